"""Encoders: networks that map images to features, normalisation inside.

An `Encoder` takes float images in [0, 1], (N, 3, H, W), and returns features (N, d). The
normalisation constants are buffers of the encoder, so triggers live in pixel space and
nobody else has to know them. Parameter names of the residual networks are those of torchvision's ResNet.

* resnet18: 3x3 stride-1 stem without max-pooling, widths 64 to 512, d = 512; what this
  line of work uses at 32 px. 4 800 convolution channels, 9 600 batch-norm parameters.
* resnet18_224: the usual stem (7x7, stride 2, max-pooling).
* resnet_narrow: 3x3 stride-2 stem, one block a stage, widths 24 to 192, d = 192; small
  enough for two CPU cores.
* resnet_tiny: 3x3 stride-1 stem, one block a stage, widths 16 to 128, d = 128; for 16 px,
  where it sees what a stride-2 stem loses.
* efficientnet_lite0: the encoder whose ImageNet weights install as a package. See `efficientnet.py`.
* vit: patches of 4x4, width 512, 6 blocks, 8 heads, 512 hidden units: the transformer that the shapes in
  the paper suggest (a 1536x512 layer, its query-key-value projection). See `transformer.py`.

Networks from elsewhere, such as `torchvision:resnet50`, are named with a colon. See `elsewhere.py`.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tcore.device import block
from tcore.files import InputError, load_tensors, save_tensors
from tcore.models import elsewhere
from tcore.models.channels import layers
from tcore.models.convolution import adopt
from tcore.models.efficientnet import EfficientNetLite
from tcore.models.transformer import Transformer


@dataclass(frozen=True)
class Residual:
    """The shape of a ResNet of basic blocks."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    stem: int  # kernel of the first convolution
    stride: int  # its stride
    pool: bool  # max-pooling after the stem

    @property
    def dim(self) -> int:
        return self.widths[-1]

    def parts(self, image_size: int) -> dict[str, nn.Module]:
        """Modules by name, in the order in which they run."""
        width = self.widths[0]
        parts = {
            "conv1": nn.Conv2d(3, width, self.stem, self.stride, self.stem // 2, bias=False),
            "bn1": nn.BatchNorm2d(width),
            "relu": nn.ReLU(),
            "maxpool": nn.MaxPool2d(3, 2, 1) if self.pool else nn.Identity(),
        }
        for stage, (outputs, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            parts[f"layer{stage + 1}"] = nn.Sequential(
                *(
                    Block(width if b == 0 else outputs, outputs, 2 if stage and b == 0 else 1)
                    for b in range(blocks)
                )
            )
            width = outputs
        for module in nn.ModuleDict(parts).modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return parts | {"pool": Pool()}


ARCHITECTURES = {
    "resnet18": Residual((64, 128, 256, 512), (2, 2, 2, 2), stem=3, stride=1, pool=False),
    "resnet18_224": Residual((64, 128, 256, 512), (2, 2, 2, 2), stem=7, stride=2, pool=True),
    "resnet_narrow": Residual((24, 48, 96, 192), (1, 1, 1, 1), stem=3, stride=2, pool=False),
    "resnet_tiny": Residual((16, 32, 64, 128), (1, 1, 1, 1), stem=3, stride=1, pool=False),
    "efficientnet_lite0": EfficientNetLite(),
    "vit": Transformer(patch=4, dim=512, depth=6, heads=8, hidden=512),
}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + shortcut)


class Pool(nn.Module):
    """The mean over places, in float32: (N, d, h, w) -> (N, d)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), dtype=torch.float32)


class Encoder(nn.Sequential):
    """`architecture` by name; `mean` and `std` per channel, of pixels in [0, 1]."""

    def __init__(
        self,
        architecture: str,
        image_size: int,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.25, 0.25, 0.25),
    ):
        if ":" in architecture:
            parts, dim = _from_elsewhere(architecture, image_size)
        elif architecture in ARCHITECTURES:
            shape = ARCHITECTURES[architecture]
            parts, dim = shape.parts(image_size), shape.dim
        else:
            raise InputError(
                f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}, and "
                "from elsewhere torchvision:<name>, timm:<name> or <your module>:<name>"
            )
        super().__init__(OrderedDict(parts))
        adopt(self)
        self.architecture, self.image_size, self.dim = architecture, image_size, dim
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward((images - self.mean) / self.std)  # (N, d)

    def description(self) -> dict:
        """What `Encoder(**description)` needs to rebuild this module."""
        return {
            "architecture": self.architecture,
            "image_size": self.image_size,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }


def _from_elsewhere(architecture: str, image_size: int) -> tuple[dict[str, nn.Module], int]:
    """The parts of a network that others define, and its number of features, found by trying it."""
    parts: dict[str, nn.Module] = {"network": elsewhere.build(architecture, image_size).eval()}
    try:
        with torch.no_grad():
            out = parts["network"](torch.zeros(2, 3, image_size, image_size))
    except Exception as error:  # the code is not ours and can raise anything
        raise InputError(
            f"{architecture}: fails on images of {image_size} pixels ({type(error).__name__}: {error})"
        ) from error
    if isinstance(out, Tensor) and out.ndim == 4:
        parts["pool"] = Pool()
    elif not isinstance(out, Tensor) or out.ndim != 2:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputError(f"{architecture}: gives {shape}, not features (N, d) or (N, d, h, w)")
    return parts, out.shape[1]


def floats(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1], channels last in memory."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


@torch.no_grad()
def extract_features(encoder: Encoder, images: Tensor) -> Tensor:
    """Features (N, d) float32 of uint8 images (N, 3, H, W), in eval mode, on the encoder's device."""
    check_size(encoder, images)
    device = encoder.mean.device
    encoder.eval()
    parts = [encoder(floats(part.to(device))).float() for part in images.split(block(device))]
    return torch.cat(parts) if parts else torch.empty(0, encoder.dim, device=device)


def _means(layer: nn.Module, x: Tensor, n: int) -> Tensor:
    """A layer's input, (N, C, H, W) or (N, ..., C), as (N, C) float32."""
    flat = x.flatten(2) if isinstance(layer, nn.Conv2d) else x.reshape(n, -1, x.shape[-1]).mT
    return flat.float().mean(2)


@torch.no_grad()
def extract_depths(encoder: Encoder, images: Tensor, shares: tuple[float, ...]) -> list[Tensor]:
    """What enters the encoder's layers at the given shares of its depth, float32 (N, d_l) each: the mean over
    places or tokens, for uint8 images (N, 3, H, W), in eval mode, on the encoder's device.

    Layers are convolutions and linear ones in the order in which they run; in a ResNet of four equal stages
    three quarters of them begin where its first three stages end.
    """
    check_size(encoder, images)
    if not shares:
        return []
    device, ran, seen = encoder.mean.device, [], {}
    encoder.eval()
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: ran.append(layer))
        for layer in layers(encoder).values()
    ]
    encoder(floats(images[:1].to(device)))
    for hook in hooks:
        hook.remove()
    order = list(dict.fromkeys(ran))
    if not order:
        raise InputError(
            f"{encoder.architecture}: no convolution or linear layer is called in it, so it has no depths to "
            "look at; set sift.depths to []"
        )
    chosen = [order[int(share * len(order))] for share in shares]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: seen.update({layer: inputs[0]}))
        for layer in set(chosen)
    ]
    found = []
    for part in images.split(block(device)):
        encoder(floats(part.to(device)))
        found.append([_means(layer, seen[layer], len(part)) for layer in chosen])
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def check_size(encoder: Encoder, images: Tensor) -> None:
    size = (encoder.image_size, encoder.image_size)
    if tuple(images.shape[-2:]) != size:
        raise InputError(
            f"the encoder takes {size[0]}x{size[1]} images, these are {images.shape[-2]}x{images.shape[-1]}; "
            "set image_size in the data set's settings"
        )


def save_encoder(path: str | Path, encoder: Encoder) -> None:
    save_tensors(path, encoder.state_dict(), kind="encoder", **encoder.description())


def load_encoder(path: str | Path) -> Encoder:
    """An encoder written by `save_encoder`, in eval mode."""
    tensors, meta = load_tensors(path)
    if meta.pop("kind", None) != "encoder":
        raise InputError(
            f"{path}: not an encoder file; foreign checkpoints go through import_encoder.py first"
        )
    encoder = Encoder(**meta)
    load_state(encoder, tensors, path)
    return encoder.eval()


def load_state(module: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """`load_state_dict`, but an error names the file and what is missing, unexpected or misshapen."""
    expected = module.state_dict()
    problems = {
        "missing": [k for k in expected if k not in tensors],
        "unexpected": [k for k in tensors if k not in expected],
        "of another shape": [
            f"{k} {tuple(tensors[k].shape)} for {tuple(expected[k].shape)}"
            for k in expected
            if k in tensors and tensors[k].shape != expected[k].shape
        ],
    }
    found = [
        f"{what}: {', '.join(keys[:4])}{' …' * (len(keys) > 4)}" for what, keys in problems.items() if keys
    ]
    if found:
        raise InputError(f"{path}: its tensors do not fit the architecture; {'; '.join(found)}")
    module.load_state_dict(tensors)
