# The user with T-Core: find a few trusted samples, let the set grow, find trusted channels, bootstrap from both.


rule sift:
    input:
        model="data/defended/<cell>/none/model.safetensors",
        features="data/defended/<cell>/features.safetensors",
        images=received("train.parquet"),
    output:
        seeds="data/defended/<cell>/tcore/seeds.parquet",
        record="data/defended/<cell>/tcore/sift.run.json",
    log:
        "<logs>/sift/<cell>.log",
    resources:
        gpu=1,
    params:
        code=code("sift"),
        settings=settings("sift"),
    message:
        "T-Core sifts trusted seed samples"
        " ({wildcards.encoder_attack}, {wildcards.dataset_attack}, seed {wildcards.seed})"
    shell:
        "python scripts/sift.py --model {input.model} --features {input.features} --images {input.images}"
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --seeds {output.seeds} --record {output.record} > {log} 2>&1"


rule expand:
    input:
        features="data/defended/<cell>/features.safetensors",
        images=received("train.parquet"),
        seeds="data/defended/<cell>/tcore/seeds.parquet",
    output:
        subset="data/defended/<cell>/tcore/subset.parquet",
        record="data/defended/<cell>/tcore/expand.run.json",
    log:
        "<logs>/expand/<cell>.log",
    resources:
        gpu=1,
    params:
        code=code("expand"),
        settings=settings("expand", "head"),
    message:
        "T-Core lets the trusted seeds grow to a clean subset"
        " ({wildcards.encoder_attack}, {wildcards.dataset_attack}, seed {wildcards.seed})"
    shell:
        "python scripts/expand.py --features {input.features} --images {input.images} --seeds {input.seeds}"
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --subset {output.subset} --record {output.record} > {log} 2>&1"


rule filter_channels:
    input:
        model="data/defended/<cell>/none/model.safetensors",
        images=received("train.parquet"),
        subset="data/defended/<cell>/tcore/subset.parquet",
    output:
        channels="data/defended/<cell>/tcore/channels.safetensors",
        record="data/defended/<cell>/tcore/filter_channels.run.json",
    log:
        "<logs>/filter_channels/<cell>.log",
    resources:
        gpu=1,
    params:
        code=code("filter_channels"),
        settings=settings("filter_channels"),
    message:
        "T-Core looks for the encoder's untrusted channels"
        " ({wildcards.encoder_attack}, {wildcards.dataset_attack}, seed {wildcards.seed})"
    shell:
        "python scripts/filter_channels.py --model {input.model} --images {input.images} --subset {input.subset}"
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --channels {output.channels} --record {output.record} > {log} 2>&1"


rule bootstrap:
    input:
        model="data/defended/<cell>/none/model.safetensors",
        images=received("train.parquet"),
        subset="data/defended/<cell>/tcore/subset.parquet",
        channels="data/defended/<cell>/tcore/channels.safetensors",
    output:
        model="data/defended/<cell>/tcore/model.safetensors",
        pool="data/defended/<cell>/tcore/pool.parquet",
        record="data/defended/<cell>/tcore/bootstrap.run.json",
    log:
        "<logs>/bootstrap/<cell>.log",
    resources:
        gpu=1,
    params:
        code=code("bootstrap"),
        settings=settings("bootstrap", "head"),
    message:
        "T-Core bootstraps a clean model from the subset and the trusted channels"
        " ({wildcards.encoder_attack}, {wildcards.dataset_attack}, seed {wildcards.seed})"
    shell:
        "python scripts/bootstrap.py --model {input.model} --images {input.images} --subset {input.subset}"
        " --channels {input.channels} --settings {params.settings:q} --seed {wildcards.seed}"
        " --model-out {output.model} --pool {output.pool} --record {output.record} > {log} 2>&1"


# Another bootstrapping from the same subset and channels: a variant with defense: tcore.
use rule bootstrap as bootstrap_variant with:
    output:
        model="data/defended/<cell>/{defense}/model.safetensors",
        pool="data/defended/<cell>/{defense}/pool.parquet",
        record="data/defended/<cell>/{defense}/bootstrap.run.json",
    log:
        "<logs>/bootstrap/<cell>/{defense}.log",
    wildcard_constraints:
        defense=of_kind("tcore"),
    params:
        code=code("bootstrap"),
        settings=settings_of_growth,
