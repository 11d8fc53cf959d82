"""SVHN, cropped digits (Netzer et al. 2011): 73,257 training and 26,032 test images, 32x32.

Read from the MATLAB files: X (32, 32, 3, N) and y (N, 1), where label 10 stands for the
digit 0. The 531,131 `extra` images are not read. The checksums are torchvision's.
"""

from pathlib import Path

import numpy as np
from scipy.io import loadmat

from tcore.data.archives import Archive
from tcore.data.images import ImageSet
from tcore.files import InputError, require

URL = "http://ufldl.stanford.edu/housenumbers"
ARCHIVES = (
    Archive("train_32x32.mat", f"{URL}/train_32x32.mat", "md5:e26dedcc434d2e4c54c9b2d4a06d8373"),
    Archive("test_32x32.mat", f"{URL}/test_32x32.mat", "md5:eb5a983be6a315427106f1b164d9cef3"),
)


def _split(name: str, path: Path) -> ImageSet:
    try:
        content = loadmat(require(path, made_by="a download"), variable_names=["X", "y"])
        pixels, labels = content["X"].transpose(3, 0, 1, 2), content["y"].ravel()
    except InputError:
        raise
    except Exception as error:  # loadmat has no error class of its own for a damaged file
        raise InputError(f"{path}: not a readable SVHN file ({error!r}); fetch it again") from error
    return ImageSet(
        pixels=np.ascontiguousarray(pixels),
        labels=labels.astype(np.int64) % 10,
        index=np.arange(len(pixels)),
        class_names=tuple("0123456789"),
        origin=f"SVHN, {name}",
    )


def load(settings: None, archives: dict[str, Path]) -> dict[str, ImageSet]:
    """The splits 'train' and 'test'."""
    return {name: _split(name, archives[f"{name}_32x32.mat"]) for name in ("train", "test")}
