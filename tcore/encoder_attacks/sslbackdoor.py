"""SSLBackdoor: a patch on unlabelled images of the target class, ahead of an unchanged pre-training.

Saha, Tejankar, Koohpayegani, Pirsiavash: Backdoor Attacks on Self-Supervised Learning, CVPR 2022. The
patch of `_patch.py`, opaque, lies at a random place of every poisoned image; views of these images share
patch and class, so that the encoder learns both as one. In training the patch stays in the middle half,
at test time anywhere but the outermost tenth.

The paper edits images of a category that pre-training contains; where it contains none of that name,
`source: downstream` adds stamped downstream images instead. The paper poisons half of the category, its
released configurations all of it. Deviation: the patch is pasted at the size of the images that are
trained on, where the original pastes 50 pixels into photographs of varying size.

Behind the small encoders tried here it fails: with all of the class patched and the patch often cut off by
the crop, patch and class part ways (docs/lab/encoder-attack-needs.md).
"""

from dataclasses import dataclass

from torch import Tensor

from tcore import seeds
from tcore.data.images import ImageSet
from tcore.encoder_attacks import _patch
from tcore.encoder_attacks._patch import stamp
from tcore.encoder_attacks._unlabelled import poison_class
from tcore.poisoning.poisoned import Poisoned
from tcore.poisoning.triggers import Trigger

__all__ = ["Settings", "make_trigger", "poison_images", "stamp"]


@dataclass(frozen=True)
class Settings:
    share: float = 0.5  # share of the target class that is poisoned, in [0, 1]; its code: 1 [SSLBackdoor]
    source: str = "pretraining"  # of the poisons, one of pretraining, downstream: in place or added [ours]
    size: int | None = None  # side of the patch, in [1, inf); null: 8 at 32 px, 50 at 224 px [SSLBackdoor]
    place: tuple[float, float] = (0.25, 0.75)  # of the patch, as shares of each side, in [0, 1] [SSLBackdoor]
    place_test: tuple[float, float] = (0.1, 0.9)  # the same at test, in [0, 1] [SSLBackdoor]
    pattern_seed: int = 10  # which patch is drawn, in [0, inf) [ours]


def _side(height: int, width: int, settings: Settings) -> int:
    return round(8 + (min(height, width) - 32) * 42 / 192) if settings.size is None else settings.size


def make_trigger(height: int, width: int, settings: Settings, seed: int) -> Trigger:
    side = _side(height, width, settings)
    return _patch.make_trigger("sslbackdoor", height, width, side, settings.pattern_seed, settings.place_test)


def poison_images(
    images: ImageSet, downstream: ImageSet, target: int, trigger: Trigger, settings: Settings, seed: int
) -> Poisoned:
    height, width = images.pixels.shape[1:3]
    side = _side(height, width, settings)
    train = _patch.make_trigger("sslbackdoor", height, width, side, settings.pattern_seed, settings.place)
    generator = seeds.generator(seed, "sslbackdoor", "places")

    def apply(chosen: Tensor) -> Tensor:
        corners = _patch.draw_corners(len(chosen), train["low"], train["high"], generator)
        return _patch.paste_at(chosen, trigger["patch"], corners)

    poisoned, truth = poison_class(
        "sslbackdoor",
        images,
        downstream,
        target,
        settings.source,
        lambda size: int(settings.share * size),
        apply,
        seed,
    )
    return Poisoned(poisoned, truth, trigger, target, ("encoder_attacks", "sslbackdoor"))
