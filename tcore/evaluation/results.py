"""The evaluator's tables: the tidy rows of one cell, and what all cells add up to.

A row is one number: the cell's identity, then `stage`, `step` (null where a stage has no
steps), `metric`, `value` and, for shares over images, their Wilson interval `low`, `high`. Where a
defence cannot be applied, one row with metric `not_applicable` says why in `note`, null elsewhere.

stage       step            metrics
test        -               acc; per trigger t: asr_t, asr_t_all, robust_t, leak_t
data        -               size, poisons, ... of the training set that the victim received
sift        -               the same of the seeds
expand      round           the same of the clean subset so far
bootstrap   round           the same of the clean pool so far; without a round tpr and fpr of what it left out
filter      layer           channels, untrusted, mask_mean, mask_min (layers in name order, from 0)
detect      -               tpr and fpr of what a detector dropped, auroc of its score; no trusted samples
inputs      -               auroc_t of an input detector: triggered test images against clean ones; by its own
                            rule tpr_t, and fpr of the clean ones
cleanest    -               size, poisons, ... of the CLEANEST of each class, by that score
cost        -               seconds (sum), peak_ram_mb, peak_gpu_mb (maximum) of the defence's own steps;
                            where these are several also seconds_s, ... of the step s (sift, expand, ...)

asr_t_all asks for the target class and is missing where there is none (all-to-all). leak_t is there where the
attack aims at some classes only (TaCT): the same rate for the others.
A trigger t is `encoder` or `dataset`. In Threat 3 (`adaptive`) both attackers share one
trigger and one target, so it is reported once, as `encoder`.
"""

import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd

from tcore.evaluation import metrics
from tcore.experiment import grid, registry
from tcore.files import InputError, load_json, load_table

IDENTITY = list(grid.COLUMNS)
CELL = IDENTITY[:-1]  # without the seed
NUMBERS = ["stage", "step", "metric", "value", "low", "high"]
SAMPLES = ("index", "label", "score", "kept", "trusted")
CLEANEST = 0.01  # share of each class that detectors are asked to call clean (the paper's sifting)
OUTCOMES = ("acc", "asr_encoder", "asr_dataset")
COSTS = {"seconds": "sum", "peak_ram_mb": "max", "peak_gpu_mb": "max"}


def need(table: pd.DataFrame, columns: list[str], name: str | Path) -> pd.DataFrame:
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"{name}: no column {', '.join(missing)}; make the file anew with the workflow")
    return table


def _row(stage: str, step: int | None, metric: str, value, low=np.nan, high=np.nan) -> dict:
    return dict(zip(NUMBERS, (stage, step, metric, float(value), low, high), strict=True))


def _share(stage: str, metric: str, share: metrics.Share) -> dict:
    return _row(stage, None, metric, share.value, share.low, share.high)


def not_applicable(reason: str) -> dict:
    return _row("defense", None, "not_applicable", np.nan) | {"note": reason}


def _own_triggers(triggers: dict[str, dict], dataset_attack: str) -> dict[str, dict]:
    """Those to report: no clean attacker's, and the encoder's alone where both share one."""
    return {
        name: meta
        for name, meta in triggers.items()
        if meta.get("attack") != "clean" and not (name == "dataset" and dataset_attack == "adaptive")
    }


def test_rows(predictions: pd.DataFrame, triggers: dict[str, dict], dataset_attack: str) -> list[dict]:
    """Accuracy and attack success from predictions (`label`, `view`, `prediction`); `chance` is the accuracy
    of whoever names one class for all.

    `triggers` maps "encoder" and "dataset" to the metadata of the trigger files.
    """
    views = {
        view: (rows["prediction"].to_numpy(), rows["label"].to_numpy())
        for view, rows in predictions.groupby("view")
    }
    wanted = _own_triggers(triggers, dataset_attack)
    for view in ("clean", *(f"{name}_trigger" for name in wanted)):
        if view not in views:
            raise InputError(f"predictions: no row has view {view!r}; predict this cell anew")
    labels = views["clean"][1]
    rows = [
        _share("test", "acc", metrics.accuracy(*views["clean"])),
        _row("test", None, "chance", np.bincount(labels).max() / len(labels)),
    ]
    for name, meta in wanted.items():
        found, labels = views[f"{name}_trigger"]
        target, goals = meta["target"], meta.get("goals")
        aim = target if goals is None else goals
        rows += [
            _share("test", f"asr_{name}", metrics.attack_success_rate(found, labels, aim)),
            _share("test", f"robust_{name}", metrics.robust_accuracy(found, labels, aim)),
        ]
        if target is not None:
            rows.append(_share("test", f"asr_{name}_all", metrics.asr_all(found, target)))
            if goals is not None:
                rows.append(_share("test", f"leak_{name}", metrics.leak(found, labels, target, goals)))
    return rows


def _aligned(table: pd.DataFrame, truth: pd.DataFrame, name: str) -> pd.DataFrame:
    """`table` with its rows in the order of `truth`, after a check that both speak of the same images."""
    if table["index"].duplicated().any() or set(table["index"]) != set(truth["index"]):
        raise InputError(
            f"{name}: its {len(table)} indices are not those of the {len(truth)} images in the truth"
        )
    return table.set_index("index").loc[truth["index"]].reset_index()


def stage_rows(
    truth: pd.DataFrame, seeds: pd.DataFrame, subset: pd.DataFrame, pool: pd.DataFrame
) -> list[dict]:
    """Purity and class balance after every step of T-Core (columns as in docs/develop/architecture.md)."""
    seeds, subset, pool = (
        _aligned(table, truth, name) for table, name in ((seeds, "seeds"), (subset, "subset"), (pool, "pool"))
    )
    is_poison, is_cover = truth["is_poison"].to_numpy(bool), truth["is_cover"].to_numpy(bool)
    labels = seeds["label"].to_numpy()

    def rows(stage: str, step: int | None, chosen: np.ndarray) -> list[dict]:
        found = metrics.purity(chosen, is_poison, is_cover)
        found |= metrics.class_balance(labels[chosen], labels.max() + 1)
        return [_row(stage, step, metric, value) for metric, value in found.items()]

    table = rows("data", None, np.full(len(truth), True)) + rows(
        "sift", None, seeds["trusted"].to_numpy(bool)
    )
    for stage, rounds in (("expand", subset["round"].to_numpy()), ("bootstrap", pool["round"].to_numpy())):
        for step in range(1, rounds.max() + 1):
            table += rows(stage, step, (rounds >= 0) & (rounds <= step))
    tpr, fpr = metrics.detection(pool["round"].to_numpy() < 0, is_poison)
    return [*table, _share("bootstrap", "tpr", tpr), _share("bootstrap", "fpr", fpr)]


def detector_rows(truth: pd.DataFrame, samples: pd.DataFrame) -> list[dict]:
    """What a detector is worth, from `score`, `kept` and `trusted` of every sample and its label.

    Samples that the defender was told are clean are no finding and count nowhere.
    """
    samples = _aligned(samples, truth, "samples")
    judged = ~samples["trusted"].to_numpy(bool)
    is_poison, is_cover = truth["is_poison"].to_numpy(bool), truth["is_cover"].to_numpy(bool)
    score, labels = samples["score"].to_numpy(), samples["label"].to_numpy()
    tpr, fpr = metrics.detection(~samples["kept"].to_numpy(bool)[judged], is_poison[judged])
    clean = np.zeros(len(truth), bool)
    for k in np.unique(labels[judged]):
        rows = np.flatnonzero(judged & (labels == k))
        best = np.argsort(score[rows], kind="stable")[: max(1, int(CLEANEST * len(rows)))]
        clean[rows[best]] = True
    found = metrics.purity(clean, is_poison, is_cover)
    return [
        _share("detect", "tpr", tpr),
        _share("detect", "fpr", fpr),
        _row("detect", None, "auroc", metrics.auroc(score[judged], is_poison[judged])),
        *(_row("cleanest", None, metric, value) for metric, value in found.items()),
    ]


def input_rows(inputs: pd.DataFrame, triggers: dict[str, dict], dataset_attack: str) -> list[dict]:
    """How well `score` and `flagged` tell triggered images that an attack aims at from clean ones."""
    rows, clean = [], inputs["view"] == "clean"
    for name, meta in _own_triggers(triggers, dataset_attack).items():
        triggered = inputs["view"] == f"{name}_trigger"
        goals = meta.get("goals")
        aims = metrics.goals(inputs["label"].to_numpy(), meta["target"] if goals is None else goals)
        aimed = triggered & (aims >= 0)
        shown = inputs[clean | aimed]
        is_triggered = (shown["view"] != "clean").to_numpy()
        rows += [
            _row("inputs", None, f"auroc_{name}", metrics.auroc(shown["score"].to_numpy(), is_triggered)),
            _share("inputs", f"tpr_{name}", metrics.share(inputs.loc[aimed, "flagged"].to_numpy(bool))),
        ]
    if rows:
        rows.append(_share("inputs", "fpr", metrics.share(inputs.loc[clean, "flagged"].to_numpy(bool))))
    return rows


def layers(tensors: dict) -> list[str]:
    """The layers of a channels file, numbers in their names in numerical order."""
    names = [name.removeprefix("mask.") for name in tensors if name.startswith("mask.")]
    return sorted(
        names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    )


def channel_rows(tensors: dict) -> list[dict]:
    rows = []
    for step, name in enumerate(layers(tensors)):
        mask, untrusted = tensors[f"mask.{name}"], tensors[f"untrusted.{name}"]
        found = {
            "channels": len(mask),
            "untrusted": untrusted.sum(),
            "mask_mean": mask.mean(),
            "mask_min": mask.min(),
        }
        rows += [_row("filter", step, metric, value) for metric, value in found.items()]
    return rows


def tidy(identity: dict, rows: list[dict]) -> pd.DataFrame:
    wrong = set(IDENTITY) ^ set(identity)
    if wrong:
        raise InputError(f"--identity: needs exactly {', '.join(IDENTITY)}; check {', '.join(sorted(wrong))}")
    table = pd.DataFrame(rows, columns=[*NUMBERS, "note"]).astype({"step": "Int64", "note": "str"})
    for position, column in enumerate(IDENTITY):
        table.insert(position, column, identity[column])
    return table


def folders(cell: dict) -> dict[str, str]:
    """The folders below data/ that a cell's result comes from (docs/develop/architecture.md)."""
    pretrain, downstream, seed = cell["pretrain"], cell["downstream"], cell["seed"]
    encoder = f"{pretrain}-{cell['encoder_attack']}"
    victim = f"{encoder}/{downstream}-{cell['dataset_attack']}/{seed}"
    clean = {"clean_encoder": f"encoders/{pretrain}-clean/{seed}"}
    return {
        "pretraining": f"datasets/{pretrain}",
        "downstream": f"datasets/{downstream}",
        **(clean if registry.on_weights(cell["encoder_attack"]) else {}),
        "encoder": f"encoders/{encoder}/{downstream}/{seed}",
        "poisoned": grid.received(**{part: cell[part] for part in grid.VICTIM}),
        "features": f"defended/{victim}",
        "undefended": f"defended/{victim}/none",
        "defended": f"defended/{victim}/{cell['defense']}",
        "results": f"results/{victim}/{cell['defense']}",
    }


def by_folder(records: dict[Path, dict]) -> dict[str, list[dict]]:
    """Run records under every tail of their folder's path, so `folders` finds them wherever data/ lies."""
    found = defaultdict(list)
    for path, record in sorted(records.items()):
        parts = path.parent.parts
        for start in range(len(parts)):
            found["/".join(parts[start:])].append(record)
    return found


def lineage(cell: dict, found: dict[str, list[dict]]) -> list[dict]:
    """The records of all steps that a cell depends on, each once; T-Core's for what a variant shares."""
    places = folders(cell)
    own = {record["step"] for record in found.get(places["defended"], [])}
    shared = grid.STAGES if grid.STAGES[-1] in own else ()
    return [
        *(record for folder in dict.fromkeys(places.values()) for record in found.get(folder, [])),
        *(
            record
            for record in found.get(folders(cell | {"defense": "tcore"})["defended"], [])
            if record["step"] in shared and record["step"] not in own
        ),
    ]


def versions(records: list[dict]) -> dict[str, str]:
    """Package -> version; several versions joined by ' / '."""
    seen = defaultdict(set)
    for record in records:
        for package, version in record["versions"].items():
            seen[package].add(str(version))
    return {package: " / ".join(sorted(found)) for package, found in sorted(seen.items())}


def read(data: Path, cells: pd.DataFrame, available: bool = False) -> tuple[list, dict[Path, dict]]:
    """The tables of the grid's cells, from the folder `data`, and the run records of all steps behind them.

    A cell without a table is an error or, if only what is `available` is asked for, left out.
    """
    tables, behind = [], set()
    for cell in cells.to_dict("records"):
        places = folders(cell)
        path = data / places["results"] / "metrics.parquet"
        if available and not path.is_file():
            continue
        tables.append(need(load_table(path), [*IDENTITY, *NUMBERS], path))
        behind.update(places.values())
        if (data / places["defended"] / f"{grid.STAGES[-1]}.run.json").is_file():
            behind.add(folders(cell | {"defense": "tcore"})["defended"])  # what a variant shares
    if not tables:
        raise InputError(f"{data}: no cell of the grid is there yet; compute one first")
    paths = (path for folder in sorted(behind) for path in sorted((data / folder).glob("*.run.json")))
    return tables, {path: load_json(path) for path in paths}


def cost_rows(records: list[dict]) -> list[dict]:
    """What a defence's own steps cost, together and, if there are several, each."""
    steps = {record["step"]: [record] for record in records} if len(records) > 1 else {}
    rows = []
    for part, own in {"": records, **{f"_{step}": own for step, own in steps.items()}}.items():
        for metric, how in COSTS.items():
            values = pd.Series([record[metric] for record in own], dtype=float).dropna()
            if len(values):
                rows.append(_row("cost", None, metric + part, values.agg(how)))
    return rows


def own_costs(data: Path, cell: dict) -> pd.DataFrame:
    """`cost_rows` of one cell from its records."""
    records = sorted((data / folders(cell)["defended"]).glob("*.run.json"))
    return tidy({key: cell[key] for key in IDENTITY}, cost_rows([load_json(path) for path in records]))


def collect(tables: list[pd.DataFrame], records: dict[Path, dict]) -> pd.DataFrame:
    """All cells in one table, with cost rows and the columns `config` and `versions`.

    `config` digests the settings and seeds of every step behind the cell, so two rows with
    the same value were made with the same experiment; `versions` is JSON.
    """
    found, parts = by_folder(records), []
    for table in tables:
        cell = table.iloc[0][IDENTITY].to_dict()
        behind = lineage(cell, found)
        costs = tidy(cell, cost_rows(found.get(folders(cell)["defended"], [])))
        made = sorted(json.dumps([r["step"], r["seed"], r["settings"]], sort_keys=True) for r in behind)
        parts.append(
            pd.concat([table, costs], ignore_index=True).assign(
                config=hashlib.sha256("\n".join(made).encode()).hexdigest()[:12],
                versions=json.dumps(versions(behind)),
            )
        )
    results = pd.concat(parts, ignore_index=True).sort_values(IDENTITY, kind="stable", ignore_index=True)
    twice = results[results.duplicated([*IDENTITY, "stage", "step", "metric"])]
    if len(twice):
        raise InputError(f"the cell {twice.iloc[0][IDENTITY].to_dict()} occurs twice; name it once")
    return results


def summary(results: pd.DataFrame) -> dict:
    """Means over random seeds: scenario -> <pretrain>-<attack>/<downstream>-<attack> -> defense -> metric."""
    rows = results[(results["stage"] == "test") & results["metric"].isin(OUTCOMES)]
    victim = rows["pretrain"] + "-" + rows["encoder_attack"]
    victim += "/" + rows["downstream"] + "-" + rows["dataset_attack"]
    means = rows.assign(victim=victim).groupby(["scenario", "victim", "defense", "metric"])["value"].mean()
    nested: dict = {}
    for (scenario, victim, defense, metric), value in means.items():
        found = nested.setdefault(scenario, {}).setdefault(victim, {}).setdefault(defense, {})
        found[metric] = round(value, 6)
    return nested


def over_seeds(rows: pd.DataFrame, largest: float = 1.0) -> tuple[float, float, float]:
    """(mean, low, high) of one metric, a row a seed; NaN for no row.

    The 95 % interval is Student's t over random seeds, cut to [0, `largest`]; with a single one it is that
    of the share over test images.
    """
    if rows.empty:
        return np.nan, np.nan, np.nan
    mean, low, high = metrics.t_interval(rows["value"])
    if len(rows) == 1:
        low, high = rows.iloc[0][["low", "high"]].astype(float)
    return mean, *np.clip([low, high], 0, largest)


def overview(results: pd.DataFrame) -> pd.DataFrame:
    """One row per cell without its seed: outcomes with sd and `over_seeds`, n seeds, mean cost."""
    lines = []
    for key, cell in results.groupby(CELL, sort=True):
        line = dict(zip(CELL, key, strict=True)) | {"n": cell["seed"].nunique()}
        for metric in OUTCOMES:
            rows = cell[(cell["stage"] == "test") & (cell["metric"] == metric)]
            mean, low, high = over_seeds(rows)
            sd = rows["value"].std()
            line |= {f"{metric}_mean": mean, f"{metric}_sd": sd, f"{metric}_low": low, f"{metric}_high": high}
        line["chance"] = cell.loc[cell["metric"] == "chance", "value"].mean()
        cost = cell[cell["stage"] == "cost"].groupby("metric")["value"].mean()
        line |= {metric: cost.get(metric, np.nan) for metric in COSTS}
        notes = cell["note"].dropna() if "note" in cell else pd.Series(dtype=str)
        lines.append(line | {"note": notes.iloc[0] if len(notes) else ""})
    rank = {"scenario": grid.SCENARIOS.index, "defense": lambda name: (name != "none", name)}
    order = ["scenario", *CELL[:4], "defense"]
    return pd.DataFrame(sorted(lines, key=lambda line: [rank.get(k, str)(line[k]) for k in order]))
