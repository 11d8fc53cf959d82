# Stranger one: pre-trains an encoder, and plants a backdoor in it, afterwards or in the unlabelled images.


SHARED = experiment["encoder_seed"]  # the random seed of the one clean encoder for all, or None


def pretraining(wildcards):
    """The pre-trainer of a data set: its own or the experiment's."""
    return experiment["datasets"][wildcards.pretrain].get("pretraining", experiment["pretraining"])


def code_of_pretraining(wildcards):
    return provenance.code("pretrain_encoder", f"pretraining/{pretraining(wildcards)}")


def settings_of_pretraining(wildcards):
    return settings(pretraining(wildcards))


def attacks_on(weights):
    """Pattern of the encoder attacks that change weights, or of those that change the images of pre-training."""
    names = registry.names("encoder_attacks")
    return "|".join(name for name in names if registry.on_weights(name) == weights)


rule pretrain_encoder:
    input:
        images="data/datasets/{pretrain}/train.parquet",
    output:
        encoder="data/encoders/{pretrain}-clean/{seed}/encoder.safetensors",
        record="data/encoders/{pretrain}-clean/{seed}/pretrain_encoder.run.json",
    log:
        "<logs>/pretrain_encoder/{pretrain}/{seed}.log",
    wildcard_constraints:
        seed="[0-9]+" if SHARED is None else str(SHARED),
    threads: 8
    resources:
        gpu=1,
    params:
        code=code_of_pretraining,
        settings=settings_of_pretraining,
    message:
        "Stranger one pre-trains an encoder on {wildcards.pretrain} (random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/pretrain_encoder.py --images {input.images}'
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --encoder {output.encoder} --record {output.record} > {log} 2>&1"


# With `encoder_seed` all random seeds start from one clean encoder, as the paper's tables do.
rule share_encoder:
    input:
        encoder=f"data/encoders/{{pretrain}}-clean/{SHARED}/encoder.safetensors",
        record=f"data/encoders/{{pretrain}}-clean/{SHARED}/pretrain_encoder.run.json",
    output:
        encoder="data/encoders/{pretrain}-clean/{seed}/encoder.safetensors",
        record="data/encoders/{pretrain}-clean/{seed}/pretrain_encoder.run.json",
    log:
        "<logs>/share_encoder/{pretrain}/{seed}.log",
    wildcard_constraints:
        seed="(?!)" if SHARED is None else f"(?!{SHARED}(?![0-9]))[0-9]+",
    message:
        "Stranger one hands over the {wildcards.pretrain} encoder of another random seed (random seed {wildcards.seed})"
    shell:
        "cp {input.encoder} {output.encoder} > {log} 2>&1 && cp {input.record} {output.record} >> {log} 2>&1"


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
    wildcard_constraints:
        encoder_attack=attacks_on(weights=True),
    threads: 8
    resources:
        gpu=1,
    params:
        code=code("poison_encoder", "encoder_attack"),
        settings=settings_of("encoder_attack"),
        target=target("encoder"),
    message:
        "Stranger one hands over the {wildcards.pretrain} encoder: attack {wildcards.encoder_attack}"
        " (random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/poison_encoder.py --encoder {input.encoder} --shadow {input.shadow}'
        " --downstream {input.downstream} --attack {wildcards.encoder_attack} --target {params.target}"
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --encoder-out {output.encoder} --trigger {output.trigger} --record {output.record} > {log} 2>&1"


rule poison_images:
    input:
        images="data/datasets/{pretrain}/train.parquet",
        downstream="data/datasets/{downstream}/train.parquet",
    output:
        # As large as the pre-training set and made again in seconds.
        images=temp("data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/images.parquet"),
        truth="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/truth.parquet",
        trigger="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/trigger.safetensors",
        record="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/poison_images.run.json",
    log:
        "<logs>/poison_images/{pretrain}-{encoder_attack}/{downstream}/{seed}.log",
    wildcard_constraints:
        encoder_attack=attacks_on(weights=False),
    params:
        code=code("poison_images", "encoder_attack"),
        settings=settings_of("encoder_attack"),
        target=target("encoder"),
    message:
        "Stranger one poisons the unlabelled images of {wildcards.pretrain}: attack {wildcards.encoder_attack}"
        " (random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/poison_images.py --images {input.images} --downstream {input.downstream}'
        " --attack {wildcards.encoder_attack} --target {params.target}"
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --poisoned {output.images} --truth {output.truth} --trigger {output.trigger}"
        " --record {output.record} > {log} 2>&1"


use rule pretrain_encoder as pretrain_on_poisons with:
    input:
        images="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/images.parquet",
    output:
        encoder="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/encoder.safetensors",
        record="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/pretrain_encoder.run.json",
    log:
        "<logs>/pretrain_encoder/{pretrain}-{encoder_attack}/{downstream}/{seed}.log",
    wildcard_constraints:
        encoder_attack=attacks_on(weights=False),
        seed="[0-9]+",
    message:
        "Stranger one pre-trains an encoder on the poisoned images of {wildcards.pretrain}:"
        " attack {wildcards.encoder_attack} (random seed {wildcards.seed})"
