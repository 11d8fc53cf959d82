"""What the baseline defences (`tcore/defenses`) share: what a defender holds, and how a method is run.

A defence is a file with `Settings`, a docstring and constants that declare what it is:

    KIND        "detector": score(received, settings, seed) -> (n,) float, higher = more suspicious, and
                            flag(score, received, settings) -> (n,) bool, its own rule, True = distrusted
                "model":    repair(received, settings, seed) -> (Classifier, log dict)
    CLEAN       whether it needs clean samples that it can trust
    NEEDS_NORM  whether it needs batch norm in the encoder
    ORACLE      settings that no real defender knows and an evaluator can fill in, such as ("poison_rate",)
    TRAINS      optional: whether it trains networks made by `received.network`, so that `part` says what is
                trained, the head on cached features or everything
    INPUTS      optional, of a detector: score_inputs(images, received, settings, seed) -> (N,) float scores
                images of later use; flag_inputs(score, received, settings, seed) -> (N,) bool, its rule for
                them, where that is not `flag`

After a detector, all train the same head on what is kept, so results compare detectors and not
trainers. Methods that cannot be applied raise `NotApplicable`; their result is a row with the reason.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from tcore.data.images import ImageSet, read_images
from tcore.defenses import _selection as selection
from tcore.files import InputError, load_table, load_tensors
from tcore.models import head as heads
from tcore.models.classifier import Classifier, load_classifier
from tcore.models.encoder import Encoder, floats

LAYERS = ("encoder", "hidden", "penultimate")
PARTS = ("head", "all")


class NotApplicable(Exception):
    """A defence makes no sense here; the message says why."""


@dataclass(frozen=True)
class Received:
    """What a defender holds: no truth, no trigger, no target, no test image."""

    model: Classifier  # the suspect: the encoder as received, a head trained on everything
    images: Tensor  # (n, 3, H, W) uint8
    labels: Tensor  # (n,) int64, as received
    features: Tensor  # (n, d) float32, of the frozen encoder
    classes: int
    clean: Tensor | None  # (n,) bool: trusted samples, None unless the method declares CLEAN
    head: heads.Settings  # the head and its training, the same for all defences
    part: str = "head"  # what a method that trains trains: the head on cached features, or all
    encoder: Encoder | None = None  # where training starts, if the suspect's own was trained on this set

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def inputs(self) -> Tensor:
        """What networks made by `network` take, row by row: features, or uint8 images."""
        return self.features if self.part == "head" else self.images

    def network(self, seed: int, *names: str) -> nn.Module:
        """A new network, inputs (N, ...) -> logits (N, C): the one place that says what is trained."""
        head = heads.new_head(self.features.shape[1], self.classes, self.head, seed, *names).to(self.device)
        if self.part == "head":
            return head
        encoder = copy.deepcopy(self.encoder or self.model.encoder).requires_grad_(True)
        return Whole(Classifier(encoder, head))

    def layer(self, name: str) -> Tensor:
        """Activations (n, d_l) of the suspect: "encoder" (its output), "hidden" or "penultimate"."""
        if name not in LAYERS:
            raise InputError(f"layer = {name!r} should be one of {LAYERS}")
        with torch.no_grad():
            h1, h2, _ = self.model.eval().head.activations(self.features)
        return (self.features, h1, h2)[LAYERS.index(name)]


class Whole(nn.Module):
    """A classifier that takes uint8 images; `activations` gives (h1, h2, logits) as a head does."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model

    def activations(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.model.head.activations(self.model.encoder(floats(images)))

    def forward(self, images: Tensor) -> Tensor:
        return self.activations(images)[2]


def receive(
    model: str | Path,
    features: str | Path,
    images: str | Path,
    trusted: str | Path | None,
    head: heads.Settings,
    device: torch.device,
    part: str = "head",
) -> tuple[Received, ImageSet]:
    """What files hold for a defender, on a device, and the images as they were read."""
    received = read_images(images)
    clean = None if trusted is None else read_trusted(trusted, received).to(device)
    found = load_tensors(features)[0]["features"]
    if bad := int((~found.isfinite()).any(1).sum()):
        raise InputError(f"{features}: features of {bad} of {len(found)} images are no numbers; make it anew")
    return Received(
        model=load_classifier(model).to(device),
        images=received.tensor.to(device),
        labels=received.targets.to(device),
        features=found.to(device),
        classes=received.num_classes,
        clean=clean,
        head=head,
        part=part,
    ), received


def read_trusted(path: str | Path, images: ImageSet) -> Tensor:
    """The trusted rows (n,) bool of a table with `granted` (by the scenario), `trusted` (T-Core's seeds) or
    `round` (its clean subset)."""
    table = load_table(path)
    if "index" not in table or sorted(table["index"]) != sorted(images.index):
        raise InputError(f"{path}: its indices are not those of the images; make it anew")
    table = table.set_index("index").loc[images.index]
    for column in ("granted", "trusted"):
        if column in table:
            return torch.from_numpy(table[column].to_numpy(bool, copy=True))
    if "round" in table:
        return torch.from_numpy((table["round"] >= 0).to_numpy(copy=True))
    raise InputError(f"{path}: no column granted, trusted or round, so nothing in it says what to trust")


@torch.no_grad()
def in_blocks(function, inputs: Tensor, block: int = 512) -> Tensor:
    """`function` over blocks of rows, joined: bounded memory where rows do not depend on each other."""
    return torch.cat([function(part) for part in inputs.split(block)])


def check(method: ModuleType, received: Received) -> None:
    """Raises NotApplicable where `received` lacks what the method declares that it needs."""
    if method.CLEAN and (received.clean is None or not received.clean.any()):
        raise NotApplicable("it needs trusted clean samples, and there are none")
    if method.NEEDS_NORM and not any(isinstance(m, nn.BatchNorm2d) for m in received.model.encoder.modules()):
        raise NotApplicable("it needs batch norm in the encoder, and there is none")


def detect(
    method: ModuleType, received: Received, settings, select: selection.Settings, seed: int
) -> tuple[Tensor, Tensor]:
    """A detector's raw scores (n,) float32 and what is kept (n,) bool. Trusted samples are kept always."""
    check(method, received)
    score = method.score(received, settings, seed)
    if not score.isfinite().all():
        raise RuntimeError(f"{method.__name__} gave scores that are no numbers")
    if select.rule == "native":
        distrusted = method.flag(score, received, settings)
    else:
        distrusted = selection.flagged(score, received.labels, select)
    if received.clean is not None:
        distrusted = distrusted & ~received.clean
    return score, ~distrusted


def flag_inputs(method: ModuleType, score: Tensor, received: Received, settings, seed: int) -> Tensor:
    """Which images of later use an input detector distrusts (N,) bool, by `flag` unless it says otherwise."""
    if hasattr(method, "flag_inputs"):
        return method.flag_inputs(score, received, settings, seed)
    return method.flag(score, received, settings)


def retrain(received: Received, kept: Tensor, seed: int) -> Classifier:
    """The encoder as received with a new head, trained on what is kept."""
    if not kept.any():
        raise NotApplicable("it distrusts every sample, so nothing is left to train on")
    head = heads.new_head(received.features.shape[1], received.classes, received.head, seed, "head")
    heads.fit_head(head, received.features[kept], received.labels[kept], received.head.epochs, seed, "head")
    return Classifier(copy.deepcopy(received.model.encoder), head).eval()


def repair(method: ModuleType, received: Received, settings, seed: int) -> tuple[Classifier, dict]:
    """The model that a training or repairing defence makes, and its log."""
    check(method, received)
    model, log = method.repair(received, settings, seed)
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise NotApplicable("its training ended in weights that are no numbers; a lower rate may do")
    return model.eval(), log
