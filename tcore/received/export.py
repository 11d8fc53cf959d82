"""A classifier for use without this project: one TorchScript file with normalisation and class names inside.

model = torch.jit.load("model.pt")
model.class_names[model(images).argmax(1)[0]]     # images (N, 3, H, W) uint8 -> probabilities (N, C)
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from tcore.files import InputError, atomic
from tcore.models.classifier import Classifier
from tcore.models.encoder import floats


class Exported(nn.Module):
    """uint8 images of the encoder's size -> probabilities, eval mode."""

    class_names: list[str]

    def __init__(self, model: Classifier, class_names: tuple[str, ...]):
        super().__init__()
        size = model.encoder.image_size
        self.class_names, self.image_size = list(class_names), size
        self.model = torch.jit.trace(model.eval(), torch.rand(2, 3, size, size))

    def forward(self, images: Tensor) -> Tensor:
        if (
            images.dtype != torch.uint8
            or images.shape[2] != self.image_size
            or images.shape[3] != self.image_size
        ):
            raise ValueError("images should be uint8 (N, 3, image_size, image_size)")
        return self.model(images.float() / 255).softmax(1)


@torch.no_grad()
def export(path: str | Path, model: Classifier, class_names: tuple[str, ...]) -> None:
    """Writes the TorchScript file, on the CPU, and checks it on other images and another batch size.

    Raises InputError where it gives other probabilities than the model, as a trace can.
    """
    model = model.cpu().eval()
    size = model.encoder.image_size
    images = torch.randint(0, 256, (5, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()
    with atomic(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Exported(model, class_names)).save(str(temporary))
        again = torch.jit.load(str(temporary))
        if not torch.allclose(again(images), model(floats(images)).softmax(1), atol=1e-4):
            raise InputError(f"{path}: {model.encoder.architecture} does not survive TorchScript")
