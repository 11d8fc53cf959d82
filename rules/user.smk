# The user without a defence: features of the frozen encoder, and a head trained on them.


rule extract_features:
    input:
        encoder="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/encoder.safetensors",
        images=received("train.parquet"),
    output:
        features="data/defended/<cell>/features.safetensors",
        record="data/defended/<cell>/extract_features.run.json",
    log:
        "<logs>/extract_features/<cell>.log",
    resources:
        gpu=1,
    params:
        code=code("extract_features"),
    message:
        "The user computes features of {wildcards.downstream}-{wildcards.dataset_attack} with the"
        " {wildcards.pretrain}-{wildcards.encoder_attack} encoder (random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/extract_features.py --encoder {input.encoder} --images {input.images}'
        " --seed {wildcards.seed} --features {output.features} --record {output.record} > {log} 2>&1"


rule train_head:
    input:
        encoder="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/encoder.safetensors",
        features="data/defended/<cell>/features.safetensors",
        images=received("train.parquet"),
    output:
        model="data/defended/<cell>/none/model.safetensors",
        record="data/defended/<cell>/none/train_head.run.json",
    log:
        "<logs>/train_head/<cell>.log",
    resources:
        gpu=1,
    params:
        code=code("train_head"),
        settings=settings("head"),
    message:
        "The user trains a head on everything received, without a defence"
        " ({wildcards.encoder_attack}, {wildcards.dataset_attack}, random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/train_head.py --encoder {input.encoder} --features {input.features} --images {input.images}'
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --model {output.model} --record {output.record} > {log} 2>&1"
