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
import torch
from matplotlib.figure import Figure
from PIL import Image

# Stand-ins that matplotlib can draw with; each becomes var(--<name>) in the SVG.
INK, MUTED, RULE, GOOD, BAD, PAPER = ROLES = tuple(f"#0a0b0{i}" for i in range(1, 7))
VARIABLES = dict(zip(ROLES, ("ink", "muted", "rule", "good", "bad", "paper"), strict=True))
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
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
SMALL = 8
matplotlib.rcParams.update(STYLE)  # this module alone draws


def image_uri(pixels: np.ndarray) -> str:
    """A (H, W, 3) uint8 image as a PNG data URI in its own resolution; CSS does the enlarging."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def difference(clean: torch.Tensor, changed: torch.Tensor) -> tuple[torch.Tensor, int]:
    """|changed - clean| of uint8 images (N, 3, H, W), N > 0, and the whole number it is magnified by."""
    plain = (changed.int() - clean.int()).abs()
    factor = max(1, 255 // max(1, int(plain.max())))
    return (plain * factor).to(torch.uint8), factor


def _panel(width: float, height: float):
    """(figure, axes) of this size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element that fills its container up to its natural width."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    width, _ = figure.get_size_inches()
    head = f'<svg role="img" aria-label="{html.escape(label)}" style="max-width:{width * 96:.0f}px"'
    return re.sub(
        r'<svg height="[^"]*"|<svg', head, re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2), count=1
    )


def _percent(axis, top: float = 1.0) -> None:
    axis.set_major_locator(matplotlib.ticker.MultipleLocator(0.25 if top > 0.5 else 0.1))
    axis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0, symbol=" %"))


def before_after(rows: list[dict], line: float | None, label: str, low: float = 0.0) -> str:
    """A dumbbell per row: `name`, `before`, `after` and `bad`; hollow = before, filled = after.

    `line` draws a threshold, `low` is where the axis starts; a `bad` row ends in a square
    in the warning colour.
    """
    figure, axes = _panel(5.2, 0.6 + 0.29 * len(rows))
    right = axes.get_yaxis_transform()
    for y, row in enumerate(rows):
        colour, marker = (BAD, "s") if row["bad"] else (GOOD, "o")
        axes.plot([row["before"], row["after"]], [y, y], color=RULE, linewidth=2.5, zorder=1)
        axes.plot(row["before"], y, "o", mfc=PAPER, mec=MUTED, ms=6, zorder=2, clip_on=False)
        axes.plot(row["after"], y, marker, color=colour, ms=6.5, zorder=3, clip_on=False)
        for text, place, style in (
            (f"{100 * row['before']:.1f}", 34, {"color": MUTED}),
            ("→", 47, {"color": MUTED}),
            (f"{100 * row['after']:.1f}", 77, {"color": colour, "weight": "bold"}),
        ):
            axes.annotate(
                text,
                (1, y),
                (place, 0),
                xycoords=right,
                textcoords="offset points",
                ha="right",
                va="center",
                **style,
            )
    if line is not None:
        axes.axvline(line, color=BAD, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
        axes.text(line, -0.8, f" {100 * line:.0f} %", color=BAD, fontsize=SMALL, va="center")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -1.0)
    axes.set_xlim(low, 1)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    _percent(axes.xaxis, 1 - low)
    return _svg(figure, label)


def benefit(points: list[dict], label: str) -> str:
    """A dot per defence: `name`, `seconds` on a logarithmic axis, `drop` of attack success, and `bad`.

    A name stands beside its dot, or below where another is in the way.
    """
    figure, axes = _panel(9.0, 4.2)
    low = min(0.0, min(point["drop"] for point in points))
    dots = [(np.log10(max(point["seconds"], 0.01)), point["drop"]) for point in points]
    left, right = (f(x for x, _ in dots) for f in (min, max))
    width, step = 1.35 * max(right - left, 1.0), 0.042 * (1.05 - low)  # with room for the last name
    taken = [(x - 0.008 * width, x + 0.008 * width, y) for x, y in dots]
    for (x, y), point in sorted(zip(dots, points, strict=True), key=lambda dot: -dot[0][1]):
        colour, marker = (BAD, "s") if point["bad"] else (GOOD, "o")
        axes.plot(x, y, marker, color=colour, ms=6, clip_on=False)
        start, place = x + 0.012 * width, y
        end = start + width * 0.0115 * len(point["name"])
        while any(
            abs(place - at) < step and start < other_end and other < end for other, other_end, at in taken
        ):
            place -= step / 4
        taken.append((start, end, place))
        axes.annotate(
            point["name"],
            (x, y),
            (x + 0.015 * width, place),
            va="center",
            fontsize=SMALL,
            arrowprops={"arrowstyle": "-", "color": RULE, "linewidth": 0.5} if y - place > step else None,
        )
    axes.set_xlim(left - 0.03 * width, left + width)
    axes.set_ylim(min(at for *_, at in [*taken, (0, 0, low)]) - 0.03, 1.02)
    ticks = [m * 10.0**k for k in range(-3, 7) for m in ((1, 2, 5) if right - left < 2.5 else (1,))]
    ticks = [tick for tick in ticks if left - 0.03 * width <= np.log10(tick) <= right + 0.3]
    axes.set_xticks(np.log10(ticks), [f"{tick:,g}" for tick in ticks])
    axes.set_xlabel("seconds", fontsize=SMALL)
    axes.spines["left"].set_visible(False)
    _percent(axes.yaxis)
    return _svg(figure, label)


def purity(stages: dict[str, list[dict]], total: int, poisons: int, label: str) -> str:
    """Shares of all images and of all poisons that are in the trusted set, step by step.

    `stages` maps a stage's title to its steps, each with `size` and `poisons`. A choice
    blind to poisons would let the two lines run together.
    """
    figure, axes = _panel(4.4, 2.4)
    # Every stage gets room for its title, and more where it has more steps.
    widths = [0.2 + 0.4 * len(steps) / sum(map(len, stages.values())) for steps in stages.values()]
    ends = np.cumsum(widths)
    x = np.concatenate(
        [end - width + width * (np.arange(len(steps)) + 0.5) / len(steps)
         for end, width, steps in zip(ends, widths, stages.values(), strict=True)]
    )  # fmt: skip
    for end, width, title in zip(ends, widths, stages, strict=True):
        axes.text(end - width / 2, 1.05, title, ha="center", va="bottom", fontsize=SMALL, color=MUTED)
        if end < ends[-1]:
            axes.axvline(end, color=RULE, linewidth=0.8)
    steps = [step for found in stages.values() for step in found]
    lines = [("size", total, GOOD, "images", "-")]
    if poisons:
        lines.append(("poisons", poisons, BAD, "poisons", (0, (4, 1.5))))
    last = []
    for key, whole, colour, name, style in lines:
        y = np.array([step[key] for step in steps]) / whole
        axes.plot(x, y, color=colour, linewidth=1.8, linestyle=style, clip_on=False)
        axes.plot(x[-1], y[-1], "o", color=colour, ms=4, clip_on=False)
        last.append((y[-1], f"{name}\n{100 * y[-1]:.1f} %, {steps[-1][key]:,}", colour))
    last.sort(key=lambda end: end[0])
    heights = [max(height, 0.07) for height, _, _ in last]
    if len(last) == 2 and heights[1] - heights[0] < 0.24:
        heights = [heights[1] - 0.24, heights[1]] if heights[1] > 0.3 else [heights[0], heights[0] + 0.24]
    for height, (_, text, colour) in zip(heights, last, strict=True):
        axes.text(ends[-1] * 1.02, height, text, va="center", color=colour)
    axes.set_ylim(0, 1)
    axes.set_xlim(0, ends[-1])
    axes.set_xticks([])
    axes.spines["left"].set_visible(False)
    _percent(axes.yaxis)
    return _svg(figure, label)


def masks(layers: list[tuple[str, np.ndarray, np.ndarray]], label: str) -> str:
    """Per convolution (name, mask (C,), untrusted (C,)) its masks in rising order, untrusted ones marked."""
    columns = 4
    lines = -(-len(layers) // columns)
    figure = Figure(figsize=(10.9, 0.85 * lines + 0.1), layout="constrained", facecolor="none")
    figure.get_layout_engine().set(wspace=0.06, hspace=0.08)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (name, mask, untrusted) in zip(grid, layers, strict=False):
        mask, count = mask[np.lexsort((mask, ~untrusted))], int(untrusted.sum())
        edges = np.arange(len(mask) + 1) / len(mask)
        axes.plot([0, 1], [0, 0], [0, 1], [1, 1], color=RULE, linewidth=0.6)
        axes.stairs(mask[count:], edges[count:], baseline=None, color=GOOD, linewidth=1.3)
        if count:
            axes.stairs(mask[:count], edges[: count + 1], fill=True, color=BAD, linewidth=0)
        axes.set_title(name, loc="left", fontsize=SMALL, color=INK, pad=3)
        axes.set_title(
            f"{count} of {len(mask)}", loc="right", fontsize=SMALL, color=BAD if count else MUTED, pad=3
        )
        axes.set(xlim=(0, 1), ylim=(-0.05, 1.05))
    return _svg(figure, label)


def classes(counts: dict[str, np.ndarray], names: tuple[str, ...], marked: dict[int, str], label: str) -> str:
    """Each class's share of the sets in `counts` ("received", "subset", "pool"), largest class first.

    `marked` are classes to name: index -> text.
    """
    figure, axes = _panel(4.4, 2.4)
    order = np.argsort(-counts["received"], kind="stable")
    x = np.arange(len(order))
    share = {name: count[order] / max(count.sum(), 1) for name, count in counts.items()}
    axes.bar(x, share["received"], width=0.8, color=RULE)
    axes.plot(x, share["subset"], "o", mfc="none", mec=MUTED, ms=4, linestyle="none")
    axes.plot(x, share["pool"], "o", color=GOOD, ms=3, linestyle="none")
    top = max(values.max() for values in share.values())
    for line, (index, text) in enumerate(marked.items()):
        position = int(np.flatnonzero(order == index)[0])
        height = top * (1.3 - 0.14 * line)
        axes.plot([position, position], [0, height], color=BAD, linewidth=0.8, zorder=0)
        left = position < len(order) / 2
        axes.text(
            position,
            height,
            f"  {names[index]}, {text}  ",
            ha="left" if left else "right",
            va="center",
            fontsize=SMALL,
            color=BAD,
        )
    axes.set_ylim(0, top * 1.38)
    axes.set_xticks([])
    axes.set_xlabel(f"{len(order)} classes, most frequent first", fontsize=SMALL)
    axes.spines["left"].set_visible(False)
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, symbol=" %"))
    return _svg(figure, label)
