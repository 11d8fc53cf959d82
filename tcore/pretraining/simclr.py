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

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from tcore import seeds
from tcore.device import autocast
from tcore.models.encoder import Encoder, floats
from tcore.pretraining.augment import simclr_view


@dataclass(frozen=True)
class Settings:
    architecture: str = "resnet18"  # encoder architecture: resnet18, resnet18_224 or resnet_narrow
    epochs: int = 1000  # passes over the unlabelled images [BadEncoder]
    batch: int = 256  # images a step, two views each [BadEncoder]
    lr: float = 1e-3  # Adam's rate at its peak [BadEncoder]
    weight_decay: float = 1e-6  # Adam's L2 penalty [BadEncoder]
    temperature: float = 0.5  # T of NT-Xent [BadEncoder]
    projection: int = 128  # width of the projection [BadEncoder]
    crop_min: float = 0.08  # smallest crop, as a share of the image's area [BadEncoder]
    jitter: float = 0.4  # colour jitter strength [BadEncoder]


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """NT-Xent of projections z (2B, p); rows i and i + B are views of one image. A scalar."""
    z = F.normalize(z.float(), dim=1)
    b = len(z) // 2
    logits = z @ z.T / temperature  # (2B, 2B)
    logits.fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * b, device=z.device).roll(b)
    return F.cross_entropy(logits, partner)


def pretrain(images: Tensor, settings: Settings, seed: int, device: torch.device) -> tuple[Encoder, dict]:
    """An encoder trained on uint8 images (N, 3, H, W), and a log with the mean loss of each epoch.

    The images stay on the device as uint8. Mean and std are those of the images.
    """
    pixels = floats(images[:10_000])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "simclr", "weights"))
        encoder = Encoder(
            settings.architecture,
            images.shape[-1],
            tuple(pixels.mean((0, 2, 3)).tolist()),
            tuple(pixels.std((0, 2, 3)).tolist()),
        )
        projector = new_projector(encoder.dim, settings.projection)
    return encoder, train(encoder, projector, images.to(device), settings, seed)


def new_projector(dim: int, width: int) -> nn.Module:
    """The projection head: features (N, dim) -> (N, width)."""
    return nn.Sequential(
        nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, width)
    )


def train(
    encoder: Encoder,
    projector: nn.Module,
    images: Tensor,
    settings: Settings,
    seed: int,
    *names: str,
    penalty: Callable[[Tensor], Tensor] | None = None,
) -> dict:
    """Trains encoder and projector in place, on the images' device; eval mode after. The log of `pretrain`.

    `names` are the random stream's. `penalty(views)` is added to the loss; it is called after the forward
    pass on float views (2B, 3, H, W), of which i and i + B show one image.
    """
    device, names = images.device, names or ("simclr",)
    model = nn.Sequential(encoder, projector).to(device, memory_format=torch.channels_last).train()
    generator = seeds.generator(seed, *names, "views", device=device.type)
    order = seeds.generator(seed, *names, "order")
    optimizer = torch.optim.Adam(model.parameters(), settings.lr, weight_decay=settings.weight_decay)
    batch = min(settings.batch, len(images))
    steps = len(images) // batch
    total, done, losses = steps * settings.epochs, 0, []
    with trange(settings.epochs, desc=" ".join(("SimCLR", *names[1:])), unit="epoch") as bar:
        for _ in bar:
            running = torch.zeros((), device=device)
            for rows in torch.randperm(len(images), generator=order)[: steps * batch].view(steps, batch):
                rate = 0.5 * (1 + math.cos(math.pi * done / total)) * min(1, (done + 1) / steps)
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * rate
                x = floats(images[rows.to(device)])
                scale = (settings.crop_min, 1.0)
                views = torch.cat([simclr_view(x, generator, scale, settings.jitter) for _ in range(2)])
                with autocast(device):
                    z = model(views.contiguous(memory_format=torch.channels_last))
                loss = nt_xent(z, settings.temperature)
                if penalty is not None:
                    loss = loss + penalty(views)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                running += loss.detach()
                done += 1
            losses.append(round(running.item() / steps, 4))
            bar.set_postfix(loss=losses[-1])
    model.eval()
    return {"loss": losses}
