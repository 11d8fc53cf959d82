# The experiment's grid, and how rules find out what they need: their digest of code, settings and files.
import hashlib
import inspect
import json

from snakemake.common import overwrite_function_params
from snakemake.exceptions import WorkflowError

from tcore.experiment import grid, registry
from tcore.experiment.config import require_files, validate
from tcore.files import InputError
from tcore.running import provenance

try:
    experiment = validate(config)
    require_files(experiment)
except InputError as error:
    raise WorkflowError(str(error)) from None

attacked = [pair for pair in experiment["pairs"] if pair["pretrain"] not in experiment["encoders"]]
GRID = json.dumps({axis: experiment[axis] for axis in grid.AXES} | {"pairs": attacked}, sort_keys=True)
VICTIMS = grid.cells(experiment)
CELLS = VICTIMS[VICTIMS["scenario"] != grid.RECEIVED]  # what an evaluator knows the truth about
RECEIVED = VICTIMS[VICTIMS["scenario"] == grid.RECEIVED]  # what nobody does


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


def methods_named(wildcards, *kinds):
    """The files, such as "dataset_attacks/sig", of the methods that the wildcards `kinds` name."""
    families = {kind: "paper/figures" if kind == "paper_figure" else f"{kind}s" for kind in kinds}
    return [f"{family}/{registry.base(family, wildcards[kind])}" for kind, family in families.items()]


def code(script, *kinds, files=()):
    """The digest of a rule's script, of the methods that its wildcards `kinds` name and of other files of ours;
    and the precision, where the configuration sets one."""
    precision = "" if experiment.get("precision", "auto") == "auto" else f"-{experiment['precision']}"
    if not kinds:
        return provenance.code(script, files=files) + precision

    @signed
    def digest(wildcards):
        return provenance.code(script, *methods_named(wildcards, *kinds), files=files) + precision

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
