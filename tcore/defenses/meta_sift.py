"""META-SIFT (Zeng et al., USENIX Security 2023): weights for samples such that what is rejected becomes hard.

`sifters` times: a network theta trains on D for `warmup` epochs; then, with V an MLP (loss -> weight in
(0, 1)) and norm(a) = a / sum a, for each batch with losses l(theta)

    theta' = theta - meta_step grad of sum_i w_i l_i(theta),         w = norm(V(l(theta)))
    V descends  -sum_i w'_i l_i(theta'),                             w' = norm(1 - V(l(theta')))
    theta descends  sum_i norm(V(l(theta)))_i l_i(theta)             with the new V, AdamW

    score = -mean over the sifters of V(l(x))
    flag: all but the `keep` share of each class with the lowest score

It sifts, it does not clean: its rule keeps few samples (1,000 of 50,000 in the paper), so a model trained on
them is not what it is for. It needs nothing: no clean data, no rate. V sees losses without their gradient.
Deviations: theta is a head on cached features (`part` of what is received), so all of it is
differentiated through, and the paper's gates, which choose layers for that to save memory, are not
needed (as released, their cost is never part of a loss); no random crops and rotations at scoring, because
features are cached; theta' is a plain gradient step, where the release puts AdamW's state and with it AdamW's
rate into the step. Its rates suit a ResNet and hundreds of steps: `lr` and `epochs` are settings.

Poisons that are learnt first look clean to it. On wrong labels, the problem of its paper, it works
(docs/lab/detectors.md).

Cost: for every sifter one training pass for each epoch of warm-up, about five for each epoch after.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import trange

from tcore import seeds
from tcore.defenses import _selection as selection
from tcore.defenses._interface import Received, in_blocks
from tcore.models.head import batches

KIND = "detector"
CLEAN = False
NEEDS_NORM = False
ORACLE = ()
TRAINS = True


@dataclass(frozen=True)
class Settings:
    sifters: int = 5  # networks that vote, in [1, inf) [paper]
    warmup_epochs: int = 1  # plain training first, in [0, inf) [paper]
    epochs: int = 1  # passes of the two levels, in [1, inf) [paper]
    batch: int = 128  # samples a step, in [1, inf) [code]
    lr: float = 1e-4  # AdamW's rate, 2.5e-5 per 32 samples, in (0, inf) [code]
    meta_step: float = 0.1  # the step to theta', in [0, inf) [code]
    v_lr: float = 5e-4  # SGD's rate of V, in (0, inf) [code]
    keep: float = 0.02  # share of each class called clean, in (0, 1] [paper: 1,000 of 50,000]


def norm(a: Tensor) -> Tensor:
    """a over its sum, or a itself where that is below 1e-4."""
    return a / a.sum() if a.sum() >= 1e-4 else a


def weigher() -> nn.Sequential:
    """V: losses (N, 1) -> weights (N, 1)."""
    return nn.Sequential(
        nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 150), nn.ReLU(), nn.Linear(150, 1), nn.Sigmoid()
    )


def weights(v: nn.Module, losses: Tensor) -> Tensor:
    return v(losses.detach()[:, None])[:, 0]


def meta_loss(model: nn.Module, v: nn.Module, inputs: Tensor, labels: Tensor, step: float) -> Tensor:
    """What V descends, with its graph through theta'."""
    parameters = dict(model.named_parameters())
    losses = F.cross_entropy(model(inputs), labels, reduction="none")
    first = (norm(weights(v, losses)) * losses).sum()
    gradients = torch.autograd.grad(first, list(parameters.values()), create_graph=True)
    ahead = {name: p - step * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
    later = F.cross_entropy(functional_call(model, ahead, (inputs,)), labels, reduction="none")
    return -(norm(1 - weights(v, later)) * later).sum()


def sift(received: Received, settings: Settings, seed: int, number: int) -> Tensor:
    """V(l(x)) (n,) of one sifter."""
    inputs, labels, device = received.inputs, received.labels, received.device
    model = received.network(seed, "meta_sift", str(number))
    g = seeds.generator(seed, "meta_sift", number, "order")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeds.derive(seed, "meta_sift", number))
        v = weigher().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), settings.lr, betas=(0.9, 0.95), weight_decay=0.05)
        v_optimizer = torch.optim.SGD(v.parameters(), settings.v_lr)
        model.train()
        for epoch in range(settings.warmup_epochs + settings.epochs):
            for rows in batches(len(labels), settings.batch, g, device):
                x, y = inputs[rows], labels[rows]
                if epoch >= settings.warmup_epochs:
                    loss = meta_loss(model, v, x, y, settings.meta_step)
                    v_optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    v_optimizer.step()
                losses = F.cross_entropy(model(x), y, reduction="none")
                if epoch >= settings.warmup_epochs:
                    loss = (norm(weights(v, losses)).detach() * losses).sum()
                else:
                    loss = losses.mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
    losses = F.cross_entropy(in_blocks(model.eval(), inputs), labels, reduction="none")
    with torch.no_grad():
        return weights(v, losses)


def score(received: Received, settings: Settings, seed: int) -> Tensor:
    numbers = trange(settings.sifters, desc="meta_sift", unit="sifter")
    return -torch.stack([sift(received, settings, seed, number) for number in numbers]).mean(0)


def flag(score: Tensor, received: Received, settings: Settings) -> Tensor:
    return ~selection.cleanest(score, received.labels, settings.keep)
