"""Confusion Training (Qi et al., USENIX Security 2023): wrong labels undo all but a trigger's shortcut.

Rounds r = 0..R shrink a set S_r from all of D. In each, a network of its own
  a) trains on S_r (the last round: with the clean samples D_c), from the last round's weights of (a);
  b) is confused: `steps` steps of  ((lambda - 1) CE(f(x'), y') + weighted CE(f(x), y)) / lambda,  x of S_r in
     every `every`-th step, x' of D_c; y' is the suspect model's prediction for x' plus a rotating
     offset, never 0; weights 1 / sqrt(class share + .001), all 1 in the last round;
  c) gives S_r+1: the share q_r of D with the smallest loss, and of each class at least
     1/50 (last: 1/100).
Suspects are the samples whose label the last network still predicts. Of a class, with A the suspects and O
the others in the plane of their penultimate activations' first two singular directions,

    ratio = exp(mean over the class of log N(own part) - log N(O))      1 where a part has fewer than 2

and the suspects are flagged where ratio > 2, or where it is the largest of all classes and above 1.5.
    margin = logit of the label - largest other           > 0 just for suspects
    score = margin in a flagged class, else log sigmoid(margin), which is below 0        flag: score > 0

It needs clean samples (2,000 in the paper) and a suspect model. The network is a head on cached
features (`part` of what is received), as T-Core tailors it, and D is not augmented, as released.
Deviations: .001 is added to covariances' diagonals only, not to every entry; batches have `batch` samples
also where the head is cheap; classes of any size pass. Choosing among seeds by the truth, as in one
toolbox, is not done.

Cost: by default about 161 training passes over D, 40 over D_c, and 28,000 steps of 32 or 64 samples.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from tcore import seeds
from tcore.defenses._interface import Received, in_blocks
from tcore.models.head import batches

KIND = "detector"
CLEAN = True
NEEDS_NORM = False
ORACLE = ()
TRAINS = True


@dataclass(frozen=True)
class Settings:
    ratios: tuple[float, ...] = (0.5, 0.2, 0.04, 0.02, 0.01)  # q, share of D left by rounds, in (0, 1] [code]
    epochs: tuple[int, ...] = (100, 100, 40, 40, 40, 40)  # training passes, by round, in [0, inf) [code]
    steps: tuple[int, ...] = (6000, 6000, 6000, 6000, 2000, 2000)  # in confusion by round, in [0, inf) [code]
    weights: tuple[float, ...] = (20.0, 20.0, 20.0, 30.0, 30.0, 15.0)  # lambda, by round, in [1, inf) [code]
    confusion_lr: tuple[float, ...] = (1e-3, 1e-3, 1e-3, 1e-2, 1e-2, 1e-2)  # each round's, in (0, inf) [code]
    confusion_momentum: float = 0.7  # SGD's momentum in confusion, in [0, 1) [code]
    every: int = 2  # a batch of S_r joins every so many confusion steps, in [1, inf) [code]
    lr: float = 1e-2  # SGD's rate in training, momentum 0.9, weight decay 1e-4, in (0, inf) [code]
    batch: int = 32  # samples of either kind a step, in [1, inf) [code]
    ratio_sure: float = 2.0  # likelihood ratio from which a class is flagged, in [0, inf) [code]
    ratio_top: float = 1.5  # ... for the class with the largest ratio, in [0, inf) [code]


def wrong_labels(predictions: Tensor, shift: int, classes: int) -> Tensor:
    """Labels other than the predictions; `shift` is any int and rotates among the others."""
    return (predictions + 1 + shift % (classes - 1)) % classes


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, settings: Settings, g) -> None:
    """(a), in place."""
    inputs, labels = data
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9, weight_decay=1e-4, fused=True)
    for _ in range(epochs):
        for rows in batches(len(labels), settings.batch, g, labels.device):
            loss = F.cross_entropy(model(inputs[rows]), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


def confuse(
    model: nn.Module,
    kept: tuple[Tensor, Tensor],
    clean: tuple[Tensor, Tensor],
    class_weights: Tensor,
    r: int,
    settings: Settings,
    g: torch.Generator,
) -> None:
    """(b), in place; `kept` are inputs and labels of S_r, `clean` inputs and predictions of D_c."""
    (inputs, labels), (clean_inputs, predictions) = kept, clean
    weight, classes, device = settings.weights[r], len(class_weights), labels.device
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), settings.confusion_lr[r], momentum=settings.confusion_momentum, fused=True
    )

    def draw(n: int) -> Tensor:
        return torch.randint(n, (min(settings.batch, n),), generator=g).to(device)

    for step in range(settings.steps[r]):
        c = draw(len(predictions))
        wrong = wrong_labels(predictions[c], step, classes)
        if step % settings.every == 0:
            x = draw(len(labels))
            out = model(torch.cat([clean_inputs[c], inputs[x]]))
            own = F.cross_entropy(out[len(c) :], labels[x], class_weights)
            loss = ((weight - 1) * F.cross_entropy(out[: len(c)], wrong) + own) / weight
        else:
            loss = F.cross_entropy(model(clean_inputs[c]), wrong)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def distil(loss: Tensor, labels: Tensor, share: float, least: float) -> Tensor:
    """(c): (n,) bool, the `share` of all with the smallest loss and at least `least` of each class."""
    order = loss.argsort(stable=True)
    kept = torch.zeros_like(labels, dtype=torch.bool)
    kept[order[: max(1, int(share * len(loss)))]] = True
    for k in labels.unique():
        own = order[labels[order] == k]
        kept[own[: math.ceil(least * len(own))]] = True
    return kept


def log_normal(points: Tensor, part: Tensor) -> Tensor:
    """Log density (n,) of points (n, 2) under the Gaussian of `part`, .001 on its covariance's diagonal."""
    mean, centred = part.mean(0), part - part.mean(0)
    covariance = centred.T @ centred / (len(part) - 1) + 1e-3 * torch.eye(2).to(part)
    return torch.distributions.MultivariateNormal(mean, covariance).log_prob(points)


def likelihood_ratio(activations: Tensor, suspect: Tensor) -> float:
    """How much likelier two Gaussians make a class's activations (n, d) than the others' alone."""
    if min(int(suspect.sum()), int((~suspect).sum())) < 2:
        return 1.0
    activations = activations.double()
    centred = activations - activations.mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:]
    points = activations @ directions
    others = log_normal(points, points[~suspect])
    own = torch.where(suspect, log_normal(points, points[suspect]), others)
    return math.exp(min((own - others).mean().item(), 50.0))


def last_network(received: Received, settings: Settings, seed: int) -> nn.Module:
    """The network after the last confusion, in eval mode."""
    labels, inputs, trusted = received.labels, received.inputs, received.clean
    with torch.no_grad():
        predictions = received.model.eval().head(received.features[trusted]).argmax(1)
    clean = (inputs[trusted], predictions)
    rounds = len(settings.ratios)
    base = received.network(seed, "ct")
    kept = torch.ones_like(trusted)
    g = seeds.generator(seed, "ct", "order")
    with torch.random.fork_rng(devices=[labels.device] if labels.device.type == "cuda" else []):
        torch.manual_seed(seeds.derive(seed, "ct", "dropout"))
        for r in trange(rounds + 1, desc="ct", unit="round"):
            final = r == rounds
            rows = kept | trusted if final else kept
            train(base, (inputs[rows], labels[rows]), settings.epochs[r], settings, g)
            model = received.network(seed, "ct")
            model.load_state_dict(base.state_dict())
            share = torch.bincount(labels[kept], minlength=received.classes) / kept.sum()
            weights = torch.ones_like(share) if final else (share + 1e-3).rsqrt()
            confuse(model, (inputs[kept], labels[kept]), clean, weights, r, settings, g)
            model.eval()
            if not final:
                loss = F.cross_entropy(in_blocks(model, inputs), labels, reduction="none")
                least = 0.01 if r == rounds - 1 else 0.02
                kept = distil(loss, labels, settings.ratios[r], least)
    return model


def score(received: Received, settings: Settings, seed: int) -> Tensor:
    model, labels = last_network(received, settings, seed), received.labels
    out = in_blocks(model, received.inputs)
    activations = in_blocks(lambda x: model.activations(x)[1], received.inputs)
    own = out.gather(1, labels[:, None])
    margin = (own - out.scatter(1, labels[:, None], -torch.inf).max(1, keepdim=True).values)[:, 0]
    classes = labels.unique()
    ratios = torch.tensor(
        [likelihood_ratio(activations[labels == k], margin[labels == k] > 0) for k in classes]
    )
    bad = (ratios > settings.ratio_sure) | ((ratios == ratios.max()) & (ratios > settings.ratio_top))
    flagged = torch.isin(labels, classes[bad.to(classes.device)])
    return torch.where(flagged, margin, F.logsigmoid(margin).clamp(max=-1e-6))


def flag(score: Tensor, received: Received, settings: Settings) -> Tensor:
    return score > 0
