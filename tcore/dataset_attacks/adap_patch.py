"""Adap-Patch: four faint marks of which every training image carries one; two of them, opaque, at test time.

Qi, Xie, Li, Mahloujifar, Mittal: Revisiting the Assumption of Latent Separability, ICLR 2023. Poisons get
the target's label, covers keep theirs, so that the marks do not set poisons apart in feature space. Marks
are dealt out at random and evenly, among poisons and among covers (backdoor-toolbox: in row order, which
ties a mark to a class where the rows are sorted by class). At test time the two test marks are pasted in
order. Poisons come from other classes than the target's (backdoor-toolbox draws from all).

The marks stand where backdoor-toolbox has its pictures, and are of our own drawing: a block, a disc, four
checkers and a square of 64 colours; test marks as there for CIFAR-10: two blocks, then the checkers (for
GTSRB: disc, square).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tcore import seeds
from tcore.data.images import ImageSet
from tcore.files import InputError
from tcore.poisoning import marks, triggers
from tcore.poisoning.poisoned import Poisoned, check_target, choose_covers, choose_poisons, poisoned
from tcore.poisoning.triggers import Trigger

OWNER = ("dataset_attacks", "adap_patch")


@dataclass(frozen=True)
class Settings:
    ratio: float | None = 0.2  # share of poisons in the target class after poisoning, in [0, 1) [T-Core, 5.1]
    rate: float | None = None  # instead of ratio (then null): share of poisons in the whole set, in [0, 1)
    poisons: int | None = None  # instead of ratio (then null): number of poisons, in [0, inf)
    cover: float = 0.25  # covers per poison, in [0, inf) [T-Core, App. B.3; Adap-Patch: 2]
    marks: tuple[str, ...] = (
        "block",
        "disc",
        "checkers",
        "square",
    )  # drawn (tcore/poisoning/marks.py), or pictures' paths
    opacities: tuple[float, ...] = (0.5, 0.2, 0.5, 0.3)  # of the marks in training, in [0, 1] [Adap-Patch]
    test_marks: tuple[str, ...] = (
        "blocks",
        "checkers",
    )  # pasted in this order [backdoor-toolbox]
    test_opacity: float = 1.0  # of the test marks, in [0, 1] [Adap-Patch]


def _stack(names: tuple[str, ...], opacities: tuple[float, ...], height: int, width: int) -> Trigger:
    drawn = [marks.mark(name, height, width) for name in names]
    return {
        "mark": torch.stack([mark for mark, _ in drawn]),
        "mask": torch.stack([mask for _, mask in drawn]),
        "opacity": torch.stack([triggers.permille(opacity) for opacity in opacities]),
    }


def make_trigger(height: int, width: int, settings: Settings) -> Trigger:
    """The test marks: `mark` (K, 3, H, W), `mask` (K, 1, H, W), `opacity` (K,)."""
    if not settings.test_marks:
        raise InputError("adap_patch: test_marks is empty; name at least one")
    return _stack(settings.test_marks, [settings.test_opacity] * len(settings.test_marks), height, width)


def stamp(images: Tensor, trigger: Trigger) -> Tensor:
    for mark, mask, opacity in zip(trigger["mark"], trigger["mask"], trigger["opacity"], strict=True):
        images = triggers.paste(images, mark, mask, opacity)
    return images


def deal(index: np.ndarray, kinds: int, seed: int, part: str) -> np.ndarray:
    """Which of `kinds` marks each image of a part (poisons, covers) gets: at random, all equally often."""
    order = seeds.uniform(seed, *OWNER, "marks", part, index=index, size=1)[:, 0].argsort(kind="stable")
    dealt = np.empty(len(index), np.int64)
    dealt[order] = np.arange(len(index)) * kinds // max(len(index), 1)
    return dealt


def poison(images: ImageSet, target: int | None, settings: Settings, seed: int) -> Poisoned:
    target = check_target(images, target)
    if len(settings.marks) != len(settings.opacities) or not settings.marks:
        raise InputError(
            f"adap_patch: {len(settings.marks)} marks and {len(settings.opacities)} opacities; "
            "give each mark one opacity"
        )
    size = images.tensor.shape[2:]
    trigger = make_trigger(*size, settings)
    training = _stack(settings.marks, settings.opacities, *size)
    poisons = choose_poisons(images, target, settings, seed, OWNER)
    covers = choose_covers(images, poisons, settings.cover, seed, OWNER)
    kind = np.zeros(len(images), np.int64)
    for part, rows in (("poisons", poisons), ("covers", covers)):
        kind[rows] = deal(images.index[rows], len(settings.marks), seed, part)

    def change(pixels: Tensor, rows: np.ndarray) -> Tensor:
        mark, mask, opacity = (training[name][kind[rows]] for name in ("mark", "mask", "opacity"))
        return triggers.paste(pixels, mark, mask, opacity.view(-1, 1, 1, 1))

    return poisoned(images, target, OWNER, trigger, change, poisons, covers)
