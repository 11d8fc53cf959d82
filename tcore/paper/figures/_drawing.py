"""What the paper's figures have in common on paper: sheets of panels, colours, curves over random seeds."""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tcore.evaluation import results
from tcore.paper.figures._declared import IDENTITY
from tcore.report import charts

# The light colours of workflow/style.css in place of the variables that the report is drawn with.
LIGHT = dict(
    zip(charts.ROLES, ("#1d2430", "#5c6472", "#d5d2ca", "#0067a5", "#b84a00", "#ffffff"), strict=True)
)
INK, MUTED, RULE, GOOD, BAD, PAPER = LIGHT.values()
STYLE = {key: LIGHT.get(value, value) for key, value in charts.STYLE.items()}
SEVERAL = (GOOD, BAD, "#3a8a5f", "#8a5aa8", "#c9a227", "#1d2430", "#6fb7d6", "#c26a8d")
SMALL = charts.SMALL
VICTIM = [column for column in IDENTITY if column != "seed"]


def victims(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each victim, all seeds together, with its name: from where to where, threat and attack."""
    found = []
    for key, own in rows.groupby(VICTIM, sort=False):
        victim = dict(zip(VICTIM, key, strict=True))
        by = "encoder" if victim["dataset_attack"] in ("clean", "adaptive") else "dataset"
        pair, attack = f"{victim['pretrain']} → {victim['downstream']}", victim[f"{by}_attack"]
        found.append((f"{pair}\n{victim['scenario']}, {attack}", own))
    return found


def sheet(
    title: str, caption: str, rows: int, columns: int, width: float = 2.7, height: float = 2.2
) -> tuple[Figure, np.ndarray]:
    """A figure with its title and caption, and its panels (rows, columns), each of this size in inches."""
    across = max(columns * width, 5.4)
    figure = Figure(figsize=(across, rows * height + 1.1), layout="constrained", facecolor=PAPER)
    figure.get_layout_engine().set(wspace=0.06, hspace=0.06)
    title = textwrap.fill(title, int(12 * across))
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, weight="bold")
    caption = textwrap.fill(caption, int(16 * across), break_on_hyphens=False)
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=SMALL, color=MUTED)
    return figure, figure.subplots(rows, columns, squeeze=False)


def panels(title: str, caption: str, count: int, **size: float) -> tuple[Figure, list[Axes]]:
    """`count` panels, up to four side by side."""
    columns = min(count, 4)
    figure, grid = sheet(title, caption, -(-count // columns), columns, **size)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, list(grid.flat[:count])


def over_seeds(rows: pd.DataFrame, by: str, largest: float = 1.0) -> pd.DataFrame:
    """`value`, `low` and `high` over random seeds (`results.over_seeds`) for each `by`, in rising order."""
    found = {key: results.over_seeds(own, largest) for key, own in rows.groupby(by)}
    return pd.DataFrame.from_dict(found, orient="index", columns=["value", "low", "high"]).rename_axis(by)


def curve(axes: Axes, points: pd.DataFrame, label: str, band: bool = True, **style) -> None:
    """A line through `over_seeds`, with its interval as a band."""
    (line,) = axes.plot(points.index, points["value"], label=label, linewidth=1.5, **style)
    if band:
        ends = (points["low"], points["high"])
        axes.fill_between(points.index, *ends, color=line.get_color(), alpha=0.15, linewidth=0)


def legend(axes: Axes, **style) -> None:
    """What is what; in one panel for all where it is the same in all."""
    axes.legend(**{"framealpha": 0.8, "edgecolor": "none", "fontsize": SMALL} | style)


def percent(axis) -> None:
    axis.set_major_formatter(PercentFormatter(1, symbol=" %", decimals=0))
