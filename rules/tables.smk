# The paper's tables, published and reproduced side by side: `snakemake table_10` computes what that table needs.
from tcore.paper import tables

PUBLISHED = "config/paper.csv"
STAND_INS = {  # the paper's data sets and ours in their place
    entry["stands_for"]: name for name, entry in experiment["datasets"].items() if "stands_for" in entry
}
REPORTED = tables.published(ROOT / PUBLISHED, STAND_INS)


def tables_in_grid():
    """The paper's tables of which the grid has cells."""
    return [table for table in tables.TITLES if len(tables.cells(table, REPORTED, CELLS))]


def metrics_of_table(wildcards):
    """What is measured of the grid's cells that one of the paper's tables is about."""
    own = tables.cells(int(wildcards.table), REPORTED, CELLS)
    if own.empty:
        raise WorkflowError(
            f"table {wildcards.table}: no cell of the grid is in it; run with --configfile config/paper.yaml"
        )
    return expand(rules.evaluate.output.metrics, zip, **own)


rule compare_tables:
    input:
        metrics=metrics_of_table,
    output:
        markdown=report(
            "data/results/tables/table_{table}.md",
            caption="../workflow/captions/table.rst",
            category="The paper's tables",
        ),
        latex="data/results/tables/table_{table}.tex",
        csv="data/results/tables/table_{table}.csv",
        picture=report(
            "data/results/tables/table_{table}.png",
            caption="../workflow/captions/table.rst",
            category="The paper's tables",
        ),
        record="data/results/tables/table_{table}.run.json",
    log:
        "<logs>/compare_tables/{table}.log",
    params:
        code=code("compare_tables", files=(PUBLISHED,)),
        grid=GRID,
        names=json.dumps(STAND_INS, sort_keys=True),
    message:
        "Table {wildcards.table} of the paper beside what was reproduced"
    shell:
        'python "$TCORE"/scripts/compare_tables.py --table {wildcards.table}'
        ' --published "$TCORE"/config/paper.csv'
        " --grid {params.grid:q} --names {params.names:q} --data data"
        " --markdown {output.markdown} --latex {output.latex} --csv {output.csv} --picture {output.picture}"
        " --record {output.record} > {log} 2>&1"


# As it stands now, like `preview` of the report.
use rule compare_tables as compare_tables_available with:
    input:
        [],
    output:
        markdown="data/preview/table_{table}.md",
        latex="data/preview/table_{table}.tex",
        csv="data/preview/table_{table}.csv",
        picture="data/preview/table_{table}.png",
        record="data/preview/table_{table}.run.json",
    log:
        "<logs>/compare_tables_available/{table}.log",
    params:
        code=code("compare_tables", files=(PUBLISHED,)),
        grid=GRID,
        names=json.dumps(STAND_INS, sort_keys=True),
        there=there,


rule tables:
    input:
        lambda wildcards: expand("data/results/tables/table_{table}.md", table=tables_in_grid()),


for number in tables.TITLES:

    rule:
        name:
            f"table_{number}"
        input:
            f"data/results/tables/table_{number}.md",
        message:
            "Open {input}"
