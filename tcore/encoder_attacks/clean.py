"""No attack on the encoder: what comes out is what was pre-trained."""

import copy
from dataclasses import dataclass

from tcore.poisoning.triggers import Trigger


@dataclass(frozen=True)
class Settings:
    """Nothing to set."""

    references = 0


def make_trigger(height: int, width: int, settings: Settings, seed: int) -> Trigger:
    return {}


def poison_encoder(encoder, shadow, references, trigger, settings, seed, device) -> tuple:
    return copy.deepcopy(encoder), {}
