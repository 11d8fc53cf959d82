"""SimCLR's augmentations as batched tensor code: every image has its own random draw.

All functions map float images in [0, 1], (N, 3, H, W), to the same shape, run on the
device of the images and take their randomness from `generator` alone (same device).
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
FROM_YIQ = torch.linalg.inv(TO_YIQ)  # once: on a GPU an inversion waits for all work before it


def _uniform(n: int, low: float, high: float, images: Tensor, generator: Generator) -> Tensor:
    return torch.empty(n, 1, 1, 1, device=images.device).uniform_(low, high, generator=generator)


def _chosen(n: int, p: float, images: Tensor, generator: Generator) -> Tensor:
    return _uniform(n, 0, 1, images, generator) < p


def resized_crop(
    images: Tensor,
    generator: Generator,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: float = 4 / 3,
    aspects: Tensor | None = None,
) -> Tensor:
    """A random window (area share in `scale`, aspect 1/ratio..ratio), resized to the full size.

    `aspects` (N,) are the images' widths over heights before they were stretched to their common size:
    the window has its aspect in the image as it was. None: they are as they were.
    Sampled bilinearly without the antialiasing that an image library applies when it shrinks.
    """
    n = len(images)
    area = _uniform(n, *scale, images, generator)
    aspect = torch.exp(_uniform(n, -math.log(ratio), math.log(ratio), images, generator))
    if aspects is not None:
        aspect = aspect / aspects.view(n, 1, 1, 1)
    width = (area * aspect).sqrt().clamp(max=1).view(n)
    height = (area / aspect).sqrt().clamp(max=1).view(n)
    x = _uniform(n, -1, 1, images, generator).view(n) * (1 - width)
    y = _uniform(n, -1, 1, images, generator).view(n) * (1 - height)
    zero = torch.zeros_like(x)
    theta = torch.stack([width, zero, x, zero, height, y], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def flip(images: Tensor, generator: Generator, p: float = 0.5) -> Tensor:
    """Left-right with probability p."""
    return torch.where(_chosen(len(images), p, images, generator), images.flip(3), images)


def _luma(images: Tensor) -> Tensor:
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def jitter(images: Tensor, generator: Generator, strength: float = 0.4, p: float = 0.8) -> Tensor:
    """Brightness, contrast, saturation (factors 1 ± strength) and hue (± strength/4 turns), in this order.

    The hue turns about the grey axis (a rotation in YIQ), which differs a little from the
    HSV shift of image libraries and needs no branches.
    """
    n = len(images)
    x = images * _uniform(n, 1 - strength, 1 + strength, images, generator)
    x = x.clamp(0, 1)
    mean = _luma(x).mean((2, 3), keepdim=True)
    x = (mean + (x - mean) * _uniform(n, 1 - strength, 1 + strength, images, generator)).clamp(0, 1)
    grey = _luma(x)
    x = (grey + (x - grey) * _uniform(n, 1 - strength, 1 + strength, images, generator)).clamp(0, 1)
    angle = _uniform(n, -strength / 4, strength / 4, images, generator).view(n) * 2 * math.pi
    turn = torch.eye(3, device=images.device).repeat(n, 1, 1)
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 2, 1] = angle.sin()
    turn[:, 1, 2] = -angle.sin()
    matrix = FROM_YIQ.to(images) @ turn @ TO_YIQ.to(images)  # (N, 3, 3)
    x = torch.einsum("nij,njhw->nihw", matrix, x).clamp(0, 1)
    return torch.where(_chosen(n, p, images, generator), x, images)


def grey(images: Tensor, generator: Generator, p: float = 0.2) -> Tensor:
    """Grey-scale with probability p."""
    return torch.where(_chosen(len(images), p, images, generator), _luma(images).expand_as(images), images)


def blur(
    images: Tensor, generator: Generator, sigma: tuple[float, float] = (0.1, 2.0), p: float = 0.5
) -> Tensor:
    """Gaussian blur with probability p, its standard deviation in pixels uniform in `sigma`."""
    n, channels, *_ = images.shape
    reach = min(math.ceil(3 * sigma[1]), min(images.shape[2:]) - 1)
    spread = _uniform(n, *sigma, images, generator).view(n, 1)
    steps = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.exp(-(steps**2) / (2 * spread**2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # (3 N, taps)
    x = images.reshape(1, n * channels, *images.shape[2:])
    for shape in ((-1, 1, 2 * reach + 1, 1), (-1, 1, 1, 2 * reach + 1)):
        weight = kernel.view(shape)
        pad = (shape[3] // 2,) * 2 + (shape[2] // 2,) * 2
        x = F.conv2d(F.pad(x, pad, "reflect"), weight, groups=n * channels)
    return torch.where(_chosen(n, p, images, generator), x.view(images.shape), images)


def simclr_view(
    images: Tensor,
    generator: Generator,
    scale: tuple[float, float],
    strength: float,
    aspects: Tensor | None = None,
) -> Tensor:
    """Crop, flip, colour jitter, grey: one random view of every image."""
    x = flip(resized_crop(images, generator, scale, aspects=aspects), generator)
    return grey(jitter(x, generator, strength), generator)
