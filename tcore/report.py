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

from tcore import figures, registry, results
from tcore.data.images import ImageSet, read_images
from tcore.files import InputError, load_json, load_table, load_tensors

ASR_LINE = 0.10  # a defence has failed where an attack succeeds more often than this
ACC_LOSS = 0.05  # ... or where it costs more accuracy than this
WEAK = 0.50  # an attack that succeeds less often than this without a defence proves little
DETAILED = 12  # victims shown with pictures and curves
SCENARIOS = {
    "clean": "nothing poisoned",
    "T1": "poisoned encoder, clean data set",
    "T2": "clean encoder, poisoned data set",
    "T3": "both poisoned, one shared trigger",
    "T1+T2": "both poisoned, a trigger each",
}
VICTIM = ["pretrain", "downstream", "encoder_attack", "dataset_attack", "scenario"]
STAGE_NAMES = {"sift": "seeds", "expand": "clean subset", "bootstrap": "clean pool"}

_read_images = lru_cache(maxsize=2)(read_images)


def percent(value: float) -> str:
    return "–" if pd.isna(value) else f"{100 * value:.1f}\u00a0%"


def points(change: float) -> str:
    return f"{100 * change:+.1f}".replace("-", "−") + " points"


def _span(values: pd.Series) -> str:
    """'9.1 %' for one value, else the mean with the range."""
    values = values.dropna()
    text = percent(values.mean())
    return text if len(values) == 1 else f"{text} (from {percent(values.min())} to {percent(values.max())})"


def outcomes(table: pd.DataFrame) -> list[dict]:
    """Per victim and defence of `results.overview`: outcomes, change against no defence, verdict."""
    rows = []
    for key, group in table.groupby(VICTIM, sort=False):
        group = group.sort_values("defense", key=lambda names: names != "none", kind="stable")
        bare = group[group["defense"] == "none"]
        for position, (_, line) in enumerate(group.iterrows()):
            row = dict(zip(VICTIM, key, strict=True)) | {"defense": line["defense"], "n": line["n"]}
            row |= {"first": len(group) if position == 0 else 0, "numbers": {}}
            for metric in results.OUTCOMES:
                mean, low, high = (line[f"{metric}_{part}"] for part in ("mean", "low", "high"))
                before = bare[f"{metric}_mean"].iloc[0] if len(bare) else np.nan
                row["numbers"][metric] = {"mean": mean, "low": low, "high": high, "before": before}
            found = row["numbers"]
            row["missed"] = [m for m in results.OUTCOMES[1:] if found[m]["mean"] >= ASR_LINE]
            row["change"] = found["acc"]["mean"] - found["acc"]["before"]
            row["lossy"] = bool(row["change"] < -ACC_LOSS)
            rows.append(row)
    return rows


def _where(row: dict) -> str:
    return f"{row['scenario']}, {row['encoder_attack']} + {row['dataset_attack']}, {row['pretrain']} → {row['downstream']}"


def narrative(table: pd.DataFrame, rows: list[dict]) -> dict[str, list[str]]:
    """The summary in sentences, every number from the table: what was `run`, `bare`, `defended`, what `failed`."""
    bare, guarded = [r for r in rows if r["defense"] == "none"], [r for r in rows if r["defense"] != "none"]
    attack_rates = table[[f"{metric}_mean" for metric in results.OUTCOMES[1:]]]
    victims, seeds = len(table[VICTIM].drop_duplicates()), int(table["n"].max())
    pairs = [f"{a} → {b}" for a, b in table[VICTIM[:2]].drop_duplicates().itertuples(index=False)]
    text = {
        "run": [
            f"An encoder is pre-trained by one stranger, a data set labelled by another, and a user joins the two: "
            f"{', '.join(pairs)}. {victims} {'victim was' if victims == 1 else 'victims were'} built, "
            f"{'each once' if seeds == 1 else f'each with {seeds} seeds'}, and trained without and with a defence."
        ],
        "bare": [],
        "defended": [],
        "failed": [],
    }
    without = table["defense"] == "none"
    if without.any():
        sentence = f"Without a defence, accuracy on clean test images is {_span(table.loc[without, 'acc_mean'])}"
        rates = attack_rates[without].stack().dropna()
        if len(rates):
            sentence += f"; a trigger sends images of other classes to the attacker's class in {_span(rates)} of cases"
        text["bare"].append(sentence + ".")
    for defense in sorted({row["defense"] for row in guarded}):
        own = table["defense"] == defense
        rates = attack_rates[own].stack().dropna()
        sentence = f"With {title(defense)}, accuracy is {_span(table.loc[own, 'acc_mean'])}"
        if len(rates):
            sentence += f" and triggers succeed in {_span(rates)} of cases"
        text["defended"].append(sentence + ".")
    for row in guarded:
        for metric in row["missed"]:
            text["failed"].append(
                f"{title(row['defense'])} missed the {100 * ASR_LINE:.0f} % line: {_name(metric)} at "
                f"{percent(row['numbers'][metric]['mean'])} ({_where(row)})."
            )
        if row["lossy"]:
            text["failed"].append(
                f"{title(row['defense'])} costs more than {100 * ACC_LOSS:.0f} points of accuracy: "
                f"{points(row['change'])} ({_where(row)})."
            )
    for row in bare:
        for metric in results.OUTCOMES[1:]:
            if row["numbers"][metric]["mean"] < WEAK:
                text["failed"].append(
                    f"The attack itself is weak: {_name(metric)} without a defence only "
                    f"{percent(row['numbers'][metric]['mean'])} ({_where(row)}), so little follows from its defeat."
                )
    return text


def title(defense: str) -> str:
    return {"none": "no defence", "tcore": "T-Core"}.get(defense, defense)


def _name(metric: str) -> str:
    return {"asr_encoder": "the encoder's trigger", "asr_dataset": "the data set's trigger"}.get(metric, metric)


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
        line(row, metric, row["encoder_attack" if metric == "asr_encoder" else "dataset_attack"], metric in row["missed"])
        for row in guarded
        for metric in results.OUTCOMES[1:]
    ]
    acc = [line(r, "acc", f"{r['encoder_attack']} + {r['dataset_attack']}", r["lossy"]) for r in guarded]
    asr, acc = ([x for x in found if not np.isnan(x["before"] + x["after"])] for found in (asr, acc))
    drawn = {}
    if asr:
        drawn["asr"] = Markup(figures.before_after(asr, ASR_LINE, "Attack success without and with a defence"))
    if acc:
        low = np.floor(10 * min(min(x["before"], x["after"]) for x in acc) - 0.5) / 10
        drawn["acc"] = Markup(
            figures.before_after(acc, None, "Accuracy without and with a defence", low=max(0.0, min(low, 0.8)))
        )
    return drawn


def gallery(data: Path, cells: list[dict], notes: list[str], count: int = 6) -> list[dict]:
    """Per trigger: clean test images, the same images triggered, their difference magnified."""
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
                notes.append(f"No pictures of {cell[f'{side}_attack']}: its trigger or the test images are not there.")
                continue
            tensors, meta = load_tensors(path)
            test = _read_images(test_path)
            rows = _one_of_each(test, meta["target"], count)
            images = test.tensor[rows]
            triggered = registry.load(meta["family"], meta["attack"]).stamp(images, tensors)
            difference = (triggered.int() - images.int()).abs()
            factor = max(1, 255 // max(1, int(difference.max())))
            stacks = [images, triggered, (difference * factor).to(torch.uint8)]
            shown[path] = {
                "attack": meta["attack"],
                "side": side,
                "where": f"{cell['pretrain']} → {cell['downstream']}",
                "target": test.class_names[meta["target"]],
                "factor": factor,
                "largest": int(difference.max()),
                "touched": float((difference > 0).any(1).float().mean()),
                "images": [
                    {"name": test.class_names[label], "views": [figures.image_uri(_array(s[i])) for s in stacks]}
                    for i, label in enumerate(test.labels[rows])
                ],
            }
    return list(shown.values())


def _array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def _one_of_each(test: ImageSet, target: int, count: int) -> np.ndarray:
    """The first image of up to `count` classes other than the target, spread over the class list."""
    present, first = np.unique(test.labels, return_index=True)
    first = first[present != target]
    return first[np.unique(np.linspace(0, len(first) - 1, min(count, len(first))).astype(int))]


def _spread(items: np.ndarray, count: int) -> np.ndarray:
    """Up to `count` of the items at even distances."""
    return items[np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))] if len(items) else items


def _steps(found: pd.DataFrame) -> tuple[list[dict], dict]:
    """(`stage`, `size`, `poisons`) after every step of a cell's stages, and the same of the whole data set."""
    rows = found[found["metric"].isin(["size", "poisons"])].assign(step=found["step"].fillna(0))
    wide = rows.pivot_table(index=["stage", "step"], columns="metric", values="value").astype(int)
    steps = [
        {"stage": name} | line
        for stage, name in STAGE_NAMES.items()
        if stage in wide.index
        for line in wide.loc[stage].to_dict("records")
    ]
    return steps, wide.loc["data"].to_dict("records")[0]


def inside(found: pd.DataFrame, data: Path, cell: dict, notes: list[str]) -> dict | None:
    """What happened inside one defended cell: purity, class balance, channels, what stayed outside."""
    where = results.folders(cell)
    folder, source = data / where["defended"], data / where["poisoned"]
    files = [folder / f"{name}.parquet" for name in ("seeds", "subset", "pool")]
    files += [folder / "channels.safetensors", source / "truth.parquet", source / "train.parquet"]
    gone = [path.name for path in files if not path.is_file()]
    if gone:
        notes.append(f"No look inside {_where(cell)}: {', '.join(gone)} not there.")
        return None
    seeds, subset, pool, truth = (
        load_table(path).set_index("index") for path in (files[0], files[1], files[2], files[4])
    )
    subset, pool, truth = (part.loc[seeds.index] for part in (subset, pool, truth))
    steps, total = _steps(found)
    name, poisons = _where(cell), total["poisons"]
    tensors, _ = load_tensors(files[3])
    layers = [
        (name, tensors[f"mask.{name}"].numpy(), tensors[f"untrusted.{name}"].numpy().astype(bool))
        for name in results.layers(tensors)
    ]
    images = _read_images(files[5])
    targets = {}
    for side, place in (("encoder", where["encoder"]), ("data set", where["poisoned"])):
        path = data / place / "trigger.safetensors"
        meta = load_tensors(path)[1] if path.is_file() else {}
        if meta.get("target") is not None:
            targets[meta["target"]] = f"{side} attack's target"
    labels = seeds["label"].to_numpy()
    counts = {
        name: np.bincount(labels[chosen], minlength=images.num_classes)
        for name, chosen in (
            ("received", slice(None)),
            ("subset", subset["round"].to_numpy() >= 0),
            ("pool", pool["round"].to_numpy() >= 0),
        )
    }
    mark = np.select([truth["is_poison"], truth["is_cover"]], ["poison", "cover"], "clean")
    out = pool["round"].to_numpy() < 0
    slipped = np.flatnonzero(~out & (mark == "poison"))
    position = pd.Series(np.arange(len(images)), index=images.index)

    def pictures(rows: np.ndarray) -> list[dict]:
        return [
            {
                "uri": figures.image_uri(images.pixels[position[seeds.index[row]]]),
                "mark": mark[row],
                "name": images.class_names[labels[row]],
            }
            for row in rows
        ]

    return {
        "title": name,
        "scenario": cell["scenario"],
        "seed": cell["seed"],
        "purity": Markup(figures.purity(steps, total["size"], poisons, f"Purity through the stages: {name}")),
        "classes": Markup(figures.classes(counts, images.class_names, targets, f"Class balance: {name}")),
        "masks": Markup(figures.masks(layers, f"Channel masks: {name}")),
        "untrusted": sum(int(u.sum()) for _, _, u in layers),
        "channels": sum(len(u) for _, _, u in layers),
        "poisons": poisons,
        "left": int(out.sum()),
        "left_poisons": int((out & (mark == "poison")).sum()),
        "slipped": len(slipped),
        "outside": pictures(_spread(np.flatnonzero(out), 16)),
        "inside": pictures(_spread(slipped, 8)),
        "empty": [images.class_names[i] for i in np.flatnonzero((counts["pool"] == 0) & (counts["received"] > 0))],
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
    return steps.assign(part=steps["total"] / steps["total"].max()).sort_values("total", ascending=False).reset_index().to_dict("records")


def provenance(found: pd.DataFrame, records: list[dict]) -> dict:
    settings: dict[str, set] = {}
    for record in records:
        settings.setdefault(record["step"], set()).add(json.dumps(record["settings"], indent=1, sort_keys=True))
    return {
        "versions": results.versions(records),
        "devices": sorted({record["device"] for record in records}),
        "seeds": sorted(int(seed) for seed in found["seed"].unique()),
        "configs": found.drop_duplicates(results.IDENTITY)[[*results.IDENTITY, "config"]].to_dict("records"),
        "settings": {step: sorted(texts - {"{}"}) for step, texts in sorted(settings.items()) if texts - {"{}"}},
    }


def build(found: pd.DataFrame, data: Path) -> dict:
    """Everything the template shows, from the table of all cells and the folder `data`."""
    if found.empty:
        raise InputError("--results: no cell in it; run at least one scenario")
    overview = results.overview(found)
    rows, notes = outcomes(overview), []
    cells = found.drop_duplicates(results.IDENTITY)[results.IDENTITY].sort_values("seed", kind="stable")
    victims = cells.drop_duplicates(VICTIM).sort_index().to_dict("records")
    with_stages = cells.merge(found.loc[found["stage"] == "sift", results.IDENTITY].drop_duplicates())
    opened = with_stages.drop_duplicates([*VICTIM, "defense"]).sort_values(VICTIM[::-1]).to_dict("records")
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
