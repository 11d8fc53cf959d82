"""Figure 4: accuracy and attack success after CLP, for every threshold u and on each part of the model.

CLP prunes channels whose Lipschitz bound exceeds mean + u std of their layer (`tcore/defenses/clp.py`, also
for the extension to the head, which is ours). For u = 0, `step`, ..., `highest` it is applied to the
undefended model's encoder, to its head, or to both, and the pruned model classifies the test images

    acc   as they are, share of right answers
    asr   with the trigger, share taken for what the attack wants of those it aims at (`metrics`)

with Wilson's interval. Only an evaluator can choose u by such curves: ASR needs the trigger. Parts are pruned
by their own bounds, so one pruned model gives all three. An encoder without batch norm has no bounds; of it
there is the head alone.
"""

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from tcore.defenses import clp
from tcore.defenses._interface import in_blocks
from tcore.defenses._training import SCOPES
from tcore.models.encoder import extract_features
from tcore.paper.figures import _drawing as drawing
from tcore.paper.figures._declared import scale
from tcore.paper.figures._victim import Victim
from tcore.stages.bootstrap import norms_behind

CELLS = {"T1": None, "T2": None, "T3": None}
METHODS = ()
TITLE = "Figure 4: CLP by its threshold u, on the encoder, on the head and on both"
CAPTION = (
    "The paper reports that no u keeps the accuracy high and the attack success low, as both fall "
    "together; compare whether there is a u with the solid line high and the dashed one low."
)


@dataclass(frozen=True)
class Settings:
    highest: float = 10.0  # the largest u, in (0, inf); the smallest is 0 [paper]
    step: float = 0.1  # between one u and the next, in (0, inf) [paper]


def measure(victim: Victim, settings: dict) -> pd.DataFrame:
    """Two rows per u and scope: `scope`, `u`, `pruned` (channels), `metric`, `n`, `value`, `low`, `high`."""
    received, own = victim.received, Settings(**settings["figure_4"])
    model = received.model
    views = (victim.test.tensor, victim.stamp(victim.test.tensor))
    scopes = SCOPES if norms_behind(model.encoder) else ("head",)
    plain = features = [extract_features(model.encoder, view) for view in views]
    before, found = {}, []
    for u in tqdm(scale("figure_4", own.step, own.highest), desc="clp", unit="u"):
        pruned, log = clp.repair(received, clp.Settings(u=u, scope="both"), victim.seed)
        gone = {
            part: {layer: c for layer, c in log["pruned"].items() if layer.startswith(part)}
            for part in ("encoder", "head")
        }
        if gone["encoder"] != before:
            features, before = [extract_features(pruned.encoder, view) for view in views], gone["encoder"]
        for scope in scopes:
            parts = ("encoder", "head") if scope == "both" else (scope,)
            head = model.head if scope == "encoder" else pruned.head
            logits = [in_blocks(head, z) for z in (plain if scope == "head" else features)]
            count = sum(len(channels) for part in parts for channels in gone[part].values())
            for metric, (value, low, high, n) in victim.outcome(*logits).items():
                found.append([scope, u, count, metric, n, value, low, high])
    return pd.DataFrame(found, columns=["scope", "u", "pruned", "metric", "n", "value", "low", "high"])


def draw(rows: pd.DataFrame) -> Figure:
    victims = drawing.victims(rows)
    figure, grid = drawing.sheet(TITLE, CAPTION, len(victims), len(SCOPES), height=1.7)
    for line, (name, own) in zip(grid, victims, strict=True):
        for axes, scope in zip(line, SCOPES, strict=True):
            mine = own[own["scope"] == scope]
            if mine.empty:
                axes.set_axis_off()
                continue
            for metric, label, colour, dashes in (
                ("acc", "ACC", drawing.GOOD, "-"),
                ("asr", "ASR", drawing.BAD, "--"),
            ):
                points = drawing.over_seeds(mine[mine["metric"] == metric], "u")
                drawing.curve(axes, points, label, color=colour, linestyle=dashes)
            axes.set(xlim=(0, rows["u"].max()), ylim=(0, 1.02))
            axes.set_title(scope, fontsize=drawing.SMALL, loc="right")
            drawing.percent(axes.yaxis)
        line[0].set_title(name, fontsize=drawing.SMALL, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("u")
    drawing.legend(grid[0, 1])
    return figure
