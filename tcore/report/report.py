"""The report: one HTML file that needs nothing else, made from the results and the files behind them.

Numbers come from `results.parquet`; pictures and channel masks from the folders of
docs/develop/architecture.md, for the first random seed of each victim (`closeups`). Several defences are set
side by side (`leaderboard`); where there are many cells the long tables fold away. What is not there is left
out, and the page says so.
"""

import json
import os
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from tcore.evaluation import leaderboard, results
from tcore.evaluation.leaderboard import RATES, VICTIM
from tcore.files import InputError, load_json
from tcore.report import charts, closeups
from tcore.report.closeups import where
from tcore.running.record import CONFIG

ASR_LINE = 0.10  # a defence has failed where an attack succeeds more often than this
ACC_LOSS = 0.05  # ... or where it costs more accuracy than this
ACC_FLOOR = 2  # ... or where accuracy is at most this many times that of naming one class for all
WEAK = 0.50  # an attack that succeeds less often than this without a defence proves little
DETAILED = 12  # victims shown with pictures and curves
SCENARIOS = {
    "clean": "nothing poisoned",
    "T1": "poisoned encoder, clean data set",
    "T2": "clean encoder, poisoned data set",
    "T3": "both poisoned, one shared trigger",
    "T1+T2": "both poisoned, a trigger each",
}
LARGE = 24  # rows of victims and defences above which the page is laid out for many
TOLD = 4  # defences above which the summary speaks of T-Core alone and leaves the others to the tables
FAILURES = 10  # told one by one; the table has all
CURVES = 250  # victims of a large grid with a purity curve


def percent(value: float) -> str:
    return "\u2013" if pd.isna(value) else f"{100 * value:.1f}\u00a0%"


def points(change: float) -> str:
    return f"{100 * change:+.1f}".replace("-", "\u2212") + " points"


def _span(values: pd.Series, of: str = "") -> str:
    """'9.1 % of cases' for one value, else the mean with the range."""
    values = values.dropna()
    text = percent(values.mean()) + of
    if len(values) == 1:
        return text
    return f"{text} on average ({percent(values.min())} to {percent(values.max())})"


def outcomes(table: pd.DataFrame) -> list[dict]:
    """Per victim and defence of `results.overview`: outcomes, change against no defence, verdict."""
    rows = []
    for key, group in table.groupby(VICTIM, sort=False):
        bare = group[group["defense"] == "none"]
        for position, (_, line) in enumerate(group.iterrows()):
            row = dict(zip(VICTIM, key, strict=True)) | {"defense": line["defense"], "n": line["n"]}
            row["seconds"] = line["seconds"]
            row |= {"first": len(group) if position == 0 else 0, "numbers": {}, "note": line["note"]}
            for metric in results.OUTCOMES:
                mean, low, high = (line[f"{metric}_{part}"] for part in ("mean", "low", "high"))
                before = bare[f"{metric}_mean"].iloc[0] if len(bare) else np.nan
                row["numbers"][metric] = {"mean": mean, "low": low, "high": high, "before": before}
            found = row["numbers"]
            row["missed"] = [m for m in RATES if found[m]["mean"] >= ASR_LINE]
            row["change"] = found["acc"]["mean"] - found["acc"]["before"]
            row["lossy"] = bool(row["change"] < -ACC_LOSS)
            row["guesses"] = bool(found["acc"]["mean"] <= ACC_FLOOR * line["chance"])
            row["held"] = not (row["missed"] or row["lossy"] or row["guesses"])
            rows.append(row)
    return rows


def narrative(table: pd.DataFrame, rows: list[dict]) -> dict[str, list[str]]:
    """The summary in sentences, every number from `results.overview`.

    What was `run`, how it went (`found`), where a defence or an attack `failed`.
    """
    victims, seeds = len(table[VICTIM].drop_duplicates()), int(table["n"].max())
    pairs = [f"{a} → {b}" for a, b in table[VICTIM[:2]].drop_duplicates().itertuples(index=False)]
    run = (
        "One stranger pre-trains an encoder, another labels a data set, a user joins the two: "
        f"{', '.join(pairs)}. {victims} {'case was' if victims == 1 else 'cases were'} built, "
        f"{'each once' if seeds == 1 else f'each with up to {seeds} random seeds'}."
    )
    found, told = [], table["defense"].drop_duplicates().sort_values(key=lambda names: names != "none")
    if len(told) > TOLD:
        told = told[told.isin(["none", "tcore"])]
    for defense in told:
        own = table[table["defense"] == defense]
        own = own[own["note"] == ""]
        if own.empty:
            found.append(f"{title(defense)} could not be applied anywhere.")
            continue
        with_it = "Without a defence" if defense == "none" else f"With {title(defense)}"
        sentence = f"{with_it}, accuracy on clean test images is {_span(own['acc_mean'])}"
        rates = own[[f"{metric}_mean" for metric in RATES]].stack().dropna()
        if len(rates):
            sentence += (
                f"; a triggered image is taken for the attacker's class in {_span(rates, ' of cases')}"
            )
        found.append(sentence + ".")
    failed = [text for row in rows if row["defense"] in set(told) for text in _failures(row)]
    if len(failed) > FAILURES:
        failed[FAILURES:] = [f"{len(failed) - FAILURES:,} more stand in the table of all cells."]
    return {"run": [run], "found": found, "failed": failed}


def _failures(row: dict) -> list[str]:
    name, place, texts = title(row["defense"]), where(row), []
    for metric, trigger in RATES.items():
        rate = row["numbers"][metric]["mean"]
        if row["defense"] == "none" and rate < WEAK:
            texts.append(
                f"The attack itself is weak: {trigger} succeeds in only {percent(rate)} of cases "
                f"without a defence ({place})."
            )
        if row["defense"] != "none" and metric in row["missed"]:
            line = f"{100 * ASR_LINE:.0f} %"
            texts.append(
                f"{name} missed the {line} line: {trigger} succeeds in {percent(rate)} of cases ({place})."
            )
    if row["guesses"]:
        accuracy = percent(row["numbers"]["acc"]["mean"])
        texts.append(f"{name} leaves a model that guesses: {accuracy} accuracy ({place}).")
    if row["lossy"]:
        limit = f"{100 * ACC_LOSS:.0f} points"
        texts.append(f"{name} costs more than {limit} of accuracy: {points(row['change'])} ({place}).")
    return texts


def title(defense: str) -> str:
    return {"none": "no defence", "tcore": "T-Core"}.get(defense, defense)


def detections(found: pd.DataFrame) -> list[dict]:
    """Per victim and detector, means over random seeds: what it dropped, AUROCs, the cleanest per class."""
    own = found[found["stage"].isin(["detect", "cleanest", "inputs"])]
    lines = []
    for key, cell in own.groupby([*VICTIM, "defense"], sort=True):
        value = cell.groupby("metric")["value"].mean()
        line = dict(zip([*VICTIM, "defense"], key, strict=True)) | value.to_dict()
        line["in_use"] = [value[metric] for metric in ("auroc_encoder", "auroc_dataset") if metric in value]
        lines.append(line)
    return sorted(lines, key=lambda line: list(SCENARIOS).index(line["scenario"]))


def before_and_after(rows: list[dict]) -> dict[str, Markup]:
    """The two before-and-after charts, {} where no defence was run beside `none`."""
    guarded = [row for row in rows if row["defense"] != "none"]
    pairs = len({(row["pretrain"], row["downstream"]) for row in rows}) > 1
    several = len({row["defense"] for row in guarded}) > 1

    def line(row: dict, metric: str, attack: str, bad: bool) -> dict:
        parts = [row["scenario"], attack]
        parts += [f"{row['pretrain']}→{row['downstream']}"] * pairs + [row["defense"]] * several
        number = row["numbers"][metric]
        return {"name": " · ".join(parts), "before": number["before"], "after": number["mean"], "bad": bad}

    asr = [
        line(
            row,
            metric,
            row["encoder_attack" if metric == "asr_encoder" else "dataset_attack"],
            metric in row["missed"],
        )
        for row in guarded
        for metric in RATES
    ]
    acc = [line(r, "acc", f"{r['encoder_attack']} + {r['dataset_attack']}", r["lossy"]) for r in guarded]
    asr, acc = ([x for x in found if not np.isnan(x["before"] + x["after"])] for found in (asr, acc))
    drawn = {}
    if asr:
        drawn["asr"] = Markup(charts.before_after(asr, ASR_LINE, "Attack success without and with a defence"))
    if acc:
        low = np.floor(10 * min(min(x["before"], x["after"]) for x in acc) - 0.5) / 10
        drawn["acc"] = Markup(
            charts.before_after(acc, None, "Accuracy without and with a defence", low=max(0.0, min(low, 0.8)))
        )
    return drawn


def costs(records: list[dict]) -> list[dict]:
    """Per kind of step, dearest first: runs, mean and total seconds, peak memory."""
    if not records:
        return []
    table = pd.DataFrame(records).astype({"peak_ram_mb": float, "peak_gpu_mb": float})
    steps = table.groupby("step").agg(
        runs=("seconds", "size"),
        mean=("seconds", "mean"),
        total=("seconds", "sum"),
        ram=("peak_ram_mb", "max"),
        gpu=("peak_gpu_mb", "max"),
    )
    return (
        steps.assign(part=steps["total"] / steps["total"].max())
        .sort_values("total", ascending=False)
        .reset_index()
        .to_dict("records")
    )


def provenance(found: pd.DataFrame, records: list[dict]) -> dict:
    settings: dict[str, set] = {}
    for record in records:
        settings.setdefault(record["step"], set()).add(
            json.dumps(record["settings"], indent=1, sort_keys=True)
        )
    return {
        "config": os.environ.get(CONFIG),
        "commits": sorted({record["commit"] for record in records if record.get("commit")}),
        "seconds": sum(record["seconds"] for record in records),
        "versions": results.versions(records),
        "devices": sorted({record["device"] for record in records}),
        "seeds": sorted(int(seed) for seed in found["seed"].unique()),
        "configs": found.drop_duplicates(results.IDENTITY)[[*results.IDENTITY, "config"]].to_dict("records"),
        "settings": {
            step: sorted(texts - {"{}"}) for step, texts in sorted(settings.items()) if texts - {"{}"}
        },
    }


def build(found: pd.DataFrame, data: Path, planned: int = 0) -> dict:
    """Everything the template shows, from the table of all cells and the folder `data`.

    `planned` is the number of cells in the grid: a page about fewer says so.
    """
    if found.empty:
        raise InputError("--results: no cell in it; run at least one scenario")
    overview = results.overview(found)
    rows, notes = outcomes(overview), []
    cells = overview[results.CELL].merge(found[results.IDENTITY].drop_duplicates())
    if len(cells) < planned:
        notes.append(f"{len(cells)} of {planned} cells of the grid are there.")
    large = len(rows) > LARGE
    victims = cells.drop_duplicates(VICTIM)
    pictured = victims.drop_duplicates(["encoder_attack", "dataset_attack"]) if large else victims
    opened = look_inside(found, data, cells, notes, large)
    number = {tuple(cell[key] for key in VICTIM): number for number, cell in enumerate(opened)}
    rows = [row | {"inside": number.get(tuple(row[key] for key in VICTIM))} for row in rows]
    wanted = {folder for cell in cells.to_dict("records") for folder in results.folders(cell).values()}
    records = [
        load_json(path) for folder in sorted(wanted) for path in sorted((data / folder).glob("*.run.json"))
    ]
    if not records:
        notes.append("No run records: costs and versions are unknown.")
    return {
        "large": large,
        "text": narrative(overview, rows),
        "rows": rows,
        "charts": {} if large else before_and_after(rows),
        "comparison": comparison(rows, found),
        "detections": detections(found),
        "gallery": closeups.gallery(data, pictured[:DETAILED].to_dict("records"), notes),
        "details": opened,
        "costs": costs(records),
        "provenance": provenance(found, records),
        "scenarios": {name: text for name, text in SCENARIOS.items() if name in set(found["scenario"])},
        "line": ASR_LINE,
        "loss": ACC_LOSS,
        "floor": ACC_FLOOR,
        "notes": list(dict.fromkeys(notes)),
    }


def comparison(rows: list[dict], found: pd.DataFrame) -> dict:
    """Heat maps, leaderboards, cost against benefit; {} for fewer than two defences beside `none`."""
    if len({row["defense"] for row in rows} - {"none"}) < 2:
        return {}
    benefits = leaderboard.benefits(rows)
    drawn = charts.benefit(
        [point | {"name": title(point["name"]), "bad": point["change"] < -ACC_LOSS} for point in benefits],
        "Seconds of a defence against the fall of attack success",
    )
    return {
        "heatmaps": leaderboard.heatmaps(rows),
        "boards": leaderboard.boards(rows, found),
        "benefit": Markup(drawn) if benefits else "",
    }


def look_inside(
    found: pd.DataFrame, data: Path, cells: pd.DataFrame, notes: list[str], large: bool
) -> list[dict]:
    """T-Core's victims: pictures and curves of the first ones, of a large grid curves of the others."""
    staged = cells[cells["defense"] == "tcore"].merge(
        found.loc[found["stage"] == "sift", results.IDENTITY].drop_duplicates()
    )
    staged = staged.drop_duplicates(VICTIM).to_dict("records")
    if len(staged) > DETAILED:
        kind = "Pictures" if large else "Pictures and curves"
        notes.append(f"{kind} for the first {DETAILED} of {len(staged)} defended victims.")
    if len(staged) > CURVES:
        notes.append(f"Curves for the first {CURVES} of {len(staged)} defended victims.")
    by_cell, opened = dict(list(found.groupby(results.IDENTITY))), []
    for position, cell in enumerate(staged[: CURVES if large else DETAILED]):
        own = by_cell[tuple(cell[key] for key in results.IDENTITY)]
        seen = closeups.inside(own, data, cell, notes) if position < DETAILED else None
        if seen is None and large:
            seen = closeups.curve(own, cell)
        if seen is not None:
            opened.append({key: cell[key] for key in VICTIM} | seen)
    return opened


def render(context: dict, template: Path) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "title_of": title}
    return environment.get_template(template.name).render(context)
