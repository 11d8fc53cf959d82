"""A classifier: an encoder and a head, as one module and one file."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tcore.device import autocast, block
from tcore.files import InputError, load_tensors, save_tensors
from tcore.models import head as heads
from tcore.models.encoder import Encoder, check_size, floats, load_state
from tcore.models.head import Head


class Classifier(nn.Module):
    """Float images in [0, 1], (N, 3, H, W) -> logits (N, C).

    The head computes in float32 in any case: bfloat16's three digits leave no order among small losses.
    """

    def __init__(self, encoder: Encoder, head: Head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        features = self.encoder(images).float()
        with torch.autocast(images.device.type, enabled=False):
            return self.head(features)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, C) float32 of uint8 images, in eval mode, on the model's device."""
    check_size(model.encoder, images)
    model.eval()
    device = model.encoder.mean.device
    parts = []
    for part in images.split(block(device)):
        with autocast(device):
            parts.append(model(floats(part.to(device))).float())
    return torch.cat(parts)


def save_classifier(path: str | Path, model: Classifier, class_names: tuple[str, ...]) -> None:
    save_tensors(
        path,
        model.state_dict(),
        kind="classifier",
        encoder=model.encoder.description(),
        head=model.head.description(),
        class_names=list(class_names),
    )


def load_classifier(path: str | Path) -> Classifier:
    """A classifier written by `save_classifier`, in eval mode."""
    tensors, meta = load_tensors(path)
    if meta.get("kind") != "classifier":
        raise InputError(f"{path}: not a classifier file")
    head = meta["head"]
    settings = heads.Settings(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in head["settings"].items()}
    )
    model = Classifier(Encoder(**meta["encoder"]), Head(head["dim"], head["classes"], settings))
    load_state(model, tensors, path)
    return model.eval()
