"""A tiny encoder and easy images, for tests of attacks."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tcore.data.images import ImageSet

CPU = torch.device("cpu")


class TinyEncoder(nn.Module):
    """Three convolutions; the last shift is negative so that features differ in direction."""

    image_size, dim = 16, 48

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5), persistent=False)
        self.body = nn.Sequential()
        for inputs, outputs in ((3, 24), (24, 32), (32, 48)):
            self.body.extend(
                [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            )
        nn.init.constant_(self.body[-2].bias, -0.5)

    def forward(self, x):
        return self.body(x - self.mean).mean((2, 3))


def toy(n: int, seed: int) -> ImageSet:
    """Five colour templates with noise."""
    templates = torch.rand(5, 3, 5, 5, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % 5
    x = F.interpolate(templates[labels], 16, mode="bilinear")
    x = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return ImageSet(pixels, labels.numpy(), np.arange(n), tuple("abcde"), "toy")
