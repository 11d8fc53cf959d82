"""SSL-Distillation: a clean encoder distilled from a poisoned one on trusted images, without their labels.

Han, Sun, et al.: On the Effectiveness of Distillation in Mitigating Backdoors in Pre-trained Encoder, arXiv
2403.03846, 2024. Assumes that trusted images show the teacher's benign knowledge and never its
backdoor. The variant that the authors found best, and T-Core compares with:

1  teacher: the encoder received, fine-tuned by SimCLR on the trusted images, then fixed (eval mode)
2  student: a new encoder of the same architecture, warmed up by SimCLR on the same images
3  distillation: the student (training mode) minimises, with Adam,

       NT-Xent(two views) + attention sum_l MSE(A(F_l of the student), A(F_l of the teacher))

   over the four stages l of the residual network, on the first view; F (N, C, h, w) is a stage's output and
   A(F) = sum over channels of F^2, (N, h w), L2-normalised per image. Encoders without layer1 to layer4, such
   as the transformer and networks from elsewhere, have no such stages: the method is not applicable to them
4  a new head on the student's features of everything received, by the recipe that all defences share; poisons
   in the data set are no concern of this method and stay

Views, projection head and NT-Xent are those of `pretraining/simclr.py`. The preparation of teacher and
student is not in the released code: SimCLR and its epochs are this project's choice. Deviation: the rate
follows SimCLR's schedule (warm-up, cosine to 0; there it is constant). In the released code only the name AT
gives the loss above: the one in its README falls through to a branch that adds a cosine term.

Cost: by default 700 training passes over two views of the trusted images, 500 forward passes of the teacher.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tcore.defenses import _training as training
from tcore.defenses._interface import NotApplicable, Received
from tcore.device import autocast
from tcore.models import head as heads
from tcore.models.classifier import Classifier
from tcore.models.encoder import Encoder, extract_features
from tcore.pretraining import simclr

KIND = "model"
CLEAN = True
NEEDS_NORM = False
ORACLE = ()

STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Settings:
    teacher_epochs: int = 100  # SimCLR passes of the teacher, in [0, inf); 0: as received [open]
    warmup_epochs: int = 100  # SimCLR passes of the student, in [0, inf); 0: from random weights [open]
    epochs: int = 500  # passes of the distillation, in [1, inf) [released code]
    attention: float = 1000.0  # weight of the attention loss, in [0, inf) [released code]
    batch: int = 128  # images a step, two views each, in [2, inf) [released code]
    lr: float = 1e-3  # Adam's rate at its peak, in (0, inf) [released code]
    weight_decay: float = 1e-6  # Adam's L2 penalty, in [0, inf) [released code]
    temperature: float = 0.5  # T of NT-Xent, in (0, inf) [released code]


def attention(maps: Tensor) -> Tensor:
    """A(F): (N, C, h, w) -> (N, h w)."""
    return F.normalize(maps.float().square().sum(1).flatten(1), dim=1)


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The sum of the formula over stages; a scalar."""
    return sum(F.mse_loss(attention(s), attention(t)) for s, t in zip(student, teacher, strict=True))


@contextmanager
def stages(encoder: Encoder) -> Iterator[dict[str, Tensor]]:
    """Inside the block, the outputs of the encoder's stages in its latest forward pass, by name."""
    found: dict[str, Tensor] = {}
    handles = [
        encoder.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: found.update({name: output})
        )
        for name in STAGES
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def new_encoder(like: Encoder, seed: int) -> Encoder:
    """An encoder of the same architecture and normalisation with random weights."""
    with training.stream(torch.device("cpu"), seed, "ssl_distillation", "student"):
        return Encoder(**like.description()).to(like.mean.device)


def distil(
    teacher: Encoder, student: Encoder, images: Tensor, settings: Settings, seed: int
) -> dict[str, list[float]]:
    """Steps 1 to 3 in place on teacher and student; the mean loss of every epoch, by step."""
    log = {}

    def train(name: str, encoder: Encoder, projector, epochs: int, penalty=None) -> None:
        how = simclr.Settings(
            epochs=epochs,
            batch=settings.batch,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            temperature=settings.temperature,
        )
        log[name] = simclr.train(
            f"SSL-Distillation: {name}", encoder, projector, images, how, seed, images.device, penalty=penalty
        )

    def projector(name: str):
        with training.stream(torch.device("cpu"), seed, "ssl_distillation", "projector", name):
            return simclr.new_projector(teacher.dim, simclr.Settings.projection)

    teacher.requires_grad_(True)
    train("teacher", teacher, projector("teacher"), settings.teacher_epochs)
    teacher.requires_grad_(False).eval()
    projection = projector("student")
    train("warm-up", student, projection, settings.warmup_epochs)
    with stages(teacher) as of_teacher, stages(student) as of_student:

        def penalty(views: Tensor) -> Tensor:
            half = len(views) // 2
            with torch.no_grad(), autocast(views.device):
                teacher(views[:half])
            pairs = [(of_student[name][:half], of_teacher[name]) for name in STAGES]
            return settings.attention * attention_loss(*zip(*pairs, strict=True))

        train("distillation", student, projection, settings.epochs, penalty)
    return log


def repair(received: Received, settings: Settings, seed: int) -> tuple[Classifier, dict]:
    """A classifier with the student as its encoder; the log has the losses by step and epoch."""
    teacher = copy.deepcopy(received.model.encoder)
    if not all(hasattr(teacher, name) for name in STAGES):
        raise NotApplicable(
            f"it compares the stages {STAGES[0]} to {STAGES[-1]}, and {teacher.architecture} has none"
        )
    student = new_encoder(teacher, seed)
    log = distil(teacher, student, received.images[received.clean], settings, seed)
    features = extract_features(student, received.images)
    head = heads.new_head(student.dim, received.classes, received.head, seed, "head")
    heads.fit_head(head, features, received.labels, received.head.epochs, seed, "head")
    return Classifier(student, head).eval(), log
