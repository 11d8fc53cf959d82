# The paper's figures, measured on the grid's victims by the evaluator: `snakemake figure_6` computes what it needs.
from tcore.paper.figures import _declared as paper_figure


def figures_in_grid():
    """The paper's figures of which the grid has victims."""
    return [figure for figure in paper_figure.names() if len(paper_figure.victims(figure, CELLS))]


def measured_of_figure(wildcards):
    """What is measured of the grid's victims that one of the paper's figures is about."""
    figure = wildcards.paper_figure
    victims = paper_figure.victims(figure, CELLS)
    if victims.empty:
        raise WorkflowError(f"{figure}: no cell of the grid is in it; it needs {paper_figure.wanted(figure)}")
    return expand(rules.measure_figure.output.measured, zip, **victims.assign(paper_figure=figure))


def settings_of_figure(wildcards):
    return settings(*paper_figure.methods(wildcards.paper_figure))


def trusted_for_figure(wildcards):
    """The table of trusted samples that a figure takes; most take none."""
    file = paper_figure.declared(wildcards.paper_figure).get("TRUSTED")
    return f"data/defended/{CELL}/{file}".format(**wildcards) if file else []


rule measure_figure:
    input:
        model="data/defended/<cell>/none/model.safetensors",
        features="data/defended/<cell>/features.safetensors",
        images=received("train.parquet"),
        trusted=trusted_for_figure,
        truth=received("truth.parquet"),
        test="data/datasets/{downstream}/test.parquet",
        encoder_trigger="data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/trigger.safetensors",
        dataset_trigger=received("trigger.safetensors"),
    output:
        measured="data/results/<cell>/{paper_figure}/measured.parquet",
        record="data/results/<cell>/{paper_figure}/measure_figure.run.json",
    log:
        "<logs>/measure_figure/<cell>/{paper_figure}.log",
    resources:
        gpu=1,
    params:
        code=code("measure_figure", "paper_figure", "encoder_attack", "dataset_attack"),
        settings=settings_of_figure,
        identity=identity,
        optional=flags("trusted"),
    message:
        "The paper's {wildcards.paper_figure}: {wildcards.encoder_attack}, {wildcards.dataset_attack}"
        " (random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/measure_figure.py --figure {wildcards.paper_figure} --model {input.model}'
        " --features {input.features} --images {input.images} {params.optional} --truth {input.truth}"
        " --test {input.test} --encoder-trigger {input.encoder_trigger} --dataset-trigger {input.dataset_trigger}"
        " --settings {params.settings:q} --identity {params.identity:q}"
        " --measured {output.measured} --record {output.record} > {log} 2>&1"


rule draw_figure:
    input:
        measured=measured_of_figure,
    output:
        picture=report(
            "data/results/figures/{paper_figure}.png",
            caption="../workflow/captions/figure.rst",
            category="The paper's figures",
        ),
        csv="data/results/figures/{paper_figure}.csv",
        record="data/results/figures/{paper_figure}.run.json",
    log:
        "<logs>/draw_figure/{paper_figure}.log",
    params:
        code=code("draw_figure", "paper_figure"),
    message:
        "Drawing the paper's {wildcards.paper_figure}"
    shell:
        'python "$TCORE"/scripts/draw_figure.py --figure {wildcards.paper_figure} --measured {input.measured}'
        " --picture {output.picture} --csv {output.csv} --record {output.record} > {log} 2>&1"


rule figures:
    input:
        lambda wildcards: expand("data/results/figures/{paper_figure}.png", paper_figure=figures_in_grid()),


for figure in paper_figure.names():

    rule:
        name:
            figure
        input:
            f"data/results/figures/{figure}.png",
        message:
            "Open {input}"
