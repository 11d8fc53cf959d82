"""What an evaluator has of one victim: what the user received, and what only the attackers know."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tcore.data.images import ImageSet, read_images
from tcore.defenses._interface import Received, receive
from tcore.evaluation import metrics, results
from tcore.files import InputError, load_table
from tcore.models import head as heads
from tcore.poisoning import triggers


@dataclass(frozen=True)
class Victim:
    """`Received` with the truth about it, the test set, and the one trigger that there is (T1, T2, T3)."""

    received: Received  # `clean`: the samples that are trusted, where the figure takes some
    train: ImageSet  # the training set, as received
    is_poison: Tensor  # (n,) bool
    is_cover: Tensor  # (n,) bool
    test: ImageSet
    stamp: triggers.Stamp
    target: int | None  # the class that the attack aims at; None: at several
    aim: int | list[int]  # the same for each true class, as `metrics.goals` takes it
    scenario: str
    seed: int

    @property
    def of_target(self) -> Tensor:
        """Training samples (n,) bool with the label that poisons carry, but for those that are trusted."""
        if self.target is None:
            raise InputError(
                f"{self.train.origin}: the attack aims at several classes and this figure is about one; "
                "leave attacks with all_to_all out"
            )
        found = self.received.labels == self.target
        return found if self.received.clean is None else found & ~self.received.clean

    def outcome(self, clean: Tensor, triggered: Tensor) -> dict[str, metrics.Share]:
        """`acc` and `asr` of logits (N, C) of the test images, as they are and with the trigger."""
        clean, triggered = (logits.argmax(1).cpu().numpy() for logits in (clean, triggered))
        return {
            "acc": metrics.accuracy(clean, self.test.labels),
            "asr": metrics.attack_success_rate(triggered, self.test.labels, self.aim),
        }


def read(
    model: str | Path,
    features: str | Path,
    images: str | Path,
    truth: str | Path,
    test: str | Path,
    encoder_trigger: str | Path,
    dataset_trigger: str | Path,
    head: dict,
    scenario: str,
    seed: int,
    device: torch.device,
    trusted: str | Path | None = None,
) -> Victim:
    """A victim from its files, on a device. In T3 both triggers are the same."""
    received, train = receive(model, features, images, trusted, heads.Settings(**head), device)
    known = results.need(load_table(truth), ["index", "is_poison", "is_cover"], truth)
    if sorted(known["index"]) != sorted(train.index):
        raise InputError(f"{truth}: its indices are not those of {images}; make both anew")
    known = known.set_index("index").loc[train.index]
    stamp, meta = triggers.load(encoder_trigger)
    if stamp is None:
        stamp, meta = triggers.load(dataset_trigger)
    if stamp is None:
        raise InputError(f"{dataset_trigger}: neither this nor {encoder_trigger} holds a trigger")
    return Victim(
        received=received,
        train=train,
        is_poison=torch.from_numpy(known["is_poison"].to_numpy(bool, copy=True)).to(device),
        is_cover=torch.from_numpy(known["is_cover"].to_numpy(bool, copy=True)).to(device),
        test=read_images(test),
        stamp=stamp,
        target=meta["target"],
        aim=meta.get("goals", meta["target"]),
        scenario=scenario,
        seed=seed,
    )
