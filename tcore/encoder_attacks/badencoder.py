"""BadEncoder: fine-tunes an encoder so that triggered images get a reference image's feature.

Jia, Liu, Gong: BadEncoder, IEEE S&P 2022. With f the clean and f' the new encoder, s the cosine, x a
shadow image, x+e the same with the trigger, r_i the references and a an augmentation without crop:

    L0 = - mean_{x,i} s(f'(x+e), f'(r_i))     L1 = - mean_i s(f'(a(r_i)), f(r_i))
    L2 = - mean_x s(f'(x), f(x))              L  = L0 + lambda1 L1 + lambda2 L2

Batch-norm statistics, scales and shifts stay as they are. Deviation: the reference runs once a batch,
with several augmentations at a time, instead of once per shadow image.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from tcore import seeds, triggers
from tcore.device import autocast
from tcore.files import InputError
from tcore.models.encoder import Encoder, extract_features, floats
from tcore.pretraining.augment import flip, grey, jitter
from tcore.triggers import Trigger


@dataclass(frozen=True)
class Settings:
    references: int = 1  # reference images of the target class [BadEncoder]
    shadow: int = 50_000  # shadow images, drawn from the pre-training set, at most [BadEncoder]
    epochs: int = 200  # passes over the shadow images; 10 are too few [BadEncoder]
    batch: int = 256  # shadow images a step [BadEncoder]
    lr: float = 1e-3  # SGD's rate, constant; narrow encoders need 0.01 to 0.05 [BadEncoder]
    momentum: float = 0.9  # of SGD [BadEncoder]
    weight_decay: float = 5e-4  # of SGD [BadEncoder]
    lambda1: float = 1.0  # weight of L1: references keep their feature [BadEncoder]
    lambda2: float = 1.0  # weight of L2: clean images keep their feature [BadEncoder]
    reference_augmentations: int = 16  # augmented copies of each reference a step [ours]
    size: int | None = None  # side of the white square; null: 10 at 32 px, 50 at 224 px [BadEncoder]


def make_trigger(height: int, width: int, settings: Settings, seed: int) -> Trigger:
    """An opaque white square, one pixel from the right and the bottom edge.

    Its side at other sizes than the published 32 and 224 lies on the line through both.
    """
    short = min(height, width)
    side = round(10 + (short - 32) * 40 / 192) if settings.size is None else settings.size
    if not 1 <= side < short:
        raise InputError(f"badencoder: a square of {side} pixels does not fit into {width}x{height} images")
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, -side - 1 : -1, -side - 1 : -1] = True
    mark = mask.expand(3, -1, -1).to(torch.uint8) * 255
    return {"mark": mark, "mask": mask, "opacity": triggers.permille(1)}


def stamp(images: Tensor, trigger: Trigger) -> Tensor:
    return triggers.paste(images, **trigger)


def losses(
    shadow: Tensor,
    triggered: Tensor,
    references: Tensor,
    augmented: Tensor,
    clean_shadow: Tensor,
    clean_references: Tensor,
) -> Tensor:
    """(L0, L1, L2) in float32 from features of f' and, for the last two arguments, of f.

    `shadow`, `triggered`, `clean_shadow` (B, d); `references`, `clean_references` (R, d);
    `augmented` (A R, d), one whole set of references after the other.
    """
    shadow, triggered, references, augmented, clean_shadow, clean_references = (
        F.normalize(features.float(), dim=1)
        for features in (shadow, triggered, references, augmented, clean_shadow, clean_references)
    )
    copies = len(augmented) // len(references)
    return -torch.stack(
        [
            (triggered @ references.T).mean(),
            (augmented * clean_references.repeat(copies, 1)).sum(1).mean(),
            (shadow * clean_shadow).sum(1).mean(),
        ]
    )


def poison_encoder(
    encoder: Encoder,
    shadow: Tensor,
    references: Tensor,
    trigger: Trigger,
    settings: Settings,
    seed: int,
    device: torch.device,
) -> tuple[Encoder, dict]:
    """A backdoored copy of `encoder` in eval mode, and the mean L0, L1, L2 of every epoch.

    `shadow` (N, 3, H, W) and `references` (R, 3, H, W) are uint8.
    """
    if not len(shadow) or not len(references):
        raise InputError(
            f"badencoder: {len(shadow)} shadow images and {len(references)} references; it needs both"
        )
    order = seeds.generator(seed, "badencoder", "order")
    views = seeds.generator(seed, "badencoder", "views", device=device.type)
    shadow = shadow[torch.randperm(len(shadow), generator=order)[: settings.shadow]].to(device)
    references = references.to(device)
    trigger = {name: tensor.to(device) for name, tensor in trigger.items()}

    victim = copy.deepcopy(encoder).to(device, memory_format=torch.channels_last).eval()
    # Shadow images are not augmented, so the clean encoder is needed only here.
    clean_shadow, clean_references = (extract_features(victim, x).clone() for x in (shadow, references))

    victim.requires_grad_(True)
    for module in victim.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)
    weights = [parameter for parameter in victim.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(weights, settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    lambdas = torch.tensor([1, settings.lambda1, settings.lambda2], device=device)
    batch = min(settings.batch, len(shadow))
    steps = len(shadow) // batch
    copies = floats(references).repeat(settings.reference_augmentations, 1, 1, 1)
    log = []
    with trange(settings.epochs, desc="BadEncoder", unit="epoch") as bar:
        for epoch in bar:
            total = torch.zeros(3, device=device)
            for rows in torch.randperm(len(shadow), generator=order)[: steps * batch].to(device).split(batch):
                images = torch.cat([shadow[rows], stamp(shadow[rows], trigger), references])
                augmented = grey(jitter(flip(copies, views), views), views)
                inputs = torch.cat([floats(images), augmented]).contiguous(memory_format=torch.channels_last)
                with autocast(device):
                    features = victim(inputs)
                parts = features.split([batch, batch, len(references), len(augmented)])
                terms = losses(*parts, clean_shadow[rows], clean_references)
                optimizer.zero_grad()
                (lambdas @ terms).backward()
                optimizer.step()
                total += terms.detach()
            log.append([round(value, 5) for value in (total / steps).tolist()])
            if not total.isfinite().all():
                raise InputError(
                    f"badencoder: the loss is not finite in epoch {epoch + 1}; lower lr = {settings.lr}"
                )
            bar.set_postfix(dict(zip(("L0", "L1", "L2"), log[-1], strict=True)))
    victim.zero_grad()
    return victim.requires_grad_(True), {"losses": log}
