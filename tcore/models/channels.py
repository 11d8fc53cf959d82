"""Output channels of an encoder's layers, and the batch norms behind them."""

import torch
from torch import Tensor, nn


def layers(encoder: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """The layers whose output channels are trusted or not, by name."""
    return {name: m for name, m in encoder.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def norms_behind(encoder: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The batch norm behind each convolution that has one, by the convolution's name."""
    found, last, channels = {}, None, None
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            last, channels = name, module.out_channels
        elif isinstance(module, nn.BatchNorm2d) and module.num_features == channels:
            found[last] = module
    return found


def channel_bounds(weight: Tensor, gamma: Tensor, variance: Tensor, epsilon: float) -> Tensor:
    """Lipschitz bounds (C_out,) of a convolution (C_out, C_in, kh, kw) and the batch norm behind it:
    sigma_max of each channel's C_in x (kh kw) matrix times |gamma| / sqrt(variance + epsilon)."""
    return torch.linalg.matrix_norm(weight.flatten(2), ord=2) * gamma.abs() / (variance + epsilon).sqrt()
