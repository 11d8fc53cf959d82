"""TIS-aware: a small perturbation that carries images to where the target class's seed samples are.

T-Core's own adaptive attack (Zhang et al., IEEE S&P 2025, 5.6.1 and table 12), white-box on Topological
Invariance Sifting: the attacker has the user's encoder and the clean downstream set, trains a head as the
user does, sifts the clean set and gets the target class's seed samples S_t. With h_1, h_2, h_3 the encoder's
output and the head's first two layers, where the paper's TIS looks, and D' the images of other classes, one
perturbation

    delta = argmin_{|delta|_inf <= eps}  mean_{x in D'} mean_l |h_l(x + delta) - mu_l| / s_l
    mu_l  = mean_{x in S_t} h_l(x),      s_l = mean_{x in D'} |h_l(x) - mu_l|,      |.| Euclidean

is the trigger of a dirty-label poisoning: delta (3, H, W) in whole steps of 1/255, x + delta cut to 0..255 in
the search as at test time.

The paper searches over all of D, and states neither the distance, nor how the layers weigh, nor how delta is
found. Here D' are the images that may become poisons; s_l makes layers count alike and the value without a
trigger 1; delta takes steps of one size against the sign of the gradient, `passes` times over D', is cut to
eps after each and rounded at the end. The attacker's head starts and trains with other random numbers than
the user's. The search runs in floating point, so its result may differ between devices. Passes after the
first hardly lower the distance (docs/lab/tis-aware.md).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tcore import seeds
from tcore.data.images import ImageSet
from tcore.files import InputError
from tcore.models import head as heads
from tcore.models.classifier import Classifier
from tcore.models.encoder import extract_features, floats, load_encoder
from tcore.poisoning.poisoned import Poisoned, check_target, dirty_label
from tcore.poisoning.triggers import Trigger, check_size
from tcore.stages import sift

OWNER = ("dataset_attacks", "tis_aware")
TOLD = "encoder"


@dataclass(frozen=True)
class Settings:
    ratio: float | None = 0.2  # share of poisons in the target class, in [0, 1) [open; T-Core's usual]
    rate: float | None = None  # instead of ratio (then null): share of poisons in the whole set, in [0, 1)
    poisons: int | None = None  # instead of ratio (then null): number of poisons, in [0, inf)
    eps: int = 8  # largest change of a pixel, in 1/255, in [1, 255] [T-Core, table 12: 4, 8, 12, 16]
    step: float = 0.1  # of the search, as a share of eps, in (0, inf) [open]
    passes: int = 5  # of the search over the images of other classes, in [1, inf) [open]
    batch: int = 128  # images a step of the search, in [1, inf) [open]


def stamp(images: Tensor, trigger: Trigger) -> Tensor:
    delta = trigger["delta"].to(images.device)
    check_size(images, delta.shape)
    return (images.short() + delta).clamp(0, 255).to(torch.uint8)


def distance(
    model: Classifier, images: Tensor, delta: Tensor, means: list[Tensor], scales: list[Tensor]
) -> Tensor:
    """(N,) the mean over layers of |h_l(x + delta) - mu_l| / s_l, for uint8 images on the model's device."""
    features = model.encoder((floats(images) + delta / 255).clamp(0, 1))
    layers = [features, *model.head.activations(features)[:2]]
    found = [(h - mu).norm(dim=1) / s for h, mu, s in zip(layers, means, scales, strict=True)]
    return torch.stack(found).mean(0)


def search(
    model: Classifier,
    images: Tensor,
    means: list[Tensor],
    scales: list[Tensor],
    settings: Settings,
    seed: int,
) -> tuple[Tensor, list[float]]:
    """delta (3, H, W) int16 for images of other classes (n, 3, H, W) uint8 and a model in eval mode.

    Also the mean distance during each pass and, last, with the rounded delta. On the model's device is one
    batch of images at a time.
    """
    model.requires_grad_(False)
    device = model.encoder.mean.device
    delta = torch.zeros(images.shape[1:], device=device)
    order, history = seeds.generator(seed, *OWNER, "order"), []
    for _ in tqdm(range(settings.passes), desc="tis_aware", unit="pass"):
        total = 0.0
        for rows in torch.randperm(len(images), generator=order).split(settings.batch):
            delta.requires_grad_()
            found = distance(model, images[rows].to(device), delta, means, scales)
            (gradient,) = torch.autograd.grad(found.mean(), delta)
            delta = delta.detach() - settings.step * settings.eps * gradient.sign()
            delta = delta.clamp(-settings.eps, settings.eps)
            total += found.detach().sum()
        history.append(round(float(total) / len(images), 5))
    delta = delta.round()
    with torch.no_grad():
        parts = images.split(settings.batch)
        total = sum(distance(model, part.to(device), delta, means, scales).sum() for part in parts)
    return delta.to(torch.int16).cpu(), [*history, round(float(total) / len(images), 5)]


def poison(
    images: ImageSet,
    target: int | None,
    settings: Settings,
    seed: int,
    encoder: str | Path,
    user: dict,
    device: torch.device,
) -> Poisoned:
    """`encoder` is a file; `user` has the user's settings of `head` and `sift`."""
    target = check_target(images, target)
    if not (0 < settings.eps < 256 and settings.step > 0 and settings.passes > 0 and settings.batch > 0):
        raise InputError("tis_aware: eps should be 1 to 255, and step, passes and batch above 0")
    own, labels = load_encoder(encoder).to(device), images.targets.to(device)
    features = extract_features(own, images.tensor)
    of_head = heads.Settings(**user["head"])
    head = heads.new_head(own.dim, images.num_classes, of_head, seed, *OWNER, "head")
    heads.fit_head(head, features, labels, of_head.epochs, seed, *OWNER, "head")
    model = Classifier(own, head)

    sifting = sift.Settings(**user["sift"])
    layers = sift.activations(model, features, images.tensor, sifting)
    table = sift.sift(layers, labels, sifting, seed)
    layers = layers[-3:]  # those that the paper's attacker moves the images in
    trusted = torch.tensor(table["trusted"].to_numpy(), device=device)
    chosen, others = trusted & (labels == target), labels != target
    means = [layer[chosen].mean(0) for layer in layers]
    scales = [
        (layer[others] - mu).norm(dim=1).mean().clamp(min=1e-12)
        for layer, mu in zip(layers, means, strict=True)
    ]
    delta, distances = search(model, images.tensor[others.cpu()], means, scales, settings, seed)
    trigger = {"delta": delta}
    result = dirty_label(
        images, target, settings, seed, lambda pixels: stamp(pixels, trigger), trigger, OWNER
    )
    return replace(result, log={"seeds": int(chosen.sum()), "distances": distances})
