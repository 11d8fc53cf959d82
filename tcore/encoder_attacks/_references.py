"""The reference images that an attack pulls triggered images towards.

The head may put the image nearest to its own class's centroid into another class. Triggered images then go to
that class (docs/lab/encoder-attack-needs.md), so other classes' centroids count too.
"""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tcore.data.images import ImageSet
from tcore.files import InputError, require
from tcore.models.encoder import Encoder, extract_features
from tcore.poisoning.poisoned import check_target


def choose_references(
    encoder: Encoder, images: ImageSet, target: int, n: int, device: torch.device
) -> Tensor:
    """Rows (n,) of the target's images nearest to their centroid compared to other classes', nearest first.

    Features are those of the clean encoder, L2-normalised; an image counts by its cosine with the centroid
    of its class less the largest with another class's. The reference must be one that the victim's head
    puts into the target class: an arbitrary image often is not, nor the nearest to its own centroid alone.
    """
    rows = torch.from_numpy((images.labels == check_target(images, target)).nonzero()[0])
    if len(rows) < n:
        raise InputError(
            f"{n} references wanted but {images.origin} has {len(rows)} images of class {target}"
        )
    features = F.normalize(extract_features(encoder.to(device), images.tensor), dim=1)
    labels = images.targets.to(device)
    own, *others = (
        F.normalize(features[labels == k].mean(0), dim=0)
        for k in sorted(labels[labels >= 0].unique().tolist(), key=lambda k: k != target)
    )
    features = features[rows.to(device)]
    margin = features @ own
    if others:
        margin = margin - (features @ torch.stack(others).T).max(1).values
    return rows[margin.topk(n).indices.cpu()]


def read_references(path: str | Path, height: int, width: int) -> tuple[Tensor, Tensor | None]:
    """References (R, 3, height, width) uint8 and, where given, their objects' masks (R, height, width) bool.

    The file is a NumPy archive (.npz) with `x` (R, H, W, 3) uint8, as BadEncoder's and DRUPE's are, and
    perhaps `mask` (R, H, W).
    """
    try:
        with np.load(require(path, "you: the attack's setting `reference_file` names it")) as file:
            content = {name: file[name] for name in ("x", "mask") if name in file}
    except (OSError, ValueError, BadZipFile, AttributeError, TypeError) as error:
        raise InputError(f"{path}: not a readable .npz file without pickled objects ({error})") from error
    x, mask = content.get("x"), content.get("mask")
    if x is None or x.dtype != np.uint8 or x.shape[1:] != (height, width, 3) or not len(x):
        found = "no array `x`" if x is None else f"`x` of {x.dtype} {x.shape}"
        raise InputError(f"{path}: {found}; it should be uint8 (R, {height}, {width}, 3)")
    if mask is not None and (mask.shape != x.shape[:3] or not mask.any((1, 2)).all()):
        raise InputError(f"{path}: `mask` {mask.shape} should be {x.shape[:3]} with something in every mask")
    return torch.from_numpy(x).permute(0, 3, 1, 2), None if mask is None else torch.from_numpy(mask != 0)
