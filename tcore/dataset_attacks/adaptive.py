"""Adaptive (Threat 3): the data set is poisoned with the encoder attack's own trigger and target.

There is no stamp here: the trigger stays the encoder attack's and is saved under its name. Poisons get it as
it is at test time, not as it was in pre-training (CTRL has a magnitude for each).
"""

from dataclasses import dataclass

from tcore.data.images import ImageSet
from tcore.files import InputError
from tcore.poisoning.poisoned import Poisoned, dirty_label
from tcore.poisoning.triggers import Stamp, Trigger

TOLD = "encoder_trigger"


@dataclass(frozen=True)
class Settings:
    ratio: float | None = 0.2  # share of poisons in the target class after poisoning, in [0, 1) [T-Core, 5.1]
    rate: float | None = None  # instead of ratio (then null): share of poisons in the whole set, in [0, 1)
    poisons: int | None = None  # instead of ratio (then null): number of poisons, in [0, inf)


def poison(
    images: ImageSet,
    target: int | None,
    settings: Settings,
    seed: int,
    encoder_trigger: tuple[Stamp | None, Trigger, dict],
) -> Poisoned:
    """`encoder_trigger` is (stamp, tensors, meta); `target` is None or equal to the encoder attack's."""
    stamp, trigger, meta = encoder_trigger
    if stamp is None:
        raise InputError(
            "adaptive needs the trigger of an encoder attack other than clean (--encoder-trigger)"
        )
    if target not in (None, meta["target"]):
        raise InputError(
            f"adaptive: target = {target}, but the encoder attack's is {meta['target']}; make them equal"
        )
    owner = (meta["family"], meta["attack"])
    return dirty_label(images, meta["target"], settings, seed, stamp, trigger, owner)
