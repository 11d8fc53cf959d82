"""GTSRB, German traffic signs (Stallkamp et al. 2012): 39,209 training and 12,630 test images, 43 classes.

The training set is the full one of `GTSRB_Final_Training_Images.zip`. torchvision's
`GTSRB(split="train")` reads another archive, the competition's online set of 26,640 images;
results on the two do not compare. Test labels come from `GTSRB_Final_Test_GT.zip`.

Images differ in size (15 to 250 pixels) and show a margin of about a tenth around the sign.
The whole frame, margin included, is resized to `image_size` squared with Pillow (bilinear,
antialiased); proportions are not kept. `index` is the rank among the sorted file names.
Training images come in tracks of 30 frames of one physical sign.

The checksums of the test archives are torchvision's; the training archive's is the one
in common use, for which no publisher's page was found.
"""

import csv
import io
import re
import zipfile
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tcore.data.archives import Archive
from tcore.data.images import ImageSet
from tcore.data.sources._reading import at_least, decode, stack
from tcore.files import InputError, require

URL = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"
TRAIN, TEST, TRUTH = (f"GTSRB_Final_{part}.zip" for part in ("Training_Images", "Test_Images", "Test_GT"))
ARCHIVES = (
    Archive(TRAIN, f"{URL}/{TRAIN}", "md5:f33fd80ac59bff73c82d25ab499e03a3"),
    Archive(TEST, f"{URL}/{TEST}", "md5:c7e4e6327067d32654124b0fe9e82185"),
    Archive(TRUTH, f"{URL}/{TRUTH}", "md5:fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
)
CLASSES = (
    "Speed limit (20km/h)",
    "Speed limit (30km/h)",
    "Speed limit (50km/h)",
    "Speed limit (60km/h)",
    "Speed limit (70km/h)",
    "Speed limit (80km/h)",
    "End of speed limit (80km/h)",
    "Speed limit (100km/h)",
    "Speed limit (120km/h)",
    "No passing",
    "No passing for vehicles over 3.5 metric tons",
    "Right-of-way at the next intersection",
    "Priority road",
    "Yield",
    "Stop",
    "No vehicles",
    "Vehicles over 3.5 metric tons prohibited",
    "No entry",
    "General caution",
    "Dangerous curve to the left",
    "Dangerous curve to the right",
    "Double curve",
    "Bumpy road",
    "Slippery road",
    "Road narrows on the right",
    "Road work",
    "Traffic signals",
    "Pedestrians",
    "Children crossing",
    "Bicycles crossing",
    "Beware of ice/snow",
    "Wild animals crossing",
    "End of all speed and passing limits",
    "Turn right ahead",
    "Turn left ahead",
    "Ahead only",
    "Go straight or right",
    "Go straight or left",
    "Keep right",
    "Keep left",
    "Roundabout mandatory",
    "End of no passing",
    "End of no passing by vehicles over 3.5 metric tons",
)


@dataclass(frozen=True)
class Settings:
    image_size: int = 32  # height and width in pixels, in [1, inf)


@contextmanager
def _opened(path: Path):
    """The zip archive at `path`; damage met inside the block is an InputError too."""
    try:
        with zipfile.ZipFile(require(path, made_by="a download")) as archive:
            yield archive
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{path}: not the published archive ({error}); fetch it again") from error


def _images(path: Path, pattern: str, size: int) -> tuple[np.ndarray, list[re.Match]]:
    """The images whose names match `pattern`, in the order of their names, and the matches."""
    with _opened(path) as archive:
        found = [match for name in sorted(archive.namelist()) if (match := re.fullmatch(pattern, name))]
        if not found:
            raise InputError(f"{path}: holds no images named {pattern}; is it the published archive?")

        def frames() -> Iterable[Image.Image]:
            for match in found:
                frame = decode(archive.read(match[0]), f"{path}: {match[0]}")
                yield frame.resize((size, size), Image.Resampling.BILINEAR)

        return stack(frames(), len(found), str(path)), found


def _truth(path: Path) -> dict[str, int]:
    """The class of every test file."""
    with _opened(path) as archive:
        rows = csv.DictReader(io.StringIO(archive.read("GT-final_test.csv").decode()), delimiter=";")
        return {row["Filename"]: int(row["ClassId"]) for row in rows}


def _set(pixels: np.ndarray, labels: list[int], split: str) -> ImageSet:
    return ImageSet(pixels, np.array(labels, np.int64), np.arange(len(pixels)), CLASSES, f"GTSRB, {split}")


def load(settings: Settings, archives: dict[str, Path]) -> dict[str, ImageSet]:
    """The splits 'train' and 'test'."""
    size = at_least(1, settings.image_size, "gtsrb: image_size")
    pixels, found = _images(archives[TRAIN], r"GTSRB/Final_Training/Images/(\d{5})/\d{5}_\d{5}\.ppm", size)
    train = _set(pixels, [int(match[1]) for match in found], "train (39,209 set)")
    pixels, found = _images(archives[TEST], r"GTSRB/Final_Test/Images/(\d{5}\.ppm)", size)
    truth = _truth(archives[TRUTH])
    if missing := [match[1] for match in found if match[1] not in truth]:
        raise InputError(
            f"{archives[TRUTH]}: no class for the test image {missing[0]}; fetch both archives again"
        )
    return {"train": train, "test": _set(pixels, [truth[match[1]] for match in found], "test")}
