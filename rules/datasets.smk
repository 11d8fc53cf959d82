# Public data sets, in the one image format.


def of_dataset(key):
    """An entry of the data set that the wildcard names: its source, its settings, ..."""

    @signed
    def entry(wildcards):
        return experiment["datasets"][wildcards.dataset][key]

    return entry


def archives(source):
    """The archives of a data source by file name; a source without any is not imported (it may need torch)."""
    if "\nARCHIVES" not in registry.path("data/sources", source).read_text():
        return {}
    return {archive.name: archive for archive in registry.load("data/sources", source).ARCHIVES}


def of_archive(key):
    """A field of the archive that the wildcards name: its url, its checksum."""

    @signed
    def field(wildcards):
        return getattr(archives(wildcards.source)[wildcards.archive], key)

    return field


def own_file(wildcards):
    """The file that a data set's settings name, if they name one."""
    path = of_dataset("settings")(wildcards).get("path")
    return [path] if path and Path(path).is_file() else []


def own_folder(wildcards):
    """What lies in the folder that a data set's settings name, as a digest; "" if they name none."""
    path = of_dataset("settings")(wildcards).get("path")
    return provenance.listing(path) if path and Path(path).is_dir() else ""


def archives_of_dataset(wildcards):
    source = of_dataset("source")(wildcards)
    return [f"data/archives/{source}/{name}" for name in archives(source)]


def code_of_source(wildcards):
    return provenance.code("prepare_dataset", f"data/sources/{of_dataset('source')(wildcards)}")


def settings_of_source(wildcards):
    return canonical(of_dataset("settings")(wildcards))


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
        'python "$TCORE"/scripts/download_archive.py --url {params.url:q} --checksum {params.checksum}'
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
        'python "$TCORE"/scripts/prepare_dataset.py --source {params.source} --settings {params.settings:q}'
        " --archives {input.archives}"
        " --train {output.train} --test {output.test} --record {output.record} > {log} 2>&1"
