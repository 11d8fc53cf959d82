# What comes from outside: an encoder in somebody's file, labelled images. Nobody knows whether anything is
# poisoned, so there is no truth to measure against: the user gets a clean model and an audit.
import os


def of_encoder(key):
    """An entry of the encoder from outside that the wildcard names."""

    @signed
    def entry(wildcards):
        return experiment["encoders"][wildcards.pretrain][key]

    return entry


def code_of_audit(wildcards):
    source = experiment["datasets"][wildcards.downstream]["source"]
    files = ("workflow/audit.html.jinja", "workflow/style.css")
    return provenance.code("audit", f"data/sources/{source}", files=files)


# Networks of the user's own that may run code, for all jobs: see tcore/models/elsewhere.py.
os.environ.update(
    TCORE_RUN_CODE=" ".join(
        entry["architecture"] for entry in experiment["encoders"].values() if entry.get("run_code")
    )
)


rule import_encoder:
    input:
        checkpoint=of_encoder("file"),
    output:
        encoder="data/encoders/{pretrain}-received/{downstream}/{seed}/encoder.safetensors",
        record="data/encoders/{pretrain}-received/{downstream}/{seed}/import_encoder.run.json",
    log:
        "<logs>/import_encoder/{pretrain}/{downstream}/{seed}.log",
    params:
        code=code("import_encoder"),
        architecture=of_encoder("architecture"),
        image_size=of_encoder("image_size"),
        mean=of_encoder("mean"),
        std=of_encoder("std"),
    message:
        "Importing the encoder {wildcards.pretrain} from {input.checkpoint}"
    shell:
        'python "$TCORE"/scripts/import_encoder.py --checkpoint {input.checkpoint:q} --architecture {params.architecture}'
        " --image-size {params.image_size} --mean {params.mean} --std {params.std}"
        " --encoder {output.encoder} --record {output.record} > {log} 2>&1"


rule check_received:
    input:
        encoder="data/encoders/{pretrain}-received/{downstream}/{seed}/encoder.safetensors",
        images="data/datasets/{downstream}/train.parquet",
    output:
        record="data/defended/{pretrain}-received/{downstream}-received/{seed}/check_received.run.json",
    log:
        "<logs>/check_received/{pretrain}/{downstream}/{seed}.log",
    # First by this and not as an input: it reads all settings, and one that changes makes no earlier stage stale.
    priority: 100
    resources:
        gpu=1,
    params:
        code=code("check_received"),
        settings=settings("sift", "expand", "filter_channels", "bootstrap"),
    message:
        "Do the encoder {wildcards.pretrain}, the images {wildcards.downstream} and the settings go together?"
    shell:
        'python "$TCORE"/scripts/check_received.py --encoder {input.encoder} --images {input.images}'
        " --settings {params.settings:q} --record {output.record} > {log} 2>&1"


rule export_model:
    input:
        model="data/defended/{pretrain}-received/{downstream}-received/{seed}/tcore/model.safetensors",
    output:
        exported="data/results/{pretrain}-received/{downstream}-received/{seed}/model.pt",
        record="data/results/{pretrain}-received/{downstream}-received/{seed}/export_model.run.json",
    log:
        "<logs>/export_model/{pretrain}/{downstream}/{seed}.log",
    params:
        code=code("export_model"),
    message:
        "Exporting the clean model for use elsewhere"
    shell:
        'python "$TCORE"/scripts/export_model.py --model {input.model} --exported {output.exported}'
        " --record {output.record} > {log} 2>&1"


rule audit:
    input:
        checked="data/defended/{pretrain}-received/{downstream}-received/{seed}/check_received.run.json",
        encoder="data/encoders/{pretrain}-received/{downstream}/{seed}/import_encoder.run.json",
        train="data/datasets/{downstream}/train.parquet",
        test="data/datasets/{downstream}/test.parquet",
        model="data/defended/{pretrain}-received/{downstream}-received/{seed}/tcore/model.safetensors",
        seeds="data/defended/{pretrain}-received/{downstream}-received/{seed}/tcore/seeds.parquet",
        subset="data/defended/{pretrain}-received/{downstream}-received/{seed}/tcore/subset.parquet",
        expanded="data/defended/{pretrain}-received/{downstream}-received/{seed}/tcore/expand.run.json",
        channels="data/defended/{pretrain}-received/{downstream}-received/{seed}/tcore/channels.safetensors",
        pool="data/defended/{pretrain}-received/{downstream}-received/{seed}/tcore/pool.parquet",
        undefended="data/results/{pretrain}-received/{downstream}-received/{seed}/none/predictions.parquet",
        defended="data/results/{pretrain}-received/{downstream}-received/{seed}/tcore/predictions.parquet",
    output:
        audit=report(
            "data/results/{pretrain}-received/{downstream}-received/{seed}/audit.html",
            caption="../workflow/captions/audit.rst",
            category="Audits",
        ),
        distrust=report(
            "data/results/{pretrain}-received/{downstream}-received/{seed}/distrust.csv",
            caption="../workflow/captions/distrust.rst",
            category="Audits",
        ),
        record="data/results/{pretrain}-received/{downstream}-received/{seed}/audit.run.json",
    log:
        "<logs>/audit/{pretrain}/{downstream}/{seed}.log",
    resources:
        gpu=1,
    params:
        code=code_of_audit,
        source=lambda wildcards: experiment["datasets"][wildcards.downstream]["source"],
        settings=lambda wildcards: canonical(experiment["datasets"][wildcards.downstream]["settings"]),
    message:
        "Writing the audit of {wildcards.pretrain} and {wildcards.downstream} (random seed {wildcards.seed})"
    shell:
        'python "$TCORE"/scripts/audit.py --checked {input.checked} --encoder {input.encoder} --train {input.train}'
        " --test {input.test} --model {input.model} --seeds {input.seeds} --subset {input.subset}"
        " --expanded {input.expanded} --channels {input.channels} --pool {input.pool}"
        " --undefended {input.undefended} --defended {input.defended}"
        " --source {params.source} --settings {params.settings:q}"
        " --audit {output.audit} --distrust {output.distrust} --record {output.record} > {log} 2>&1"


audits = [
    path
    for rule_ in (rules.audit, rules.export_model)
    for path in expand(rule_.output[0], zip, **RECEIVED.drop_duplicates(["pretrain", "downstream", "seed"]))
]
