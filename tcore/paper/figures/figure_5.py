"""Figure 5: does a channel's Lipschitz bound say how it reacts to the trigger?

CLP prunes by the bound L_k (`clp.channel_bounds`) of each convolution's channels with the batch norm behind
it. The reaction is the trigger-activated change of CLP's paper, over the N test images x that the attack
aims at,

    change_k = 1/N sum over x of  || F_k(stamp(x)) - F_k(x) ||_2

with F_k (h, w) the channel's output behind its batch norm (stored statistics), before ReLU and shortcut. In
each layer Pearson's r of bound and change over its channels, with Fisher's 95 % interval. Two kinds of
network:

    T2 with BadNets    a network trained end to end on the poisoned set, from random weights, of the encoder's
                       architecture (`tcore/models/end_to_end.py`): the world that CLP comes from
    T1                 the backdoored encoder as received, which the trigger of its attack is made for

The paper has a DRUPE encoder for the second. It states neither what it takes for the change nor how its
BadNets network was trained. `acc` and `asr` are those of the network measured (with a head, in T1): without
a backdoor there is nothing to correlate. A network without batch norm has no bounds and no rows.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from tcore.defenses import clp
from tcore.evaluation import metrics
from tcore.files import InputError
from tcore.models import end_to_end
from tcore.models.classifier import logits
from tcore.models.encoder import Encoder, floats
from tcore.paper.figures import _drawing as drawing
from tcore.paper.figures._victim import Victim
from tcore.poisoning.triggers import Stamp
from tcore.stages.bootstrap import norms_behind

CELLS = {"T1": None, "T2": ("badnets",)}
METHODS = ()
TITLE = "Figure 5: Lipschitz bounds of channels and how they react to the trigger"
CAPTION = (
    "The paper reports r from +0.35 to +0.93 in a network trained end to end on BadNets and from -0.43 to "
    "-0.33 in a DRUPE encoder; compare the signs. Left all channels, in standard deviations from their "
    "layer's mean; right r of each layer with its interval, a dot a seed."
)
COLUMNS = ["network", "depth", "layer", "channel", "bound", "change", "n", "correlation", "low", "high"]


@dataclass(frozen=True)
class Settings:
    epochs: int = 20  # of training end to end, in [1, inf) [open]
    batch: int = 64  # images a step, in [1, inf) [open]
    lr: float = 0.05  # SGD's rate at its peak, in (0, inf) [open]


def bounds(encoder: Encoder) -> dict[str, Tensor]:
    """L_k (C_out,) of each convolution with a batch norm behind it."""
    with torch.no_grad():
        return {
            name: clp.channel_bounds(
                encoder.get_submodule(name).weight, norm.weight, norm.running_var, norm.eps
            )
            for name, norm in norms_behind(encoder).items()
        }


@torch.no_grad()
def changes(encoder: Encoder, images: Tensor, stamp: Stamp, batch: int = 256) -> dict[str, Tensor]:
    """change_k (C_out,) of the same layers, over uint8 images (N, 3, H, W)."""
    sums: dict[str, Tensor] = {}

    def watch(name: str):
        def add(module, inputs, out: Tensor) -> None:
            clean, triggered = out.float().chunk(2)
            change = (triggered - clean).flatten(2).norm(dim=2).sum(0)
            sums[name] = sums[name] + change if name in sums else change

        return add

    hooks = [norm.register_forward_hook(watch(name)) for name, norm in norms_behind(encoder.eval()).items()]
    try:
        for part in images.split(batch):
            encoder(floats(torch.cat([part, stamp(part)]).to(encoder.mean.device)))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / len(images) for name, total in sums.items()}


def correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Pearson's r and its interval; NaN where there are fewer than four channels or one side is constant."""
    if len(x) < 4 or min(np.ptp(x), np.ptp(y)) == 0:
        return (float("nan"),) * 3
    found = stats.pearsonr(x, y)
    return float(found.statistic), *map(float, found.confidence_interval(metrics.LEVEL))


def measure(victim: Victim, settings: dict) -> pd.DataFrame:
    """A row per channel: COLUMNS, and `acc` and `asr` of the network."""
    own, model, test = Settings(**settings["figure_5"]), victim.received.model, victim.test.tensor
    network = "encoder" if victim.scenario == "T1" else "end to end"
    if network == "end to end":
        model = end_to_end.train(
            victim.train,
            model.encoder.architecture,
            own.epochs,
            own.batch,
            own.lr,
            victim.seed,
            victim.received.device,
        )
    aimed = torch.from_numpy(metrics.goals(victim.test.labels, victim.aim) >= 0)
    reactions, found = changes(model.encoder, test[aimed], victim.stamp), []
    for depth, (layer, bound) in enumerate(bounds(model.encoder).items()):
        x, y = bound.cpu().numpy(), reactions[layer].cpu().numpy()
        r = correlation(x, y)
        found += [
            (network, depth, layer, k, *pair, len(x), *r) for k, pair in enumerate(zip(x, y, strict=True))
        ]
    outcome = victim.outcome(logits(model, test), logits(model, victim.stamp(test)))
    shares = {metric: share.value for metric, share in outcome.items()}
    return pd.DataFrame(found, columns=COLUMNS).assign(**shares)


def standard(values: pd.Series) -> pd.Series:
    return (values - values.mean()) / values.std()


def draw(rows: pd.DataFrame) -> Figure:
    if rows.empty:
        raise InputError("figure 5: no network has batch norm, so there are no bounds; take another encoder")
    victims = drawing.victims(rows)
    figure, grid = drawing.sheet(TITLE, CAPTION, len(victims), 2, width=3.6, height=2.6)
    for (left, right), (name, own) in zip(grid, victims, strict=True):
        by_layer = own.groupby(["seed", "depth"])
        colour = drawing.BAD if own["network"].iloc[0] == "encoder" else drawing.GOOD
        left.scatter(
            by_layer["bound"].transform(standard),
            by_layer["change"].transform(standard),
            s=5,
            c=colour,
            alpha=0.4,
            linewidths=0,
        )
        left.set(xlabel="bound", ylabel="change")
        left.set_title(f"{name}, {own['network'].iloc[0]}", fontsize=drawing.SMALL, loc="left")
        acc, asr = own.groupby("seed")[["acc", "asr"]].first().mean()
        layers = by_layer[["layer", "correlation", "low", "high"]].first().reset_index()
        r = layers["correlation"]
        right.axvline(0, color=drawing.MUTED, linewidth=0.8)
        interval = (r - layers["low"], layers["high"] - r)
        right.errorbar(r, layers["depth"], xerr=interval, fmt="o", ms=4, lw=1, color=colour)
        right.set(xlim=(-1, 1), xlabel="r")
        names = layers.drop_duplicates("depth")
        right.set_yticks(names["depth"], names["layer"], fontsize=6)
        right.invert_yaxis()
        right.set_title(f"ACC {100 * acc:.1f} %, ASR {100 * asr:.1f} %", fontsize=drawing.SMALL, loc="right")
    return figure
