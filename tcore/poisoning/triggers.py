"""Triggers: tensors in a file, and the primitive that puts a mark on images.

A trigger is a dict of tensors. The attack that made it (its metadata names family and attack)
has the function `stamp(images, trigger)` that applies it: uint8 (N, 3, H, W) in and out, the
input untouched, every image by itself. Arithmetic is integer: opacities count thousandths and
results are floor(v + 1/2), so that all devices and batch sizes agree to the bit.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from tcore.experiment import registry
from tcore.files import InputError, load_tensors, save_tensors

Trigger = dict[str, Tensor]
Stamp = Callable[[Tensor], Tensor]
BLOCK = 2**22  # pixel values that are widened at a time


def permille(opacity: float) -> Tensor:
    """The opacity in thousandths (int32 scalar); it must be a multiple of 0.001 in 0..1."""
    exact = Fraction(str(opacity)) * 1000
    if exact.denominator != 1 or not 0 <= exact <= 1000:
        raise InputError(f"opacity = {opacity} should be a multiple of 0.001 between 0 and 1")
    return torch.tensor(int(exact), dtype=torch.int32)


def check_size(images: Tensor, trigger: Sequence[int]) -> None:
    """An error where images and a trigger's (channels, height, width) differ."""
    if images.shape[1:] != tuple(trigger):
        raise InputError(
            f"the trigger is {tuple(trigger)} (channels, height, width), the images are "
            f"{tuple(images.shape[1:])}; make the trigger anew at their size"
        )


def rows_at_once(images: Tensor) -> int:
    """How many images make up a block of some `BLOCK` values."""
    return max(1, BLOCK // images[:1].numel()) if len(images) else 1


def paste(images: Tensor, mark: Tensor, mask: Tensor, opacity: Tensor) -> Tensor:
    """images + opacity/1000 * mask * (mark - images), rounded half up.

    `images` (N, 3, H, W) uint8, `mark` (3, H, W) uint8, `mask` (1, H, W) bool, `opacity` scalar; or
    one of each per image: (N, 3, H, W), (N, 1, H, W), (N, 1, 1, 1).
    """
    check_size(images, mark.shape[-3:])
    mark, mask, opacity = (tensor.to(images.device) for tensor in (mark, mask, opacity))
    weight = mask * opacity
    mixed = images.int() * (1000 - weight) + mark.int() * weight
    return ((mixed + 500) // 1000).to(torch.uint8)


def in_blocks(stamp: Callable[[Tensor, Trigger], Tensor], trigger: Trigger) -> Stamp:
    """An attack's `stamp` with its trigger, for any number of images."""
    return lambda images: torch.cat([stamp(part, trigger) for part in images.split(rows_at_once(images))])


def save(
    path: str | Path,
    trigger: Trigger,
    family: str,
    attack: str,
    target: int | None,
    goals: Sequence[int] | None = None,
) -> None:
    """Writes a trigger. `goals`: see `tcore.poisoning.poisoned.Poisoned`; left out where there are none."""
    meta = {} if goals is None else {"goals": list(goals)}
    save_tensors(path, trigger, family=family, attack=attack, target=target, **meta)


def load(path: str | Path) -> tuple[Stamp | None, dict]:
    """The (stamp, meta) of a trigger file; `stamp(images)` is ready to use, None for a clean one."""
    trigger, meta = load_tensors(path)
    if not {"family", "attack", "target"} <= meta.keys():
        raise InputError(
            f"{path}: not a trigger file; it should come from poison_dataset.py or poison_encoder.py"
        )
    if not trigger:
        return None, meta
    return in_blocks(registry.load(meta["family"], meta["attack"]).stamp, trigger), meta
