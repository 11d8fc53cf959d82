"""From predictions to the page, through the real commands, on a small planted world."""

import base64
import importlib.util
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tcore.data.images import ImageSet, write_images
from tcore.evaluation import results
from tcore.experiment import grid, registry
from tcore.files import InputError, load_json, load_tensors, save_json, save_table, save_tensors
from tcore.report import closeups, report

ROOT = Path(__file__).resolve().parents[1]
ATTACKS = {
    "T1": ("badencoder", "clean"),
    "T2": ("clean", "badnets"),
    "T3": ("badencoder", "adaptive"),
    "T1+T2": ("badencoder", "badnets"),
}


def command(name: str, *arguments) -> None:
    """Runs scripts/<name>.py in this process."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        module.main()
    finally:
        sys.argv = before


def stamp(images: torch.Tensor, trigger: dict) -> torch.Tensor:
    stamped = images.clone()
    stamped[:, :, -trigger["size"] :, -trigger["size"] :] = trigger["colour"].view(3, 1, 1)
    return stamped


class World:
    """A data folder as the workflow would leave it, with the outcome that is asked for."""

    def __init__(self, data: Path, images: ImageSet, widths=(4, 8), seed=0):
        self.data, self.images, self.widths = data, images, widths
        self.random = np.random.default_rng(seed)
        self.scenarios, self.seeds = [], []
        for split in ("train", "test"):
            write_images(data / f"datasets/signs/{split}.parquet", images)

    def log(self, folder: Path, step: str, seconds: float, **settings) -> None:
        save_json(
            folder / f"{step}.run.json",
            {
                "step": step, "settings": settings, "seed": 0, "versions": {"torch": "9.8.7"},
                "commit": "c0ffee1234", "device": "cpu", "seconds": seconds,
                "peak_ram_mb": 300.0, "peak_gpu_mb": None,
            },
        )  # fmt: skip

    def predictions(self, path: Path, rates: dict, accuracy: float) -> None:
        labels, frames = self.images.labels, []
        for view, (rate, target) in ({"clean": (0.0, -1)} | rates).items():
            right = np.where(
                self.random.random(len(labels)) < accuracy, labels, (labels + 3) % self.images.num_classes
            )
            fooled = self.random.random(len(labels)) < rate
            found = np.where(fooled & (target >= 0), target, right)
            frames.append(pd.DataFrame({"label": labels, "view": view, "prediction": found}))
        save_table(path, pd.concat(frames).assign(index=np.tile(self.images.index, len(frames))))

    def victim(
        self, scenario: str, seed: int, before: float, after: float, acc=(0.9, 0.88), poisons=0.05
    ) -> None:
        self.scenarios, self.seeds = [*self.scenarios, scenario], [*self.seeds, seed]
        encoder_attack, dataset_attack = ATTACKS[scenario]
        identity = {
            "pretrain": "scenes",
            "downstream": "signs",
            "encoder_attack": encoder_attack,
            "dataset_attack": dataset_attack,
            "scenario": scenario,
            "defense": "",
            "seed": seed,
        }
        place = {name: self.data / folder for name, folder in results.folders(identity).items()}
        rates, n = {}, len(self.images)
        for side, attack, target, size in (
            ("encoder", encoder_attack, 1, 3),
            ("dataset", dataset_attack, 2, 2),
        ):
            path = place["encoder" if side == "encoder" else "poisoned"] / "trigger.safetensors"
            if attack == "clean":
                save_tensors(path, {}, family=f"{side}_attacks", attack="clean", target=None)
                continue
            tensors = {"size": torch.tensor(size), "colour": torch.tensor([255, 255, 0], dtype=torch.uint8)}
            family = f"{side}_attacks"
            if attack == "adaptive":
                family, attack, target = "encoder_attacks", encoder_attack, 1
            save_tensors(path, tensors, family=family, attack=attack, target=target)
            rates[f"{side}_trigger"] = target
        poison = np.random.default_rng(seed).random(n) < (poisons if dataset_attack != "clean" else 0)
        truth = pd.DataFrame(
            {"index": self.images.index, "clean_label": self.images.labels, "is_poison": poison}
        )
        save_table(place["poisoned"] / "truth.parquet", truth.assign(is_cover=False))
        write_images(place["poisoned"] / "train.parquet", self.images)
        self.log(place["poisoned"], "poison_dataset", 0.5, ratio=0.2)
        for defense, rate, accuracy in (("none", before, acc[0]), ("tcore", after, acc[1])):
            cell = identity | {"defense": defense}
            place = {name: self.data / folder for name, folder in results.folders(cell).items()}
            self.predictions(
                place["results"] / "predictions.parquet", {v: (rate, t) for v, t in rates.items()}, accuracy
            )
            extra = self.stages(place["defended"], poison) if defense == "tcore" else []
            if defense == "none":
                self.log(place["defended"], "train_head", 4.0, epochs=20)
            command(
                "evaluate",
                "--predictions", place["results"] / "predictions.parquet",
                "--truth", place["poisoned"] / "truth.parquet",
                "--encoder-trigger", place["encoder"] / "trigger.safetensors",
                "--dataset-trigger", place["poisoned"] / "trigger.safetensors",
                "--identity", json.dumps(cell),
                "--metrics", place["results"] / "metrics.parquet",
                "--record", place["results"] / "evaluate.run.json",
                *extra,
            )  # fmt: skip

    def stages(self, folder: Path, poison: np.ndarray) -> list:
        """Sets that grow by a score on which poisons come late, channels with a tenth distrusted."""
        n, labels = len(poison), self.images.labels
        order = np.argsort(self.random.random(n) + 0.8 * poison)
        rank = np.argsort(order) / n
        self.rounds = pool = np.select([rank < 0.1, rank < 0.9], [0, np.ceil((rank - 0.1) * 20)], -1).astype(
            int
        )
        subset = np.select([rank < 0.01, rank < 0.1], [0, np.ceil(rank * 30)], -1).astype(int)
        frame = pd.DataFrame({"index": self.images.index})
        seeds = frame.assign(label=labels, in_core=True, score=-rank, trusted=subset == 0)
        save_table(folder / "seeds.parquet", seeds)
        save_table(folder / "subset.parquet", frame.assign(round=subset))
        save_table(folder / "pool.parquet", frame.assign(round=pool, phase=1 + (pool > 5)))
        tensors = {}
        for i, width in enumerate(self.widths):
            mask = torch.tensor(np.minimum(self.random.beta(4, 1, width) * 1.15, 1), dtype=torch.float32)
            untrusted = torch.zeros(width, dtype=torch.bool)
            untrusted[mask.argsort()[: max(1, width // 10)]] = True
            tensors |= {f"mask.layer{i}.conv": mask, f"untrusted.layer{i}.conv": untrusted}
        save_tensors(folder / "channels.safetensors", tensors)
        steps = {"sift": 12.0, "expand": 5.5, "filter_channels": 21.0, "bootstrap": 60.25}
        for step, seconds in steps.items():
            self.log(folder, step, seconds, epochs=7)
        names = ("seeds.parquet", "subset.parquet", "pool.parquet", "channels.safetensors")
        return [part for name in names for part in (f"--{name.partition('.')[0]}", folder / name)]

    def axes(self) -> dict[str, list]:
        return {
            "pairs": [{"pretrain": "scenes", "downstream": "signs"}],
            "scenarios": self.scenarios,
            "encoder_attacks": ["badencoder"],
            "dataset_attacks": ["badnets"],
            "defenses": ["none", "tcore"],
            "seeds": self.seeds,
        }

    def page(self, folder: str = "results", *options: str, **axes: list) -> str:
        """What `collect` and `make_report` write into a folder, for the world's cells or another grid."""
        out = self.data / folder
        given = ("--grid", json.dumps(self.axes() | axes), "--data", self.data)
        command(
            "collect", *given, *options, "--results", out / "results.parquet",
            "--summary", out / "summary.json", "--table", out / "table.csv",
            "--record", out / "collect.run.json",
        )  # fmt: skip
        command(
            "make_report", "--results", out / "results.parquet", *given,
            "--output", out / "report.html", "--record", out / "make_report.run.json",
        )  # fmt: skip
        return (out / "report.html").read_text()


def small_images() -> ImageSet:
    random = np.random.default_rng(1)
    pixels = random.integers(0, 200, (200, 8, 8, 3), dtype=np.uint8)
    names = tuple(f"sign <{c}> & co" if c == 1 else f"sign {c}" for c in range(8))
    return ImageSet(pixels, np.arange(200) % 8, np.arange(200), names, "planted")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(registry, "load", lambda family, name: SimpleNamespace(stamp=stamp))
    world = World(tmp_path_factory.mktemp("world") / "data", small_images())
    world.victim("T1", 0, before=1.0, after=0.0)
    world.victim("T1+T2", 0, before=1.0, after=0.4, acc=(0.9, 0.7))
    world.html = world.page()
    yield world
    patch.undo()


def rows_of(world: World, scenario: str) -> pd.DataFrame:
    found = pd.read_parquet(world.data / "results/results.parquet")
    return found[(found["defense"] == "tcore") & (found["scenario"] == scenario)]


class Tags(HTMLParser):
    VOID = frozenset({"meta", "img", "br", "link", "path", "use"})

    def __init__(self, html: str):
        super().__init__()
        self.links, self.tags, self.open, self.text = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            value for key, value in attrs if key in ("src", "href", "srcset", "xlink:href", "action")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_stands_alone_and_is_well_formed(world):
    page = Tags(world.html)
    assert not page.open
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", world.html)
    assert str(world.data) not in world.html


def test_names_are_escaped(world):
    assert "sign &lt;1&gt; &amp; co" in world.html
    assert "sign <1>" not in world.html


def test_numbers_on_the_page_are_those_of_the_predictions(world):
    path = world.data / "results/scenes-badencoder/signs-badnets/0/tcore/predictions.parquet"
    found = pd.read_parquet(path)
    clean = found[found["view"] == "clean"]
    assert report.percent((clean["prediction"] == clean["label"]).mean()) in world.html
    for view, target in (("encoder_trigger", 1), ("dataset_trigger", 2)):
        rows = found[(found["view"] == view) & (found["label"] != target)]
        assert report.percent((rows["prediction"] == target).mean()) in world.html


def test_the_page_names_commit_and_total_time(world):
    own = (path for path in world.data.rglob("*.run.json") if path.parent != world.data / "results")
    seconds = sum(json.loads(path.read_text())["seconds"] for path in own)
    text = " ".join(Tags(world.html).text)
    assert re.search(rf"commit [^·]*c0ffee1234[^·]* · {seconds / 60:.1f} minutes of computing in all", text)
    assert f"{seconds:,.1f}" in text  # below the table of costs


def test_failures_are_said_aloud(world):
    text = " ".join(Tags(world.html).text)
    assert "T-Core missed the 10 % line" in text
    assert "costs more than 5 points" in text
    assert "✕ attack survives" in text and "✓ held" in text
    assert "No shortfall" not in text


def test_gallery_shows_images_without_loss(world):
    notes = []
    shown = closeups.gallery(world.data, [rows_of(world, "T1+T2").iloc[0][results.IDENTITY].to_dict()], notes)
    assert [(t["attack"], t["target"]) for t in shown] == [
        ("badencoder", "sign <1> & co"),
        ("badnets", "sign 2"),
    ]
    assert not notes
    clean, triggered, change = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))).astype(int)
        for uri in shown[1]["images"][0]["views"]
    )
    assert (clean == world.images.pixels[0]).all()  # class 0 is the first that is not the target
    assert (triggered[-2:, -2:] == [255, 255, 0]).all() and (triggered[:-2] == clean[:-2]).all()
    assert (change == shown[1]["factor"] * abs(triggered - clean)).all()
    assert shown[1]["touched"] == pytest.approx(4 / 64)


def test_gallery_shows_poisons_of_the_training_set(world, tmp_path):
    cell = rows_of(world, "T1+T2").iloc[0][results.IDENTITY].to_dict()
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    folder = data / results.folders(cell)["poisoned"]
    clean = world.images
    flags = pd.DataFrame({"index": clean.index, "clean_label": clean.labels, "is_poison": False})
    flags["is_cover"] = False
    flags.loc[[3, 11, 40], "is_poison"], flags.loc[[50, 60, 70], "is_cover"] = True, True
    pixels, labels = clean.pixels.copy(), clean.labels.copy()
    pixels[[3, 11, 40, 50, 60, 70], :2, :2] ^= 16
    labels[[3, 11, 40]] = 2
    write_images(folder / "train.parquet", replace(clean, pixels=pixels, labels=labels))
    save_table(folder / "truth.parquet", flags)
    tensors, meta = load_tensors(folder / "trigger.safetensors")
    save_tensors(folder / "trigger.safetensors", tensors, **meta | {"goals": [-1, -1, -1, -1, 2, 2, -1, -1]})
    shown = closeups.gallery(data, [cell], [])[1]
    assert [image["name"] for image in shown["images"]][:2] == ["sign 4", "sign 5"] == shown["sources"]
    strip = shown["training"]
    assert [image["name"] for image in strip["images"]] == [
        "sign 3 → sign 2", "sign 3 → sign 2", "sign 0 → sign 2", "sign 2, cover", "sign 6, cover",
    ]  # fmt: skip
    assert (strip["largest"], strip["factor"], strip["touched"]) == (16, 15, pytest.approx(4 / 64))


def test_inside_counts_what_was_left_out(world):
    own = rows_of(world, "T1+T2")
    detail = closeups.inside(own, world.data, own.iloc[0][results.IDENTITY].to_dict(), [])
    truth = pd.read_parquet(world.data / "poisoned/any/signs-badnets/0/truth.parquet")
    left = world.rounds < 0
    assert detail["left"] == left.sum()
    assert detail["left_poisons"] == (left & truth["is_poison"].to_numpy()).sum()
    assert detail["slipped"] == detail["poisons"] - detail["left_poisons"]
    assert [p["mark"] for p in detail["inside"]] == ["poison"] * min(8, detail["slipped"])


def test_tables_for_dvc(world):
    summary = load_json(world.data / "results/summary.json")
    assert set(summary) == {"T1", "T1+T2"}
    (own,) = summary["T1"].values()
    assert own["none"]["asr_encoder"] == 1 and "asr_dataset" not in own["none"]
    table = pd.read_csv(world.data / "results/table.csv")
    assert len(table) == 4 and set(table["n"]) == {1}
    assert table.loc[table["defense"] == "tcore", "seconds"].tolist() == [98.75, 98.75]


def test_same_results_same_page(world):
    assert re.sub(r"make_report.*", "", world.page()) == re.sub(r"make_report.*", "", world.html)


def test_a_grid_of_which_a_part_is_there(world):
    axes = {"scenarios": ["T1", "T2", "T1+T2"], "seeds": [0, 1]}
    with pytest.raises(InputError, match=r"signs-clean/1/none/metrics\.parquet: no such file"):
        world.page("partial", **axes)
    assert not (world.data / "partial/results.parquet").exists()
    page = world.page("partial", "--available", **axes)
    assert "4 of 12 cells of the grid are there." in page and "cells of the grid are there" not in world.html
    for file in ("results.parquet", "summary.json", "table.csv"):
        assert (world.data / "partial" / file).read_bytes() == (world.data / "results" / file).read_bytes()
    with pytest.raises(InputError, match="no cell of the grid is there yet"):
        world.page("empty", "--available", **axes | {"scenarios": ["T2"]})


def test_thousands_of_cells_fit_on_a_command_line(world):
    """The kernel takes 128 KiB an argument; the grid of 40,000 cells is far from it."""
    axes = {"seeds": list(range(10_000)), "scenarios": ["T1", "T1+T2"]}
    assert len(grid.cells(world.axes() | axes)) == 40_000
    assert len(json.dumps(world.axes() | axes)) < 2**16


def test_missing_pieces_are_noted(world, tmp_path):
    found = pd.read_parquet(world.data / "results/results.parquet")
    context = report.build(found, tmp_path)
    page = report.render(context, ROOT / "workflow/report.html.jinja")
    assert "No pictures of badencoder" in page and "No look inside T1" in page and "No run records" in page
    assert not Tags(page).open


def test_the_clean_encoder_stands_behind_attacks_on_weights_only():
    cell = {"pretrain": "p", "downstream": "d", "dataset_attack": "clean", "defense": "none", "seed": 0}
    assert results.folders(cell | {"encoder_attack": "drupe"})["clean_encoder"] == "encoders/p-clean/0"
    assert "clean_encoder" not in results.folders(cell | {"encoder_attack": "ctrl"})


def test_detectors_have_a_table_and_what_cannot_be_applied_says_why(world):
    found = pd.read_parquet(world.data / "results/results.parquet")
    cell = found[(found["defense"] == "none") & (found["scenario"] == "T1+T2")]
    numbers = {"tpr": 0.75, "fpr": 0.015, "auroc": 0.987, "size": 4, "poisons": 1, "auroc_dataset": 0.654}
    stage = {"size": "cleanest", "poisons": "cleanest", "auroc_dataset": "inputs"}
    rows = [
        cell.iloc[0].to_dict()
        | {"defense": "strip", "stage": stage.get(m, "detect"), "metric": m, "value": v}
        for m, v in numbers.items()
    ]
    tested = cell[cell["stage"] == "test"].assign(defense="strip")
    reason = results.not_applicable("it needs <moons>")
    rows.append(cell.iloc[0].to_dict() | {"defense": "clp"} | reason)
    context = report.build(pd.concat([found, tested, pd.DataFrame(rows)], ignore_index=True), world.data)
    assert [line["defense"] for line in context["detections"]] == ["strip"]
    page = report.render(context, ROOT / "workflow/report.html.jinja")
    text = " ".join(" ".join(Tags(page).text).split())
    for shown in ("75.0 %", "1.5 %", "0.987", "1 of 4", "0.654"):
        assert shown in text, shown
    assert "n/a it needs <moons>" in text and "clp could not be applied anywhere" in text
    assert "clp missed" not in text and "What the detectors found" not in world.html


def test_a_table_of_the_paper_from_the_files_of_cells(world, tmp_path):
    lines = ["table,pretrain,downstream,encoder_attack,dataset_attack,defense,stage,metric,value"]
    lines += [f"9,scenes,signs,badencoder,badnets,{name},test,asr_dataset,7.5" for name in ("none", "tcore")]
    lines += ["9,scenes,signs,badencoder,sig,none,test,acc,50"]
    lines += ["17,scenes,signs,badencoder,badnets,tcore,cost,seconds_sift,20"]
    lines += ["17,scenes,signs,badencoder,badnets,tcore,cost,seconds,1000.5"]
    (tmp_path / "published.csv").write_text("\n".join(lines))

    def table(number: int) -> pd.DataFrame:
        command(
            "compare_tables", "--table", number, "--published", tmp_path / "published.csv",
            "--grid", json.dumps(world.axes()), "--data", world.data,
            "--markdown", tmp_path / "table.md", "--latex", tmp_path / "table.tex",
            "--csv", tmp_path / "table.csv", "--picture", tmp_path / "table.png",
            "--record", tmp_path / "table.run.json",
        )  # fmt: skip
        return pd.read_csv(tmp_path / "table.csv")

    found = table(9).set_index("defense")
    own = rows_of(world, "T1+T2").query("metric == 'asr_dataset'").iloc[0]
    measured = found.loc["tcore", ["reproduced", "low", "high", "difference"]].tolist()
    expected = [100 * own["value"], 100 * own["low"], 100 * own["high"], 100 * own["value"] - 7.5]
    assert measured == pytest.approx(expected, rel=1e-5)
    assert "2 of 3 cells are there." in (tmp_path / "table.md").read_text()
    assert load_json(tmp_path / "table.run.json")["log"] == {"cells": 2, "there": 2}
    # planted: sifting took 12 seconds, all stages 98.75
    costs = table(17).set_index("metric")[["reproduced", "difference"]].to_dict("index")
    assert costs == {
        "seconds_sift": {"reproduced": 12, "difference": -8},
        "seconds": {"reproduced": 98.75, "difference": pytest.approx(98.75 - 1000.5)},
    }
    assert "1 of 1 cells are there. Seconds" in (tmp_path / "table.md").read_text()
