"""The experiment grid: one row per result, and where a cell's received data set lies.

A scenario is a consequence of two attack names, so it is a column here and never a part
of a path: what two scenarios share is computed once.
"""

import re
from functools import cache
from itertools import product

import pandas as pd

from tcore.experiment import registry, settings
from tcore.files import InputError

SCENARIOS = ("clean", "T1", "T2", "T3", "T1+T2")
RECEIVED = "received"  # scenario and both attacks of a pair whose encoder comes from outside: nobody knows
AUDITED = ("none", "tcore")  # its defences
STAGES = ("sift", "expand", "filter_channels", "bootstrap")  # of T-Core, in this order
VICTIM = ("pretrain", "encoder_attack", "downstream", "dataset_attack", "seed")
AXES = ("pairs", "scenarios", "encoder_attacks", "dataset_attacks", "defenses", "seeds")  # of a configuration
COLUMNS = ("pretrain", "downstream", "encoder_attack", "dataset_attack", "scenario", "defense", "seed")


def scenario(encoder_attack: str, dataset_attack: str) -> str:
    """The threat that a pair of attacks amounts to.

    T1: the encoder is poisoned; T2: the data set; T3: the data set with the encoder's own trigger
    (`adaptive`); T1+T2: both, independently; received: nobody knows.
    """
    if dataset_attack == "adaptive":
        return "T3"
    if encoder_attack == RECEIVED:
        return RECEIVED
    threats = [encoder_attack != "clean" and "T1", dataset_attack != "clean" and "T2"]
    return "+".join(filter(None, threats)) or "clean"


def cells(config: dict) -> pd.DataFrame:
    """One row per result of a resolved configuration, with `COLUMNS`.

    A pair that names an encoder of `encoders` is `RECEIVED` and `AUDITED`, whatever the lists say.
    """
    dataset_attacks = config["dataset_attacks"]
    outside = config.get("encoders", {})

    def attacks(pair: dict, name: str) -> tuple[list[str], list[str]]:
        encoder_attacks = pair.get("encoder_attacks", config["encoder_attacks"])
        return {
            "clean": (["clean"], ["clean"]),
            "T1": (encoder_attacks, ["clean"]),
            "T2": (["clean"], dataset_attacks),
            "T3": (encoder_attacks, ["adaptive"]),
            "T1+T2": (encoder_attacks, dataset_attacks),
            RECEIVED: ([RECEIVED], [RECEIVED]),
        }[name]

    rows = [
        (pair["pretrain"], pair["downstream"], *attack, scenario(*attack), defense, seed)
        for pair in config["pairs"]
        for name in ([RECEIVED] if pair["pretrain"] in outside else config["scenarios"])
        for attack in product(*attacks(pair, name))
        for defense in (AUDITED if name == RECEIVED else config["defenses"])
        for seed in config["seeds"]
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS)).drop_duplicates(ignore_index=True)


@cache
def told(dataset_attack: str) -> str | None:
    """What an attack on a data set, or its variant, is told of the encoder: the constant TOLD of its file.

    `encoder_trigger` (the encoder attack's), `encoder` (as handed over), or None where there is no constant.
    """
    name = registry.base("dataset_attacks", dataset_attack)
    return settings.constants(registry.path("dataset_attacks", name)).get("TOLD")


def received(
    pretrain: str, encoder_attack: str, downstream: str, dataset_attack: str, seed: int | str
) -> str:
    """The folder of the data set that a cell's user receives.

    An attack that is `told` of the encoder makes a set for each; all other sets serve every encoder.
    What a stranger to this project has labelled is used as it is.
    """
    if dataset_attack == RECEIVED:
        return f"datasets/{downstream}"
    origin = f"{pretrain}-{encoder_attack}" if told(dataset_attack) else "any"
    return f"poisoned/{origin}/{downstream}-{dataset_attack}/{seed}"


def victim(name: str) -> dict[str, str]:
    """`VICTIM` of a cell's name, `<pretrain>-<encoder attack>/<downstream>-<data set attack>/<seed>`."""
    parts = re.fullmatch(r"(\w+)-(\w+)/(\w+)-(\w+)/(\d+)", name)
    if parts is None:
        raise InputError(f"{name!r} should be <pretrain>-<attack>/<downstream>-<attack>/<seed>")
    return dict(zip(VICTIM, parts.groups(), strict=True))
