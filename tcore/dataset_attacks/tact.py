"""TaCT: a patch that works on images of chosen source classes only.

Tang, Wang, Tang, Zhang: Demon in the Variant, USENIX Security 2021. Images of the source classes get the
patch and the target's label; images of the cover classes get the patch and keep their label, which
teaches the model that the patch means nothing elsewhere. The original appends triggered copies; here, as
in backdoor-toolbox, images are replaced. The patch is an 8x8 square of 64 colours (at 32 px), of our own
drawing.

Success is counted on test images of the source classes; `stamp` itself marks any image. In the small runs
here the trigger also works on classes that are no source (docs/lab/implantation.md). On GTSRB
`config/paper.yaml` gives this attack another target, so its number of poisons differs from the others'.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tcore.data.images import ImageSet
from tcore.files import InputError
from tcore.poisoning import marks, triggers
from tcore.poisoning.poisoned import Poisoned, check_target, choose_covers, choose_poisons, poisoned
from tcore.poisoning.triggers import Trigger

OWNER = ("dataset_attacks", "tact")


@dataclass(frozen=True)
class Settings:
    ratio: float | None = 0.2  # share of poisons in the target class after poisoning, in [0, 1) [T-Core, 5.1]
    rate: float | None = None  # instead of ratio (then null): share of poisons in the whole set, in [0, 1)
    poisons: int | None = None  # instead of ratio (then null): number of poisons, in [0, inf)
    cover: float = 0.25  # covers per poison, in [0, inf) [T-Core, App. B.3; TaCT: 1]
    sources: tuple[int, ...] = (9,)  # classes that become the target, in [0, inf) [T-Core, App. B.3: truck]
    cover_classes: tuple[int, ...] = (5, 6, 7)  # classes of covers, in [0, inf) [T-Core: dog, frog, horse]
    target: int | None = None  # instead of the data set's target, in [0, inf) [T-Core, App. B.3: GTSRB]
    mark: str = "square"  # a drawn mark (tcore/poisoning/marks.py) or the path of a picture [ours]
    opacity: float = 1.0  # of the mark, in steps of 0.001, in [0, 1] [backdoor-toolbox]


def make_trigger(height: int, width: int, settings: Settings) -> Trigger:
    mark, mask = marks.mark(settings.mark, height, width)
    return {"mark": mark, "mask": mask, "opacity": triggers.permille(settings.opacity)}


def stamp(images: Tensor, trigger: Trigger) -> Tensor:
    return triggers.paste(images, **trigger)


def _check_classes(images: ImageSet, target: int, settings: Settings) -> None:
    roles = {"target": (target,), "sources": settings.sources, "cover_classes": settings.cover_classes}
    seen: dict[int, str] = {}
    for role, classes in roles.items():
        for label in classes:
            if not 0 <= label < images.num_classes:
                raise InputError(
                    f"tact: {role} has {label}, but the classes of {images.origin} are "
                    f"0..{images.num_classes - 1}; set {role} for this data set"
                )
            if label in seen:
                raise InputError(
                    f"tact: class {label} is in {seen[label]} and in {role}; it can have one part"
                )
            seen[label] = role
    if not settings.sources:
        raise InputError("tact: sources is empty; name at least one class")


def poison(images: ImageSet, target: int | None, settings: Settings, seed: int) -> Poisoned:
    target = check_target(images, target if settings.target is None else settings.target)
    _check_classes(images, target, settings)
    trigger = make_trigger(*images.tensor.shape[2:], settings)
    among, beside = (np.isin(images.labels, c) for c in (settings.sources, settings.cover_classes))
    poisons = choose_poisons(images, target, settings, seed, OWNER, among)
    covers = choose_covers(images, poisons, settings.cover, seed, OWNER, beside)
    goals = tuple(target if label in settings.sources else -1 for label in range(images.num_classes))
    return poisoned(
        images, target, OWNER, trigger, lambda pixels, _: stamp(pixels, trigger), poisons, covers, goals
    )
