"""A convolution whose weight gradient is quick in bfloat16 on a CPU, too.

    y = x * w,   dL/dw[c] = sum over images and places of dL/dy[c] times the patches of x

In bfloat16 oneDNN's dL/dw of small maps takes longer than its float32 one. Here it is one matrix product of
dL/dy, (k, N h w), and the patches, (N h w, C kh kw): the same sum in another order (measured:
docs/lab/speed.md). Everything else, and other devices and types, is `nn.Conv2d` as it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 4  # output maps up to this side take the matrix product


class Convolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        training = torch.is_grad_enabled() and self.weight.requires_grad
        if not (training and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu")
        y = _Product.apply(x.to(dtype), self.weight.to(dtype), self.stride, self.padding)
        return y if self.bias is None else y + self.bias.to(dtype).view(-1, 1, 1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.how = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        to_x = torch.nn.grad.conv2d_input(x.shape, weight, g, *ctx.how) if ctx.needs_input_grad[0] else None
        gradient = product if max(g.shape[2:]) <= SMALL else torch.nn.grad.conv2d_weight
        return to_x, gradient(x, weight.shape, g, *ctx.how), None, None


def product(x: Tensor, shape: tuple[int, ...], g: Tensor, stride, padding) -> Tensor:
    """dL/dw, of that shape (k, C, kh, kw), from the input x (N, C, H, W) and dL/dy g (N, k, h, w)."""
    k, channels, *kernel = shape
    patches = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    patches = patches.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])  # (N, h, w, C, kh, kw)
    patches = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, kernel[0] * kernel[1] * channels)
    found = g.permute(0, 2, 3, 1).reshape(-1, k).T @ patches
    return found.view(k, *kernel, channels).permute(0, 3, 1, 2)


def adopt(network: nn.Module) -> None:
    """Makes every plain convolution of a network a `Convolution`, in place; grouped, dilated or padded ones
    and subclasses stay what they are."""
    for layer in network.modules():
        plain = type(layer) is nn.Conv2d and layer.groups == 1 and layer.dilation == (1, 1)
        if plain and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple):
            layer.__class__ = Convolution
