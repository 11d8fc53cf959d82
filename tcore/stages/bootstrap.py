"""Bootstrapping learning: a clean model from the trusted core (paper: 4.3, Alg. 4).

The untrusted filters psi and the head phi start anew and are all that is trained; the
trusted channels stay. Training on a pool P of clean samples and growing P take turns:

    1  `rounds_class` times: add, from each class, the gamma1 of D \\ P with the smallest CE
    2  `rounds_all` times:   add the gamma2 of D \\ P with the smallest CE over all classes
    3  until |P| / n >= rho: train a copy for one epoch on D \\ P and add the gamma3 with the
       smallest d(x) = CE(x; model) - CE(x; copy): what the copy is slow to learn is clean

Phases come from ASD (Gao et al., CVPR 2023). Not in the paper, hence settings: epochs per
round, optimiser and rate, whether batch norm uses stored statistics (`frozen_norm`) or those
of the batch, and a last training on the final pool with the rate decaying to 0. Shares are of
the rest D \\ P, the literal reading. The batch-norm entries of untrusted channels are reset
(scale 1, shift 0) and trained along; with stored statistics these are measured anew on P.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tcore import seeds
from tcore.device import autocast
from tcore.models import head as heads
from tcore.models.classifier import Classifier, logits
from tcore.models.encoder import floats
from tcore.stages.expand import highest


@dataclass(frozen=True)
class Settings:
    rounds_class: int = 10  # Iter1, rounds of phase 1 [paper: App. A]
    rounds_all: int = 10  # Iter2, rounds of phase 2 [paper: App. A]
    gamma1: float = 0.02  # share of each class's rest added per round of phase 1 [paper: App. A]
    gamma2: float = 0.05  # share of the rest added per round of phase 2 [paper: its tables; App. A says 0.02]
    gamma3: float = 0.05  # share of the rest added per round of phase 3 [paper: App. A]
    rho: float = 0.9  # share of D at which the pool is full [paper: App. A]
    epochs: int = 5  # T, passes over the pool per round of phases 1 and 2 [not in the paper]
    epochs_meta: int = 1  # passes over the pool per round of phase 3 [not in the paper]
    epochs_final: int = 20  # passes over the final pool, rate decaying to 0 [not in the paper]
    lr: float = 1e-3  # Adam's rate [not in the paper]
    batch: int = 128  # [paper: Table 17]
    frozen_norm: bool = False  # batch norm uses its stored statistics in training [not in the paper]


def norms_behind(encoder: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The batch norm behind each convolution, by the convolution's name."""
    found, last = {}, None
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            last = name
        elif isinstance(module, nn.BatchNorm2d):
            found[last] = module
    return found


def restart(encoder: nn.Module, untrusted: dict[str, Tensor], seed: int) -> None:
    """Re-initialises the untrusted filters and their batch-norm entries, in place."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "bootstrap", "filters"))
        for name, norm in norms_behind(encoder).items():
            weight, bad = encoder.get_submodule(name).weight, untrusted[name]
            fresh = torch.empty(weight.shape)
            nn.init.kaiming_normal_(fresh, mode="fan_out", nonlinearity="relu")
            weight[bad] = fresh.to(weight.device)[bad]
            norm.weight[bad], norm.bias[bad] = 1.0, 0.0
            norm.running_mean[bad], norm.running_var[bad] = 0.0, 1.0


def measure_norms(encoder: nn.Module, images: Tensor, untrusted: dict[str, Tensor], batch: int) -> None:
    """Stored batch-norm statistics of the untrusted channels, from uint8 images, in place."""
    norms = norms_behind(encoder)
    stored = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    encoder.train()
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
    with torch.no_grad():
        for part in images.split(batch):
            if len(part) > 1:
                encoder(floats(part))
    for name, norm in norms.items():
        good = ~untrusted[name]
        norm.running_mean[good], norm.running_var[good] = (s[good] for s in stored[name])
        norm.momentum = 0.1


def trainable(model: Classifier, untrusted: dict[str, Tensor]) -> list[nn.Parameter]:
    """The head and, in the encoder, the untrusted channels: all other gradients are zero."""
    model.requires_grad_(False)
    parameters = list(model.head.parameters())
    for name, norm in norms_behind(model.encoder).items():
        bad = untrusted[name].float()
        convolution = model.encoder.get_submodule(name)
        for p, mask in ((convolution.weight, bad.view(-1, 1, 1, 1)), (norm.weight, bad), (norm.bias, bad)):
            p.requires_grad_(True)
            p.register_hook(lambda gradient, mask=mask: gradient * mask)
            parameters.append(p)
    for p in model.head.parameters():
        p.requires_grad_(True)
    return parameters


def fit(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    rows: Tensor,
    settings: Settings,
    generator: torch.Generator,
    rate: Callable[[float], float] | None = None,
    epochs: int = 1,
) -> None:
    """Cross-entropy on the given rows of D, in place; `rate` maps progress in [0, 1] to a factor of lr."""
    model.train()
    if settings.frozen_norm:
        model.encoder.eval()
    device, steps = labels.device, 0
    total = epochs * math.ceil(len(rows) / settings.batch)
    for _ in range(epochs):
        for picked in heads.batches(len(rows), settings.batch, generator, device):
            if rate:
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * rate(steps / total)
            batch = rows[picked]
            with autocast(device):
                out = model(floats(images[batch]))
            loss = F.cross_entropy(out.float(), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            steps += 1


def losses(model: Classifier, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """CE of the given rows, eval mode, float32."""
    return F.cross_entropy(logits(model, images[rows]), labels[rows], reduction="none")


def bootstrap(
    encoder: nn.Module,
    images: Tensor,
    labels: Tensor,
    classes: int,
    subset: Tensor,
    untrusted: dict[str, Tensor],
    settings: Settings,
    head: heads.Settings,
    seed: int,
) -> tuple[Classifier, pd.DataFrame, dict]:
    """The clean classifier, the pool (index, round, phase) and a log; `encoder` is not changed.

    uint8 images (n, 3, H, W) and labels (n,) on the encoder's device; `subset` (n,) bool.
    In the pool, round 0 is the clean subset and -1 what was left out.
    """
    n, device = len(labels), labels.device
    encoder = copy.deepcopy(encoder).to(memory_format=torch.channels_last)
    restart(encoder, untrusted, seed)
    measure_norms(encoder, images[subset], untrusted, settings.batch)
    model = Classifier(encoder, heads.new_head(encoder.dim, classes, head, seed, "bootstrap", "head")).to(
        device
    )
    optimizer = torch.optim.Adam(trainable(model, untrusted), settings.lr)
    generator = seeds.generator(seed, "bootstrap", "order")
    pool = subset.clone()
    joined, phases = torch.where(subset, 0, -1), torch.zeros(n, dtype=torch.long, device=device)
    devices = [device] if device.type == "cuda" else []
    log: dict = {"pool": []}

    with (
        torch.random.fork_rng(devices=devices),
        tqdm(total=int(settings.rho * n), desc="bootstrap", unit="sample") as bar,
    ):
        torch.manual_seed(seeds.derive(seed, "bootstrap", "dropout"))
        bar.update(int(pool.sum()))
        number = 0
        while True:
            number += 1
            phase = (
                1 + (number > settings.rounds_class) + (number > settings.rounds_class + settings.rounds_all)
            )
            size = int(pool.sum())
            if phase == 3 and size >= settings.rho * n:
                break
            epochs = settings.epochs_meta if phase == 3 else settings.epochs
            fit(
                model, optimizer, images, labels, pool.nonzero().flatten(), settings, generator, epochs=epochs
            )
            rest = (~pool).nonzero().flatten()
            score = losses(model, images, labels, rest)
            if phase == 3:
                fast = copy.deepcopy(model)
                fresh = torch.optim.Adam(trainable(fast, untrusted), settings.lr)
                fit(fast, fresh, images, labels, rest, settings, generator)
                score = score - losses(fast, images, labels, rest)
            share = (settings.gamma1, settings.gamma2, settings.gamma3)[phase - 1]
            everywhere = torch.full((n,), -torch.inf, device=device)
            everywhere[rest] = -score
            if phase == 1:
                picked = []
                for k in range(classes):
                    candidates = ~pool & (labels == k)
                    if count := int(candidates.sum()):
                        picked.append(highest(everywhere, candidates, math.ceil(share * count)))
                add = torch.cat(picked)
            else:
                add = highest(everywhere, ~pool, math.ceil(share * len(rest)))
            pool[add], joined[add], phases[add] = True, number, phase
            log["pool"].append(int(pool.sum()))
            bar.update(len(add))
        rows = pool.nonzero().flatten()
        decay = lambda progress: 0.5 * (1 + math.cos(math.pi * progress))  # noqa: E731
        fit(model, optimizer, images, labels, rows, settings, generator, decay, settings.epochs_final)
    model.eval()
    table = pd.DataFrame({"index": range(n), "round": joined.cpu().numpy(), "phase": phases.cpu().numpy()})
    return model, table, log
