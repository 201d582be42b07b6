"""The plot of likeness against retention."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from PIL import Image

from ..sheets import FAINT, INK, save_png
from .columns import DINO, LIKENESS, MASKED, RETENTION
from .comparison import Comparison, Contender, Figure
from .results import REFERENCE


PLOT_FILE = "likeness_retention.png"
COLOURS = ("#1b6b8f", "#c77d2e", "#1b7f5c", "#a0506b", "#5b6fb5", "#8a7a2c", "#b3261e", "#4d7d8c")
WIDTH, HEIGHT, DPI = 9.5, 6.0, 110  # inches; dots per inch
LEAST_SPAN = 0.05  # of both axes
MAX_CHARACTERS = 40  # of a label
LABEL_HEIGHT = 15  # pixels at 100 dots per inch
RETAINED = f"{RETENTION}/{DINO}"


class Label(NamedTuple):
    """A text beside a point."""

    x: float
    y: float
    text: str
    colour: str
    is_bold: bool


def likeness_key(comparison: Comparison) -> str:
    """The likeness that is plotted: the subject's alone if it was masked."""
    masked = f"{LIKENESS}_{MASKED}/{DINO}"
    return masked if any(column.key == masked for column in comparison.columns) else f"{LIKENESS}/{DINO}"


def plot_likeness(comparison: Comparison, contenders: list[Contender], path: Path) -> bool:
    """Writes the plot as a PNG: every contender is a point, and a line joins the strengths of a LoRA.

    Returns:
        Whether there is anything to plot.
    """
    key = likeness_key(comparison)
    column = next((column for column in comparison.columns if column.key == key), None)
    points: dict[tuple[str, ...], list[tuple[Contender, Figure, Figure]]] = {}
    for contender in contenders:
        found = comparison.figures[contender.name]
        if key in found and RETAINED in found:
            names = tuple(lora.name for lora in contender.loras)
            points.setdefault(names, []).append((contender, found[key], found[RETAINED]))
    if column is None or not points:
        return False
    canvas = Canvas(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    agg = FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    if (reference := comparison.reference.get(key)) is not None:
        axes.axvline(reference.mean, color=FAINT, linewidth=1, linestyle="--", label=f"{REFERENCE} among themselves")
        axes.legend(loc="lower left", frameon=False)
    labels = []
    for number, group in enumerate(points.values()):
        group.sort(key=lambda point: point[0].strength)
        is_base = not group[0][0].loras
        colour = INK if is_base else COLOURS[(number - 1) % len(COLOURS)]
        alike, retained = ([point[place].mean for point in group] for place in (1, 2))
        errors = [[point[place].over_seeds or 0.0 for point in group] for place in (1, 2)]
        axes.errorbar(alike, retained, errors[1], errors[0], color=colour, linewidth=1, alpha=0.45, zorder=2)
        sizes = [90 if contender.strength == 1 else 35 for contender, *_ in group]
        axes.scatter(alike, retained, sizes, colour, marker="D" if is_base else "o", zorder=3)
        for x, y, (contender, *_) in zip(alike, retained, group, strict=True):
            is_full = contender.strength == 1
            text = contender.name if is_full else f"x{contender.strength:g}"
            labels.append(Label(x, y, text, colour, is_full))
    axes.set_xlabel(f"{column.label}, {column.model}: higher is better", parse_math=False)
    axes.set_ylabel("retention: higher is better")
    axes.margins(0.12)
    axes.set_xlim(widened(*axes.get_xlim()))
    axes.set_ylim(widened(*axes.get_ylim()))
    axes.ticklabel_format(useOffset=False)
    axes.grid(color="#e3e6eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    agg.draw()
    write_labels(axes, labels)
    agg.draw()
    save_png(Image.fromarray(np.asarray(agg.buffer_rgba())).convert("RGB"), path)
    return True


def widened(low: float, high: float) -> tuple[float, float]:
    """At least `LEAST_SPAN` wide, so that differences without a meaning do not look large."""
    missing = max(0.0, LEAST_SPAN - (high - low)) / 2
    return low - missing, high + missing


def write_labels(axes: Axes, labels: list[Label]) -> None:
    """Writes texts beside their points, those that would overlap above or below each other."""
    scale = DPI / 100
    taken: list[tuple[float, float, float]] = []  # left, right, height, in pixels
    right_end = axes.get_window_extent().x1
    for label in sorted(labels, key=lambda label: (not label.is_bold, -label.y)):
        text = label.text if len(label.text) <= MAX_CHARACTERS else label.text[: MAX_CHARACTERS - 1] + "…"
        left, height = axes.transData.transform((label.x, label.y))
        width = (len(text) * 7 + 12) * scale
        on_left = left + width > right_end
        start = left - width if on_left else left
        shift = 0.0
        while any(
            start < other_right and other_left < start + width and abs(height + shift - other) < LABEL_HEIGHT * scale
            for other_left, other_right, other in taken
        ):
            shift = -shift if shift > 0 else -shift + LABEL_HEIGHT * scale
        taken.append((start, start + width, height + shift))
        axes.annotate(
            text,
            (label.x, label.y),
            xytext=(-8 if on_left else 8, shift * 72 / DPI),
            textcoords="offset points",
            ha="right" if on_left else "left",
            va="center",
            fontsize=9.5,
            fontweight="bold" if label.is_bold else "normal",
            color=label.colour,
            fontfamily="DejaVu Sans",
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6} if shift else None,
        )
