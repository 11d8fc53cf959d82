# The evaluator: knows the triggers and the truth, and has a test set.


@signed
def left_behind(wildcards):
    """What a cell's defence left behind beside its model."""
    victim, name = f"data/defended/{CELL}".format(**wildcards), wildcards.defense
    if name in GROWN:
        return {
            "seeds": f"{victim}/{whose(name, 'sift')}/seeds.parquet",
            "subset": f"{victim}/{whose(name, 'expand')}/subset.parquet",
            "channels": f"{victim}/{whose(name, 'filter_channels')}/channels.safetensors",
            "pool": f"{victim}/{name}/pool.parquet",
        }
    if name not in experiment["variants"]:
        return {}
    variant, found = experiment["variants"][name], {"defended": f"{victim}/{name}/defend.run.json"}
    if variant["kind"] == "detector":
        found["samples"] = f"{victim}/{name}/samples.parquet"
    if variant["inputs"]:
        found["inputs"] = f"data/results/{CELL}/{name}/inputs.parquet".format(**wildcards)
    return found


@signed
def code_of_prediction(wildcards):
    if wildcards.encoder_attack == grid.RECEIVED:
        return code("predict")
    return code("predict", "encoder_attack", "dataset_attack")(wildcards)


@signed
def identity(wildcards):
    """What a cell's rows in the results say about it."""
    scenario = grid.scenario(wildcards.encoder_attack, wildcards.dataset_attack)
    return canonical(dict(wildcards.items()) | {"seed": int(wildcards.seed), "scenario": scenario})


def records(wildcards):
    """The records of all steps behind all cells."""
    everywhere = (
        rules.extract_features,
        rules.train_head,
        rules.predict,
        rules.evaluate,
    )
    found = {path for step in everywhere for path in expand(step.output.record, zip, **CELLS)}
    on_weights = CELLS["encoder_attack"].map(registry.on_weights)
    for step, chosen in (
        (rules.pretrain_encoder, on_weights),
        (rules.poison_encoder, on_weights),
        (rules.poison_images, ~on_weights),
        (rules.pretrain_on_poisons, ~on_weights),
    ):
        found.update(expand(step.output.record, zip, **CELLS[chosen]))
    for stage in grid.STAGES:
        found.update(expand(getattr(rules, stage).output.record, zip, **makers(stage)))
    found.update(expand(rules.defend.output.record, zip, **CELLS_OF_BASELINES))
    inputs = CELLS_OF_BASELINES[[experiment["variants"][d]["inputs"] for d in CELLS_OF_BASELINES["defense"]]]
    found.update(expand(rules.score_inputs.output.record, zip, **inputs))
    found.update(map(received("poison_dataset.run.json"), CELLS.to_dict("records")))
    found.update(
        expand(rules.prepare_dataset.output.record, dataset={*CELLS["pretrain"], *CELLS["downstream"]})
    )
    return sorted(found)


def there(wildcards):
    """Changes with the cells that have results by now."""
    paths = map(Path, expand(rules.evaluate.output.metrics, zip, **CELLS))
    found = [(str(path), path.stat().st_mtime_ns) for path in paths if path.is_file()]
    return hashlib.sha256(canonical(found).encode()).hexdigest()[:16]


def shown(wildcards):
    """What the report shows beside the results: triggers on test images, and T-Core's choices."""
    found = {*expand(rules.poison_encoder.output.trigger, zip, **CELLS)}
    for split in (rules.prepare_dataset.output.train, rules.prepare_dataset.output.test):
        found.update(expand(split, dataset=set(CELLS["downstream"])))
    for file in ("train.parquet", "truth.parquet", "trigger.safetensors"):
        found.update(map(received(file), CELLS.to_dict("records")))
    for stage, choice in (
        ("sift", rules.sift.output.seeds),
        ("expand", rules.expand.output.subset),
        ("filter_channels", rules.filter_channels.output.channels),
        ("bootstrap", rules.bootstrap.output.pool),
    ):
        found.update(expand(choice, zip, **makers(stage)))
    return sorted(found)


def code_of_report(wildcards):
    victims = CELLS[["encoder_attack", "dataset_attack"]].drop_duplicates().to_dict("records")
    stamps = {method for victim in victims for method in methods_named(victim, *victim)}
    return provenance.code("make_report", *stamps, files=("workflow/report.html.jinja", "workflow/style.css"))


rule predict:
    input:
        unpack(triggers),
        model="data/defended/<cell>/{defense}/model.safetensors",
        test="data/datasets/{downstream}/test.parquet",
    output:
        predictions="data/results/<cell>/{defense}/predictions.parquet",
        record="data/results/<cell>/{defense}/predict.run.json",
    log:
        "<logs>/predict/<cell>/{defense}.log",
    resources:
        gpu=1,
    params:
        code=code_of_prediction,
        optional=flags("encoder_trigger", "dataset_trigger"),
    message:
        "Test images, clean and with such triggers as are known: {wildcards.encoder_attack},"
        " {wildcards.dataset_attack}, defence {wildcards.defense} (random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/predict.py --model {input.model} --test {input.test} {params.optional}'
        " --seed {wildcards.seed} --predictions {output.predictions} --record {output.record} > {log} 2>&1"


rule evaluate:
    input:
        unpack(triggers),
        unpack(left_behind),
        predictions="data/results/<cell>/{defense}/predictions.parquet",
        truth=received("truth.parquet"),
    output:
        metrics="data/results/<cell>/{defense}/metrics.parquet",
        record="data/results/<cell>/{defense}/evaluate.run.json",
    log:
        "<logs>/evaluate/<cell>/{defense}.log",
    params:
        code=code("evaluate"),
        identity=identity,
        optional=flags("seeds", "subset", "pool", "channels", "samples", "defended", "inputs"),
    message:
        "The evaluator measures: {wildcards.encoder_attack}, {wildcards.dataset_attack},"
        " defence {wildcards.defense} (random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/evaluate.py --predictions {input.predictions} --truth {input.truth}'
        " --encoder-trigger {input.encoder_trigger} --dataset-trigger {input.dataset_trigger} {params.optional}"
        " --identity {params.identity:q} --metrics {output.metrics} --record {output.record} > {log} 2>&1"


rule collect:
    input:
        metrics=expand(rules.evaluate.output.metrics, zip, **CELLS),
        records=records,
    output:
        results="data/results/results.parquet",
        summary="data/results/summary.json",
        table=report("data/results/table.csv", caption="../workflow/captions/results.rst", category="Results"),
        record="data/results/collect.run.json",
    log:
        "<logs>/collect.log",
    params:
        code=code("collect"),
        grid=GRID,
        optional="",
    message:
        "Collecting all results"
    shell:
        'python "$TCORE"/scripts/collect.py --grid {params.grid:q} --data data {params.optional}'
        " --results {output.results} --summary {output.summary} --table {output.table}"
        " --record {output.record} > {log} 2>&1"


rule make_report:
    input:
        results="data/results/results.parquet",
        shown=shown,
    output:
        output=report(
            "data/results/report.html", caption="../workflow/captions/report.rst", category="Results"
        ),
        record="data/results/make_report.run.json",
    log:
        "<logs>/make_report.log",
    params:
        code=code_of_report,
        grid=GRID,
    message:
        "Writing the report"
    shell:
        'python "$TCORE"/scripts/make_report.py --results {input.results} --data data'
        " --grid {params.grid:q} --output {output.output} --record {output.record} > {log} 2>&1"


# What is there so far. No cell is an input, so this works while another run computes them: `snakemake --nolock
# preview`; without --nolock, Snakemake would remove the other run's locks when it is done.
use rule collect as collect_available with:
    input:
        [],
    output:
        results="data/preview/results.parquet",
        summary="data/preview/summary.json",
        table="data/preview/table.csv",
        record="data/preview/collect.run.json",
    log:
        "<logs>/collect_available.log",
    params:
        code=code("collect"),
        grid=GRID,
        optional="--available",
        there=there,
    message:
        "Collecting what is there so far"


use rule make_report as preview_report with:
    input:
        results="data/preview/results.parquet",
    output:
        output="data/preview/report.html",
        record="data/preview/make_report.run.json",
    log:
        "<logs>/preview_report.log",
    message:
        "Writing a report of what is there so far"


rule preview:
    input:
        "data/preview/report.html",
        lambda wildcards: expand("data/preview/table_{table}.md", table=tables_in_grid()),
    message:
        "Open {input[0]}"
