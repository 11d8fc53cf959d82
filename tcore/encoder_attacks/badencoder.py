"""BadEncoder: fine-tunes an encoder so that triggered images get a reference image's feature.

Jia, Liu, Gong: BadEncoder, IEEE S&P 2022. With f the clean and f' the new encoder, s the cosine, x a
shadow image, x+e the same with the trigger, r_i the references and a an augmentation without crop:

    L0 = - mean_{x,i} s(f'(x+e), f'(r_i))     L1 = - mean_i s(f'(a(r_i)), f(r_i))
    L2 = - mean_x s(f'(x), f(x))              L  = L0 + lambda1 L1 + lambda2 L2

How it is trained, and the one deviation: `_implant.py`.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tcore.encoder_attacks._implant import Features, Terms, implant
from tcore.files import InputError
from tcore.models.encoder import Encoder
from tcore.poisoning import triggers
from tcore.poisoning.triggers import Trigger


@dataclass(frozen=True)
class Settings:
    references: int = 1  # reference images of the target class, in [1, inf) [BadEncoder]
    reference_file: str | None = None  # .npz with `x` (R, H, W, 3); null: by centroids [ours]
    shadow: int = 50_000  # shadow images, drawn from the pre-training set, at most, in [1, inf) [BadEncoder]
    epochs: int = 200  # passes over the shadow images, in [1, inf); 10 are too few [BadEncoder]
    batch: int = 256  # shadow images a step, in [1, inf) [BadEncoder]
    lr: float = 1e-3  # SGD's rate, constant, in (0, inf); narrow encoders need 0.01 to 0.05 [BadEncoder]
    momentum: float = 0.9  # of SGD, in [0, 1) [BadEncoder]
    weight_decay: float = 5e-4  # of SGD, in [0, inf) [BadEncoder]
    lambda1: float = 1.0  # weight of L1, in [0, inf): references keep their feature [BadEncoder]
    lambda2: float = 1.0  # weight of L2, in [0, inf): clean images keep their feature [BadEncoder]
    reference_augmentations: int = 16  # augmented copies of each reference a step, in [1, inf) [ours]
    size: int | None = None  # the white square's side, in [1, inf); null: 10 at 32 px, 50 at 224 [BadEncoder]


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


def losses(features: Features) -> Terms:
    """L0, L1 and L2 of a batch."""
    f = Features(*(F.normalize(x, dim=1) for x in vars(features).values()))
    copies = len(f.augmented) // len(f.references)
    return {
        "L0": -(f.triggered @ f.references.T).mean(),
        "L1": -(f.augmented * f.clean_references.repeat(copies, 1)).sum(1).mean(),
        "L2": -(f.shadow * f.clean_shadow).sum(1).mean(),
    }


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

    def evaluate(features: Features) -> tuple[Tensor, Terms]:
        terms = losses(features)
        return terms["L0"] + settings.lambda1 * terms["L1"] + settings.lambda2 * terms["L2"], terms

    apply = partial(stamp, trigger=trigger)
    return implant(
        "badencoder", encoder, shadow, references, apply, lambda _: evaluate, settings, seed, device
    )
