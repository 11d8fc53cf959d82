# Stranger two: poisons a labelled data set.


rule poison_dataset:
    input:
        images="data/datasets/{downstream}/train.parquet",
    output:
        train="data/poisoned/any/{downstream}-{dataset_attack}/{seed}/train.parquet",
        truth="data/poisoned/any/{downstream}-{dataset_attack}/{seed}/truth.parquet",
        trigger="data/poisoned/any/{downstream}-{dataset_attack}/{seed}/trigger.safetensors",
        record="data/poisoned/any/{downstream}-{dataset_attack}/{seed}/poison_dataset.run.json",
    log:
        "<logs>/poison_dataset/any/{downstream}-{dataset_attack}/{seed}.log",
    params:
        code=code("poison_dataset", "dataset_attack"),
        settings=settings_of("dataset_attack"),
        target=target("dataset"),
        optional=flags("encoder_trigger"),
    message:
        "Stranger two hands over {wildcards.downstream}: attack {wildcards.dataset_attack}"
        " (seed {wildcards.seed})"
    shell:
        "python scripts/poison_dataset.py --images {input.images} {params.optional}"
        " --attack {wildcards.dataset_attack} --target {params.target}"
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --train {output.train} --truth {output.truth} --trigger {output.trigger} --record {output.record}"
        " > {log} 2>&1"


# Threat 3: both strangers are one, so the data set carries the trigger and the target of the encoder's attack.
use rule poison_dataset as poison_dataset_adaptively with:
    input:
        images="data/datasets/{downstream}/train.parquet",
        encoder_trigger="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/trigger.safetensors",
    output:
        train="data/poisoned/<cell>/train.parquet",
        truth="data/poisoned/<cell>/truth.parquet",
        trigger="data/poisoned/<cell>/trigger.safetensors",
        record="data/poisoned/<cell>/poison_dataset.run.json",
    log:
        "<logs>/poison_dataset/<cell>.log",
    params:
        code=code("poison_dataset", "dataset_attack", "encoder_attack"),
        settings=settings_of("dataset_attack"),
        target=target("encoder"),
        optional=flags("encoder_trigger"),
