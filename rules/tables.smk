# The paper's tables, published and reproduced side by side: `snakemake table_10` computes what that table needs.

PUBLISHED = "config/paper.csv"
REPORTED = tables.published(PUBLISHED, STAND_INS)


rule compare_tables:
    input:
        published=PUBLISHED,
        metrics=metrics_of_table,
    output:
        markdown="data/results/tables/table_{table}.md",
        latex="data/results/tables/table_{table}.tex",
        csv="data/results/tables/table_{table}.csv",
        picture="data/results/tables/table_{table}.png",
        record="data/results/tables/table_{table}.run.json",
    log:
        "<logs>/compare_tables/{table}.log",
    params:
        code=code("compare_tables"),
        grid=GRID,
        names=json.dumps(STAND_INS, sort_keys=True),
    message:
        "Table {wildcards.table} of the paper beside what was reproduced"
    shell:
        "python scripts/compare_tables.py --table {wildcards.table} --published {input.published}"
        " --grid {params.grid:q} --names {params.names:q} --data data"
        " --markdown {output.markdown} --latex {output.latex} --csv {output.csv} --picture {output.picture} --record {output.record} > {log} 2>&1"


# As it stands now, like `preview` of the report.
use rule compare_tables as compare_tables_available with:
    input:
        published=PUBLISHED,
    output:
        markdown="data/preview/table_{table}.md",
        latex="data/preview/table_{table}.tex",
        csv="data/preview/table_{table}.csv",
        picture="data/preview/table_{table}.png",
        record="data/preview/table_{table}.run.json",
    log:
        "<logs>/compare_tables_available/{table}.log",
    params:
        code=code("compare_tables"),
        grid=GRID,
        names=json.dumps(STAND_INS, sort_keys=True),
        there=there,


rule tables:
    input:
        expand("data/results/tables/table_{table}.md", table=tables_in_grid()),


for number in tables.TITLES:

    rule:
        name:
            f"table_{number}"
        input:
            f"data/results/tables/table_{number}.md",
        message:
            "Open {input}"
