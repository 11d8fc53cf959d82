"""backdoor-toolbox's format: files as it writes them, and ours as it would read them."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tcore.data.images import ImageSet, read_images, write_images
from tcore.dataset_attacks import wanet
from tcore.files import InputError, load_table, save_table
from tcore.poisoning import toolbox

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts/tools"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images as the toolbox saves them: floats that were not rounded, lists of int."""
    images = torch.zeros(3, 3, 2, 2)
    images[0], images[1] = 100.4 / 255, 100.6 / 255
    images[2, 0, 0, 1] = 1
    torch.save(images, tmp_path / "imgs")
    torch.save(torch.tensor([4, 0, 1]), tmp_path / "labels")
    torch.save([1], tmp_path / "poison_indices")
    torch.save([2], tmp_path / "cover_indices")
    return tmp_path


def run(name: str, *arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


def test_read(folder):
    images, truth = toolbox.read(folder)
    assert (images.pixels[0] == 100).all() and (images.pixels[1] == 101).all()
    assert images.pixels[2, 0, 1].tolist() == [255, 0, 0] and images.pixels[2].sum() == 255
    assert images.labels.tolist() == [4, 0, 1] and images.num_classes == 5
    assert truth["clean_label"].tolist() == [4, -1, 1]
    assert truth["is_poison"].tolist() == [False, True, False]
    assert truth["is_cover"].tolist() == [False, False, True]
    (folder / "cover_indices").unlink()  # the toolbox writes it for some attacks only
    assert not toolbox.read(folder)[1]["is_cover"].any()


def test_there_and_back(tmp_path):
    random = np.random.default_rng(0)
    clean = ImageSet(
        random.integers(0, 256, (60, 8, 8, 3), np.uint8), np.arange(60) % 3, np.arange(60), tuple("abc"), "x"
    )
    poisoned = wanet.poison(clean, 1, wanet.Settings(), 0)
    write_images(tmp_path / "train", poisoned.images)
    save_table(tmp_path / "truth", poisoned.truth)
    run("export_poisoned", "--train", tmp_path / "train", "--truth", tmp_path / "truth",
        "--folder", tmp_path / "set")  # fmt: skip
    theirs = {file.name: torch.load(file, weights_only=True) for file in (tmp_path / "set").iterdir()}
    assert theirs["imgs"].dtype == torch.float32 and theirs["labels"].dtype == torch.int64
    assert theirs["poison_indices"] == np.flatnonzero(poisoned.truth["is_poison"]).tolist()
    assert len(theirs["cover_indices"]) == 1
    (tmp_path / "names").write_text('["a", "b", "c"]')
    run("import_poisoned", "--folder", tmp_path / "set", "--class-names", tmp_path / "names",
        "--train", tmp_path / "train2", "--truth", tmp_path / "truth2")  # fmt: skip
    again = read_images(tmp_path / "train2")
    assert np.array_equal(again.pixels, poisoned.images.pixels)
    assert np.array_equal(again.labels, poisoned.images.labels) and again.class_names == tuple("abc")
    flags = ["is_poison", "is_cover"]
    assert load_table(tmp_path / "truth2")[flags].equals(poisoned.truth[flags])


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("imgs", Evil(), "imgs: not a file of torch.save"),
        ("imgs", torch.zeros(3, 3, 2, 2, dtype=torch.uint8), "imgs: not float images"),
        ("imgs", torch.full((3, 3, 2, 2), 2.0), r"imgs: not float images .* in \[0, 1\]"),
        ("labels", torch.tensor([0, 1]), "labels: not a class number for each of the 3 images"),
        ("poison_indices", [3], r"poison_indices: not a list of row numbers 0\.\.2"),
        ("cover_indices", [0.5], "cover_indices: not a list of row numbers"),
    ],
)
def test_what_is_refused(folder, capsys, name, content, message):
    torch.save(content, folder / name)
    with pytest.raises(InputError, match=message):
        toolbox.read(folder)
    assert "executed" not in capsys.readouterr().out


def test_missing_files_and_foreign_truth(folder, tmp_path):
    (folder / "labels").unlink()
    with pytest.raises(SystemExit, match="labels: no such file"):
        run("import_poisoned", "--folder", folder, "--train", folder / "x", "--truth", folder / "y")
    clean = ImageSet(np.zeros((2, 2, 2, 3), np.uint8), np.zeros(2, int), np.arange(2), ("a",), "x")
    write_images(tmp_path / "train", clean)
    save_table(tmp_path / "truth", pd.DataFrame({"index": [5, 6]}))
    with pytest.raises(SystemExit, match="truth: its rows are not those"):
        run("export_poisoned", "--train", tmp_path / "train", "--truth", tmp_path / "truth",
            "--folder", tmp_path / "out")  # fmt: skip
