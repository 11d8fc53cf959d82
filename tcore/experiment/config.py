"""The experiment: checked as a whole before anything is planned, with all defaults written out."""

import difflib
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tcore.experiment import grid, registry, settings
from tcore.files import InputError

KEYS = (
    "seeds",
    "pairs",
    "scenarios",
    "encoder_attacks",
    "dataset_attacks",
    "defenses",
    "pretraining",
    "datasets",
)
OPTIONAL = ("methods", "trusted", "variants", "encoders", "encoder_seed", "precision")
OF_ENCODER = ("file", "architecture", "image_size", "mean", "std")  # all needed: no checkpoint says them
OF_DATASET = (  # beside its source
    "settings",
    "encoder_target",
    "dataset_target",
    "attacks",
    "pretraining",
    "stands_for",
)
BUILT_IN = ("none", "tcore")  # the defences that have rules of their own
TRUSTED = {"source": "granted", "share": 0.1}  # what defences that need clean samples get
TRUSTED_SOURCES = ("granted", "seeds", "subset", "none")
SELECTION = registry.ROOT / "defenses" / "_selection.py"
DEFENSE = registry.ROOT / "defenses" / "_interface.py"
PRECISIONS = ("auto", "float32")
IMPLIED = ("clean", "adaptive")  # attacks that a scenario brings with it


def validate(config: dict) -> dict:
    """`config` with every method's and data set's settings in full.

    Raises InputError, naming the key and the remedy, for anything unknown, missing, of the
    wrong type, out of range or contradictory; of settings, all that are wrong. What only the data
    can tell, such as a target class beyond the last one, is left to the steps.
    """
    _mapping("config", config, KEYS, optional=OPTIONAL)
    faults: list[str] = []
    methods = _methods(config.get("methods") or {}, faults)
    trusted = _trusted("trusted", config.get("trusted") or {}, TRUSTED)
    variants, attack_variants = _split(config.get("variants") or {})
    variants = _variants(variants, methods, trusted, faults)
    dataset_attacks = [name for name in registry.names("dataset_attacks") if name not in IMPLIED]
    attack_variants = _attack_variants(attack_variants, dataset_attacks, faults)
    sets = _datasets(config["datasets"], faults)
    if faults:
        raise InputError("\n".join(faults))
    encoders = _encoders(config.get("encoders") or {}, sets)
    encoder_attacks = [name for name in registry.names("encoder_attacks") if name not in IMPLIED]
    for position, pair in enumerate(_list("pairs", config["pairs"], dict)):
        where = f"pairs[{position}]"
        _mapping(where, pair, ("pretrain", "downstream"), optional=("encoder_attacks",))
        _known(f"{where}.pretrain", pair["pretrain"], [*sets, *encoders])
        _known(f"{where}.downstream", pair["downstream"], list(sets))
        if pair["pretrain"] in encoders:
            _received(where, pair, encoders, sets)
        if "encoder_attacks" in pair:
            for name in _list(f"{where}.encoder_attacks", pair["encoder_attacks"], str):
                _known(f"{where}.encoder_attacks", name, encoder_attacks)
    for position, seed in enumerate(_list("seeds", config["seeds"], int)):
        if seed < 0:
            raise InputError(f"config: seeds[{position}] = {seed}: a seed is 0 or more")
    if (shared := config.get("encoder_seed")) is not None and (type(shared) is not int or shared < 0):
        raise InputError(
            f"config: encoder_seed = {shared!r}: a number, 0 or more, "
            "or null: each random seed pre-trains its own"
        )
    _known("precision", config.get("precision", PRECISIONS[0]), PRECISIONS)
    choices = {
        "scenarios": grid.SCENARIOS,
        "encoder_attacks": encoder_attacks,
        "dataset_attacks": [*dataset_attacks, *attack_variants],
        "defenses": [*BUILT_IN, *variants],
    }
    for key, known in choices.items():
        for name in _list(key, config[key], str):
            _known(key, name, known)
    _known("pretraining", config["pretraining"], registry.names("pretraining"))
    for name in {pair["downstream"] for pair in config["pairs"] if pair["pretrain"] not in encoders}:
        _targets(name, sets[name], config["scenarios"])
    return config | {
        "encoder_seed": shared,
        "datasets": sets,
        "methods": methods,
        "trusted": trusted,
        "variants": variants,
        "attack_variants": attack_variants,
        "encoders": encoders,
    }


def _datasets(datasets: dict, faults: list[str]) -> dict:
    if not isinstance(datasets, dict):
        raise InputError(f"config: datasets should map names to sources, not {datasets!r}")
    resolved = {}
    for name, entry in datasets.items():
        where = f"datasets.{name}"
        if not re.fullmatch("[a-z0-9_]+", str(name)):
            raise InputError(
                f"config: {where}: a name consists of a-z, 0-9 and _, because it becomes a folder"
            )
        _mapping(where, entry, ("source",), optional=OF_DATASET)
        _known(f"{where}.source", entry["source"], registry.names("data/sources"))
        if "pretraining" in entry:
            _known(f"{where}.pretraining", entry["pretraining"], registry.names("pretraining"))
        overrides = entry.get("settings") or {}
        resolved[name] = entry | {
            "settings": _resolve(entry["source"], overrides, f"{where}.settings", faults),
            "attacks": _attacks(entry.get("attacks", {}), f"{where}.attacks", faults),
        }
    stands_for = [entry["stands_for"] for entry in datasets.values() if "stands_for" in entry]
    if twice := [name for name in stands_for if stands_for.count(name) > 1]:
        raise InputError(f"config: two data sets have stands_for: {twice[0]}; the paper's tables take one")
    return resolved


def _encoders(given: dict, sets: dict) -> dict:
    """Encoders from outside, by name: a file, and what the file does not say."""
    if not isinstance(given, dict):
        raise InputError(f"config: encoders should map names to files, not {given!r}")
    for name, entry in given.items():
        where = f"encoders.{name}"
        if not re.fullmatch("[a-z0-9_]+", str(name)) or name in sets:
            raise InputError(f"config: {where}: a name of a-z, 0-9 and _ that no data set has, please")
        _mapping(where, entry, OF_ENCODER, optional=("run_code",))
        if not isinstance(entry["file"], str):
            raise InputError(f"config: {where}.file = {entry['file']!r} should be a path")
        _architecture(where, entry["architecture"], entry.get("run_code", False))
        if type(entry["image_size"]) is not int or entry["image_size"] < 1:
            raise InputError(
                f"config: {where}.image_size = {entry['image_size']!r}: height and width in pixels"
            )
        for key in ("mean", "std"):
            value = entry[key]
            numbers = isinstance(value, list) and [type(v) in (int, float) and 0 <= v <= 1 for v in value]
            if numbers != [True] * 3 or (key == "std" and not all(value)):
                raise InputError(
                    f"config: {where}.{key} = {value!r} should be three numbers from 0 to 1, for red, "
                    f"green and blue of pixels in [0, 1]{', none of them 0' if key == 'std' else ''}"
                )
    return given


def _architecture(where: str, name: str, run_code: bool) -> None:
    """A network of this project, of a library, or of the user's own, which runs only where that is said."""
    if run_code not in (True, False):
        raise InputError(f"config: {where}.run_code = {run_code!r} should be true or false")
    library, colon, _ = str(name).partition(":")
    if not colon:
        _known(
            f"{where}.architecture", name, [*registry.architectures(), "torchvision:<name>", "timm:<name>"]
        )
    elif not re.fullmatch(r"[\w.]+:[\w.]+", name):
        raise InputError(f"config: {where}.architecture = {name!r}: <library or module>:<name>, please")
    elif library not in ("torchvision", "timm") and not run_code:
        raise InputError(
            f"config: {where}.architecture = {name!r} is a network of your own, whose code would run; "
            f"if you trust it, set {where}.run_code to true"
        )


def require_files(config: dict) -> None:
    """An error where a pair with an encoder from outside names a file or folder that is not there."""
    for pair in config["pairs"]:
        encoder, name = config["encoders"].get(pair["pretrain"]), pair["downstream"]
        if encoder is None:
            continue
        if not Path(encoder["file"]).is_file():
            raise InputError(f"config: encoders.{pair['pretrain']}.file = {encoder['file']!r} is not a file")
        path = config["datasets"][name]["settings"].get("path")
        if path is not None and not Path(path).exists():
            raise InputError(f"config: datasets.{name}.settings.path = {path!r} is not there")


def _received(where: str, pair: dict, encoders: dict, sets: dict) -> None:
    """A pair with an encoder from outside: nothing is attacked, and the images have the encoder's size."""
    if "encoder_attacks" in pair:
        raise InputError(
            f"config: {where}.encoder_attacks: {pair['pretrain']} is used as it is; remove the key"
        )
    size = encoders[pair["pretrain"]]["image_size"]
    settings = sets[pair["downstream"]]["settings"]
    if settings.get("image_size", size) != size:
        raise InputError(
            f"config: {where}: the encoder {pair['pretrain']} takes {size} pixels; set "
            f"datasets.{pair['downstream']}.settings.image_size to {size}, not {settings['image_size']}"
        )


def _attacks(attacks: dict, where: str, faults: list[str]) -> dict:
    """What differs, for one data set, from the settings of attacks on data sets; not filled up."""
    _mapping(where, attacks, (), optional=registry.names("dataset_attacks"))
    for name, overrides in attacks.items():
        _resolve(name, overrides, where, faults)
    return attacks


def _methods(methods: dict, faults: list[str]) -> dict:
    """The settings of all methods; those of data sources belong to a data set, not to a method."""
    known = [name for name in settings.methods() if name not in registry.names("data/sources")]
    _mapping("methods", methods, (), optional=known)
    found = {name: _resolve(name, methods.get(name) or {}, "methods", faults) for name in known}
    for name in registry.names("pretraining"):
        if isinstance(architecture := (methods.get(name) or {}).get("architecture"), str):
            with _noted(faults):
                _architecture(f"methods.{name}", architecture, run_code=True)
    return found


def _split(given: dict) -> tuple[dict, dict]:
    """The variants of defences, and those of attacks on data sets."""
    if not isinstance(given, dict):
        raise InputError(f"config: variants should map names to defences or attacks, not {given!r}")
    attacks = {name: entry for name, entry in given.items() if isinstance(entry, dict) and "attack" in entry}
    return {name: entry for name, entry in given.items() if name not in attacks}, attacks


def _attack_variants(given: dict, attacks: list[str], faults: list[str]) -> dict:
    """What differs from the attack's settings, by variant; not filled up, as data sets have a word in it.

    All that paths say of a variant is its name, so the name begins with the attack's (`registry.base`).
    """
    for name, variant in given.items():
        where = f"variants.{name}"
        _mapping(where, variant, ("attack", "settings"))
        attack = variant["attack"]
        if attack in IMPLIED:
            raise InputError(f"config: {where}.attack: {attack} comes with its scenarios and has no variants")
        _known(f"{where}.attack", attack, attacks)
        if (
            not re.fullmatch(f"{attack}_[a-z0-9_]+", str(name))
            or registry.base("dataset_attacks", name) != attack
            or name in registry.names("defenses")
        ):
            raise InputError(
                f"config: {where}: a variant of {attack} is called {attack}_<more>, of a-z, 0-9 and _, "
                "and has no other method's name"
            )
        _resolve(attack, variant["settings"], where, faults)
    return {name: variant["settings"] for name, variant in given.items()}


def _variants(given: dict, methods: dict, trusted: dict, faults: list[str]) -> dict:
    """Every way to run a defence, by name: each as it is, and the configuration's variants of them."""
    defenses = registry.names("defenses")
    found = {name: {"defense": name} for name in defenses}
    for name, variant in given.items():
        where = f"variants.{name}"
        if not re.fullmatch("[a-z0-9_]+", str(name)) or name in (*BUILT_IN, *defenses):
            raise InputError(f"config: {where}: a name of a-z, 0-9 and _ that no defence has, please")
        _mapping(
            where, variant, ("defense",), optional=("settings", "part", "selection", "oracle", "trusted")
        )
        _known(f"{where}.defense", variant["defense"], ["tcore", *defenses])
        found[name] = variant
    return {
        name: _variant(f"variants.{name}", variant, methods, trusted, faults)
        for name, variant in found.items()
    }


def _variant(where: str, variant: dict, methods: dict, trusted: dict, faults: list[str]) -> dict:
    defense, oracle = variant["defense"], variant.get("oracle", False)
    if defense == "tcore":
        if other := sorted(set(variant) - {"defense", "settings"}):
            raise InputError(f"config: {where}.{other[0]}: of T-Core only the stages' settings vary")
        given = variant.get("settings") or {}
        return {"defense": defense, "kind": "tcore"} | _stages(where, given, methods, faults)
    declared = settings.constants(registry.path("defenses", defense))
    if not isinstance(oracle, bool):
        raise InputError(f"config: {where}.oracle = {oracle!r} should be true or false")
    if oracle and not declared["ORACLE"]:
        raise InputError(f"config: {where}.oracle: {defense} has no setting that an oracle knows")
    if variant.get("selection") and declared["KIND"] != "detector":
        raise InputError(f"config: {where}.selection: {defense} is no detector, it selects no samples")
    parts = settings.constants(DEFENSE)["PARTS"]
    part = variant.get("part", parts[0])
    _known(f"{where}.part", part, parts)
    if "part" in variant and not declared.get("TRAINS"):
        raise InputError(f"config: {where}.part: {defense} trains no network of its own")
    overrides = methods.get(defense, {}) | (variant.get("settings") or {})
    selection = _complete(SELECTION, variant.get("selection"), f"{where}.selection", faults)
    return {
        "defense": defense,
        "kind": declared["KIND"],
        "inputs": declared.get("INPUTS", False),
        "settings": _resolve(defense, overrides, where, faults),
        "part": part,
        "selection": selection,
        "oracle": declared["ORACLE"] if oracle else (),
        "trusted": _trusted(f"{where}.trusted", variant.get("trusted") or {}, trusted)
        if declared["CLEAN"]
        else None,
    }


def _stages(where: str, given: dict, methods: dict, faults: list[str]) -> dict:
    """The settings of T-Core's stages for a variant, and those stages that run anew for it: from the first
    that differs on, and the last in any case, whose model is the variant's."""
    _mapping(f"{where}.settings", given, (), optional=grid.STAGES)
    found = {
        stage: _resolve(stage, methods[stage] | (given.get(stage) or {}), f"{where}.settings", faults)
        for stage in grid.STAGES
    }
    differ = [found[stage] != methods[stage] for stage in grid.STAGES[:-1]]
    first = differ.index(True) if True in differ else len(differ)
    return {"settings": found, "own": grid.STAGES[first:]}


def _trusted(where: str, given: dict, default: dict) -> dict:
    """Where clean samples come from and, if the scenario grants them, what share of each class."""
    _mapping(where, given, (), optional=tuple(TRUSTED))
    found = default | given
    _known(f"{where}.source", found["source"], TRUSTED_SOURCES)
    share = found["share"]
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share < 1:
        raise InputError(f"config: {where}.share = {share!r} should be between 0 and 1")
    return found


def _resolve(method: str, overrides: dict, where: str, faults: list[str]) -> dict:
    """The settings in full; where some are wrong, `faults` gets what is wrong and they are the defaults."""
    if not isinstance(overrides, dict):
        raise InputError(f"config: {where}: settings of {method} are a mapping, not {overrides!r}")
    return _complete(settings.methods().get(method), overrides, f"{where}.{method}", faults)


def _complete(path: Path | None, overrides: dict | None, where: str, faults: list[str]) -> dict:
    """The same for any source file, such as `_selection.py`, which is no method."""
    with _noted(faults):
        return settings.complete(path, overrides, where)
    return settings.complete(path, None, where)


@contextmanager
def _noted(faults: list[str]) -> Iterator[None]:
    """An InputError in the block goes to `faults` and ends the block alone."""
    try:
        yield
    except InputError as error:
        faults.append(str(error))


def _targets(name: str, entry: dict, scenarios: list[str]) -> None:
    """The classes that the attackers of a downstream set aim at."""
    for key in ("encoder_target", "dataset_target"):
        target = entry.get(key)
        if not isinstance(target, int) or isinstance(target, bool) or target < 0:
            raise InputError(
                f"config: datasets.{name}.{key} = {target!r}: a downstream set needs a class number"
            )
    if "T1+T2" in scenarios and entry["encoder_target"] == entry["dataset_target"]:
        raise InputError(
            f"config: datasets.{name}: encoder_target and dataset_target are both {entry['dataset_target']}; "
            "independent attackers (T1+T2) aim at different classes"
        )


def _mapping(where: str, value, required: Collection[str], optional: Collection[str] = ()) -> None:
    if not isinstance(value, dict):
        raise InputError(f"config: {where} should be a mapping, not {value!r}")
    prefix = "" if where == "config" else f"{where}."
    for key in value:
        _known(f"{prefix}{key}", key, [*required, *optional])
    if missing := [key for key in required if key not in value]:
        raise InputError(f"config: {prefix}{missing[0]} is missing")


def _list(where: str, value, kind: type) -> list:
    """`value` if it is a list of one or more different items of one kind."""
    if not isinstance(value, list) or not value:
        raise InputError(f"config: {where} should be a list with at least one entry, not {value!r}")
    for position, item in enumerate(value):
        if type(item) is not kind:
            raise InputError(f"config: {where}[{position}] = {item!r} should be of type {kind.__name__}")
        if item in value[:position]:
            raise InputError(f"config: {where}[{position}] = {item!r} stands there twice")
    return value


def _known(where: str, name, known: Collection[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), list(known), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"config: {where}: unknown name {name!r}: {hint}known: {', '.join(known) or 'none'}")
