"""Training on two views of every image: the loop that SimCLR and MoCo share."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from tqdm import trange

from tcore import seeds
from tcore.models.encoder import Encoder, floats


def new_encoder(
    name: str, architecture: str, images: Tensor, seed: int, projector: Callable[[int], nn.Module]
) -> tuple[Encoder, nn.Module]:
    """A fresh encoder and projector of its features; mean and std are those of uint8 images (N, 3, H, W)."""
    pixels = floats(images[:10_000])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, name, "weights"))
        encoder = Encoder(
            architecture,
            images.shape[-1],
            tuple(pixels.mean((0, 2, 3)).tolist()),
            tuple(pixels.std((0, 2, 3)).tolist()),
        )
        return encoder, projector(encoder.dim)


def train(
    name: str,
    images: Tensor,
    aspects: Tensor | None,
    view: Callable[[Tensor, Generator, Tensor | None], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    settings,
    seed: int,
    device: torch.device,
) -> list[float]:
    """Minimises `loss(view, view)` over float views (B, 3, H, W); the mean loss of each epoch.

    `view` gets float images, a generator and the images' aspects (`augment.resized_crop`).

    The images stay on the device as uint8. The learning rate falls as a cosine after a linear warm-up over
    the first epoch. `settings` has epochs, batch and lr. A last, smaller batch is left out.
    """
    images = images.to(device)
    aspects = None if aspects is None else aspects.to(device)
    generator = seeds.generator(seed, name, "views", device=device.type)
    order = seeds.generator(seed, name, "order")
    batch = min(settings.batch, len(images))
    steps = len(images) // batch
    total, done, losses = steps * settings.epochs, 0, []
    with trange(settings.epochs, desc=name, unit="epoch") as bar:
        for _ in bar:
            running = torch.zeros((), device=device)
            for rows in torch.randperm(len(images), generator=order)[: steps * batch].view(steps, batch):
                rate = 0.5 * (1 + math.cos(math.pi * done / total)) * min(1, (done + 1) / steps)
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * rate
                rows = rows.to(device)
                x, shape = floats(images[rows]), None if aspects is None else aspects[rows]
                value = loss(view(x, generator, shape), view(x, generator, shape))
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                running += value.detach()
                done += 1
            losses.append(round(running.item() / steps, 4))
            bar.set_postfix(loss=losses[-1])
    return losses
