"""ABL: isolates the samples that are learnt first and unlearns them; needs no clean data.

Li, Lyu, Koren, Lyu, Li, Ma: Anti-Backdoor Learning: Training Clean Models on Poisoned Data, NeurIPS 2021.
Assumes that poisons are learnt faster than clean samples and that a small share of them, `isolate`, is
enough to unlearn them. With l the mean cross-entropy of a batch:

1  isolation: train a new network on everything with a loss that is kept at gamma,
       local gradient ascent  sign(l - gamma) l    or    flooding  |l - gamma| + gamma,
   and isolate the `isolate` of all samples with the smallest cross-entropy (eval mode, not augmented)
2  go on training, on the rest, with plain cross-entropy
3  unlearn: ascend the cross-entropy of the isolated samples

What is trained is `received.part`: the head on cached features (frozen encoder), or the network. The
latter starts from the encoder received; the paper starts from random weights. Where poisons are not learnt
first, as with a frozen clean encoder, clean samples are isolated and unlearning costs accuracy for nothing.
On a frozen encoder poisons separate by their loss for a few epochs at most, so what is isolated depends on
the epoch (docs/lab/defenses.md).

Unlearning needs batch norm in training mode: a poison that is learnt well has no gradient, unless the
statistics are those of a batch of poisons. Seen on 2,000 digits with a 6 pixel patch, a network from random
weights, all 40 isolated samples poisons, the released code's rate: in 12 steps attack success fell from 1.00
to 0.10 (accuracy 0.97 to 0.89); with stored statistics no rate changed anything. With the batch's statistics
in the gradient and the stored ones left alone, attack success stayed too (docs/lab/repairs.md). A head alone
has no batch norm, so well-learnt poisons stay learnt.

Deviations from the released code: four passes of unlearning are four (there, five of which the first only
evaluates), without weight decay; gamma is a float (declared int there); no cutout; at least two
samples are isolated, since batch norm cannot train on one.

Cost: `isolation_epochs` + `epochs` training passes over all samples, `unlearn_epochs` over those isolated.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tcore import seeds
from tcore.defenses import _training as training
from tcore.defenses._interface import Received, in_blocks
from tcore.device import autocast
from tcore.files import InputError
from tcore.models.classifier import Classifier

KIND = "model"
CLEAN = False
NEEDS_NORM = False
ORACLE = ()
TRAINS = True

KEPT_BY = ("ascent", "flooding")


@dataclass(frozen=True)
class Settings:
    isolate: float = 0.01  # share of all samples that is isolated, in [0, 1) [paper]
    kept_by: str = "flooding"  # what keeps isolation's loss at gamma, one of ascent, flooding [released code]
    gamma: float = 0.5  # the level of the loss in isolation, in [0, inf) [released code]
    isolation_epochs: int = 10  # passes before isolation, in [1, inf) [released code; paper: 20]
    epochs: int = 60  # passes over the rest, rate / 10 after two thirds, in [1, inf) [released code]
    unlearn_epochs: int = 4  # passes over the isolated samples, in [1, inf) [released code]
    lr: float = 0.1  # SGD's rate, momentum 0.9, in (0, inf) [released code]
    unlearn_lr: float = 5e-4  # SGD's rate in unlearning, in (0, inf) [released code]
    weight_decay: float = 1e-4  # of SGD, in [0, inf) [released code]
    batch: int = 128  # samples a step, in [1, inf) [released code]
    shift: float = 0.125  # random shift in phase 2, as a share of the images' side, in [0, 1] [released code]
    flip: bool = True  # whether images are mirrored by chance in phase 2 [released code]


def kept(loss: Tensor, gamma: float, by: str) -> Tensor:
    """The loss of phase 1, from the mean cross-entropy of a batch."""
    return torch.sign(loss.detach() - gamma) * loss if by == "ascent" else (loss - gamma).abs() + gamma


def easiest(losses: Tensor, share: float) -> Tensor:
    """The `share` of all samples with the smallest losses, (n,) bool; at least two."""
    chosen = torch.zeros(len(losses), dtype=torch.bool, device=losses.device)
    chosen[losses.argsort(stable=True)[: max(2, int(share * len(losses) + 1e-9))]] = True
    return chosen


def isolated(network: nn.Module, received: Received, share: float) -> Tensor:
    """The samples that the network has learnt best, (n,) bool."""
    network.eval()
    logits = in_blocks(network, received.inputs).float()
    return easiest(F.cross_entropy(logits, received.labels, reduction="none"), share)


def repair(received: Received, settings: Settings, seed: int) -> tuple[Classifier, dict]:
    """The trained and unlearnt classifier; the log has the isolated samples' rows and losses by phase."""
    if settings.kept_by not in KEPT_BY:
        raise InputError(f"abl.kept_by = {settings.kept_by!r} should be one of {KEPT_BY}")
    network = received.network(seed, "abl", "head")
    generator = seeds.generator(seed, "abl", "order")
    log = {"loss": {}}

    def train(phase: str, rows: Tensor, settings: Settings, epochs: int, lr, loss) -> None:
        samples = (received.inputs[rows], received.labels[rows])
        optimizer = torch.optim.SGD(
            network.parameters(), settings.lr, momentum=0.9, weight_decay=settings.weight_decay, fused=True
        )
        for progress, x, y in tqdm(
            training.passes(*samples, settings, epochs, generator),
            desc=f"ABL: {phase}",
            unit="step",
            total=epochs * -(-len(samples[1]) // settings.batch),
        ):
            with autocast(received.device):
                out = network(x)
            value = F.cross_entropy(out.float(), y)
            training.descend(optimizer, loss(value), lr(progress))
        if not value.isfinite():
            rate = "unlearn_lr" if phase == "unlearn" else "lr"
            raise InputError(f"abl.{rate} = {getattr(settings, rate)}: the loss diverged; lower it")
        log["loss"][phase] = round(value.item(), 4)

    with training.stream(received.device, seed, "abl", "dropout"):
        everything = torch.ones_like(received.labels, dtype=torch.bool)
        network.train()
        train(
            "isolate",
            everything,
            replace(settings, shift=0.0, flip=False),
            settings.isolation_epochs,
            lambda progress: settings.lr,
            lambda loss: kept(loss, settings.gamma, settings.kept_by),
        )
        bad = isolated(network, received, settings.isolate)
        network.train()  # isolation has left it in eval mode
        train(
            "learn",
            ~bad,
            settings,
            settings.epochs,
            lambda progress: settings.lr * (1 if progress < 2 / 3 else 0.1),
            lambda loss: loss,
        )
        train(
            "unlearn",
            bad,
            replace(settings, shift=0.0, flip=False, weight_decay=0.0),
            settings.unlearn_epochs,
            lambda progress: settings.unlearn_lr,
            lambda loss: -loss,
        )
    log["isolated"] = bad.nonzero().flatten().tolist()
    return training.assembled(received, network).eval(), log
