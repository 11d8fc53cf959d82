# Public data sets, in the one image format.


rule download_archive:
    output:
        output="data/archives/{source}/{archive}",
    log:
        "<logs>/download_archive/{source}/{archive}.log",
    params:
        url=of_archive("url"),
        checksum=of_archive("checksum"),
    message:
        "Downloading {wildcards.archive}"
    shell:
        "python scripts/download_archive.py --url {params.url:q} --checksum {params.checksum}"
        " --output {output.output} > {log} 2>&1"


rule prepare_dataset:
    input:
        archives=archives_of_dataset,
        own=own_file,
    output:
        train="data/datasets/{dataset}/train.parquet",
        test="data/datasets/{dataset}/test.parquet",
        record="data/datasets/{dataset}/prepare_dataset.run.json",
    log:
        "<logs>/prepare_dataset/{dataset}.log",
    params:
        code=code_of_source,
        source=of_dataset("source"),
        settings=settings_of_source,
        folder=own_folder,
    message:
        "Preparing the data set {wildcards.dataset} from {params.source}"
    shell:
        "python scripts/prepare_dataset.py --source {params.source} --settings {params.settings:q}"
        " --archives {input.archives}"
        " --train {output.train} --test {output.test} --record {output.record} > {log} 2>&1"
