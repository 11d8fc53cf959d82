"""Seed expansion: from the seed samples to the clean subset, by confusion training (paper: 4.1.2, Alg. 2).

A head is trained on the untrusted data and then confused: it goes on learning the untrusted
data while it learns wrong labels for the trusted samples,

    min over the head   lambda CE(h(X), Y) + (1 - lambda) CE(h(X'), Y*)           (eq. 3)
    (X, Y) of D \\ Dsub,  X' of Dsub with wrong labels Y*

in bfloat16 where the processor has it (`precision`),
so it forgets the clean mapping and keeps the poisons': samples with a large loss under their
own label are clean. Each round adds the `round_share` of D \\ Dsub with the largest loss,
until Dsub holds `subset_share` of D. The encoder is frozen; all runs on cached features.

Not in the paper: only samples of B_k, which passed sifting's majority rule, can join (`within_core`). They
are about a quarter of D with hardly a poison, also where confusion fails because a backdoored encoder puts
poisons at the class's centre, and less varied: narrow worlds take all of D (docs/lab/clean-subset.md).
Where they are fewer than asked, all of them join, without confusion.

Where a trigger hardly shows in the features, confusion forgets poisons as it does clean samples, and the
ranking is chance. Such poisons still look like their true class. So witnesses can be asked: `witnesses`
heads trained on Dsub alone. A sample's place is then the worse of two: by its confused loss (largest first)
and by the CE of the witnesses' mean prediction (smallest first). It is for users who trust the encoder and
not the data: a backdoored encoder deceives witnesses (measured: docs/lab/witnesses.md), and so they are
off, as in the paper.

Not in the paper, hence settings marked [open]: lambda, steps, optimiser, how Y* is drawn, and whether the
loss is ranked over all classes (the paper's algorithm, literally) or within each class. Confusion keeps what
the head knows of the poisons, so the head is first trained until it knows them, by default as long as the
user's own: with less, poisons are what it has wrong, and rank first. Strength weighs two things: where
confusion leaves most trusted samples known, the largest losses are those of images that look like another
class, weak poisons among them; where it leaves next to none, it forgets the poisons too (measured:
docs/lab/confusion.md).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tcore import seeds
from tcore.device import autocast
from tcore.files import InputError
from tcore.models import head as heads

WRONG_LABELS = ("shifted", "random")


@dataclass(frozen=True)
class Settings:
    subset_share: float = 0.1  # q, the clean subset's share of D, in (0, 1] [paper: 4.1.2; 5.2 says 0.2]
    round_share: float = 0.05  # r_expand, share of the rest added per round, in (0, 1] [paper: App. A]
    per_class: bool = True  # rank losses within each class [paper: over all classes]
    trust: float = 0.1  # lambda of eq. 3, weight of the untrusted data, in [0, 1] [open; CT 0.05]
    wrong_label: str = "shifted"  # one of shifted, random: prediction plus rotating offset, any other [open]
    epochs: int | None = None  # head training before confusion, in [0, inf); null: as the user's head [open]
    steps: int = 2000  # confusion steps, in [0, inf); 0: the trained head's loss, no confusion [open]
    lr: float = 3e-3  # SGD's rate in confusion, momentum 0.9, in (0, inf) [open; CT 0.001]
    batch: int = 128  # images of either kind per confusion step, in [1, inf) [open]
    within_core: bool = True  # only samples of sifting's core can join [ours]
    witnesses: int = 0  # heads trained on the clean subset alone that are asked too, in [0, inf) [ours]
    witness_steps: int = 600  # a witness's training, rounded up to whole passes, in [1, inf) [ours]


def confuse(
    head: heads.Head,
    features: Tensor,
    labels: Tensor,
    subset: Tensor,
    settings: Settings,
    generator: torch.Generator,
) -> None:
    """Confusion training of `head` in place; `subset` (n,) bool marks the trusted samples."""
    device = features.device
    inside, outside = subset.nonzero().flatten(), (~subset).nonzero().flatten()
    classes = head.classes
    optimizer = torch.optim.SGD(head.parameters(), settings.lr, momentum=0.9, fused=True)
    head.eval()  # no dropout: the loss that ranks the samples is the one that is trained
    for step in range(settings.steps):
        x = outside[torch.randint(len(outside), (settings.batch,), generator=generator).to(device)]
        t = inside[torch.randint(len(inside), (settings.batch,), generator=generator).to(device)]
        with autocast(device):
            out = head(features[torch.cat([x, t])])
        out = out.float()
        if settings.wrong_label == "shifted":
            wrong = (out[len(x) :].argmax(1) + 1 + step % (classes - 1)) % classes
        else:
            offset = torch.randint(1, classes, (len(t),), generator=generator).to(device)
            wrong = (labels[t] + offset) % classes
        loss = settings.trust * F.cross_entropy(out[: len(x)], labels[x])
        loss = loss + (1 - settings.trust) * F.cross_entropy(out[len(x) :], wrong)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def testify(
    features: Tensor,
    labels: Tensor,
    subset: Tensor,
    classes: int,
    settings: Settings,
    head: heads.Settings,
    seed: int,
    *stream: str | int,
) -> Tensor:
    """CE (n,) of the mean prediction of the witnesses, heads trained on the clean subset alone."""
    mine, epochs = (
        (features[subset], labels[subset]),
        -(-settings.witness_steps // -(-int(subset.sum()) // head.batch)),
    )
    votes = torch.zeros(len(labels), classes, device=features.device)
    for number in range(settings.witnesses):
        names = (*stream, "witness", number)
        witness = heads.new_head(features.shape[1], classes, head, seed, *names)
        heads.fit_head(witness, *mine, epochs, seed, *names, bar=False)
        with torch.no_grad():
            votes += witness(features).softmax(1)
    return F.nll_loss((votes / settings.witnesses).clamp_min(1e-12).log(), labels, reduction="none")


def places(values: Tensor, candidates: Tensor, groups: Tensor) -> Tensor:
    """Each candidate's place (n,) in its group, 0 for the largest value; others have places behind."""
    order = values.masked_fill(~candidates, -torch.inf).argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    sizes = torch.bincount(groups)
    first = (sizes.cumsum(0) - sizes)[groups[order]]
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order), device=order.device) - first
    return found


def highest(values: Tensor, candidates: Tensor, n: int, groups: Tensor | None = None) -> Tensor:
    """Indices of the n candidates (bool) with the largest values; with groups, an even share of each.

    Shares follow the groups' sizes among the candidates, by largest remainder.
    """
    values = values.masked_fill(~candidates, -torch.inf)
    if groups is None:
        return values.topk(n).indices
    sizes = torch.bincount(groups[candidates])
    exact = sizes * (n / sizes.sum())
    quota = exact.floor().long()
    rest = n - int(quota.sum())
    quota[(exact - quota).topk(rest).indices] += 1
    return torch.cat(
        [
            values.masked_fill(groups != k, -torch.inf).topk(q).indices
            for k, q in enumerate(quota.tolist())
            if q
        ]
    )


def confused_head(
    features: Tensor,
    labels: Tensor,
    subset: Tensor,
    classes: int,
    settings: Settings,
    head: heads.Settings,
    seed: int,
    number: int,
) -> heads.Head:
    """The head of round `number`: trained on all but the clean subset, then confused by it."""
    stream = ("expand", number)
    model = heads.new_head(features.shape[1], classes, head, seed, *stream)
    epochs = head.epochs if settings.epochs is None else settings.epochs
    heads.fit_head(model, features[~subset], labels[~subset], epochs, seed, *stream, bar=False)
    confuse(model, features, labels, subset, settings, seeds.generator(seed, *stream, "confusion"))
    return model


def expand(
    features: Tensor,
    labels: Tensor,
    trusted: Tensor,
    core: Tensor,
    classes: int,
    settings: Settings,
    head: heads.Settings,
    seed: int,
) -> tuple[Tensor, dict]:
    """Round (n,) int64 in which each sample joined the clean subset: 0 a seed sample, -1 never; and a log.

    `trusted` and `core` (n,) bool mark the seed samples and B_k, which sifting's majority rule left.
    The log has, for each round, the accuracy that confusion left on the trusted samples.
    """
    if settings.wrong_label not in WRONG_LABELS:
        raise InputError(f"expand.wrong_label = {settings.wrong_label!r} should be one of {WRONG_LABELS}")
    n, allowed = len(labels), trusted | core if settings.within_core else torch.ones_like(trusted)
    target = min(int(settings.subset_share * n), int(allowed.sum()))
    rounds, log = torch.where(trusted, 0, -1), {"trusted_accuracy": []}
    if settings.within_core and target == int(allowed.sum()):
        rounds[allowed & ~trusted] = 1
    with tqdm(total=target, initial=int((rounds >= 0).sum()), desc="expand", unit="sample") as bar:
        while (size := int((rounds >= 0).sum())) < target:
            number = int(rounds.max()) + 1
            subset = rounds >= 0
            model = confused_head(features, labels, subset, classes, settings, head, seed, number)
            with torch.no_grad():
                out = model(features)
                loss = F.cross_entropy(out, labels, reduction="none")
            log["trusted_accuracy"].append(round((out.argmax(1) == labels)[subset].float().mean().item(), 4))
            score = loss
            if settings.witnesses:
                groups = labels if settings.per_class else torch.zeros_like(labels)
                doubt = testify(features, labels, subset, classes, settings, head, seed, "expand", number)
                score = -torch.maximum(
                    *(places(by, allowed & ~subset, groups) for by in (loss, -doubt))
                ).float()
            add = min(max(1, int(settings.round_share * (n - size))), target - size)
            rounds[highest(score, allowed & ~subset, add, labels if settings.per_class else None)] = number
            bar.update(add)
    return rounds, log
