"""What comes from outside: its configuration, its plan, what is refused and what is said about it."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tcore import grid, provenance, received, registry
from tcore.config import require_files, validate
from tcore.data.images import ImageSet
from tcore.files import InputError
from tcore.models import head as heads
from tcore.models.encoder import ARCHITECTURES, Encoder
from tcore.stages import bootstrap, expand, filter_channels, sift

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
        run = [
            sys.executable,
            "-m",
            "snakemake",
            "-n",
            "--forceall",
            "--configfile",
            str(overlay),
            *arguments,
        ]
        return subprocess.run(run, cwd=ROOT, capture_output=True, text=True)

    return plan, overlay, folder


def test_nothing_on_this_path_asks_for_a_truth_and_no_stage_for_held_out_images(planned):
    plan, _, folder = planned
    lines = [line for line in plan("--printshellcmds").stdout.splitlines() if "python scripts/" in line]
    text = "\n".join(lines)
    assert not re.search("truth|trigger|poison", text)
    commands = re.findall(r"python scripts/(\w+)\.py .*", text)
    assert sorted(commands) == sorted(
        [
            "import_encoder",
            "prepare_dataset",
            "check_received",
            "extract_features",
            "train_head",
            "sift",
            "expand",
            "filter_channels",
            "bootstrap",
            "predict",
            "predict",
            "export_model",
            "audit",
        ]
    )
    readers = {re.search(r"scripts/(\w+)", line)[1] for line in lines if "datasets/mine/test" in line}
    assert readers == {"prepare_dataset", "predict", "audit"}
    assert f"--checkpoint '{folder}/encoder.pth'" in text


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
    assert received.check_classes(images_of(10, 35), settings) == {
        "smallest": 10,
        "largest": 35,
        "seeds_of_smallest": 1,
    }
    with pytest.raises(InputError, match=r"need 10 .*'class 1' has 9; .*seed_share to 0.1112"):
        received.check_classes(images_of(10, 9), settings)
    assert (
        received.check_classes(images_of(10, 9), sift.Settings(seed_share=0.1112))["seeds_of_smallest"] == 1
    )
    with pytest.raises(InputError, match=r"'class 0' has 1; add images or leave such classes out$"):
        received.check_classes(images_of(1, 30), settings)
    with pytest.raises(InputError, match=r"'class 1' has 0"):
        received.check_classes(images_of(30, 0, 30), settings)
    with pytest.raises(InputError, match=r"and so on, 1000 classes in all"):
        received.check_classes(images_of(*[2] * 1000), settings)


def test_repeats_by_hand():
    images = images_of(4, 4)
    images.pixels[1] = images.pixels[0]  # the same label
    images.pixels[5] = images.pixels[0]  # another label
    images.pixels[7] = images.pixels[6]
    assert received.repeats(images) == {"duplicates": 3, "contradictions": 1}


def test_passes_count_what_bootstrapping_trains_on(monkeypatch):
    """Against a run of the stage with counters in place of its training."""
    pooling = bootstrap.Settings(
        rounds_class=0, rounds_all=2, epochs=3, epochs_meta=2, epochs_final=4, gamma3=0.3
    )
    n, subset = 40, torch.arange(40) < 4
    trained, looked = [], []
    monkeypatch.setattr(
        bootstrap,
        "fit",
        lambda m, o, rows, *rest: trained.append(len(rows) * (rest[5] if len(rest) > 5 else 1)),
    )
    monkeypatch.setattr(
        bootstrap, "losses", lambda m, i, y, rows: looked.append(len(rows)) or torch.rand(len(rows))
    )
    images = images_of(20, 20)
    untrusted = {
        name: torch.zeros(layer.out_channels, dtype=torch.bool)
        for name, layer in filter_channels.convolutions(Encoder("resnet_tiny", 8)).items()
    }
    bootstrap.bootstrap(
        Encoder("resnet_tiny", 8),
        images.tensor,
        images.targets,
        2,
        subset,
        untrusted,
        pooling,
        heads.Settings(),
        0,
    )
    channels = filter_channels.Settings(unlearn_epochs=0, epochs=0)
    assert received.passes(n, expand.Settings(subset_share=0.1), channels, pooling) == (
        sum(trained),
        sum(looked),
    )
    more = filter_channels.Settings(unlearn_epochs=2, epochs=5)
    found = received.passes(n, expand.Settings(subset_share=0.1), more, pooling)
    assert found == (sum(trained) + 2 * 40 + 5 * 4, sum(looked))


def test_the_check_as_a_whole():
    stages = (sift.Settings(), expand.Settings(), filter_channels.Settings(), bootstrap.Settings())
    found = received.check(Encoder("resnet_tiny", 8), images_of(100, 120), *stages)
    assert found["images"] == 220 and found["classes"] == 2 and found["seeds_of_smallest"] == 1
    assert found["seconds"] > 0 and found["duplicates"] == found["contradictions"] == 0
    with pytest.raises(InputError, match="takes 16x16 images, these are 8x8; set image_size"):
        received.check(Encoder("resnet_tiny", 16), images_of(100, 120), *stages)
