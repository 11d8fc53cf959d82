"""The report's close-ups: pictures of triggers, and what happened inside one defended cell.

Pictures and channel masks come from the folders of docs/develop/architecture.md. What is not there is noted.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from markupsafe import Markup

from tcore.data.images import ImageSet, read_images
from tcore.evaluation import metrics, results
from tcore.files import load_table, load_tensors
from tcore.poisoning import triggers
from tcore.report import charts

STAGES = {"sift": "seed samples", "expand": "clean subset", "bootstrap": "clean pool"}

_read_images = lru_cache(maxsize=3)(read_images)


def where(row: dict) -> str:
    attacks = f"{row['encoder_attack']} + {row['dataset_attack']}"
    return f"{row['scenario']}, {attacks}, {row['pretrain']} → {row['downstream']}"


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
    magnified, factor = charts.difference(clean, changed)
    stacks = [clean, changed, magnified]
    return {
        "factor": factor,
        "largest": int(magnified.max()) // factor,
        "touched": float((magnified > 0).any(1).float().mean()),
        "images": [
            {"name": name, "views": [charts.image_uri(_array(stack[i])) for stack in stacks]}
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


def curve(found: pd.DataFrame, cell: dict) -> dict:
    """Purity through T-Core's stages in one cell, from its rows of the results alone."""
    name, (stages, total) = where(cell), _stages(found)
    purity = charts.purity(stages, total["size"], total["poisons"], f"Purity through the stages: {name}")
    return {"title": name, "seed": cell["seed"], "poisons": total["poisons"], "purity": Markup(purity)}


def inside(found: pd.DataFrame, data: Path, cell: dict, notes: list[str]) -> dict | None:
    """What happened inside one defended cell: purity, class balance, channels, what stayed outside.

    `found` are the cell's rows of the results. None, and a note, where a file is missing.
    """
    drawn, place = curve(found, cell), results.folders(cell)
    name = drawn["title"]
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

    def pictures(rows: np.ndarray) -> list[dict]:
        return [
            {
                "uri": charts.image_uri(images.pixels[row]),
                "mark": mark[row],
                "name": images.class_names[images.labels[row]],
            }
            for row in rows
        ]

    classes = charts.classes(counts, images.class_names, _targets(data, cell), f"Share of each class: {name}")
    return drawn | {
        "classes": Markup(classes),
        "masks": Markup(charts.masks(layers, f"Channel masks: {name}")),
        "untrusted": sum(int(untrusted.sum()) for _, _, untrusted in layers),
        "channels": sum(len(untrusted) for _, _, untrusted in layers),
        "left": int((~trusted).sum()),
        "left_poisons": int((poison & ~trusted).sum()),
        "slipped": int((poison & trusted).sum()),
        "outside": pictures(_spread(np.flatnonzero(~trusted), 12)),
        "inside": pictures(_spread(np.flatnonzero(poison & trusted), 6)),
        "empty": [
            images.class_names[i] for i in np.flatnonzero((counts["pool"] == 0) & (counts["received"] > 0))
        ],
    }
