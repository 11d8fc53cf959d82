"""The user's steps as commands: a chain on 80 images, and what each does about an input that is no good."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tcore.data.images import read_images, write_images
from tcore.data.sources import signs
from tcore.encoder_attacks import badencoder
from tcore.files import load_table, load_tensors
from tcore.models.classifier import load_classifier
from tcore.poisoning import triggers

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
HEAD = {"head": {"hidden": [16, 8], "epochs": 2}}
SHORT = {"epochs": 1, "epochs_meta": 1, "epochs_final": 1, "rounds_class": 1, "rounds_all": 1, "gamma3": 0.5}
SIMCLR = {"architecture": "resnet_narrow", "epochs": 1, "batch": 40}
STEPS = {  # inputs, outputs, settings; an option's file has its name
    "pretrain_encoder": (("images",), ("encoder",), {"simclr": SIMCLR}),
    "extract_features": (("encoder", "images"), ("features",), None),
    "train_head": (("encoder", "features", "images"), ("model",), HEAD),
    "sift": (("model", "features", "images"), ("seeds",), {"sift": {"seed_share": 0.2, "neighbours": 5}}),
    "expand": (("features", "images", "seeds"), ("subset",), HEAD | {"expand": {"epochs": 1, "steps": 2}}),
    "filter_channels": (
        ("model", "images", "subset"),
        ("channels",),
        {"filter_channels": {"epochs": 1, "unlearn_epochs": 1}},
    ),
    "bootstrap": (
        ("model", "images", "seeds", "subset", "channels"),
        ("model-out", "pool"),
        HEAD | {"bootstrap": SHORT},
    ),
}
INPUTS = [(step, name) for step, (inputs, _, _) in STEPS.items() for name in inputs]


def arguments(step: str, folder: Path, out: Path, **replaced: Path) -> list[str]:
    inputs, outputs, settings = STEPS[step]
    files = {name: replaced.get(name, folder / name) for name in inputs}
    files |= {name: out / name for name in outputs} | {"record": out / f"{step}.run.json"}
    options = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    if settings is not None:
        options += ["--settings", json.dumps(settings)]
    return [str(SCRIPTS / f"{step}.py"), *options, "--seed", "0"]


def run(*given, **replaced) -> None:
    with pytest.MonkeyPatch.context() as patch:
        argv = arguments(*given, **replaced)
        patch.setattr(sys, "argv", argv)
        runpy.run_path(argv[0], run_name="__main__")


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    images = signs.load(signs.Settings(train=160, test=10, image_size=16), {})["train"]
    rows = np.sort(images.labels.argsort(kind="stable").reshape(10, 16)[:, 8:].ravel())
    write_images(folder / "images", images.select(rows))
    for step in STEPS:
        run(step, folder, folder)
    return folder


def test_the_steps_fit_together(chain):
    files = {name for _, outputs, _ in STEPS.values() for name in outputs}
    assert {path.name for path in chain.iterdir()} == files | {"images"} | {f"{s}.run.json" for s in STEPS}
    for step, (_, _, settings) in STEPS.items():
        record = json.loads((chain / f"{step}.run.json").read_text())
        assert (record["step"], record["seed"], record["settings"]) == (step, 0, settings or {})
    seeds, subset, pool = (load_table(chain / name) for name in ("seeds", "subset", "pool"))
    for table in (seeds, subset, pool):
        assert table["index"].tolist() == read_images(chain / "images").index.tolist()  # not the row numbers
    assert seeds.trusted.sum() == 10  # one of eight in each of ten classes
    assert (subset["round"] == 0).tolist() == seeds.trusted.tolist()
    assert (pool["round"] == 0).tolist() == (subset["round"] >= 0).tolist()
    assert load_tensors(chain / "features")[0]["features"].shape == (80, 192)
    names = {name.partition(".")[0] for name in load_tensors(chain / "channels")[0]}
    assert names == {"mask", "untrusted"}
    assert load_classifier(chain / "model-out").head.classes == 10


@pytest.mark.parametrize(("step", "name"), INPUTS)
def test_a_missing_or_damaged_input_is_named_and_nothing_is_left(chain, tmp_path, step, name):
    broken, out = tmp_path / "broken", tmp_path / "out"
    out.mkdir()
    with pytest.raises(SystemExit, match=r"^error: .*broken: no such file"):
        run(step, chain, out, **{name: broken})
    broken.write_bytes((chain / name).read_bytes()[:100])
    with pytest.raises(SystemExit, match=r"^error: .*broken: not a"):
        run(step, chain, out, **{name: broken})
    assert list(out.iterdir()) == []


def test_an_error_is_one_line_and_exit_status_1(tmp_path):
    done = subprocess.run([sys.executable, *arguments("train_head", tmp_path, tmp_path)], capture_output=True)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_baseline_counts_triggered_images_of_other_classes(chain, tmp_path, capsys):
    class Always(torch.nn.Module):
        """Class 3 for what is bright in the lower right corner, class 0 for the rest."""

        encoder = load_classifier(chain / "model").encoder

        def forward(self, images):
            return torch.nn.functional.one_hot((images[:, 0, -2, -2] > 0.99) * 3, 10).float()

    trigger = badencoder.make_trigger(16, 16, badencoder.Settings(), 0)
    triggers.save(tmp_path / "t", trigger, "encoder_attacks", "badencoder", 3)
    triggers.save(tmp_path / "clean", {}, "encoder_attacks", "clean", None)
    options = ["baseline.py", "--model", str(chain / "model"), "--test", str(chain / "images")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcore.models.classifier.load_classifier", lambda path: Always())
        patch.setattr(sys, "argv", [*options, str(tmp_path / "t")])
        runpy.run_path(str(SCRIPTS / "tools/baseline.py"), run_name="__main__")
        assert capsys.readouterr().out.splitlines()[1].startswith("badencoder,3,1.0000,")
        patch.setattr(sys, "argv", [*options, str(tmp_path / "clean")])
        with pytest.raises(SystemExit, match="clean: a trigger of no attack"):
            runpy.run_path(str(SCRIPTS / "tools/baseline.py"), run_name="__main__")
