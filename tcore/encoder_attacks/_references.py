"""The reference images that an attack pulls triggered images towards."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tcore.data.images import ImageSet
from tcore.files import InputError
from tcore.models.encoder import Encoder, extract_features
from tcore.poisoning import check_target


def choose_references(
    encoder: Encoder, images: ImageSet, target: int, n: int, device: torch.device
) -> Tensor:
    """Rows (n,) of the target's images nearest to their centroid, nearest first.

    Features are those of the clean encoder, L2-normalised. An arbitrary image of the class often fails:
    the reference must be one that the victim's head puts into the target class.
    """
    rows = torch.from_numpy((images.labels == check_target(images, target)).nonzero()[0])
    if len(rows) < n:
        raise InputError(
            f"{n} references wanted but {images.origin} has {len(rows)} images of class {target}"
        )
    features = F.normalize(extract_features(encoder.to(device), images.tensor[rows]), dim=1)
    return rows[(features @ features.mean(0)).topk(n).indices.cpu()]
