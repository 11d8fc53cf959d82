"""SimCLR: contrastive pre-training of an encoder on unlabelled images.

Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual
Representations, ICML 2020. Two random views of each image of a batch; for view i with
partner j(i) among 2B views, NT-Xent is

    l_i = - s(i, j(i)) / T + log sum_{k != i} exp(s(i, k) / T),     s = cosine similarity

of the projections of the encoder's features. The projection head is dropped afterwards.
Defaults are those of BadEncoder's encoders (Jia et al., S&P 2022), which the paper uses.
Deviations: cosine learning-rate schedule after a linear warm-up over the first epoch
(BadEncoder: constant); hue and crop as described in `augment.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tcore.data.augment import simclr_view
from tcore.device import autocast
from tcore.models.encoder import Encoder
from tcore.pretraining._loop import new_encoder
from tcore.pretraining._loop import train as loop


@dataclass(frozen=True)
class Settings:
    architecture: str = "resnet18"  # a name in tcore/models/encoder.py
    epochs: int = 1000  # passes over the unlabelled images, in [1, inf) [BadEncoder]
    batch: int = 256  # images a step, two views each, in [2, inf) [BadEncoder]
    lr: float = 1e-3  # Adam's rate at its peak, in (0, inf) [BadEncoder]
    weight_decay: float = 1e-6  # Adam's L2 penalty, in [0, inf) [BadEncoder]
    temperature: float = 0.5  # T of NT-Xent, in (0, inf) [BadEncoder]
    projection: int = 128  # width of the projection, in [1, inf) [BadEncoder]
    crop_min: float = 0.08  # smallest crop, as a share of the image's area, in (0, 1] [BadEncoder]
    jitter: float = 0.4  # colour jitter strength, in [0, 1] [BadEncoder]


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """NT-Xent of projections z (2B, p); rows i and i + B are views of one image. A scalar."""
    z = F.normalize(z.float(), dim=1)
    b = len(z) // 2
    logits = z @ z.T / temperature  # (2B, 2B)
    logits.fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * b, device=z.device).roll(b)
    return F.cross_entropy(logits, partner)


def new_projector(dim: int, width: int) -> nn.Module:
    """The projection head: features (N, dim) -> (N, width)."""
    return nn.Sequential(
        nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, width)
    )


def pretrain(
    images: Tensor, settings: Settings, seed: int, device: torch.device, aspects: Tensor | None = None
) -> tuple[Encoder, dict]:
    """An encoder trained on uint8 images (N, 3, H, W), and a log with the mean loss of each epoch.

    `aspects` (N,): see `augment.resized_crop`.
    """

    def projector(dim: int) -> nn.Module:
        return new_projector(dim, settings.projection)

    encoder, head = new_encoder("simclr", settings.architecture, images, seed, projector)
    return encoder, {"loss": train("simclr", encoder, head, images, settings, seed, device, aspects)}


def train(
    name: str,
    encoder: Encoder,
    projector: nn.Module,
    images: Tensor,
    settings: Settings,
    seed: int,
    device: torch.device,
    aspects: Tensor | None = None,
    penalty: Callable[[Tensor], Tensor] | None = None,
) -> list[float]:
    """Trains encoder and projector in place, eval mode after; the mean loss of each epoch.

    `name` is the random stream's. `penalty(views)` is added to the loss; it is called after the forward
    pass on float views (2B, 3, H, W), of which i and i + B show one image.
    """

    def view(x: Tensor, generator: Generator, aspects: Tensor | None) -> Tensor:
        return simclr_view(x, generator, (settings.crop_min, 1.0), settings.jitter, aspects)

    def loss(first: Tensor, second: Tensor) -> Tensor:
        views = torch.cat([first, second])
        with autocast(device):
            z = model(views.contiguous(memory_format=torch.channels_last))
        return nt_xent(z, settings.temperature) + (penalty(views) if penalty else 0)

    model = nn.Sequential(encoder, projector).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(
        model.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True
    )
    losses = loop(name, images, aspects, view, loss, optimizer, settings, seed, device)
    model.eval()
    return losses
