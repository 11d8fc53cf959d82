"""FT-SAM: fine-tuning on trusted samples by adaptive sharpness-aware minimisation.

Zhu, Wei, Shen, Fan, Wu: Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization,
ICCV 2023. Assumes clean labelled samples (usually 5 % of the data). Backdoor-related weights are large;
a step that scales with |w| moves these the most. With g = grad L(w), element by element,

    e  = rho w^2 g / (|| |w| g ||_2 + 1e-12)      the ascent, one norm over all trained parameters
    w <- SGD(w, grad L(w + e))

and L cross-entropy against labels smoothed to 1 - s, and s / (C - 1) for the other classes.
A trained encoder is in training mode, and only the first pass updates its running statistics; a frozen one
uses its stored ones (cached features). The head is without dropout, so both passes see one network.
Random shifts and mirror images for images, as the released code has for CIFAR-10.

Deviations from the released code: the rate follows one cosine to 0 (there, a schedule of 100 steps is
advanced by batch, so the rate oscillates); its gradient-decomposition weight alpha is 0 by default and left
out. rho = 2 was tuned for whole networks. On a frozen encoder the learning rate decides the loss of accuracy
more than rho (docs/lab/defenses.md).

Cost: two training passes over the trusted samples in each epoch, through the head alone by default.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tcore import seeds
from tcore.defenses import _training as training
from tcore.defenses._interface import Received, Whole
from tcore.models.classifier import Classifier

KIND = "model"
CLEAN = True
NEEDS_NORM = False
ORACLE = ()


@dataclass(frozen=True)
class Settings:
    scope: str = "head"  # what is fine-tuned, one of encoder, head, both [paper: both; T-Core: head]
    rho: float = 2.0  # radius of the ascent, in [0, inf) [BackdoorBench]
    epochs: int = 100  # passes over the trusted samples, in [1, inf) [BackdoorBench]
    lr: float = 0.01  # SGD's rate at its peak, in (0, inf) [BackdoorBench]
    momentum: float = 0.9  # of SGD, in [0, 1) [BackdoorBench]
    weight_decay: float = 5e-4  # of SGD, in [0, inf) [BackdoorBench]
    batch: int = 256  # samples a step, in [1, inf) [BackdoorBench]
    smoothing: float = 0.1  # s, what labels leave to the other classes, in [0, 1) [BackdoorBench]
    shift: float = 0.125  # random shift of images, as a share of their side, in [0, 1] [BackdoorBench]
    flip: bool = True  # whether images are mirrored by chance [BackdoorBench: not for signs]


def smoothed(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """L: cross-entropy against 1 - s for the label and s / (C - 1) for each other class."""
    classes = logits.shape[1]
    return F.cross_entropy(logits, labels, label_smoothing=smoothing * classes / (classes - 1))


def ascent(parameters: Sequence[Tensor], gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """e of the formula, for each parameter."""
    scaled = [p.abs() * g for p, g in zip(parameters, gradients, strict=True)]
    length = torch.stack([s.norm() for s in scaled]).norm() + 1e-12
    return [rho * p.abs() * s / length for p, s in zip(parameters, scaled, strict=True)]


def sharpness_aware_step(loss, parameters: list[nn.Parameter], optimizer, rho: float, norms=()) -> float:
    """One step of the optimiser along the gradient at w + e; the loss at w.

    `loss()` is evaluated at both places, and batch norms in `norms` keep their statistics the second time.
    """
    value = loss()
    with torch.no_grad():
        step = ascent([p.detach() for p in parameters], torch.autograd.grad(value, parameters), rho)
        torch._foreach_add_(parameters, step)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    optimizer.zero_grad(set_to_none=True)
    loss().backward()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    with torch.no_grad():
        torch._foreach_sub_(parameters, step)
    optimizer.step()
    return value.item()


def repair(received: Received, settings: Settings, seed: int) -> tuple[Classifier, dict]:
    """The fine-tuned classifier, and its mean loss over the last pass."""
    model, parameters = training.copied(received, settings.scope, "ft_sam")
    frozen = settings.scope == "head"
    network, inputs = (model.head, received.features) if frozen else (Whole(model), received.images)
    if not frozen:
        model.encoder.train()
    norms = [] if frozen else [m for m in model.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    optimizer = torch.optim.SGD(
        parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    generator = seeds.generator(seed, "ft_sam", "order")
    trusted = (inputs[received.clean], received.labels[received.clean])
    steps = -(-len(trusted[1]) // settings.batch)
    losses = []
    for progress, x, y in tqdm(
        training.passes(*trusted, settings, settings.epochs, generator),
        desc="FT-SAM",
        unit="step",
        total=steps * settings.epochs,
    ):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * 0.5 * (1 + cos(pi * progress))
        losses.append(
            sharpness_aware_step(
                lambda x=x, y=y: smoothed(network(x), y, settings.smoothing),
                parameters,
                optimizer,
                settings.rho,
                norms,
            )
        )
    last = losses[-steps:]
    return model.eval(), {"loss": round(sum(last) / len(last), 4)}
