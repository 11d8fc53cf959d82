# The user with T-Core: find a few trusted samples, let the set grow, find trusted channels, bootstrap from both.
# A variant of T-Core runs the stages from the first that differs on in a folder of its own.


GROWN = ["tcore", *(name for name, variant in experiment["variants"].items() if variant["kind"] == "tcore")]
CELLS_OF_TCORE = CELLS[CELLS["defense"].isin(GROWN)]


def whose(defense, stage):
    """In whose folder a variant of T-Core finds what a stage left behind: its own or T-Core's."""
    return defense if defense == "tcore" or stage in experiment["variants"][defense]["own"] else "tcore"


def with_own(stage):
    """The pattern of T-Core and those variants that run a stage anew."""
    return "|".join(name for name in GROWN if whose(name, stage) == name)


def made_by(stage, file):
    """A file that a stage left behind for T-Core or a variant of it."""

    @signed
    def path(wildcards):
        return f"data/defended/{CELL}/{whose(wildcards.defense, stage)}/{file}".format(**wildcards)

    return path


def settings_of_stage(stage, *methods):
    """The settings of a stage of T-Core or of a variant of it, and of other methods."""

    @signed
    def found(wildcards):
        own = experiment["variants"].get(wildcards.defense, {}).get("settings", experiment["methods"])
        return canonical({stage: own[stage]} | {method: experiment["methods"][method] for method in methods})

    return found


def makers(stage):
    """T-Core's cells, each with the variant that ran a stage for it."""
    return CELLS_OF_TCORE.assign(defense=CELLS_OF_TCORE["defense"].map(lambda name: whose(name, stage)))


rule sift:
    input:
        model="data/defended/<cell>/none/model.safetensors",
        features="data/defended/<cell>/features.safetensors",
        images=received("train.parquet"),
    output:
        seeds="data/defended/<cell>/{defense}/seeds.parquet",
        record="data/defended/<cell>/{defense}/sift.run.json",
    log:
        "<logs>/sift/<cell>/{defense}.log",
    wildcard_constraints:
        defense=with_own("sift"),
    resources:
        gpu=1,
    params:
        code=code("sift"),
        settings=settings_of_stage("sift"),
    message:
        "T-Core sifts trusted seed samples"
        " ({wildcards.encoder_attack}, {wildcards.dataset_attack}, random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/sift.py --model {input.model} --features {input.features} --images {input.images}'
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --seeds {output.seeds} --record {output.record} > {log} 2>&1"


rule expand:
    input:
        features="data/defended/<cell>/features.safetensors",
        images=received("train.parquet"),
        seeds=made_by("sift", "seeds.parquet"),
    output:
        subset="data/defended/<cell>/{defense}/subset.parquet",
        record="data/defended/<cell>/{defense}/expand.run.json",
    log:
        "<logs>/expand/<cell>/{defense}.log",
    wildcard_constraints:
        defense=with_own("expand"),
    resources:
        gpu=1,
    params:
        code=code("expand"),
        settings=settings_of_stage("expand", "head"),
    message:
        "T-Core lets the seed samples grow to a clean subset"
        " ({wildcards.encoder_attack}, {wildcards.dataset_attack}, random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/expand.py --features {input.features} --images {input.images} --seeds {input.seeds}'
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --subset {output.subset} --record {output.record} > {log} 2>&1"


rule filter_channels:
    input:
        model="data/defended/<cell>/none/model.safetensors",
        images=received("train.parquet"),
        subset=made_by("expand", "subset.parquet"),
    output:
        channels="data/defended/<cell>/{defense}/channels.safetensors",
        record="data/defended/<cell>/{defense}/filter_channels.run.json",
    log:
        "<logs>/filter_channels/<cell>/{defense}.log",
    wildcard_constraints:
        defense=with_own("filter_channels"),
    resources:
        gpu=1,
    params:
        code=code("filter_channels"),
        settings=settings_of_stage("filter_channels"),
    message:
        "T-Core looks for the encoder's untrusted channels"
        " ({wildcards.encoder_attack}, {wildcards.dataset_attack}, random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/filter_channels.py --model {input.model} --images {input.images} --subset {input.subset}'
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --channels {output.channels} --record {output.record} > {log} 2>&1"


rule bootstrap:
    input:
        model="data/defended/<cell>/none/model.safetensors",
        images=received("train.parquet"),
        seeds=made_by("sift", "seeds.parquet"),
        subset=made_by("expand", "subset.parquet"),
        channels=made_by("filter_channels", "channels.safetensors"),
    output:
        model="data/defended/<cell>/{defense}/model.safetensors",
        pool="data/defended/<cell>/{defense}/pool.parquet",
        record="data/defended/<cell>/{defense}/bootstrap.run.json",
    log:
        "<logs>/bootstrap/<cell>/{defense}.log",
    wildcard_constraints:
        defense=with_own("bootstrap"),
    resources:
        gpu=1,
    params:
        code=code("bootstrap"),
        settings=settings_of_stage("bootstrap", "head"),
    message:
        "T-Core bootstraps a clean model from the subset and the trusted channels"
        " ({wildcards.encoder_attack}, {wildcards.dataset_attack}, random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/bootstrap.py --model {input.model} --images {input.images} --seeds {input.seeds}'
        " --subset {input.subset} --channels {input.channels} --settings {params.settings:q} --seed {wildcards.seed}"
        " --model-out {output.model} --pool {output.pool} --record {output.record} > {log} 2>&1"
