# The user with one of the baseline defences, every file in tcore/defenses; what the scenario gives it first.


CELLS_OF_BASELINES = CELLS[CELLS["defense"].isin(experiment["variants"]) & ~CELLS["defense"].isin(GROWN)]


def of_kind(kind):
    """The pattern of all variants of one kind."""
    names = CELLS.loc[CELLS["defense"].isin(experiment["variants"]), "defense"].unique()
    return "|".join(name for name in names if experiment["variants"][name]["kind"] == kind) or "(?!)"


def of_variant(key):
    """An entry of the variant of a defence that the wildcard names."""

    @signed
    def entry(wildcards):
        return experiment["variants"][wildcards.defense][key]

    return entry


@signed
def share_of_trusted(wildcards):
    return experiment["variants"][wildcards.defense]["trusted"]["share"]


@signed
def code_of_defense(wildcards):
    return provenance.code("defend", f"defenses/{experiment['variants'][wildcards.defense]['defense']}")


def code_of_input_detector(wildcards):
    variant = experiment["variants"][wildcards.defense]
    attacks = methods_named(wildcards, "encoder_attack", "dataset_attack")
    return provenance.code("score_inputs", f"defenses/{variant['defense']}", *attacks)


@signed
def settings_of_defense(wildcards):
    variant = experiment["variants"][wildcards.defense]
    return canonical(
        {
            "defense": variant["settings"],
            "part": variant["part"],
            "selection": variant["selection"],
            "head": experiment["methods"]["head"],
        }
    )


@signed
def trusted_samples(wildcards):
    """The table of clean samples for a defence that needs some; they may be T-Core's own."""
    trusted = experiment["variants"][wildcards.defense]["trusted"]
    file = {
        "granted": "{defense}/given/granted.parquet",
        "seeds": "tcore/seeds.parquet",
        "subset": "tcore/subset.parquet",
    }.get(trusted and trusted["source"])
    return f"data/defended/{CELL}/{file}".format(**wildcards) if file else []


@signed
def oracle(wildcards):
    known = experiment["variants"][wildcards.defense]["oracle"]
    return f"data/defended/{CELL}/{{defense}}/given/oracle.json".format(**wildcards) if known else []


rule grant_clean:
    input:
        truth=received("truth.parquet"),
    output:
        granted="data/defended/<cell>/{defense}/given/granted.parquet",
        record="data/defended/<cell>/{defense}/given/grant_clean.run.json",
    log:
        "<logs>/grant_clean/<cell>/{defense}.log",
    params:
        code=code("grant_clean"),
        share=share_of_trusted,
    message:
        "The scenario grants clean samples: {wildcards.encoder_attack}, {wildcards.dataset_attack},"
        " defence {wildcards.defense} (random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/grant_clean.py --truth {input.truth} --share {params.share} --seed {wildcards.seed}'
        " --granted {output.granted} --record {output.record} > {log} 2>&1"


rule reveal_rate:
    input:
        truth=received("truth.parquet"),
    output:
        oracle="data/defended/<cell>/{defense}/given/oracle.json",
        record="data/defended/<cell>/{defense}/given/reveal_rate.run.json",
    log:
        "<logs>/reveal_rate/<cell>/{defense}.log",
    params:
        code=code("reveal_rate"),
    message:
        "An oracle tells the poison rate: {wildcards.encoder_attack}, {wildcards.dataset_attack},"
        " defence {wildcards.defense} (random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/reveal_rate.py --truth {input.truth}'
        " --oracle {output.oracle} --record {output.record} > {log} 2>&1"


rule defend:
    input:
        model="data/defended/<cell>/none/model.safetensors",
        features="data/defended/<cell>/features.safetensors",
        images=received("train.parquet"),
        trusted=trusted_samples,
        oracle=oracle,
    output:
        model="data/defended/<cell>/{defense}/model.safetensors",
        record="data/defended/<cell>/{defense}/defend.run.json",
    log:
        "<logs>/defend/<cell>/{defense}.log",
    wildcard_constraints:
        defense=of_kind("model"),
    resources:
        gpu=1,
    params:
        code=code_of_defense,
        defense=of_variant("defense"),
        settings=settings_of_defense,
        optional=flags("trusted", "oracle"),
        samples="",
    message:
        "The user defends with {wildcards.defense}"
        " ({wildcards.encoder_attack}, {wildcards.dataset_attack}, random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/defend.py --defense {params.defense} --model {input.model} --features {input.features}'
        " --images {input.images} {params.optional} --settings {params.settings:q} --seed {wildcards.seed}"
        " --model-out {output.model} {params.samples} --record {output.record} > {log} 2>&1"


# Detectors also say what they think of every sample.
use rule defend as detect with:
    output:
        model="data/defended/<cell>/{defense}/model.safetensors",
        samples="data/defended/<cell>/{defense}/samples.parquet",
        record="data/defended/<cell>/{defense}/defend.run.json",
    wildcard_constraints:
        defense=of_kind("detector"),
    params:
        code=code_of_defense,
        defense=of_variant("defense"),
        settings=settings_of_defense,
        optional=flags("trusted", "oracle"),
        samples=signed(lambda wildcards, output: f"--samples {output.samples}"),


# The evaluator: input detectors in use.
rule score_inputs:
    input:
        unpack(triggers),
        model="data/defended/<cell>/none/model.safetensors",
        features="data/defended/<cell>/features.safetensors",
        images=received("train.parquet"),
        trusted=trusted_samples,
        test="data/datasets/{downstream}/test.parquet",
    output:
        inputs="data/results/<cell>/{defense}/inputs.parquet",
        record="data/results/<cell>/{defense}/score_inputs.run.json",
    log:
        "<logs>/score_inputs/<cell>/{defense}.log",
    resources:
        gpu=1,
    params:
        code=code_of_input_detector,
        defense=of_variant("defense"),
        settings=settings_of_defense,
        optional=flags("trusted"),
    message:
        "The evaluator shows clean and triggered test images to {wildcards.defense}"
        " ({wildcards.encoder_attack}, {wildcards.dataset_attack}, random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/score_inputs.py --defense {params.defense} --model {input.model}'
        " --features {input.features} --images {input.images} {params.optional} --test {input.test}"
        " --encoder-trigger {input.encoder_trigger} --dataset-trigger {input.dataset_trigger}"
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --inputs {output.inputs} --record {output.record} > {log} 2>&1"
