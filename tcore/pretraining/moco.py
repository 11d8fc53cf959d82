"""MoCo v2: contrastive pre-training against a queue of keys from a slowly moving copy of the encoder.

Chen, Fan, Girshick, He: Improved Baselines with Momentum Contrastive Learning, 2020. Of two random views
of an image the encoder's projection of one is the query q, the copy's of the other the key k+; with the K
keys k_j of the last batches, all of unit length, InfoNCE is

    l = - q.k+ / T + log( exp(q.k+ / T) + sum_j exp(q.k_j / T) )

Before each step the copy's weights move to m copy + (1 - m) encoder; after it the batch's keys replace the
oldest of the queue, which starts with random directions. Defaults are those of SSLBackdoor's and
CorruptEncoder's encoders. Deviations: a linear warm-up over the first epoch (there: none); batch norm sees
the keys of a batch in their order, on one device (there: shuffled over several); the blur is in pixels of a
224-pixel image and shrinks with smaller ones; hue and crop as described in `augment.py`.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tcore import seeds
from tcore.data.augment import blur, flip, grey, jitter, resized_crop
from tcore.device import autocast
from tcore.models.encoder import Encoder
from tcore.pretraining._loop import new_encoder, train


@dataclass(frozen=True)
class Settings:
    architecture: str = "resnet18_224"  # a name in tcore/models/encoder.py
    epochs: int = 200  # passes over the unlabelled images, in [1, inf) [SSLBackdoor]
    batch: int = 256  # images a step, two views each, in [1, inf) [SSLBackdoor]
    lr: float = 0.06  # SGD's rate at its peak, in (0, inf) [SSLBackdoor]
    momentum: float = 0.9  # of SGD, in [0, 1) [SSLBackdoor]
    weight_decay: float = 1e-4  # of SGD, in [0, inf) [SSLBackdoor]
    temperature: float = 0.2  # T of InfoNCE, in (0, inf) [SSLBackdoor]
    queue: int = 65_536  # K, keys of earlier batches, in [1, inf) [SSLBackdoor]
    inertia: float = 0.999  # m, of the copy of the encoder, in [0, 1] [SSLBackdoor]
    projection: int = 128  # width of the projection, in [1, inf) [SSLBackdoor]
    crop_min: float = 0.2  # smallest crop, as a share of the image's area, in (0, 1] [SSLBackdoor]
    jitter: float = 0.4  # colour jitter strength, in [0, 1] [SSLBackdoor]
    blur: float = 0.5  # probability of a blur of 0.1 to 2 pixels at 224 px, in [0, 1] [SSLBackdoor]


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE of queries (B, p) with their keys (B, p) and those of the queue (K, p), all of unit length."""
    positive = (queries * keys).sum(1, keepdim=True)
    logits = torch.cat([positive, queries @ queue.T], 1) / temperature  # (B, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def enqueue(queue: Tensor, keys: Tensor, start: int) -> int:
    """Writes keys (B, p) over the queue (K, p) from row `start` on and round its end; the next start."""
    rows = torch.arange(start, start + len(keys), device=queue.device) % len(queue)
    queue[rows[-len(queue) :]] = keys[-len(queue) :]
    return (start + len(keys)) % len(queue)


@torch.no_grad()
def follow(copied: nn.Module, model: nn.Module, inertia: float) -> None:
    """Moves the copy's weights a little towards the model's; batch-norm statistics are each one's own."""
    for slow, fast in zip(copied.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - inertia)


def pretrain(
    images: Tensor, settings: Settings, seed: int, device: torch.device, aspects: Tensor | None = None
) -> tuple[Encoder, dict]:
    """An encoder trained on uint8 images (N, 3, H, W), and a log with the mean loss of each epoch.

    `aspects` (N,): see `augment.resized_crop`.
    """

    def projector(dim: int) -> nn.Module:
        return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, settings.projection))

    def view(x: Tensor, generator: Generator, aspects: Tensor | None) -> Tensor:
        x = resized_crop(x, generator, (settings.crop_min, 1.0), aspects=aspects)
        x = grey(jitter(x, generator, settings.jitter), generator)
        pixel = images.shape[-1] / 224
        return flip(blur(x, generator, (0.1 * pixel, 2 * pixel), settings.blur), generator)

    start = 0

    def project(network: nn.Module, x: Tensor) -> Tensor:
        with autocast(device):
            z = network(x.contiguous(memory_format=torch.channels_last))
        return F.normalize(z.float(), dim=1)

    def loss(first: Tensor, second: Tensor) -> Tensor:
        nonlocal start
        with torch.no_grad():
            follow(slow, model, settings.inertia)
            keys = project(slow, second)
        value = info_nce(project(model, first), keys, queue.clone(), settings.temperature)
        start = enqueue(queue, keys, start)
        return value

    encoder, head = new_encoder("moco", settings.architecture, images, seed, projector)
    model = nn.Sequential(encoder, head).to(device, memory_format=torch.channels_last).train()
    slow = copy.deepcopy(model).requires_grad_(False)
    drawn = torch.randn(settings.queue, settings.projection, generator=seeds.generator(seed, "moco", "queue"))
    queue = F.normalize(drawn, dim=1).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay, fused=True
    )
    losses = train("moco", images, aspects, view, loss, optimizer, settings, seed, device)
    return encoder.eval(), {"loss": losses}
