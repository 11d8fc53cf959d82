# Stranger one: pre-trains an encoder, and plants a backdoor in it.


rule pretrain_encoder:
    input:
        images="data/datasets/{pretrain}/train.parquet",
    output:
        encoder="data/encoders/{pretrain}-clean/{seed}/encoder.safetensors",
        record="data/encoders/{pretrain}-clean/{seed}/pretrain_encoder.run.json",
    log:
        "<logs>/pretrain_encoder/{pretrain}/{seed}.log",
    threads: 8
    resources:
        gpu=1,
    params:
        code=code_of_pretraining,
        settings=settings(experiment["pretraining"]),
    message:
        "Stranger one pre-trains an encoder on {wildcards.pretrain} (seed {wildcards.seed})"
    shell:
        "python scripts/pretrain_encoder.py --images {input.images}"
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --encoder {output.encoder} --record {output.record} > {log} 2>&1"


rule poison_encoder:
    input:
        encoder="data/encoders/{pretrain}-clean/{seed}/encoder.safetensors",
        shadow="data/datasets/{pretrain}/train.parquet",
        downstream="data/datasets/{downstream}/train.parquet",
    output:
        encoder="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/encoder.safetensors",
        trigger="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/trigger.safetensors",
        record="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/poison_encoder.run.json",
    log:
        "<logs>/poison_encoder/{pretrain}-{encoder_attack}/{downstream}/{seed}.log",
    threads: 8
    resources:
        gpu=1,
    params:
        code=code("poison_encoder", "encoder_attack"),
        settings=settings_of("encoder_attack"),
        target=target("encoder"),
    message:
        "Stranger one hands over the {wildcards.pretrain} encoder: attack {wildcards.encoder_attack}"
        " (seed {wildcards.seed})"
    shell:
        "python scripts/poison_encoder.py --encoder {input.encoder} --shadow {input.shadow}"
        " --downstream {input.downstream} --attack {wildcards.encoder_attack} --target {params.target}"
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --encoder-out {output.encoder} --trigger {output.trigger} --record {output.record} > {log} 2>&1"
