# The experiment's grid, and how rules find out what they need: their digest of code, settings and files.
import hashlib
import inspect
import json

from snakemake.common import overwrite_function_params
from snakemake.exceptions import WorkflowError

from tcore import grid, paper_figure, provenance, registry, tables
from tcore.config import require_files, validate
from tcore.files import InputError

try:
    experiment = validate(config)
    require_files(experiment)
except InputError as error:
    raise WorkflowError(str(error)) from None

attacked = [pair for pair in experiment["pairs"] if pair["pretrain"] not in experiment["encoders"]]
GRID = json.dumps({axis: experiment[axis] for axis in grid.AXES} | {"pairs": attacked}, sort_keys=True)
STAND_INS = {  # the paper's data sets and ours in their place, for its tables
    entry["stands_for"]: name for name, entry in experiment["datasets"].items() if "stands_for" in entry
}
SHARED = experiment["encoder_seed"]  # the seed of the one clean encoder for all seeds, or None
VICTIMS = grid.cells(experiment)
CELLS = VICTIMS[VICTIMS["scenario"] != grid.RECEIVED]  # what an evaluator knows the truth about
RECEIVED = VICTIMS[VICTIMS["scenario"] == grid.RECEIVED]  # what nobody does
GROWN = ["tcore", *(name for name, variant in experiment["variants"].items() if variant["kind"] == "tcore")]
CELLS_OF_TCORE = CELLS[CELLS["defense"].isin(GROWN)]
CELLS_OF_BASELINES = CELLS[CELLS["defense"].isin(experiment["variants"]) & ~CELLS["defense"].isin(GROWN)]


wildcard_constraints:
    dataset="|".join(experiment["datasets"]),
    pretrain="|".join(VICTIMS["pretrain"].unique()),
    downstream="|".join(VICTIMS["downstream"].unique()),
    encoder_attack="|".join({"clean", *VICTIMS["encoder_attack"]}),
    dataset_attack="|".join({"clean", *VICTIMS["dataset_attack"]}),
    defense="|".join({"ct", *VICTIMS["defense"]}),  # figure 2 grants CT clean samples in any grid
    seed="[0-9]+",
    table="[0-9]+",
    paper_figure="figure_[0-9]+",


def signed(function):
    """`function` with its parameters at hand: Snakemake asks for them at every call, which takes longer than most."""
    overwrite_function_params(function, inspect.signature(function).parameters)
    return function


def methods_named(wildcards, *attacks):
    """The files, such as "dataset_attacks/sig", of the methods that the wildcards `attacks` name."""
    return [f"{attack}s/{registry.base(f'{attack}s', wildcards[attack])}" for attack in attacks]


def code(script, *attacks):
    """The digest of a rule's script and of the methods that its wildcards `attacks` name."""
    if not attacks:
        return provenance.code(script)

    @signed
    def digest(wildcards):
        return provenance.code(script, *methods_named(wildcards, *attacks))

    return digest


def canonical(value):
    """JSON with one text for equal values, because Snakemake compares texts."""
    return json.dumps(value, sort_keys=True)


def settings(*methods):
    """The settings of several methods, by name."""
    return canonical({method: experiment["methods"][method] for method in methods})


def settings_of(attack):
    """The settings of the one method that the wildcard `attack` names: its own, with what differs for the
    downstream set at hand, and with what differs in a variant."""

    @signed
    def found(wildcards):
        name = registry.base(f"{attack}s", wildcards[attack])
        own = experiment["datasets"][wildcards.downstream]["attacks"].get(name, {})
        varied = experiment["attack_variants"].get(wildcards[attack], {})
        return canonical(experiment["methods"].get(name, {}) | own | varied)

    return found


@signed
def dataset_attack(wildcards):
    """The attack on a data set that runs, also where its variant is named."""
    return registry.base("dataset_attacks", wildcards.dataset_attack)


def told(what):
    """Pattern of the attacks on data sets that are told `what` of the encoder."""
    return "|".join(name for name in CELLS["dataset_attack"].unique() if grid.told(name) == what) or "(?!)"


def target(attacker):
    """The class of the downstream set that an attacker ("encoder" or "dataset") aims at."""

    @signed
    def found(wildcards):
        return experiment["datasets"][wildcards.downstream][f"{attacker}_target"]

    return found


def received(file):
    """A file from the folder of the data set that a cell's user receives."""

    @signed
    def path(wildcards):
        return f"data/{grid.received(**{part: wildcards[part] for part in grid.VICTIM})}/{file}"

    return path


def flags(*names):
    """`--name path` for those inputs that a job has."""

    @signed
    def given(wildcards, input):
        return " ".join(f"--{name.replace('_', '-')} {input[name]}" for name in names if input.get(name))

    return given


# Data sets and encoders


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


def pretraining(wildcards):
    """The pre-trainer of a data set: its own or the experiment's."""
    return experiment["datasets"][wildcards.pretrain].get("pretraining", experiment["pretraining"])


def code_of_pretraining(wildcards):
    return provenance.code("pretrain_encoder", f"pretraining/{pretraining(wildcards)}")


def settings_of_pretraining(wildcards):
    return settings(pretraining(wildcards))


def attacks_on(weights):
    """Pattern of the encoder attacks that change weights, or of those that change the images of pre-training."""
    names = registry.names("encoder_attacks")
    return "|".join(name for name in names if registry.on_weights(name) == weights)


# What comes from outside


def of_encoder(key):
    """An entry of the encoder from outside that the wildcard names."""

    @signed
    def entry(wildcards):
        return experiment["encoders"][wildcards.pretrain][key]

    return entry


def code_of_audit(wildcards):
    source = experiment["datasets"][wildcards.downstream]["source"]
    return provenance.code("audit", f"data/sources/{source}")


# Baseline defences


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


# T-Core and its variants, which share with it the stages before the first that differs


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


@signed
def oracle(wildcards):
    known = experiment["variants"][wildcards.defense]["oracle"]
    return f"data/defended/{CELL}/{{defense}}/given/oracle.json".format(**wildcards) if known else []


# Evaluation


@signed
def triggers(wildcards):
    """What test images may carry; nothing where nobody knows of an attack."""
    if wildcards.encoder_attack == grid.RECEIVED:
        return {}
    encoder = "data/encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/trigger.safetensors"
    return {
        "encoder_trigger": encoder.format(**wildcards),
        "dataset_trigger": received("trigger.safetensors")(wildcards),
    }


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


def makers(stage):
    """T-Core's cells, each with the variant that ran a stage for it."""
    return CELLS_OF_TCORE.assign(defense=CELLS_OF_TCORE["defense"].map(lambda name: whose(name, stage)))


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
    return provenance.code("make_report", *stamps)
