"""I-BAU: adversarial unlearning of the worst universal perturbation, by implicit hypergradients.

Zeng, Chen, Park, Mao, Jin, Jia: Adversarial Unlearning of Backdoors via Implicit Hypergradient, ICLR 2022.
Assumes clean labelled samples. Solves  min over theta  max over delta  CE(f_theta(x + delta), y)  with one
perturbation delta (3, H, W), in units of pixels in [0, 1], for all images. Each round:

(i)  delta from 0: a pass of SGD over the clean batches on  -CE(f(x + delta), argmax f(x)) + c |delta|^2
(ii) for each clean batch, an Adam step on theta along the hypergradient of the outer loss G = CE of the batch
     with delta on a share of its images. With H the inner loss on the first batch and its true labels, and
     Phi(delta, theta) = delta - a dH/d delta,

         v <- (dPhi/d delta)^T v + dG/d delta,  K times from v = 0
         hypergradient = dG/d theta + (dPhi/d theta)^T v

The model is in eval mode throughout, and x + delta is not clipped, so that gradients exist everywhere. When
theta is the head, delta still goes through the whole classifier. As in the released code, only the penalty
bounds delta (the paper's norm ball is commented out there). With the released rate it grows to a norm of
hundreds in the first round (docs/lab/repairs.md). Deviations: batches are drawn once, by the random seed; at
least one image of a batch carries delta (the code rounds down).

Cost: a round has 2 forward and 2 training passes over all batches, and for each batch K + 2 over the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from tcore import seeds
from tcore.defenses import _training as training
from tcore.defenses._interface import Received
from tcore.models.classifier import Classifier
from tcore.models.encoder import floats

KIND = "model"
CLEAN = True
NEEDS_NORM = False
ORACLE = ()


@dataclass(frozen=True)
class Settings:
    scope: str = "head"  # theta, one of encoder, head, both [paper: both; T-Core: head]
    rounds: int = 5  # alternations of (i) and (ii), in [1, inf) [released code]
    lr: float = 1e-3  # Adam's rate for theta, in (0, inf) [released code]
    batch: int = 100  # images a step, in [1, inf) [released code]
    inner_lr: float = 10.0  # SGD's rate for delta, in (0, inf) [released code]
    penalty: float = 0.001  # c, weight of |delta|^2, in [0, inf) [released code]
    fixed_point_lr: float = 0.1  # a of the fixed-point map, in (0, inf) [released code]
    fixed_point_steps: int = 5  # K, terms of the hypergradient's series, in [0, inf) [released code]
    portion: float = 0.01  # share of a batch that carries delta in the outer loss, in (0, 1] [released code]


def hypergradient(
    inner: Callable[[Tensor], Tensor],
    outer: Callable[[Tensor], Tensor],
    delta: Tensor,
    parameters: Sequence[Tensor],
    lr: float,
    steps: int,
) -> list[Tensor]:
    """Gradient of outer(delta*(theta)) in theta by `steps` terms of the series at delta, for each parameter.

    `inner` and `outer` map delta to a scalar and depend on `parameters`; exact in the limit of many
    steps where delta minimises `inner` and the map delta - lr d inner/d delta contracts.
    """
    delta = delta.detach().requires_grad_(True)
    slope = torch.autograd.grad(inner(delta), delta, create_graph=True)[0]
    phi = delta - lr * slope
    source, *direct = torch.autograd.grad(outer(delta), [delta, *parameters], materialize_grads=True)
    v = torch.zeros_like(delta)
    for _ in range(steps):
        v = torch.autograd.grad(phi, delta, v, retain_graph=True)[0] + source
    indirect = torch.autograd.grad(phi, parameters, v, materialize_grads=True)
    return [d + i for d, i in zip(direct, indirect, strict=True)]


def repair(received: Received, settings: Settings, seed: int) -> tuple[Classifier, dict]:
    """The repaired classifier; the log has |delta| and the error under delta of every round."""
    model, parameters = training.copied(received, settings.scope, "i_bau")
    rows = received.clean.nonzero().flatten()
    order = torch.randperm(len(rows), generator=seeds.generator(seed, "i_bau", "order"))
    batches = [
        (floats(received.images[part]), received.labels[part])
        for part in rows[order.to(rows.device)].split(settings.batch)
    ]
    portions = seeds.generator(seed, "i_bau", "portion")
    optimizer = torch.optim.Adam(parameters, settings.lr)

    def inner(delta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return -F.cross_entropy(model(images + delta), labels) + settings.penalty * delta.square().sum()

    log = {"norm": [], "error": []}
    for _ in trange(settings.rounds, desc="I-BAU", unit="round"):
        delta = torch.zeros_like(batches[0][0][0], requires_grad=True)
        for images, _ in batches:
            with torch.no_grad():
                predicted = model(images).argmax(1)
            slope = torch.autograd.grad(inner(delta, images, predicted), delta)[0]
            delta = (delta.detach() - settings.inner_lr * slope).requires_grad_(True)
        with torch.no_grad():
            changed = [(model(x + delta).argmax(1) != y).float().mean() for x, y in batches]
        log["norm"].append(round(delta.norm().item(), 4))
        log["error"].append(round(torch.stack(changed).mean().item(), 4))
        for images, labels in batches:
            carriers = torch.zeros(len(images), 1, 1, 1)
            number = max(1, int(settings.portion * len(images)))
            carriers[torch.randperm(len(images), generator=portions)[:number]] = 1.0
            carriers = carriers.to(received.device)
            gradients = hypergradient(
                lambda d: inner(d, *batches[0]),
                lambda d, x=images, y=labels, c=carriers: F.cross_entropy(model(x + c * d), y),
                delta,
                parameters,
                settings.fixed_point_lr,
                settings.fixed_point_steps,
            )
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
    return model, log
