"""What comes from outside: its configuration, its plan, what is refused and what is said about it."""

import copy
import io
import os
import re
import runpy
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from tcore import __main__ as command
from tcore.data.images import ImageSet, read_images, write_images
from tcore.data.sources import imagefolder, parquet
from tcore.data.sources._reading import decode
from tcore.evaluation import metrics
from tcore.experiment import grid, registry
from tcore.experiment.config import require_files, validate
from tcore.files import InputError
from tcore.models import head as heads
from tcore.models.channels import layers
from tcore.models.classifier import Classifier, save_classifier
from tcore.models.encoder import ARCHITECTURES, Encoder, floats
from tcore.received import audit, check
from tcore.received.export import export
from tcore.running import memory, provenance
from tcore.stages import bootstrap, expand, filter_channels, sift
from tests import planner

ROOT = Path(__file__).resolve().parents[1]


def own_config() -> dict:
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    own = yaml.safe_load((ROOT / "config/own.yaml").read_text())
    return config | own | {"datasets": config["datasets"] | own["datasets"]}


# The configuration


def test_a_pair_with_an_encoder_from_outside_is_received_and_nothing_else():
    cells = grid.cells(
        validate(own_config() | {"scenarios": ["T1", "T2"], "defenses": ["tcore", "spectral"]})
    )
    assert cells.to_dict("split")["data"] == [
        ["theirs", "mine", "received", "received", "received", "none", 0],
        ["theirs", "mine", "received", "received", "received", "tcore", 0],
    ]
    assert grid.scenario("received", "received") == "received"
    assert grid.received("theirs", "received", "mine", "received", 0) == "datasets/mine"


def test_other_pairs_stay_as_they_are():
    demo = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    both = own_config() | {"pairs": demo["pairs"] + own_config()["pairs"]}
    cells = grid.cells(validate(both))
    assert cells[:-2].equals(grid.cells(validate(demo)))
    assert set(cells[-2:]["scenario"]) == {"received"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("encoders", "theirs", "encoders should map"),
        ("encoders.theirs.architecture", "resnet81", "architecture.*did you mean 'resnet18'"),
        ("encoders.theirs.architecture", "torchvision:", "<library or module>:<name>"),
        ("encoders.theirs.architecture", "my.nets:Net", "whose code would run.*run_code to true"),
        ("encoders.theirs.run_code", "yes", "run_code = 'yes' should be true or false"),
        ("encoders.theirs.mean", 0.5, "mean = 0.5 should be three numbers"),
        ("encoders.theirs.mean", [127, 127, 127], "mean.*from 0 to 1"),
        ("encoders.theirs.std", [0.2, 0, 0.2], "std.*none of them 0"),
        ("encoders.theirs.image_size", "32", "image_size = '32'"),
        ("encoders.theirs.file", 3, "file = 3 should be a path"),
        ("encoders.theirs.prefix", "f.f.", "prefix.*known: file, architecture"),
        ("encoders.signs", {}, "encoders.signs: a name"),
        ("pairs.0.pretrain", "their", "did you mean 'theirs'"),
        ("pairs.0.encoder_attacks", ["badencoder"], "used as it is"),
        ("datasets.mine.settings.image_size", 224, "takes 32 pixels; set .*image_size to 32, not 224"),
    ],
)
def test_what_is_refused(path, value, message):
    config = copy.deepcopy(own_config())
    place = config
    *parents, last = path.split(".")
    for key in parents:
        place = place[int(key) if key.isdecimal() else key]
    place[last] = value
    with pytest.raises(InputError, match=message):
        validate(config)


def test_files_that_are_not_there_are_named(tmp_path):
    config = own_config()
    config["encoders"]["theirs"]["file"] = str(tmp_path / "gone.pth")
    with pytest.raises(InputError, match=r"encoders.theirs.file = .*gone\.pth' is not a file"):
        require_files(validate(config))
    (tmp_path / "gone.pth").touch()
    config["datasets"]["mine"]["settings"]["path"] = str(tmp_path / "images")
    with pytest.raises(InputError, match=r"datasets.mine.settings.path = .*images' is not there"):
        require_files(validate(config))
    (tmp_path / "images").mkdir()
    require_files(validate(config))


def test_architectures_are_known_without_torch():
    assert registry.architectures() == list(ARCHITECTURES)


def test_a_listing_changes_with_names_sizes_and_times_and_not_without(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "1.png").write_bytes(b"1")
    first = provenance.listing(tmp_path)
    assert provenance.listing(tmp_path) == first
    (tmp_path / "a b" / "1.png").write_bytes(b"12")
    second = provenance.listing(tmp_path)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert len({first, second, provenance.listing(tmp_path)}) == 3


# The plan


@pytest.fixture
def planned(tmp_path):
    """A plan for two files that are there, in a folder with a space in its name."""
    folder = tmp_path / "with space"
    (folder / "images").mkdir(parents=True)
    (folder / "encoder.pth").touch()
    config = own_config()
    config["encoders"]["theirs"]["file"] = str(folder / "encoder.pth")
    config["datasets"]["mine"]["settings"]["path"] = str(folder / "images")
    overlay = tmp_path / "own.yaml"
    overlay.write_text(yaml.safe_dump({key: config[key] for key in ("pairs", "encoders", "datasets")}))

    def plan(*arguments: str) -> subprocess.CompletedProcess:
        return planner.snakemake(ROOT, "-n", "--forceall", "--configfile", str(overlay), *arguments)

    return plan, overlay, folder


def test_nothing_on_this_path_asks_for_a_truth_and_no_stage_for_held_out_images(planned):
    plan, _, folder = planned
    lines = [
        line
        for line in plan("--printshellcmds").stdout.splitlines()
        if "/scripts/" in line and "$TCORE" in line
    ]
    text = "\n".join(lines)
    assert not re.search("truth|trigger|poison", text)
    commands = re.findall(r'python "\$TCORE"/scripts/(\w+)\.py .*', text)
    steps = "import_encoder prepare_dataset check_received extract_features train_head sift expand "
    steps += "filter_channels bootstrap predict predict export_model audit"
    assert sorted(commands) == sorted(steps.split())
    readers = {re.search(r"scripts/(\w+)", line)[1] for line in lines if "datasets/mine/test" in line}
    assert readers == {"prepare_dataset", "predict", "audit"}
    assert f"--checkpoint '{folder}/encoder.pth'" in text


def test_a_setting_that_changes_makes_no_stage_stale_by_way_of_the_check(planned):
    plan, _, _ = planned
    graph = plan("--dag").stdout
    rules = dict(re.findall(r'(\d+)\[label = "(\w+)', graph))
    edges = {(rules[a], rules[b]) for a, b in re.findall(r"(\d+) -> (\d+)", graph)}
    assert {to for of, to in edges if of == "check_received"} == {"audit"}
    assert ("extract_features", "sift") in edges


def test_a_missing_file_stops_the_plan_with_a_short_message(planned):
    plan, _, folder = planned
    (folder / "encoder.pth").unlink()
    run = plan()
    assert run.returncode and "encoder.pth' is not a file" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr


# What is looked at first


def images_of(*counts: int, size: int = 8, seed: int = 0) -> ImageSet:
    labels = np.repeat(np.arange(len(counts)), counts)
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), size, size, 3), np.uint8)
    names = tuple(f"class {k}" for k in range(len(counts)))
    return ImageSet(pixels, labels, np.arange(len(labels)), names, "toy")


def test_every_class_needs_a_seed_and_a_core_point():
    settings = sift.Settings(seed_share=0.1)
    assert check.check_classes(images_of(10, 35), settings) == {
        "smallest": 10,
        "largest": 35,
        "seeds_of_smallest": 1,
    }
    with pytest.raises(InputError, match=r"need 10 .*'class 1' has 9; .*seed_share to 0.1112"):
        check.check_classes(images_of(10, 9), settings)
    assert check.check_classes(images_of(10, 9), sift.Settings(seed_share=0.1112))["seeds_of_smallest"] == 1
    with pytest.raises(InputError, match=r"'class 0' has 1; add images or leave such classes out$"):
        check.check_classes(images_of(1, 30), settings)
    with pytest.raises(InputError, match=r"'class 1' has 0"):
        check.check_classes(images_of(30, 0, 30), settings)
    for share in (0, -1, 1, 20):
        with pytest.raises(InputError, match=r"seed_share = .* between 0 and 1"):
            check.check_classes(images_of(30, 30), sift.Settings(seed_share=share))
    with pytest.raises(InputError, match=r"and so on, 1000 classes in all"):
        check.check_classes(images_of(*[2] * 1000), settings)


def test_repeats_by_hand():
    images = images_of(4, 4)
    images.pixels[1] = images.pixels[0]  # the same label
    images.pixels[5] = images.pixels[0]  # another label
    images.pixels[7] = images.pixels[6]
    assert check.repeats(images) == {"duplicates": 3, "contradictions": 1}


def test_passes_count_what_bootstrapping_trains_on(monkeypatch):
    """Against a run of the stage with counters in place of its training; the core is sifting's majority."""
    pooling = bootstrap.Settings(
        rounds_class=0, rounds_all=2, gamma2=0.2, epochs=3, epochs_meta=2, epochs_final=4, gamma3=0.3
    )
    n, subset = 40, torch.arange(40) < 4
    trained, looked = [], []
    monkeypatch.setattr(
        bootstrap,
        "fit",
        lambda m, o, rows, *rest, **named: trained.append(len(rows) * (rest[6] if len(rest) > 6 else 1)),
    )
    monkeypatch.setattr(
        bootstrap, "losses", lambda m, i, y, rows: looked.append(len(rows)) or torch.rand(len(rows))
    )
    images = images_of(20, 20)
    untrusted = {
        name: torch.zeros(layer.out_channels, dtype=torch.bool)
        for name, layer in layers(Encoder("resnet_tiny", 8)).items()
    }
    bootstrap.bootstrap(
        Encoder("resnet_tiny", 8),
        images.tensor,
        images.targets,
        2,
        subset,
        torch.arange(40) < 20,
        untrusted,
        pooling,
        heads.Settings(),
        0,
    )
    channels = filter_channels.Settings(unlearn_epochs=0, epochs=0)
    assert check.passes(n, sift.Settings(), expand.Settings(subset_share=0.1), channels, pooling) == (
        sum(trained),
        sum(looked),
    )
    more = filter_channels.Settings(unlearn_epochs=2, epochs=5)
    found = check.passes(n, sift.Settings(), expand.Settings(subset_share=0.1), more, pooling)
    assert found == (sum(trained) + 2 * 40 + 5 * 4, sum(looked))


def test_the_check_as_a_whole():
    stages = (sift.Settings(), expand.Settings(), filter_channels.Settings(), bootstrap.Settings())
    found = check.check(Encoder("resnet_tiny", 8), images_of(100, 120), *stages)
    assert found["images"] == 220 and found["classes"] == 2 and found["seeds_of_smallest"] == 1
    assert found["seconds"] > 0 and found["duplicates"] == found["contradictions"] == 0
    for position, change in ((1, {"subset_share": 1.0}), (2, {"untrusted_share": -0.1}), (3, {"rho": 90})):
        wrong = [replace(s, **change) if i == position else s for i, s in enumerate(stages)]
        with pytest.raises(InputError, match=rf"{next(iter(change))} = .* between 0 and 1"):
            check.check(Encoder("resnet_tiny", 8), images_of(100, 120), *wrong)
    with pytest.raises(InputError, match="takes 16x16 images, these are 8x8; set image_size"):
        check.check(Encoder("resnet_tiny", 16), images_of(100, 120), *stages)


# The audit


def tables(n: int, left: set[int]) -> dict[str, pd.DataFrame]:
    """All joined in round 1 but row 0, a seed, and those left out."""
    rounds = np.where(np.isin(np.arange(n), list(left)), -1, 1)
    rounds[0] = 0
    index = {"index": np.arange(n)}
    return {
        "seeds": pd.DataFrame(index | {"trusted": np.arange(n) == 0}),
        "subset": pd.DataFrame(index | {"round": np.where(np.arange(n) < 2, np.arange(n), -1)}),
        "pool": pd.DataFrame(index | {"round": rounds, "phase": np.where(rounds > 0, 2, 0)}),
    }


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    encoder = Encoder("resnet_tiny", 8, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    return Classifier(encoder, heads.Head(encoder.dim, 2, heads.Settings(hidden=(8, 4)))).eval()


def test_distrust_puts_what_was_left_out_first_and_the_least_likely_labels_before_others(model):
    images = images_of(6, 6)
    found = audit.distrust(images, model, *tables(12, {3, 8, 9}).values())
    assert set(found["index"][:3]) == {3, 8, 9} and found["index"].iloc[-1] == 0
    out = model(floats(images.tensor)).detach().double()
    loss = -out.log_softmax(1).numpy()[np.arange(12), images.labels]
    assert found["loss"].to_numpy() == pytest.approx(loss[found["index"]], rel=1e-4)
    for part in (found[:3], found[3:-1]):
        assert (np.diff(part["loss"]) <= 0).all()
    said = [images.class_names[k] for k in out.argmax(1)]
    assert found.sort_values("index")["clean_model_says"].tolist() == said


def test_the_class_that_loses_most_stands_out():
    images = images_of(100, 100)
    table = pd.DataFrame(
        {
            "class": ["class 0"] * 100 + ["class 1"] * 100,
            "clean_model_says": ["class 0"] * 200,
            "left_out": [i % 50 == 0 for i in range(100)] + [i < 30 for i in range(100)],
            "seed": False,
            "in_subset": False,
            "row": range(200),
        }
    )
    found = audit.classes(images, table)
    assert found["left_out"].tolist() == [2, 30] and found["other"].tolist() == [0, 30]
    assert found["excess"].tolist() == pytest.approx([0.02 / 0.16, 0.3 / 0.16])
    assert found["stands_out"].tolist() == [False, False]
    table.loc[table.index[100:140], "left_out"] = True
    table.loc[:99, "left_out"] = False
    assert audit.classes(images, table)["stands_out"].tolist() == [False, True]


def judged(left_out: int = 1, right: int = 1000, trusted: tuple[float, ...] = ()) -> dict[str, bool]:
    """What calls for care; `left_out` of 50 images of either class, `right` of 1,000 held-out images."""
    per_class = pd.DataFrame(
        {"name": ["a", "b"], "seeds": 9, "subset": 10, "images": 50, "left_out": left_out}
    )
    accuracy = metrics.accuracy(np.arange(1000) >= right, np.zeros(1000))
    said = audit.indicators(
        per_class.assign(excess=1.0, stands_out=False),
        {"accuracies": {"none": accuracy, "tcore": accuracy}, "known": 0, "images": 1000},
        {"trusted_accuracy": list(trusted)},
        {"unlearning_accuracy": [0.1], "recovery_accuracy": [0.9]},
        tables(100, {3})["pool"],
        {"duplicates": 0, "contradictions": 0},
    )
    return {one["name"]: one["care"] for one in said}


@pytest.mark.parametrize(("left", "care"), [((0.9, 0.2), [True]), ((0.1, 0.2), [False]), ((), [])])
def test_what_confusion_left_is_judged_where_there_was_confusion(left, care):
    assert [found for name, found in judged(trusted=left).items() if "confusion" in name] == care


@pytest.mark.parametrize(("left_out", "right", "care"), [(10, 540, True), (10, 800, False), (25, 540, False)])
def test_a_pool_larger_than_what_the_model_gets_right_calls_for_care(left_out, right, care):
    assert judged(left_out, right)["Images in the pool, against that accuracy"] == care


def test_held_out_images_that_were_trained_on_do_not_count():
    train, test = images_of(5, 5), images_of(2, 2, seed=1)
    test.pixels[0] = train.pixels[9]

    def predictions(*said: int) -> pd.DataFrame:
        return pd.DataFrame({"index": range(4), "label": test.labels, "view": "clean", "prediction": said})

    found = audit.held_out(train, test, predictions(0, 0, 1, 1), predictions(1, 0, 0, 1))
    assert found["known"] == 1 and found["differ"].tolist() == [2]
    assert found["accuracies"]["none"][::3] == (1.0, 3)
    assert found["accuracies"]["tcore"].value == pytest.approx(2 / 3)


# The model for use elsewhere


@pytest.mark.parametrize("architecture", ["resnet_tiny", "vit"])
def test_torchscript_says_what_the_model_says_and_knows_its_classes(tmp_path, architecture):
    torch.manual_seed(0)
    encoder = Encoder(architecture, 16, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    model = Classifier(encoder, heads.Head(encoder.dim, 3, heads.Settings(hidden=(8, 4)))).eval()
    names = ("a b", "ü", "c")
    export(tmp_path / "model.pt", model, names)
    images = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8)
    program = (
        "import sys, torch; model = torch.jit.load(sys.argv[1]); "
        "assert list(model.class_names) == ['a b', 'ü', 'c']; "
        "torch.save(model(torch.load(sys.argv[2])), sys.argv[3]); assert 'tcore' not in sys.modules"
    )
    torch.save(images, tmp_path / "images")
    paths = [str(tmp_path / name) for name in ("model.pt", "images", "out")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True)
    expected = model(images.float() / 255).softmax(1)
    torch.testing.assert_close(torch.load(tmp_path / "out"), expected, rtol=1e-4, atol=1e-5)


def test_predict_reads_any_picture_and_goes_on_after_a_broken_one(model, tmp_path, monkeypatch):
    save_classifier(tmp_path / "model.safetensors", model, ("one thing", "another"))
    folder = tmp_path / "my pictures"
    (folder / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels).convert("CMYK").save(folder / "more" / "b.jpg")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "notes.txt").write_text("no picture")
    flags = f"predict --model {tmp_path}/model.safetensors --output {tmp_path}/p.csv"
    run_command(monkeypatch, flags, folder)
    found = pd.read_csv(tmp_path / "p.csv", keep_default_na=False)
    assert [Path(path).name for path in found["image"]] == ["a.png", "broken.jpg", "b.jpg"]
    assert "broken.jpg: not a readable image" in found["problem"][1] and found["class"][1] == ""
    best = int(model(floats(torch.from_numpy(pixels).permute(2, 0, 1)[None])).argmax())
    assert found["class"][0] == ("one thing", "another")[best]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in it"):
        run_command(monkeypatch, flags, tmp_path / "empty")


def run_command(monkeypatch, text: str, images: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["tcore", *text.split(), "--images", str(images)])
    command.main()


def test_secure_writes_the_configuration_that_its_flags_say(monkeypatch, tmp_path):
    (tmp_path / "e.pth").touch()
    (tmp_path / "set of images").mkdir()
    called = []
    monkeypatch.setattr(
        command.subprocess, "run", lambda c: called.append(c) or subprocess.CompletedProcess(c, 1)
    )
    flags = (
        f"secure --encoder {tmp_path}/e.pth --architecture resnet18 --image-size 64 --name my_set --seed 3"
    )
    flags += " --mean 0.1 0.2 0.3 --std 0.4 0.5 0.6 --seed-share 0.05 --untrusted-share 0.4"
    flags += f" --directory {tmp_path}"
    with pytest.raises(InputError, match="it stopped"):
        run_command(monkeypatch, flags, tmp_path / "set of images")
    path = tmp_path / "data/own/my_set.yaml"
    assert called[0][1:3] == ["-m", "snakemake"] and str(path) in called[0]
    assert called[0][-2:] == ["--until", "check_received"] and len(called) == 1
    log = tmp_path / "data/logs/sift/a.log"
    log.parent.mkdir(parents=True)
    said = "reading\nerror: a class is small; add images\n"

    def stops(command):
        log.write_text(said)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(command.subprocess, "run", stops)
    with pytest.raises(InputError, match=r"^a class is small; add images \(data/logs/sift/a.log\)$"):
        run_command(monkeypatch, flags, tmp_path / "set of images")

    def interrupts(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.subprocess, "run", interrupts)
    with pytest.raises(InputError, match="interrupted; the same command goes on"):
        run_command(monkeypatch, flags, tmp_path / "set of images")
    demo = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config = validate(demo | yaml.safe_load(path.read_text()))
    require_files(config)
    assert config["encoders"]["my_set_encoder"]["std"] == [0.4, 0.5, 0.6]
    assert config["datasets"]["my_set"]["settings"]["path"] == str(tmp_path / "set of images")
    assert config["methods"]["sift"]["seed_share"] == 0.05 and config["seeds"] == [3]
    assert config["methods"]["filter_channels"]["untrusted_share"] == 0.4
    assert set(grid.cells(config)["scenario"]) == {"received"}
    with pytest.raises(InputError, match=r"datasets.My: a name consists of"):
        run_command(monkeypatch, flags.replace("my_set", "My"), tmp_path / "set of images")
    with pytest.raises(InputError, match=r"nets:Net' is a network of your own"):
        run_command(monkeypatch, flags.replace("resnet18", "nets:Net"), tmp_path / "set of images")
    with pytest.raises(InputError, match=r"--images .*gone: no such folder"):
        run_command(monkeypatch, flags, tmp_path / "gone")


# Wrong uses of images


def saved(folder: Path, **pictures) -> Path:
    for name, picture in pictures.items():
        path = folder / name.replace("__", "/").replace("_", " ")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path.with_suffix(".png" if picture.mode != "CMYK" else ".jpg"))
    return folder


def grey(value: int, mode: str = "L") -> Image.Image:
    return Image.new("RGB", (9, 7), (value,) * 3).convert(mode)


def test_colour_modes_are_handled_and_names_may_have_spaces(tmp_path):
    deep = Image.fromarray(np.full((7, 9), 128 * 257, np.uint16))
    folder = saved(
        tmp_path, red_fox__1=grey(128), red_fox__2=grey(128, "RGBA"), red_fox__3=grey(128).quantize(4)
    )
    saved(tmp_path, grey_wolf__1=grey(128, "CMYK"), grey_wolf__2=grey(128, "LA"), grey_wolf__3=deep)
    splits = imagefolder.load(imagefolder.Settings(path=str(folder), image_size=8, test_share=0.34), {})
    for split in splits.values():
        assert split.class_names == ("grey wolf", "red fox")
        assert np.abs(split.pixels.astype(int) - 128).max() <= 2


def bomb(path: Path) -> None:
    """A PNG that says it is 60,000 pixels wide and high."""
    header = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        content += len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    path.write_bytes(content)


def cut(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (bomb, r"cat/2\.jpg: not a readable image \(Image size .*decompression bomb"),
        (cut, r"cat/2\.jpg: not a readable image \(.*truncated"),
        (lambda path: path.write_bytes(b""), r"cat/2\.jpg: not a readable image"),
        (lambda path: [p.unlink() for p in path.parent.iterdir()], "no images of class 'cat'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, damage, message):
    saved(tmp_path, cat__1=grey(1), cat__3=grey(3), dog__1=grey(2), dog__2=grey(4))
    damage(tmp_path / "cat" / "2.jpg")
    with pytest.raises(InputError, match=message):
        imagefolder.load(imagefolder.Settings(path=str(tmp_path), image_size=8), {})


def test_an_empty_folder_and_a_class_of_one_image(tmp_path):
    with pytest.raises(InputError, match="one folder per class, it has 0"):
        imagefolder.load(imagefolder.Settings(path=str(tmp_path)), {})
    saved(tmp_path, cat__1=grey(1), dog__1=grey(2), dog__2=grey(3), dog__3=grey(3))
    train = imagefolder.load(imagefolder.Settings(path=str(tmp_path), image_size=8, test_share=0.3), {})[
        "train"
    ]
    with pytest.raises(InputError, match="'cat' has 1"):
        check.check_classes(train, sift.Settings())


def test_folders_that_are_no_classes_and_classes_that_only_the_test_has(tmp_path):
    saved(tmp_path, train__cat__1=grey(1), train__dog__1=grey(2), test__cat__1=grey(3), test__dog__1=grey(4))
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    settings = imagefolder.Settings(path=str(tmp_path), image_size=8)
    assert imagefolder.load(settings, {})["test"].class_names == ("cat", "dog")
    saved(tmp_path, test__emu__1=grey(5))
    with pytest.raises(InputError, match=r"test has classes that .*train has not: emu; name the same"):
        imagefolder.load(settings, {})


def test_photographs_are_turned_as_their_camera_says(tmp_path):
    """Orientation 6: the first row is the right-hand side."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    found = np.asarray(decode(tmp_path / "a.png", "a"))
    assert (found[:, 4:] == 255).all() and (found[:, :4] == 0).all()


def test_a_table_of_paths(tmp_path):
    saved(tmp_path, in_here__1=grey(10), in_here__2=grey(20), in_here__3=grey(30))
    rows = "file,what,part\nin here/1.png,red fox,train\nin here/2.png,wolf,train\nin here/3.png,wolf,test\n"
    (tmp_path / "list.csv").write_text(rows)
    columns = {"image_column": "file", "label_column": "what", "split_column": "part"}
    settings = parquet.Settings(path=str(tmp_path / "list.csv"), image_size=8, **columns)
    splits = parquet.load(settings, {})
    assert splits["train"].pixels[:, 0, 0, 0].tolist() == [10, 20]
    assert splits["train"].labels.tolist() == [0, 1]
    assert splits["test"].pixels[0, 0, 0, 0] == 30 and splits["test"].class_names == ("red fox", "wolf")
    assert parquet.names(settings, splits["train"].index[::-1]) == ["in here/2.png", "in here/1.png"]
    (tmp_path / "in here" / "2.png").unlink()
    with pytest.raises(InputError, match=r"2\.png \(.*row 1 of column 'file'\): not a readable"):
        parquet.load(settings, {})


def test_unpacked_images_are_read_back_as_they_were(tmp_path, monkeypatch):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(content, "PNG")
    rows = {
        "image": [content.getvalue()] * 4,
        "label": ["a/b", "c d"] * 2,
        "split": ["train"] * 2 + ["test"] * 2,
    }
    pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
    flags = ["unpack_images.py", "--parquet", str(tmp_path / "t.parquet"), "--folder", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", flags)
    runpy.run_path(str(ROOT / "scripts/tools/unpack_images.py"), run_name="__main__")
    splits = imagefolder.load(imagefolder.Settings(path=str(tmp_path / "out"), image_size=8), {})
    expected = np.asarray(Image.open(content))
    for split in splits.values():
        assert split.class_names == ("a_b", "c d") and (split.pixels == expected).all() and len(split) == 2


def test_images_have_the_names_of_their_files(tmp_path):
    saved(tmp_path, cat__1=grey(1), cat__2=grey(2), cat__3=grey(3))
    saved(tmp_path, dog__1=grey(4), dog__2=grey(5), dog__3=grey(6))
    settings = imagefolder.Settings(path=str(tmp_path), image_size=8, test_share=0.34)
    train = imagefolder.load(settings, {})["train"]
    for name, pixels in zip(imagefolder.names(settings, train.index), train.pixels, strict=True):
        assert np.asarray(Image.open(name))[0, 0] == pixels[0, 0, 0]


# Memory


def test_what_does_not_fit_into_memory_is_said_before_it_is_asked_for(tmp_path, monkeypatch):
    saved(tmp_path, cat__1=grey(1), cat__2=grey(3), dog__1=grey(2), dog__2=grey(4))
    settings = imagefolder.Settings(path=str(tmp_path), image_size=64, test_share=0.5)
    needed = 2 * 64 * 64 * 3
    monkeypatch.setattr(memory, "free", lambda: needed - 1)
    with pytest.raises(InputError, match=r"2 images of 64x64 pixels needs .* smaller image_size"):
        imagefolder.load(settings, {})
    monkeypatch.setattr(memory, "free", lambda: needed)
    train = imagefolder.load(settings, {})["train"]
    write_images(tmp_path / "train.parquet", train)
    assert (read_images(tmp_path / "train.parquet").pixels == train.pixels).all()
    monkeypatch.setattr(memory, "free", lambda: 0)
    with pytest.raises(InputError, match=r"train\.parquet needs .* take fewer or smaller images"):
        read_images(tmp_path / "train.parquet")
    monkeypatch.setattr(memory, "free", lambda: None)  # where the system does not say
    read_images(tmp_path / "train.parquet")


def test_free_memory_is_the_lesser_of_machine_and_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "GROUP", tmp_path / "none")
    machine = memory.free()
    assert machine is None or machine > 0
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    for name, text in {"current": "700", "max": "1000", "stat": "anon 500\ninactive_file 200\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.free() == 500  # 1000 less 700, of which 200 are cache that goes on demand
    (tmp_path / "memory.max").write_text("max")
    assert memory.free() is machine is None or memory.free() > 500


OWN = """
from torch import nn, no_grad
Plain = lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
Bare = lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
class Frozen(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    forward = no_grad()(nn.Sequential.forward)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "nets_of_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TCORE_RUN_CODE", "nets_of_mine:Plain nets_of_mine:Bare nets_of_mine:Frozen")
    yield Encoder
    sys.modules.pop("nets_of_mine", None)


def test_memory_of_a_step_by_hand(own):
    """The convolution keeps its input, batch norm its input, relu its output: (5, 6, 6) of (3, 8, 8)."""
    encoder = own("nets_of_mine:Plain", 8).eval()
    blocks = check.saved_blocks(encoder, 10)
    assert sum(blocks) == 10 * 4 * (3 * 64 + 2 * 5 * 36) and max(blocks) == 10 * 4 * 3 * 64
    few, many = images_of(3, 3), images_of(3, 3000)
    weights = 4 * (3 * 5 * 9 + 5 + 5 + 5)  # of the convolution, its bias, and of the normalisation
    step = 1.5 * sum(blocks) + 3 * weights + 4 * max(blocks)
    sifting = 3003 * (4 * 8 * 5 + 4 * 2 * 256 + 8 * 3 * 50)  # layers, blocks of distances, lists of int64
    assert check.memory_needed(encoder, few, 10) == int(1.5 * few.pixels.nbytes + step)
    assert check.memory_needed(encoder, many, 10) == 1.5 * many.pixels.nbytes + sifting


STEPS = """
import torch
from tcore.received import check
from tcore.models.encoder import Encoder, floats

def kib(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

torch.set_num_threads(1)
encoder = Encoder("resnet_narrow", 32)
none = type("Images", (), {"labels": [0], "pixels": torch.zeros(0)})
needed = check.memory_needed(encoder, none, 128)
encoder = encoder.to(memory_format=torch.channels_last).train()
optimizer = torch.optim.Adam(encoder.parameters())
images = torch.zeros(128, 3, 32, 32, dtype=torch.uint8)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = kib("VmRSS")
for _ in range(3):
    encoder(floats(images)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print(needed, 1024 * (kib("VmHWM") - before))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of memory to measure")
def test_memory_of_a_step_of_a_narrow_network_as_measured():
    for _ in range(5):  # what else the process touches meanwhile only adds to the peak
        command = [sys.executable, "-c", STEPS]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        needed, measured = map(int, run.stdout.split())
        if 0.8 * measured < needed:
            break
    assert 0.8 * measured < needed < 1.6 * measured


def test_too_little_memory_and_a_network_that_does_not_do_are_said(own, monkeypatch):
    stages = (sift.Settings(), expand.Settings(), filter_channels.Settings(), bootstrap.Settings())
    images = images_of(100, 120)
    assert check.check(own("nets_of_mine:Plain", 8), images, *stages)["memory_mb"] >= 0
    with pytest.raises(InputError, match="no normalisation layers"):
        check.check(own("nets_of_mine:Bare", 8), images, *stages)
    with pytest.raises(
        InputError, match=r"nets_of_mine:Frozen: .*stages do not work .* need convolutions or"
    ):
        check.check(own("nets_of_mine:Frozen", 8), images, *stages)
    monkeypatch.setattr(memory, "free", lambda: 1000)
    with pytest.raises(InputError, match=r"toy: T-Core on 220 images of 8 pixels, 128 a step, needs"):
        check.check(own("nets_of_mine:Plain", 8), images, *stages)
