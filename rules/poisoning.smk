# Stranger two: poisons a labelled data set.


@signed
def dataset_attack(wildcards):
    """The attack on a data set that runs, also where its variant is named."""
    return registry.base("dataset_attacks", wildcards.dataset_attack)


def told(what):
    """Pattern of the attacks on data sets that are told `what` of the encoder."""
    return "|".join(name for name in CELLS["dataset_attack"].unique() if grid.told(name) == what) or "(?!)"


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
        attack=dataset_attack,
        settings=settings_of("dataset_attack"),
        target=target("dataset"),
        optional="",
    message:
        "Stranger two hands over {wildcards.downstream}: attack {wildcards.dataset_attack}"
        " (random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/poison_dataset.py --images {input.images} {params.optional}'
        " --attack {params.attack} --target {params.target}"
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --train {output.train} --truth {output.truth} --trigger {output.trigger} --record {output.record}"
        " > {log} 2>&1"


# Threat 3: both strangers are one, so the data set carries the trigger and the target of the encoder's attack.
# Paths are written out here and below, as constraints do not reach into <cell>.
use rule poison_dataset as poison_dataset_adaptively with:
    input:
        images="data/datasets/{downstream}/train.parquet",
        encoder_trigger="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/trigger.safetensors",
    output:
        train=f"data/poisoned/{CELL}/train.parquet",
        truth=f"data/poisoned/{CELL}/truth.parquet",
        trigger=f"data/poisoned/{CELL}/trigger.safetensors",
        record=f"data/poisoned/{CELL}/poison_dataset.run.json",
    log:
        "<logs>/poison_dataset/<cell>.log",
    wildcard_constraints:
        dataset_attack=told("encoder_trigger"),
    params:
        code=code("poison_dataset", "dataset_attack", "encoder_attack"),
        attack=dataset_attack,
        settings=settings_of("dataset_attack"),
        target=target("encoder"),
        optional=flags("encoder_trigger"),


# An attacker who knows the encoder and how its user sifts.
use rule poison_dataset as poison_dataset_knowingly with:
    input:
        images="data/datasets/{downstream}/train.parquet",
        encoder="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/encoder.safetensors",
    output:
        train=f"data/poisoned/{CELL}/train.parquet",
        truth=f"data/poisoned/{CELL}/truth.parquet",
        trigger=f"data/poisoned/{CELL}/trigger.safetensors",
        record=f"data/poisoned/{CELL}/poison_dataset.run.json",
    log:
        "<logs>/poison_dataset/<cell>.log",
    wildcard_constraints:
        dataset_attack=told("encoder"),
    resources:
        gpu=1,
    params:
        code=code("poison_dataset", "dataset_attack"),
        attack=dataset_attack,
        settings=settings_of("dataset_attack"),
        target=target("dataset"),
        optional=lambda wildcards, input: f"--encoder {input.encoder} --user {quote(settings('head', 'sift'))}",
