"""The report's view of many cells at once: heat maps, a leaderboard per scenario, cost against benefit.

All of it works on rows of `report.outcomes` (one per victim and defence, means over random seeds). The
success of an attack is that of the worse trigger where there are two. Means are over the victims that a
defence was run on and could be applied to, each of equal weight.
"""

from collections import defaultdict

import numpy as np
import pandas as pd

from tcore.evaluation import metrics, results

RATES = {"asr_encoder": "the encoder's trigger", "asr_dataset": "the data set's trigger"}
VICTIM = results.CELL[:-1]  # a cell without its defence
FULL = 0.30  # accuracy lost at which a heat map's colour is full


def rate(row: dict, part: str = "mean") -> float:
    """Success of the worse trigger, after the defence ("mean") or "before"; NaN without a trigger."""
    found = [row["numbers"][metric][part] for metric in RATES]
    return np.nan if np.isnan(found).all() else float(np.nanmax(found))


def _mean(values) -> float:
    values = [value for value in values if not np.isnan(value)]
    return float(np.mean(values)) if values else np.nan


def heatmaps(rows: list[dict]) -> list[dict]:
    """ASR and ACC, attacks by defences, each the mean over pairs of data sets.

    A cell has its `value`, a `shade` in [-1, 1] (1 is bad), `n` victims and the number `row` of the first of
    them in `rows`; it is None where nothing is there.
    """
    defenses = sorted({row["defense"] for row in rows}, key=lambda d: (d != "none", d != "tcore", d))
    lines: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for position, row in enumerate(rows):
        if not row["note"]:
            attacks = (row["scenario"], row["encoder_attack"], row["dataset_attack"])
            lines[attacks][row["defense"]].append((position, row))

    def cell(found: list, asr: bool) -> dict | None:
        value = _mean(rate(row) if asr else row["numbers"]["acc"]["mean"] for _, row in found)
        if np.isnan(value):
            return None
        change = _mean(row["change"] for _, row in found)
        shade = value if asr else np.clip(-change / FULL, -1, 1) if not np.isnan(change) else 0.0
        return {"value": value, "shade": float(shade), "n": len(found), "row": found[0][0]}

    return [
        {
            "asr": asr,
            "defenses": defenses,
            "lines": [
                {"scenario": key[0], "encoder_attack": key[1], "dataset_attack": key[2], "cells": cells}
                for key, line in lines.items()
                if any(cells := [cell(line[defense], asr) for defense in defenses])
            ],
        }
        for asr in (True, False)
    ]


def _by_seed(found: pd.DataFrame) -> pd.DataFrame:
    """Columns `asr` (of the worse trigger) and `acc` of every victim, defence and seed."""
    own = found[(found["stage"] == "test") & found["metric"].isin(results.OUTCOMES)]
    wide = own.pivot_table(index=[*results.CELL, "seed"], columns="metric", values="value")
    wide = wide.reindex(columns=list(results.OUTCOMES))
    return wide.assign(asr=wide[list(RATES)].max(axis=1))[["asr", "acc"]]


def _over_seeds(values: pd.Series) -> dict:
    """Mean over victims, and its interval over random seeds, of victims that have every random seed."""
    wide = values.dropna().unstack("seed")
    if wide.empty:
        return dict.fromkeys(("mean", "low", "high"), np.nan)
    whole = wide.dropna()
    _, low, high = metrics.t_interval(whole.mean()) if len(whole) else (np.nan,) * 3
    low, high = np.clip([low, high], 0, 1)
    return {"mean": float(wide.mean(axis=1).mean()), "low": float(low), "high": float(high)}


def boards(rows: list[dict], found: pd.DataFrame) -> list[dict]:
    """Per scenario its defences, by the share of victims held, then by mean attack success, `none` last.

    Held: no trigger at or above the line, no more accuracy lost than allowed, accuracy above chance.
    A scenario with fewer than two defences beside `none` has no board.
    """
    seeds, shown = _by_seed(found), []
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        own = [row for row in rows if row["scenario"] == scenario]
        victims = len({tuple(row[key] for key in VICTIM) for row in own})
        lines = []
        for defense in dict.fromkeys(row["defense"] for row in own):
            there = [row for row in own if row["defense"] == defense and not row["note"]]
            if not there:
                continue
            values = seeds.xs((scenario, defense), level=("scenario", "defense"))
            rates = [rate(row) for row in there]
            lines.append(
                {
                    "defense": defense,
                    "victims": len(there),
                    "held": sum(row["held"] for row in there),
                    "asr": _over_seeds(values["asr"]),
                    "worst": float(np.nanmax(rates)) if not np.isnan(rates).all() else np.nan,
                    "acc": _over_seeds(values["acc"]),
                    "change": _mean(row["change"] for row in there),
                    "seconds": _mean(row["seconds"] for row in there),
                }
            )
        if sum(line["defense"] != "none" for line in lines) > 1:
            lines.sort(key=_rank)
            shown.append({"scenario": scenario, "victims": victims, "lines": lines})
    return shown


def _rank(line: dict) -> tuple:
    return line["defense"] == "none", -line["held"] / line["victims"], np.nan_to_num(line["asr"]["mean"])


def benefits(rows: list[dict]) -> list[dict]:
    """Per defence beside `none`, means: seconds of its steps, fall of attack success, change of accuracy."""
    shown = []
    for defense in dict.fromkeys(row["defense"] for row in rows if row["defense"] != "none"):
        own = [row for row in rows if row["defense"] == defense and not row["note"]]
        seconds = _mean(row["seconds"] for row in own)
        drop = _mean(rate(row, "before") - rate(row) for row in own)
        if not np.isnan(seconds + drop):
            change = _mean(row["change"] for row in own)
            shown.append({"name": defense, "seconds": seconds, "drop": drop, "change": change})
    return shown
