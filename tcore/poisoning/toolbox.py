"""Poisoned sets of backdoor-toolbox: read and written in its format, without executing anything in a file.

A folder with four files of `torch.save`: `imgs` (N, 3, H, W) float32 in [0, 1], `labels` (N,) int64 as the
victim sees them, `poison_indices` and, where there are covers, `cover_indices`, lists of row numbers. The
trigger is kept elsewhere and not read. BackdoorBench keeps its sets in pickles, which cannot be read safely;
they do not enter here.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from tcore.data.images import ImageSet
from tcore.files import InputError, atomic, require
from tcore.poisoning.triggers import rows_at_once


def _load(path: Path):
    try:
        return torch.load(require(path, "backdoor-toolbox"), map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise InputError(
            f"{path}: not a file of torch.save that can be read without running code in it "
            f"({type(error).__name__}); make the set anew with backdoor-toolbox"
        ) from error


def _rows(path: Path, n: int) -> np.ndarray:
    """The mask (n,) of the rows that a file of indices names."""
    mask = np.zeros(n, bool)
    rows = np.asarray(_load(path))
    if rows.size:
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= n:
            raise InputError(f"{path}: not a list of row numbers 0..{n - 1}; make the set anew")
        mask[rows] = True
    return mask


def read(folder: str | Path, class_names: tuple[str, ...] | None = None) -> tuple[ImageSet, pd.DataFrame]:
    """The images, rounded to 8 bit, and the truth; poisons' `clean_label` is -1, for nothing tells it.

    Without `class_names` the classes are 0 to the largest label.
    """
    folder = Path(folder)
    images, labels = _load(folder / "imgs"), _load(folder / "labels")
    labels = np.asarray(labels)
    floats = isinstance(images, torch.Tensor) and images.is_floating_point() and images.ndim == 4
    if not floats or not len(images) or images.shape[1] != 3 or images.min() < 0 or images.max() > 1:
        raise InputError(f"{folder / 'imgs'}: not float images (N, 3, H, W) in [0, 1]; N at least 1")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise InputError(f"{folder / 'labels'}: not a class number for each of the {len(images)} images")
    pixels = [(part * 255 + 0.5).to(torch.uint8) for part in images.split(rows_at_once(images))]
    poison = _rows(folder / "poison_indices", len(images))
    covers = folder / "cover_indices"
    cover = _rows(covers, len(images)) if covers.is_file() else np.zeros(len(images), bool)
    found = ImageSet(
        pixels=torch.cat(pixels).permute(0, 2, 3, 1).contiguous().numpy(),
        labels=labels.astype(np.int64),
        index=np.arange(len(images)),
        class_names=class_names or tuple(map(str, range(labels.max() + 1))),
        origin=f"backdoor-toolbox, {folder.name}",
    )
    clean = np.where(poison, -1, found.labels)
    return found, pd.DataFrame(
        {"index": found.index, "clean_label": clean, "is_poison": poison, "is_cover": cover & ~poison}
    )


def write(folder: str | Path, images: ImageSet, truth: pd.DataFrame) -> None:
    """The same four files; `imgs` takes 4 bytes per pixel value."""
    contents = {
        "imgs": images.tensor.contiguous().float() / 255,
        "labels": images.targets,
        "poison_indices": np.flatnonzero(truth["is_poison"]).tolist(),
        "cover_indices": np.flatnonzero(truth["is_cover"]).tolist(),
    }
    for name, content in contents.items():
        with atomic(Path(folder) / name) as temporary:
            torch.save(content, temporary)
