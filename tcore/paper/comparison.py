"""A table of the paper as a picture: published hollow, reproduced filled, a row for each cell."""

import pandas as pd
from matplotlib.figure import Figure

from tcore.paper import tables

LIMIT = 60  # rows in one picture; of a longer table the first


def draw(table: int, compared: pd.DataFrame) -> Figure:
    """Of `compared` (`tables.compare`) what is there, in the published unit, a panel for each metric.

    Rows are named by what differs between cells; a line through a dot is its interval.
    """
    there = compared[compared["n"] > 0]
    varying = [key for key in tables.KEYS if there[key].nunique() > 1] or ["defense"]
    there = there.assign(name=there[varying].agg(", ".join, axis=1))
    rows = list(dict.fromkeys(there["name"]))[:LIMIT]
    there = there[there["name"].isin(rows)]
    metrics = list(dict.fromkeys(there["metric"])) or ["no cell is there"]
    figure = Figure((2.4 + 2.6 * len(metrics), 1.1 + 0.26 * len(rows)), layout="constrained")
    figure.suptitle(f"Table {table}: {tables.TITLES[table]}", fontsize=9)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        own = there[there["metric"] == metric]
        y = own["name"].map(rows.index)
        axes.hlines(y, own["reported"], own["reproduced"], color="0.85", linewidth=2.5, zorder=1)
        axes.hlines(y, own["low"], own["high"], color="C0", linewidth=1, zorder=2)
        axes.plot(own["reported"], y, "o", mfc="white", mec="0.4", ms=5, zorder=3, label="published")
        axes.plot(own["reproduced"], y, "o", color="C0", ms=5, zorder=4, label="reproduced")
        axes.set_title(tables.LABELS.get(metric, metric), fontsize=9, loc="left")
        axes.grid(axis="x", color="0.93")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8, length=0)
        if not metric.startswith(tables.COUNTS):
            axes.set_xlim(-3, 103)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].set_ylim(max(len(rows), 1) - 0.5, -0.5)
    if rows:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure
