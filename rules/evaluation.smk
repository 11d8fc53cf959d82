# The evaluator: knows the triggers and the truth, and has a test set.


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
        " {wildcards.dataset_attack}, defence {wildcards.defense} (seed {wildcards.seed})"
    shell:
        "python scripts/predict.py --model {input.model} --test {input.test} {params.optional}"
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
        " defence {wildcards.defense} (seed {wildcards.seed})"
    shell:
        "python scripts/evaluate.py --predictions {input.predictions} --truth {input.truth}"
        " --encoder-trigger {input.encoder_trigger} --dataset-trigger {input.dataset_trigger} {params.optional}"
        " --identity {params.identity:q} --metrics {output.metrics} --record {output.record} > {log} 2>&1"


rule collect:
    input:
        metrics=expand(rules.evaluate.output.metrics, zip, **CELLS),
        records=records,
    output:
        results="data/results/results.parquet",
        summary="data/results/summary.json",
        table="data/results/table.csv",
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
        "python scripts/collect.py --grid {params.grid:q} --data data {params.optional}"
        " --results {output.results} --summary {output.summary} --table {output.table}"
        " --record {output.record} > {log} 2>&1"


rule make_report:
    input:
        results="data/results/results.parquet",
        template="workflow/report.html.jinja",
        style="workflow/style.css",
        shown=shown,
    output:
        output="data/results/report.html",
        record="data/results/make_report.run.json",
    log:
        "<logs>/make_report.log",
    params:
        code=code_of_report,
        grid=GRID,
    message:
        "Writing the report"
    shell:
        "python scripts/make_report.py --results {input.results} --data data"
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
        template="workflow/report.html.jinja",
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
