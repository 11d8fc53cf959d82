"""The report's pictures: charts as inline SVG, images as PNG data URIs.

Charts take their colours from the page's CSS variables, so one drawing serves light,
dark and print, and their text stays text.
"""

import base64
import html
import io
import re

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

# Stand-ins that matplotlib can draw with; each becomes var(--<name>) in the SVG.
INK, MUTED, RULE, GOOD, BAD, PAPER = ROLES = tuple(f"#0a0b0{i}" for i in range(1, 7))
VARIABLES = dict(zip(ROLES, ("ink", "muted", "rule", "good", "bad", "paper"), strict=True))
STYLE = {
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 2,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


def image_uri(pixels: np.ndarray) -> str:
    """A (H, W, 3) uint8 image as a PNG data URI in its own resolution; CSS does the enlarging."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _panel(width: float, height: float):
    """(figure, axes) of this size in inches, with the page's style."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        axes.grid(axis="y", color=RULE, linewidth=0.5)
        axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element that fills its container up to its natural width."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    width, _ = figure.get_size_inches()
    head = f'<svg role="img" aria-label="{html.escape(label)}" style="max-width:{width * 96:.0f}px"'
    return re.sub(r'<svg height="[^"]*"|<svg', head, re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2), count=1)


def _percent(axis, top: float = 1.0) -> None:
    axis.set_major_locator(matplotlib.ticker.MultipleLocator(0.25 if top > 0.5 else 0.1))
    axis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0, symbol=" %"))


def before_after(rows: list[dict], line: float | None, label: str, low: float = 0.0) -> str:
    """A dumbbell per row: `name`, `before`, `after` and `bad`; hollow = before, filled = after.

    `line` draws a threshold; a `bad` row is drawn as a square in the warning colour.
    """
    figure, axes = _panel(4.4, 0.55 + 0.3 * len(rows))
    for y, row in enumerate(rows):
        colour, marker = (BAD, "s") if row["bad"] else (GOOD, "o")
        axes.plot([row["before"], row["after"]], [y, y], color=RULE, linewidth=2.5, zorder=1)
        axes.plot(row["before"], y, "o", mfc=PAPER, mec=MUTED, ms=6, zorder=2)
        axes.plot(row["after"], y, marker, color=colour, ms=6.5, zorder=3)
        right = row["after"] >= row["before"]
        axes.annotate(
            f"{100 * row['after']:.1f}", (row["after"], y), (7 if right else -7, 0),
            textcoords="offset points", ha="left" if right else "right", va="center", fontweight="bold", color=colour,
        )  # fmt: skip
        axes.annotate(
            f"{100 * row['before']:.1f}", (row["before"], y), (-7 if right else 7, 0),
            textcoords="offset points", ha="right" if right else "left", va="center", color=MUTED,
        )  # fmt: skip
    if line is not None:
        axes.axvline(line, color=BAD, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
        axes.text(line, -0.75, f" {line:.0%} line".replace("%", " %"), color=BAD, fontsize=7, va="center")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -1.0)
    axes.set_xlim(low - 0.13 * (1 - low), 1 + 0.13 * (1 - low))
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    _percent(axes.xaxis, 1 - low)
    return _svg(figure, label)


def purity(steps: list[dict], total: int, poisons: int, label: str) -> str:
    """Shares of all images and of all poisons that are in the trusted set, step by step.

    `steps` have `stage`, `size` and `poisons`. A choice blind to poisons would let the
    two lines run together.
    """
    figure, axes = _panel(3.7, 2.35)
    x = np.arange(len(steps))
    lines = [("size", total, GOOD, "images", "-")]
    if poisons:
        lines.append(("poisons", poisons, BAD, "poisons", (0, (4, 1.5))))
    ends = []
    for key, whole, colour, name, style in lines:
        y = np.array([step[key] for step in steps]) / whole
        axes.plot(x, y, color=colour, linewidth=1.8, linestyle=style, clip_on=False)
        axes.plot(x[-1], y[-1], "o", color=colour, ms=4, clip_on=False)
        ends.append((y[-1], f"{name}\n{100 * y[-1]:.1f} %, {steps[-1][key]:,}", colour))
    shift = 0.11 - abs(ends[0][0] - ends[-1][0]) / 2 if len(ends) > 1 and abs(ends[0][0] - ends[-1][0]) < 0.22 else 0
    for y, text, colour in ends:
        up = shift if y == max(end[0] for end in ends) else -shift
        axes.annotate(text, (x[-1], max(y + up, 0.07)), (6, 0), textcoords="offset points", va="center", color=colour)
    stages = [step["stage"] for step in steps]
    for stage in dict.fromkeys(stages):
        first, last = stages.index(stage), len(stages) - 1 - stages[::-1].index(stage)
        if first:
            axes.axvline(first - 0.5, color=RULE, linewidth=0.8)
        axes.text((first + last) / 2, 1.06, stage, ha="center", va="bottom", fontsize=7, color=MUTED)
    axes.set_ylim(0, 1)
    axes.set_xlim(-0.5, len(steps) - 0.5)
    axes.set_xticks([])
    axes.spines["left"].set_visible(False)
    _percent(axes.yaxis)
    return _svg(figure, label)


def masks(layers: list[tuple[str, np.ndarray, np.ndarray]], label: str) -> str:
    """Per convolution (name, mask (C,), untrusted (C,)) its masks in rising order, untrusted ones marked."""
    columns = 3
    with matplotlib.rc_context(STYLE):
        lines = -(-len(layers) // columns)
        figure = Figure(figsize=(7.4, 0.72 * lines + 0.1), layout="constrained", facecolor="none")
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (name, mask, untrusted) in zip(grid, layers, strict=False):
        order = np.lexsort((mask, ~untrusted))
        mask, count = mask[order], int(untrusted.sum())
        edges = np.arange(len(mask) + 1) / len(mask)
        axes.stairs(np.ones(len(mask)), edges, fill=True, color=RULE, alpha=0.35, linewidth=0)
        axes.stairs(mask[count:], edges[count:], fill=True, color=GOOD, linewidth=0)
        if count:
            axes.stairs(mask[:count], edges[: count + 1], fill=True, color=BAD, linewidth=0)
            axes.plot([0, edges[count]], [-0.1, -0.1], color=BAD, linewidth=2.2, solid_capstyle="butt")
        axes.set_title(name, loc="left", fontsize=7, color=MUTED, pad=2)
        axes.set_title(f"{count} of {len(mask)}", loc="right", fontsize=7, color=BAD, pad=2)
        axes.set(xlim=(0, 1), ylim=(-0.18, 1))
    return _svg(figure, label)


def classes(counts: dict[str, np.ndarray], names: tuple[str, ...], marked: dict[int, str], label: str) -> str:
    """Each class's share of the sets in `counts` ("received", "subset", "pool"), largest class first.

    `marked` are classes to name: index -> text.
    """
    figure, axes = _panel(3.7, 2.1)
    order = np.argsort(-counts["received"], kind="stable")
    x = np.arange(len(order))
    share = {name: count[order] / max(count.sum(), 1) for name, count in counts.items()}
    axes.bar(x, share["received"], width=0.8, color=RULE)
    axes.plot(x, share["subset"], "o", mfc="none", mec=MUTED, ms=4, linestyle="none")
    axes.plot(x, share["pool"], "o", color=GOOD, ms=3, linestyle="none")
    top = max(values.max() for values in share.values())
    for index, text in marked.items():
        position = int(np.flatnonzero(order == index)[0])
        height = max(values[position] for values in share.values())
        axes.annotate(
            f"{names[index]}\n({text})", (position, height), (0, 5), textcoords="offset points",
            ha="left" if position < len(order) / 2 else "right", va="bottom", fontsize=7, color=BAD,
        )  # fmt: skip
    axes.set_ylim(0, top * 1.3)
    axes.set_xticks([])
    axes.set_xlabel(f"{len(order)} classes, most frequent first", fontsize=7)
    axes.spines["left"].set_visible(False)
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, symbol=" %"))
    return _svg(figure, label)
