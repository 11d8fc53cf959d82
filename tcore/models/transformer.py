"""A small vision transformer (Dosovitskiy et al., ICLR 2021): images (N, 3, H, W) to the class token (N, d).

Layer norm before attention and before the two-layer perceptron (GELU) of each block, and after the last
block; learned positions, so that the image size is fixed. Queries, keys and values are one linear layer
(3 d, d) without bias.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcore.files import InputError


@dataclass(frozen=True)
class Transformer:
    """The shape of a vision transformer."""

    patch: int  # side of a patch in pixels
    dim: int  # d, width of a token
    depth: int  # blocks
    heads: int
    hidden: int  # units of the perceptrons

    def parts(self, image_size: int) -> dict[str, nn.Module]:
        """Modules by name, in the order in which they run."""
        if image_size % self.patch:
            raise InputError(
                f"patches of {self.patch} pixels do not tile images of {image_size}; "
                "set image_size in the data set's settings"
            )
        blocks = (TransformerBlock(self.dim, self.heads, self.hidden) for _ in range(self.depth))
        return {
            "tokens": Tokens(image_size, self.patch, self.dim),
            "blocks": nn.Sequential(*blocks),
            "norm": nn.LayerNorm(self.dim),
            "pool": ClassToken(),
        }


class Tokens(nn.Module):
    """Images -> (N, 1 + patches, d): a class token and a linear map of every patch, plus their positions."""

    def __init__(self, image_size: int, patch: int, dim: int):
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(3 * patch**2, dim)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (image_size // patch) ** 2, dim))

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        tokens = self.linear(patches)
        return torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.positions


class Attention(nn.Module):
    """Multi-head self-attention of tokens (N, T, d)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, dim = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, dim))


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each normalised before and added to what comes in."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ClassToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]
