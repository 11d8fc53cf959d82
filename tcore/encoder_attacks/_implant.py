"""Fine-tuning a clean encoder on an attacker's loss: the loop that BadEncoder and DRUPE share.

Normalisation layers stay as they are: statistics (batch norm in eval mode), scales and shifts. The
references run once a batch, with several augmentations at a time, instead of once per shadow image.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import trange

from tcore import seeds
from tcore.data.augment import flip, grey, jitter
from tcore.device import autocast
from tcore.files import InputError
from tcore.models.encoder import Encoder, extract_features, floats
from tcore.poisoning.triggers import Stamp


@dataclass(frozen=True)
class Features:
    """Features of one batch, float32 and not normalised: of the new encoder f', and of the clean one f."""

    shadow: Tensor  # (B, d)
    triggered: Tensor  # (B, d): the same shadow images with the trigger
    references: Tensor  # (R, d)
    augmented: Tensor  # (A R, d), one whole set of references after the other
    clean_shadow: Tensor  # (B, d) of f
    clean_references: Tensor  # (R, d) of f


Terms = dict[str, Tensor]
Objective = Callable[[Features], tuple[Tensor, Terms]]


def implant(
    name: str,
    encoder: Encoder,
    shadow: Tensor,
    references: Tensor,
    stamp: Stamp,
    objective: Callable[[list[dict]], Objective],
    settings,
    seed: int,
    device: torch.device,
) -> tuple[Encoder, dict]:
    """A copy of `encoder`, trained on an objective, in eval mode; and the means of every epoch's terms.

    `objective(history)`, called at the start of each epoch with the terms of those before, gives the
    function from features to (loss, terms). `shadow` and `references` are uint8 (N, 3, H, W);
    `settings` has shadow, epochs, batch, lr, momentum, weight_decay and reference_augmentations.
    """
    if not len(shadow) or not len(references):
        raise InputError(
            f"{name}: {len(shadow)} shadow images and {len(references)} references; it needs both"
        )
    order = seeds.generator(seed, name, "order")
    views = seeds.generator(seed, name, "views", device=device.type)
    shadow = shadow[torch.randperm(len(shadow), generator=order)[: settings.shadow]].to(device)
    references = references.to(device)

    victim = copy.deepcopy(encoder).to(device, memory_format=torch.channels_last).eval()
    # Shadow images are not augmented, so the clean encoder is needed only here.
    clean_shadow, clean_references = (extract_features(victim, x).clone() for x in (shadow, references))

    victim.requires_grad_(True)
    for module in victim.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
            module.requires_grad_(False)
    weights = [parameter for parameter in victim.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        weights, settings.lr, settings.momentum, weight_decay=settings.weight_decay, fused=True
    )
    batch = min(settings.batch, len(shadow))
    steps = len(shadow) // batch
    copies = floats(references).repeat(settings.reference_augmentations, 1, 1, 1)
    history = []
    with trange(settings.epochs, desc=name, unit="epoch") as bar:
        for epoch in bar:
            total, evaluate = 0, objective(history)
            for rows in torch.randperm(len(shadow), generator=order)[: steps * batch].to(device).split(batch):
                images = torch.cat([shadow[rows], stamp(shadow[rows]), references])
                augmented = grey(jitter(flip(copies, views), views), views)
                inputs = torch.cat([floats(images), augmented]).contiguous(memory_format=torch.channels_last)
                with autocast(device):
                    features = victim(inputs)
                parts = features.float().split([batch, batch, len(references), len(augmented)])
                loss, terms = evaluate(Features(*parts, clean_shadow[rows], clean_references))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total = total + torch.stack(list(terms.values())).detach()
            if not total.isfinite().all():
                raise InputError(
                    f"{name}: the loss is not finite in epoch {epoch + 1}; lower lr = {settings.lr}"
                )
            means = (round(value, 5) for value in (total / steps).tolist())
            history.append(dict(zip(terms, means, strict=True)))
            bar.set_postfix({term: history[-1][term] for term in ("L0", "L1", "L2")})
    victim.zero_grad()
    return victim.requires_grad_(True), {"losses": history}
