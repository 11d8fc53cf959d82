"""Pictures stamped from the command line, against the attack itself."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tcore.dataset_attacks import adap_patch, sig
from tcore.poisoning import triggers

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/tools/stamp_images.py"


def run(*arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def trigger(tmp_path) -> Path:
    file = tmp_path / "trigger.safetensors"
    triggers.save(file, sig.make_trigger(32, 48, sig.Settings()), *sig.OWNER, 2)
    return file


def picture(path: Path, height: int, width: int) -> torch.Tensor:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_a_folder(trigger, tmp_path):
    clean = picture(tmp_path / "in/a.png", 32, 48)
    picture(tmp_path / "in/b.bmp", 70, 70)
    (tmp_path / "in/notes.txt").write_text("no picture")
    run("--trigger", trigger, "--pictures", tmp_path / "in", "--output", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]
    expected = sig.stamp(clean[None], sig.make_trigger(32, 48, sig.Settings()))[0]
    assert torch.equal(read(tmp_path / "out/a.png"), expected)
    assert read(tmp_path / "out/b.png").shape == (3, 32, 48)


def test_side_by_side(trigger, tmp_path):
    clean = picture(tmp_path / "a.png", 32, 48)
    run("--trigger", trigger, "--pictures", tmp_path / "a.png", "--output", tmp_path, "--compare")
    left, middle, right = read(tmp_path / "a.png").split(48, 2)
    assert torch.equal(left, clean)
    assert torch.equal(right, (middle.int() - left.int()).abs() * (255 // 30))


def test_a_stack_of_marks(tmp_path):
    triggers.save(
        tmp_path / "t", adap_patch.make_trigger(32, 32, adap_patch.Settings()), *adap_patch.OWNER, 2
    )
    clean = picture(tmp_path / "a.png", 32, 32)
    run("--trigger", tmp_path / "t", "--pictures", tmp_path / "a.png", "--output", tmp_path / "out")
    assert 50 < (read(tmp_path / "out/a.png") != clean).any(0).sum() <= 50 + 36 - 9


def test_what_is_refused(trigger, tmp_path):
    arguments = ["--output", tmp_path / "out", "--trigger"]
    with pytest.raises(SystemExit, match="neither a picture nor a folder"):
        run(*arguments, trigger, "--pictures", tmp_path / "nowhere")
    picture(tmp_path / "in/a.png", 8, 8)
    picture(tmp_path / "in/a.bmp", 8, 8)
    with pytest.raises(SystemExit, match="two pictures are called a"):
        run(*arguments, trigger, "--pictures", tmp_path / "in")
    (tmp_path / "in/a.bmp").write_bytes(b"broken")
    with pytest.raises(SystemExit, match=r"a\.bmp: not a readable image"):
        run(*arguments, trigger, "--pictures", tmp_path / "in/a.bmp")
    triggers.save(tmp_path / "clean", {}, "dataset_attacks", "clean", None)
    with pytest.raises(SystemExit, match="clean set"):
        run(*arguments, tmp_path / "clean", "--pictures", tmp_path / "in/a.png")
