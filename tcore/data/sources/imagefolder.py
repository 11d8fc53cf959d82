"""Image files in one folder per class: ImageNet, its subsets, and anybody's own photographs.

`path` holds either `train/<class>/...` (with the test images in `test/<class>/...` or else
`val/<class>/...`) or the class folders themselves; without a test folder a share of every class is held out.
Classes are the sorted folder names, or the names listed in the file `classes`, in that order:
ImageNet-100 and ImageNet-10 are the ILSVRC 2012 folder and a list of synsets.
The shorter side is brought to `image_size` with Pillow (bilinear, antialiased) and the longer one cropped
around the centre. `index` is the rank of the file among those of its folder, class by class.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tcore.data.images import ImageSet
from tcore.data.sources._reading import at_least, decode, hold_out, square, stack
from tcore.files import InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Settings:
    path: str = ""  # the folder, relative to the working directory
    image_size: int = 224  # height and width in pixels, in [1, inf)
    classes: str | None = None  # file with one class folder a line; null: all folders
    test_share: float = 0.2  # share of every class held out where there is no test folder, in (0, 1)
    seed: int = 0  # of the held-out share, in [0, inf); a run's random seed does not change the data


def _classes(settings: Settings, folder: Path) -> tuple[str, ...]:
    if settings.classes is None:
        names = sorted(item.name for item in folder.iterdir() if item.is_dir() and item.name[0] != ".")
        if len(names) < 2:
            raise InputError(f"imagefolder: {folder} should hold one folder per class, it has {len(names)}")
        return tuple(names)
    if not Path(settings.classes).is_file():
        raise InputError(f"imagefolder: classes = {settings.classes!r} is not a file")
    names = [name for line in Path(settings.classes).read_text().splitlines() if (name := line.strip())]
    if len(set(names)) != len(names) or len(names) < 2:
        raise InputError(f"{settings.classes}: should name at least two classes, each once")
    return tuple(names)


def _files(folder: Path, names: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    paths, labels = [], []
    for label, name in enumerate(names):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not found:
            raise InputError(f"imagefolder: no images of class {name!r} in {folder / name}")
        paths += found
        labels += [label] * len(found)
    return paths, labels


def _read(folder: Path, names: tuple[str, ...], size: int, origin: str, rows: np.ndarray | None) -> ImageSet:
    """The images of a folder, or those at `rows` (boolean) of its files."""
    paths, labels = _files(folder, names)
    index = np.arange(len(paths)) if rows is None else np.flatnonzero(rows)
    files = tqdm([paths[i] for i in index], desc=f"reading {folder}", unit="image")
    pixels = stack((square(decode(path, str(path)), size) for path in files), len(index), str(folder))
    return ImageSet(pixels, np.array(labels)[index], index, names, origin)


def names(settings: Settings, index: np.ndarray) -> list[str]:
    """The files of training images by their `index`."""
    root = Path(settings.path)
    folder = root / "train" if (root / "train").is_dir() else root
    paths = _files(folder, _classes(settings, folder))[0]
    return [str(paths[i]) for i in index]


def load(settings: Settings, archives: dict) -> dict[str, ImageSet]:
    """The splits 'train' and 'test'."""
    root, size = Path(settings.path), at_least(1, settings.image_size, "imagefolder: image_size")
    if not settings.path or not root.is_dir():
        raise InputError(
            f"imagefolder: path = {settings.path!r} is not a folder; name the folder with the images"
        )
    own = (root / "train").is_dir()
    folder, origin = (root / "train", f"{root.name}, train") if own else (root, root.name)
    names = _classes(settings, folder)
    for split in ("test", "val"):
        if own and (root / split).is_dir():
            others = [] if settings.classes else sorted(set(_classes(settings, root / split)) - set(names))
            if others:
                raise InputError(
                    f"imagefolder: {root / split} has classes that {folder} has not: "
                    f"{', '.join(others[:5])}; name the same classes in both"
                )
            train = _read(folder, names, size, origin, None)
            return {"train": train, "test": _read(root / split, names, size, f"{root.name}, {split}", None)}
    held_out = hold_out(np.array(_files(folder, names)[1]), settings.test_share, settings.seed, settings.path)
    return {
        "train": _read(folder, names, size, origin, ~held_out),
        "test": _read(folder, names, size, origin, held_out),
    }
