"""The report: one HTML file that needs nothing else, made from the results and the files behind them.

Numbers come from `results.parquet`; pictures and channel masks from the folders of
docs/architecture.md, for the first seed of each victim. What is not there is left out, and the page says so.
"""

import json
from functools import lru_cache
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import torch
from markupsafe import Markup

from tcore import figures, metrics, results, triggers
from tcore.data.images import ImageSet, read_images
from tcore.files import InputError, load_json, load_table, load_tensors

ASR_LINE = 0.10  # a defence has failed where an attack succeeds more often than this
ACC_LOSS = 0.05  # ... or where it costs more accuracy than this
WEAK = 0.50  # an attack that succeeds less often than this without a defence proves little
RATES = {"asr_encoder": "the encoder's trigger", "asr_dataset": "the data set's trigger"}
DETAILED = 12  # victims shown with pictures and curves
SCENARIOS = {
    "clean": "nothing poisoned",
    "T1": "poisoned encoder, clean data set",
    "T2": "clean encoder, poisoned data set",
    "T3": "both poisoned, one shared trigger",
    "T1+T2": "both poisoned, a trigger each",
}
VICTIM = results.CELL[:-1]  # a cell without its defence
STAGES = {"sift": "seeds", "expand": "clean subset", "bootstrap": "clean pool"}

_read_images = lru_cache(maxsize=3)(read_images)


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
            row |= {"first": len(group) if position == 0 else 0, "numbers": {}, "note": line["note"]}
            for metric in results.OUTCOMES:
                mean, low, high = (line[f"{metric}_{part}"] for part in ("mean", "low", "high"))
                before = bare[f"{metric}_mean"].iloc[0] if len(bare) else np.nan
                row["numbers"][metric] = {"mean": mean, "low": low, "high": high, "before": before}
            found = row["numbers"]
            row["missed"] = [m for m in RATES if found[m]["mean"] >= ASR_LINE]
            row["change"] = found["acc"]["mean"] - found["acc"]["before"]
            row["lossy"] = bool(row["change"] < -ACC_LOSS)
            rows.append(row)
    return rows


def _where(row: dict) -> str:
    attacks = f"{row['encoder_attack']} + {row['dataset_attack']}"
    return f"{row['scenario']}, {attacks}, {row['pretrain']} → {row['downstream']}"


def narrative(table: pd.DataFrame, rows: list[dict]) -> dict[str, list[str]]:
    """The summary in sentences, every number from `results.overview`.

    What was `run`, how it went (`found`), where a defence or an attack `failed`.
    """
    victims, seeds = len(table[VICTIM].drop_duplicates()), int(table["n"].max())
    pairs = [f"{a} → {b}" for a, b in table[VICTIM[:2]].drop_duplicates().itertuples(index=False)]
    run = (
        "One stranger pre-trains an encoder, another labels a data set, a user joins the two: "
        f"{', '.join(pairs)}. {victims} {'case was' if victims == 1 else 'cases were'} built, "
        f"{'each once' if seeds == 1 else f'each with up to {seeds} seeds'}."
    )
    found = []
    for defense in table["defense"].drop_duplicates().sort_values(key=lambda names: names != "none"):
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
    return {"run": [run], "found": found, "failed": [text for row in rows for text in _failures(row)]}


def _failures(row: dict) -> list[str]:
    name, where, texts = title(row["defense"]), _where(row), []
    for metric, trigger in RATES.items():
        rate = row["numbers"][metric]["mean"]
        if row["defense"] == "none" and rate < WEAK:
            texts.append(
                f"The attack itself is weak: {trigger} succeeds in only {percent(rate)} of cases "
                f"without a defence ({where})."
            )
        if row["defense"] != "none" and metric in row["missed"]:
            line = f"{100 * ASR_LINE:.0f} %"
            texts.append(
                f"{name} missed the {line} line: {trigger} succeeds in {percent(rate)} of cases ({where})."
            )
    if row["lossy"]:
        limit = f"{100 * ACC_LOSS:.0f} points"
        texts.append(f"{name} costs more than {limit} of accuracy: {points(row['change'])} ({where}).")
    return texts


def title(defense: str) -> str:
    return {"none": "no defence", "tcore": "T-Core"}.get(defense, defense)


def detections(found: pd.DataFrame) -> list[dict]:
    """Per victim and detector, means over seeds: what it dropped, AUROCs, the cleanest of each class."""
    own = found[found["stage"].isin(["detect", "cleanest", "inputs"])]
    lines = []
    for key, cell in own.groupby([*VICTIM, "defense"], sort=True):
        value = cell.groupby("metric")["value"].mean()
        line = dict(zip([*VICTIM, "defense"], key, strict=True)) | value.to_dict()
        line["in_use"] = [value[metric] for metric in ("auroc_encoder", "auroc_dataset") if metric in value]
        lines.append(line)
    return sorted(lines, key=lambda line: list(SCENARIOS).index(line["scenario"]))


def charts(rows: list[dict]) -> dict[str, Markup]:
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
        drawn["asr"] = Markup(
            figures.before_after(asr, ASR_LINE, "Attack success without and with a defence")
        )
    if acc:
        low = np.floor(10 * min(min(x["before"], x["after"]) for x in acc) - 0.5) / 10
        drawn["acc"] = Markup(
            figures.before_after(
                acc, None, "Accuracy without and with a defence", low=max(0.0, min(low, 0.8))
            )
        )
    return drawn


def gallery(data: Path, cells: list[dict], notes: list[str], count: int = 6) -> list[dict]:
    """Per trigger: clean test images, the same images triggered, their difference magnified.

    For a poisoned data set the same of some poisons and covers, which may carry another trigger in training.
    """
    shown: dict[Path, dict] = {}
    for cell in cells:
        places = results.folders(cell)
        sides = {"encoder": places["encoder"]}
        if cell["dataset_attack"] != "adaptive":
            sides["dataset"] = places["poisoned"]
        for side, folder in sides.items():
            path = data / folder / "trigger.safetensors"
            if path in shown or cell[f"{side}_attack"] == "clean":
                continue
            test_path = data / places["downstream"] / "test.parquet"
            if not (path.is_file() and test_path.is_file()):
                notes.append(
                    f"No pictures of {cell[f'{side}_attack']}: its trigger or the test images are not there."
                )
                continue
            stamp, meta = triggers.load(path)
            test = _read_images(test_path)
            target, goals = meta["target"], meta.get("goals")
            rows = _one_of_each(test, target, goals, count)
            images = test.tensor[rows]
            names = [test.class_names[label] for label in test.labels[rows]]
            attacked = [c for c, goal in enumerate(goals or ()) if goal >= 0]
            shown[path] = {
                "attack": meta["attack"],
                "side": side,
                "where": f"{cell['pretrain']} → {cell['downstream']}",
                "target": "the class after its own" if target is None else test.class_names[target],
                "sources": [test.class_names[c] for c in attacked] if target is not None else [],
                "training": _training(data / places["downstream"], data / folder, count, notes)
                if side == "dataset"
                else None,
                **_strip(images, stamp(images), names),
            }
    return list(shown.values())


def _strip(clean: torch.Tensor, changed: torch.Tensor, names: list[str]) -> dict:
    """Images before and after, their difference magnified by `factor`, and how much there is of it."""
    magnified, factor = figures.difference(clean, changed)
    stacks = [clean, changed, magnified]
    return {
        "factor": factor,
        "largest": int(magnified.max()) // factor,
        "touched": float((magnified > 0).any(1).float().mean()),
        "images": [
            {"name": name, "views": [figures.image_uri(_array(stack[i])) for stack in stacks]}
            for i, name in enumerate(names)
        ],
    }


def _training(clean: Path, received: Path, count: int, notes: list[str]) -> dict | None:
    """`_strip` of poisons and, where there are any, two covers of a poisoned set."""
    files = [clean / "train.parquet", received / "train.parquet", received / "truth.parquet"]
    if gone := [file.name for file in files if not file.is_file()]:
        notes.append(f"No pictures of poisons in {received.parent.name}: {', '.join(gone)} not there.")
        return None
    before, after, truth = _read_images(files[0]), _read_images(files[1]), load_table(files[2])
    covers = _spread(np.flatnonzero(truth["is_cover"]), 2)
    poisons = _spread(np.flatnonzero(truth["is_poison"]), count - len(covers))
    was, given = (np.array(images.class_names)[images.labels] for images in (before, after))
    names = [was[i] if was[i] == given[i] else f"{was[i]} → {given[i]}" for i in poisons]
    names += [f"{was[i]}, cover" for i in covers]
    rows = np.concatenate([poisons, covers])
    return _strip(before.tensor[rows], after.tensor[rows], names) if len(rows) else None


def _array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def _one_of_each(test: ImageSet, target: int | None, goals: list[int] | None, count: int) -> np.ndarray:
    """The first image of up to `count` classes other than the target, those that are aimed at in front."""
    present, first = np.unique(test.labels, return_index=True)
    aimed = metrics.goals(present, target if goals is None else goals) >= 0
    front = _spread(first[aimed], count)
    return np.concatenate([front, _spread(first[~aimed & (present != target)], count - len(front))])


def _spread(items: np.ndarray, count: int) -> np.ndarray:
    """Up to `count` of the items at even distances."""
    places = np.linspace(0, len(items) - 1, count if len(items) else 0)
    return items[np.unique(places.astype(int))]


def _stages(found: pd.DataFrame) -> tuple[dict[str, list[dict]], dict]:
    """`size` and `poisons` after every step of a cell's stages, and of the whole data set."""
    rows = found[found["metric"].isin(["size", "poisons"])].assign(step=found["step"].fillna(0))
    wide = rows.pivot_table(index=["stage", "step"], columns="metric", values="value").astype(int)
    stages = {
        title: wide.loc[stage].to_dict("records") for stage, title in STAGES.items() if stage in wide.index
    }
    return stages, wide.loc["data"].to_dict("records")[0]


def _targets(data: Path, cell: dict) -> dict[int, str]:
    """Class -> whose target it is."""
    aims: dict[int, list[str]] = {}
    for side, folder in (("encoder", "encoder"), ("data set", "poisoned")):
        path = data / results.folders(cell)[folder] / "trigger.safetensors"
        target = triggers.load(path)[1]["target"] if path.is_file() else None
        if target is not None:
            aims.setdefault(target, []).append(side)
    return {target: f"target ({' and '.join(sides)})" for target, sides in aims.items()}


def inside(found: pd.DataFrame, data: Path, cell: dict, notes: list[str]) -> dict | None:
    """What happened inside one defended cell: purity, class balance, channels, what stayed outside.

    `found` are the cell's rows of the results. None, and a note, where a file is missing.
    """
    name, place = _where(cell), results.folders(cell)
    files = {
        file: data / place[folder] / file
        for folder, file in (
            ("defended", "subset.parquet"),
            ("defended", "pool.parquet"),
            ("defended", "channels.safetensors"),
            ("poisoned", "truth.parquet"),
            ("poisoned", "train.parquet"),
        )
    }
    gone = [file for file, path in files.items() if not path.is_file()]
    if gone:
        notes.append(f"No look inside {name}: {', '.join(gone)} not there.")
        return None
    images = _read_images(files["train.parquet"])
    subset, pool, truth = (
        load_table(files[f"{table}.parquet"]).set_index("index").loc[images.index]
        for table in ("subset", "pool", "truth")
    )
    mark = np.select([truth["is_poison"], truth["is_cover"]], ["poison", "cover"], "clean")
    trusted, poison = pool["round"].to_numpy() >= 0, mark == "poison"
    sets = {
        "received": np.full(len(images), True),
        "subset": subset["round"].to_numpy() >= 0,
        "pool": trusted,
    }
    counts = {
        part: np.bincount(images.labels[chosen], minlength=images.num_classes)
        for part, chosen in sets.items()
    }
    tensors, _ = load_tensors(files["channels.safetensors"])
    layers = [
        (layer, tensors[f"mask.{layer}"].numpy(), tensors[f"untrusted.{layer}"].numpy().astype(bool))
        for layer in results.layers(tensors)
    ]
    stages, total = _stages(found)

    def pictures(rows: np.ndarray) -> list[dict]:
        return [
            {
                "uri": figures.image_uri(images.pixels[row]),
                "mark": mark[row],
                "name": images.class_names[images.labels[row]],
            }
            for row in rows
        ]

    purity = figures.purity(stages, total["size"], total["poisons"], f"Purity through the stages: {name}")
    classes = figures.classes(
        counts, images.class_names, _targets(data, cell), f"Share of each class: {name}"
    )
    return {
        "title": name,
        "seed": cell["seed"],
        "purity": Markup(purity),
        "classes": Markup(classes),
        "masks": Markup(figures.masks(layers, f"Channel masks: {name}")),
        "untrusted": sum(int(untrusted.sum()) for _, _, untrusted in layers),
        "channels": sum(len(untrusted) for _, _, untrusted in layers),
        "poisons": int(poison.sum()),
        "left": int((~trusted).sum()),
        "left_poisons": int((poison & ~trusted).sum()),
        "slipped": int((poison & trusted).sum()),
        "outside": pictures(_spread(np.flatnonzero(~trusted), 12)),
        "inside": pictures(_spread(np.flatnonzero(poison & trusted), 6)),
        "empty": [
            images.class_names[i] for i in np.flatnonzero((counts["pool"] == 0) & (counts["received"] > 0))
        ],
    }


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
    victims = cells.drop_duplicates(VICTIM).to_dict("records")
    with_stages = cells.merge(found.loc[found["stage"] == "sift", results.IDENTITY].drop_duplicates())
    opened = with_stages.drop_duplicates([*VICTIM, "defense"]).to_dict("records")
    if len(opened) > DETAILED:
        notes.append(f"Pictures and curves for the first {DETAILED} of {len(opened)} defended victims.")
    details = []
    for cell in opened[:DETAILED]:
        own = found[(found[results.IDENTITY] == pd.Series(cell)[results.IDENTITY]).all(axis=1)]
        details.append(inside(own, data, cell, notes))
    wanted = {folder for cell in cells.to_dict("records") for folder in results.folders(cell).values()}
    records = [
        load_json(path) for folder in sorted(wanted) for path in sorted((data / folder).glob("*.run.json"))
    ]
    if not records:
        notes.append("No run records: costs and versions are unknown.")
    return {
        "text": narrative(overview, rows),
        "rows": rows,
        "charts": charts(rows),
        "detections": detections(found),
        "gallery": gallery(data, victims[:DETAILED], notes),
        "details": [detail for detail in details if detail],
        "costs": costs(records),
        "provenance": provenance(found, records),
        "scenarios": {name: text for name, text in SCENARIOS.items() if name in set(found["scenario"])},
        "line": ASR_LINE,
        "loss": ACC_LOSS,
        "notes": list(dict.fromkeys(notes)),
    }


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
