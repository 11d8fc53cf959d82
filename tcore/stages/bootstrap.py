"""Bootstrapping learning: a clean model from the trusted core (paper: 4.3, Alg. 4).

The untrusted channels psi and the head phi start anew and are all that is trained; the
trusted channels stay. Training on a pool P of clean samples and growing P take turns:

    1  `rounds_class` times: add, from each class, the gamma1 of D \\ P with the smallest CE
    2  `rounds_all` times:   add the gamma2 of D \\ P with the smallest CE over all classes
    3  until |P| / n >= rho: train a copy for one epoch on D \\ P and add the gamma3 with the
       smallest d(x) = CE(x; model) - CE(x; copy): what the copy is slow to learn is clean

A pool that is full ends phases 1 and 2 too. Filters, scales and shifts of trusted channels stay; their
batch-norm statistics change unless `frozen_norm`. Phases come from ASD (Gao et al., CVPR 2023). Not in the
paper, hence settings: epochs per round (none before the first), optimiser and rate, whether batch norm uses
stored statistics (`frozen_norm`) or those of the batch, whether the model trains on random crops of the
images (`crop_min`; it is measured, and the copy trained, on whole images), and a last training on the final
pool with the rate decaying to 0. Shares are of the rest D \\ P, the literal reading (`of_rest`).
Filters start as He et al. (2015) do, rows of linear layers as PyTorch's, biases at 0. The batch-norm
entries of untrusted channels are reset (scale 1, shift 0) and trained along, their statistics measured
anew; layer norm, which has no channels of one layer's own, stays as it is.

On small sets a round has few steps, and both models are noise where they decide: poisons that they have
right by chance come first, and one of them in the pool brings the others. Hence stored statistics and
small batches for the copy, whose rest shrinks to a few hundred samples. Not in the paper either: phases 1
and 2, which have only the loss to go by, add samples of B_k alone, what passed sifting's majority rule
(`within_core`); when all of B_k is in, their rounds just train, and phase 3 starts the safer for it. Of
poisons that a weak model takes for the target by chance the copy, which has seen more images, may correct
those whose trigger it has not learnt yet, and their d is smallest: with `steady` phase 3 begins, until
|P| / n reaches it, with the smallest CE + |CE - CE of the copy|, what both have right. That keeps out
some poisons and lets in others, so it is off. The first rounds of phase 3 decide whether poisons join
(docs/lab/larger-encoders.md). Crops can lower what is left of the encoder's trigger. What was of no use (a
warm-up, more passes of the copy, colours and blur, losses on views) is in docs/lab/tried.md.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tcore import seeds
from tcore.data import augment
from tcore.device import autocast, block
from tcore.files import InputError
from tcore.models import head as heads
from tcore.models.channels import layers, norms_behind
from tcore.models.classifier import Classifier, logits
from tcore.models.encoder import floats
from tcore.stages.expand import highest

GUIDANCE = ("meta", "loss")


@dataclass(frozen=True)
class Settings:
    rounds_class: int = 10  # Iter1, rounds of phase 1, in [0, inf) [paper: App. A]
    rounds_all: int = 10  # Iter2, rounds of phase 2, in [0, inf) [paper: App. A]
    gamma1: float = 0.02  # share of each class's rest added per round of phase 1, in [0, 1] [paper: App. A]
    gamma2: float = 0.02  # share of the rest per round of phase 2, in [0, 1] [paper: App. A; tables 0.05]
    gamma3: float = 0.05  # share of the rest added per round of phase 3, in (0, 1] [paper: App. A]
    rho: float = 0.9  # share of D at which the pool is full, in [0, 1] [paper: App. A]
    crop_min: float = 1.0  # smallest training crop, as a share of the image's area, in (0, 1] [open]
    epochs: int = 5  # T, passes over the pool per round of phases 1 and 2, in [1, inf) [open]
    epochs_meta: int = 1  # passes over the pool per round of phase 3, in [1, inf) [open]
    epochs_final: int = 20  # passes over the final pool, rate decaying to 0, in [0, inf) [open]
    lr: float = 1e-3  # Adam's rate, in (0, inf) [open]
    batch: int = 128  # images a step, in [1, inf) [paper: Table 17]
    batch_copy: int = 32  # images a step of phase 3's copy, in [1, inf) [open]
    frozen_norm: bool = False  # batch norm uses its stored statistics in training [open]
    restart_norm: bool = True  # batch-norm entries of untrusted channels start anew and train [open]
    of_rest: bool = True  # gammas are shares of what is outside the pool; false: of D or of its class [open]
    within_core: bool = True  # phases 1 and 2 add only samples of sifting's core [ours]
    steady: float = 0.0  # share of D to which phase 3 adds what model and copy have right, in [0, 1] [ours]
    guidance: str = "meta"  # of phase 3, one of meta, loss: as in phase 2, to see its worth [paper: meta]


def restart(encoder: nn.Module, untrusted: dict[str, Tensor], seed: int, norm_too: bool = True) -> None:
    """Re-initialises the untrusted channels and, if asked, their batch-norm entries, in place."""
    norms = norms_behind(encoder) if norm_too else {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "bootstrap", "filters"))
        for name, layer in layers(encoder).items():
            bad, fresh = untrusted[name], torch.empty(layer.weight.shape)
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(fresh, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.kaiming_uniform_(fresh, a=math.sqrt(5))
            layer.weight[bad] = fresh.to(layer.weight.device)[bad]
            if layer.bias is not None:
                layer.bias[bad] = 0.0
            if name in norms:
                norm = norms[name]
                norm.weight[bad], norm.bias[bad] = 1.0, 0.0
                norm.running_mean[bad], norm.running_var[bad] = 0.0, 1.0


def measure_norms(encoder: nn.Module, images: Tensor, untrusted: dict[str, Tensor], batch: int) -> None:
    """Stored batch-norm statistics of the untrusted channels, from uint8 images, in place."""
    norms = norms_behind(encoder)
    stored = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
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
        norm.momentum = momenta[name]


def trainable(model: Classifier, untrusted: dict[str, Tensor], norm_too: bool = True) -> list[nn.Parameter]:
    """The head and, in the encoder, the untrusted channels, if asked with their batch-norm entries: all
    other gradients are zero."""
    model.requires_grad_(False)
    parameters, norms = list(model.head.parameters()), norms_behind(model.encoder) if norm_too else {}
    for name, layer in layers(model.encoder).items():
        if not untrusted[name].any():
            continue
        bad = untrusted[name].float()
        for p in (*layer.parameters(), *(norms[name].parameters() if name in norms else ())):
            mask = bad.view(-1, *[1] * (p.ndim - 1))
            p.requires_grad_(True)
            p.register_hook(lambda gradient, mask=mask: gradient * mask)
            parameters.append(p)
    for p in model.head.parameters():
        p.requires_grad_(True)
    return parameters


def fit(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    rows: Tensor,
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    order: torch.Generator,
    crops: torch.Generator,
    frozen_norm: bool,
    epochs: int = 1,
    rate: Callable[[float], float] | None = None,
) -> None:
    """Cross-entropy on random crops of the given rows of D, in place; `rate` maps progress in [0, 1] to a
    factor of lr, `order` is of the CPU and `crops` of the images' device."""
    model.train()
    if frozen_norm:
        model.encoder.eval()
    total, step = epochs * math.ceil(len(rows) / settings.batch), 0
    for _ in range(epochs):
        for picked in heads.batches(len(rows), settings.batch, order, labels.device):
            if rate:
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * rate(step / total)
            batch = rows[picked]
            x = floats(images[batch])
            if settings.crop_min < 1:
                x = augment.resized_crop(x, crops, (settings.crop_min, 1.0))
            with autocast(labels.device):
                out = model(x)
            loss = F.cross_entropy(out.float(), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1


def losses(model: Classifier, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """CE of the given rows, eval mode, float32; by blocks, so that no second copy of the images is made."""
    found = torch.cat([logits(model, images[part]) for part in rows.split(block(labels.device))])
    return F.cross_entropy(found, labels[rows], reduction="none")


def best(
    score: Tensor,
    labels: Tensor,
    pool: Tensor,
    candidates: Tensor,
    share: float,
    per_class: bool,
    of_rest: bool = True,
) -> Tensor:
    """Of the candidates (n,) outside the pool those with the smallest score (n,): as many as `share` of all
    rows outside, or of each class's, all candidates at most; where not `of_rest`, that share of D or of the
    class in D."""
    found = []
    for group in [labels == k for k in labels[~pool].unique()] if per_class else [torch.ones_like(pool)]:
        wanted = math.ceil(share * int((group & ~pool if of_rest else group).sum()))
        found.append(highest(-score, group & candidates, min(wanted, int((group & candidates).sum()))))
    return torch.cat(found)


def bootstrap(
    encoder: nn.Module,
    images: Tensor,
    labels: Tensor,
    classes: int,
    subset: Tensor,
    core: Tensor,
    untrusted: dict[str, Tensor],
    settings: Settings,
    head: heads.Settings,
    seed: int,
) -> tuple[Classifier, pd.DataFrame, dict]:
    """The clean classifier, the pool (index, round, phase) and a log; `encoder` is not changed.

    uint8 images (n, 3, H, W) and labels (n,) on the encoder's device; `subset` (n,) bool, and `core` (n,)
    bool, what passed sifting's majority rule.
    In the pool, round 0 is the clean subset and -1 what was left out.
    """
    n, device = len(labels), labels.device
    encoder = copy.deepcopy(encoder).to(memory_format=torch.channels_last)
    if settings.guidance not in GUIDANCE:
        raise InputError(f"bootstrap.guidance = {settings.guidance!r} should be one of {GUIDANCE}")
    for name, right, what in (
        ("crop_min", 0 < settings.crop_min <= 1, "a share of the image, in (0, 1]"),
        ("steady", 0 <= settings.steady <= 1, "a share of the images, in [0, 1]"),
        ("rho", 0 <= settings.rho <= 1, "a share of the images, in [0, 1]"),
    ):
        if not right:
            raise InputError(f"bootstrap.{name} = {getattr(settings, name)} should be {what}")
    restart(encoder, untrusted, seed, settings.restart_norm)
    measure_norms(encoder, images[subset], untrusted, settings.batch)
    fresh_head = heads.new_head(encoder.dim, classes, head, seed, "bootstrap", "head")
    model = Classifier(encoder, fresh_head).to(device)
    optimizer = torch.optim.Adam(trainable(model, untrusted, settings.restart_norm), settings.lr, fused=True)
    order = seeds.generator(seed, "bootstrap", "order")
    crops = seeds.generator(seed, "bootstrap", "views", device=device.type)
    data = (images, labels, settings, order, crops)
    whole = replace(settings, batch=settings.batch_copy, crop_min=1.0)
    for_copy = (images, labels, whole, order, crops)
    gamma = {1: settings.gamma1, 2: settings.gamma2, 3: settings.gamma3}
    pool = subset.clone()
    joined, phases = torch.where(subset, 0, -1), torch.zeros(n, dtype=torch.long, device=device)
    schedule = [1] * settings.rounds_class + [2] * settings.rounds_all
    rounds, log = 0, {"pool": [int(pool.sum())]}

    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        tqdm(total=int(settings.rho * n), initial=log["pool"][0], desc="bootstrap", unit="sample") as bar,
    ):
        torch.manual_seed(seeds.derive(seed, "bootstrap", "dropout"))
        while int(pool.sum()) < settings.rho * n:
            phase = schedule.pop(0) if schedule else 3
            rounds += 1
            epochs = settings.epochs_meta if phase == 3 else settings.epochs
            fit(model, optimizer, pool.nonzero().flatten(), *data, settings.frozen_norm, epochs)
            candidates = ~pool & core if settings.within_core and phase < 3 else ~pool
            rest = candidates.nonzero().flatten()
            score = torch.zeros(n, device=device)
            score[rest] = losses(model, images, labels, rest)
            if phase == 3 and settings.guidance == "meta":
                fast = copy.deepcopy(model)
                own = trainable(fast, untrusted, settings.restart_norm)
                fit(fast, torch.optim.Adam(own, settings.lr, fused=True), rest, *for_copy, frozen_norm=True)
                gain = score[rest] - losses(fast, images, labels, rest)
                steady = int(pool.sum()) < settings.steady * n
                score[rest] = score[rest] + gain.abs() if steady else gain
            add = best(score, labels, pool, candidates, gamma[phase], phase == 1, settings.of_rest)
            pool[add], joined[add], phases[add] = True, rounds, phase
            log["pool"].append(int(pool.sum()))
            bar.update(len(add))
        fit(
            model,
            optimizer,
            pool.nonzero().flatten(),
            *data,
            settings.frozen_norm,
            settings.epochs_final,
            lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
        )
    model.eval()
    table = pd.DataFrame({"index": range(n), "round": joined.cpu().numpy(), "phase": phases.cpu().numpy()})
    return model, table, log
