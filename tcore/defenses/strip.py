"""STRIP (Gao et al., ACSAC 2019), as a detector: a trigger decides, whatever else is laid over it.

    H(x) = mean over overlays x_j of the entropy of softmax f(x + alpha (x_j - mean))
    score = -H          flag: H below the `fpr` quantile of the trusted clean samples' own H

Overlays are `overlays` of the trusted clean samples, the same for every x; x_j loses the encoder's
pixel mean, which is adding normalised images as the released code does; the sum is not clipped. A
sample that is itself an overlay is not laid over itself, so the threshold comes from all clean
samples alike (the released code compares them with themselves). It needs a model trained on
everything and clean samples. `overlays`, `alpha` and `fpr` are the released class's; its entry point
takes 100, 1.0 and 0.10 instead. Costs `overlays` forward passes of the whole network per sample. Weak
against faint and sample-specific triggers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from tcore import seeds
from tcore.defenses._interface import Received
from tcore.device import autocast
from tcore.models.encoder import check_size, floats

KIND = "detector"
CLEAN = True
NEEDS_NORM = False
ORACLE = ()
INPUTS = True


@dataclass(frozen=True)
class Settings:
    overlays: int = 64  # images laid over each sample, fewer if fewer are clean, in [1, inf) [code]
    alpha: float = 0.5  # weight of the overlay, in [0, inf) [code]
    fpr: float = 0.05  # share of clean samples that may be flagged, in [0, 1]: the threshold [code; T-Core]
    batch: int = 512  # images per forward pass, in [1, inf)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy (N,) in nats of softmax(logits) (N, C)."""
    log = logits.log_softmax(1)
    return -(log.exp() * log).sum(1)


@torch.no_grad()
def mean_entropy(
    model: torch.nn.Module, images: Tensor, overlays: Tensor, own: Tensor, settings: Settings
) -> Tensor:
    """H (n,) of uint8 images; `own` (n,) says which overlay a sample is, -1 for none."""
    check_size(model.encoder, images)
    device, found = images.device, []
    added = settings.alpha * (floats(overlays) - model.encoder.mean)
    blocks = zip(images.split(settings.batch), own.split(settings.batch), strict=True)
    for part, self_at in tqdm(blocks, total=-(-len(images) // settings.batch), desc="strip", unit="batch"):
        x, total = floats(part), torch.zeros(len(part), device=device)
        for j, overlay in enumerate(added):
            with autocast(device):
                out = model(x + overlay)
            total += entropy(out.float()) * (self_at != j)
        found.append(total / (len(added) - (self_at >= 0).float()).clamp(min=1))
    return torch.cat(found)


def score_inputs(images: Tensor, received: Received, settings: Settings, seed: int) -> Tensor:
    """-H (N,) of any images; none of them counts as an overlay."""
    rows = chosen(received, settings, seed)
    own = torch.full((len(images),), -1, device=images.device)
    return -mean_entropy(received.model.eval(), images, received.images[rows], own, settings)


def chosen(received: Received, settings: Settings, seed: int) -> Tensor:
    """Rows of the clean samples that are laid over others."""
    clean = received.clean.nonzero().flatten()
    order = torch.randperm(len(clean), generator=seeds.generator(seed, "strip", "overlays"))
    return clean[order[: settings.overlays].to(clean.device)]


def score(received: Received, settings: Settings, seed: int) -> Tensor:
    return _scores(
        torch.arange(len(received.labels), device=received.labels.device), received, settings, seed
    )


def _scores(which: Tensor, received: Received, settings: Settings, seed: int) -> Tensor:
    """-H of samples of the training set, which may be overlays themselves."""
    rows = chosen(received, settings, seed)
    own = torch.full_like(received.labels, -1)
    own[rows] = torch.arange(len(rows), device=own.device)
    model, images = received.model.eval(), received.images
    return -mean_entropy(model, images[which], images[rows], own[which], settings)


def threshold(score: Tensor, settings: Settings) -> Tensor:
    """The entropy below which a sample is flagged, from the scores of clean ones."""
    entropies = (-score).sort().values
    return entropies[min(int(settings.fpr * len(entropies)), len(entropies) - 1)]


def flag(score: Tensor, received: Received, settings: Settings) -> Tensor:
    return -score < threshold(score[received.clean], settings)


def flag_inputs(score: Tensor, received: Received, settings: Settings, seed: int) -> Tensor:
    clean = _scores(received.clean.nonzero().flatten(), received, settings, seed)
    return -score < threshold(clean, settings)
