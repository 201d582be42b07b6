"""Contact sheets of images, and plots of a run's metrics. All lengths are in pixels."""

import math
import unicodedata
from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .exam.figures import ANYWHERE, FEATURES, IN_PLACE, MEASURES, TOWER
from .output import replacing


PAPER, INK, FAINT, RULE = "#ffffff", "#1d2433", "#5b6475", "#c9ced8"
ACCENT = "#d9480f"
SCREEN_PIXELS = 1600  # no sheet is wider, unless a single cell is
CELL_PIXELS, CELLS_OF_FIVE, CELLS_OF_AN_OVERVIEW = 320, 288, 192
MAX_LABEL_LINES, MAX_HEADING_LINES, MAX_CAPTION_LINES = 4, 3, 2
SMALLEST_FONT = 12
# Key in the history, label, colour.
RETENTION_CURVES = (
    ("retention", "unrelated", "#1b7f5c"),
    ("retention/held_out", "held out", "#7fb8a4"),
    ("retention/wrong_word", "wrong word", "#c77d2e"),
    ("retention/other_edit", "other edit", "#a0506b"),
    ("retention/no_word", "no word", "#5b6fb5"),
)
PROGRESS_CURVES = (
    (f"progress/{IN_PLACE}", MEASURES[IN_PLACE], "#7fa8c9"),
    (f"progress/{ANYWHERE}", MEASURES[ANYWHERE], "#1b6b8f"),
    (f"progress/{TOWER}", MEASURES[TOWER], "#c77d2e"),
    (f"progress/{FEATURES}", MEASURES[FEATURES], "#1b7f5c"),
    ("progress", "the largest that decides", INK),
)
SMOOTH_FROM = 50  # curves with more points than this are smoothed


@dataclass(frozen=True)
class Cell:
    """One cell of a contact sheet.

    Attributes:
        image: any size. None leaves the cell empty.
        caption: small text below the image, at most two lines.
    """

    image: Image.Image | None
    caption: str = ""


@dataclass(frozen=True)
class Layout:
    """Fonts and lengths of a contact sheet whose images fit into squares of this side."""

    cell_pixels: int

    @property
    def gap(self) -> int:
        """Between two cells."""
        return self.cell_pixels // 16

    @property
    def margin(self) -> int:
        return self.cell_pixels // 8

    @property
    def frame(self) -> int:
        """Thickness of the frame around each cell, which is visible around those that stand out."""
        return max(1, self.gap // 4)

    @property
    def font_size(self) -> int:
        return max(SMALLEST_FONT, self.cell_pixels // 18)

    def font(self, *, bold: bool = False, scale: float = 1) -> ImageFont.FreeTypeFont:
        return load_font("DejaVuSans-Bold" if bold else "DejaVuSans", max(SMALLEST_FONT, int(self.font_size * scale)))

    def width(self, num_columns: int) -> int:
        return num_columns * (self.cell_pixels + self.gap) - self.gap

    def columns_within(self, pixels: int) -> int:
        """How many columns, at least one, a sheet of this width has room for."""
        return max(1, (pixels - 2 * self.margin + self.gap) // (self.cell_pixels + self.gap))

    def beside(self, framed: list[Image.Image]) -> Image.Image:
        """The cells of a row, each with its frame."""
        return beside(framed, self.gap - 2 * self.frame)

    def indented(self, block: Image.Image) -> Image.Image:
        """With blank frames on the left and right, as what is above and below framed images."""
        return ImageOps.expand(block, (self.frame, 0), PAPER)

    def captions(self, texts: list[str], font: ImageFont.FreeTypeFont, max_lines: int, inks: list[str]) -> Image.Image:
        """A row of centred texts, one per cell."""
        return self.beside(
            [
                self.indented(text_block(text, font, self.cell_pixels, max_lines, align="center", ink=ink))
                for text, ink in zip(texts, inks, strict=True)
            ]
        )

    def images(self, cells: list[Cell], are_framed: list[bool]) -> Image.Image:
        """A row of images, each centred in its cell. The row is as tall as the tallest image."""
        images = [fit(cell.image, self.cell_pixels) if cell.image else None for cell in cells]
        height = max((image.height for image in images if image), default=self.cell_pixels)
        framed = []
        for image, is_framed in zip(images, are_framed, strict=True):
            block = Image.new("RGB", (self.cell_pixels, height), PAPER)
            block = ImageOps.expand(block, self.frame, PAPER)
            if image:
                image = ImageOps.expand(image, self.frame, ACCENT if is_framed else PAPER)
                block.paste(image, ((block.width - image.width) // 2, (block.height - image.height) // 2))
            framed.append(block)
        return self.beside(framed)


def contact_sheet(
    title: str,
    columns: list[str],
    rows: list[tuple[str, list[Cell]]],
    *,
    note: str = "",
    cell_pixels: int | None = None,
    accent_columns: Collection[int] = (),
    accent_rows: Collection[int] = (),
) -> Image.Image:
    """A table of images that are compared within each row.

    Args:
        title: at the top, in a larger font.
        columns: one heading per column. Columns for which `SCREEN_PIXELS` have no room continue below the others.
        rows: (label, one cell per column). The label, often a prompt, is above its images and can use the full width
            of the sheet. It is cut to four lines.
        note: at the bottom, explains how to read the sheet. It is wrapped, and its line breaks are kept.
        cell_pixels: side of the square that each image is fitted into (see `fit`). Fonts and margins scale with it.
            Default: see `default_cell_pixels`.
        accent_columns, accent_rows: indices of those that stand out, by frames and a coloured heading or label.

    Returns:
        An RGB image as large as its contents.
    """
    layout = Layout(cell_pixels or default_cell_pixels(len(columns)))
    for label, cells in rows:
        assert len(cells) == len(columns), f"row {label!r}: {len(cells)} cells for {len(columns)} columns"
    num_bands = math.ceil(len(columns) / layout.columns_within(SCREEN_PIXELS))
    band = math.ceil(len(columns) / num_bands)
    width = layout.width(band)
    small = layout.font(scale=5 / 6)

    def text(text: str, font: ImageFont.FreeTypeFont, max_lines: int | None = None, ink: str = INK) -> Image.Image:
        return layout.indented(text_block(text, font, width, max_lines, ink=ink))

    rule = layout.indented(Image.new("RGB", (width, 1), RULE))
    blocks = [text(title, layout.font(bold=True, scale=8 / 5), MAX_HEADING_LINES)]
    for first in range(0, len(columns), band):
        places = range(first, min(first + band, len(columns)))
        if first:
            blocks.append(Image.new("RGB", (width, layout.gap), PAPER))
        inks = [ACCENT if place in accent_columns else INK for place in places]
        headings = [columns[place] for place in places]
        blocks.append(layout.captions(headings, layout.font(bold=True), MAX_HEADING_LINES, inks))
        for number, (label, cells) in enumerate(rows):
            is_accented, shown = number in accent_rows, [cells[place] for place in places]
            images = layout.images(shown, [is_accented or place in accent_columns for place in places])
            texts = [cell.caption for cell in shown]
            captions = layout.captions(texts, small, MAX_CAPTION_LINES, [FAINT] * len(texts))
            above = text(label, layout.font(bold=is_accented), MAX_LABEL_LINES, ACCENT if is_accented else INK)
            blocks += [rule, stack([above, stack([images, captions], layout.gap // 3)], layout.gap // 2)]
    if note:
        blocks += [rule, text(note, small, ink=FAINT)]

    content = stack(blocks, layout.gap * 3 // 4)
    sheet = Image.new("RGB", (width + 2 * layout.margin, content.height + 2 * layout.margin), PAPER)
    sheet.paste(content, (layout.margin - layout.frame, layout.margin))
    return sheet


def default_cell_pixels(num_columns: int) -> int:
    """Side of the cells of a sheet: large, but more than eight columns make an overview."""
    return CELLS_OF_AN_OVERVIEW if num_columns > 8 else CELLS_OF_FIVE if num_columns == 5 else CELL_PIXELS


def fit(image: Image.Image, side: int) -> Image.Image:
    """The image in RGB with its aspect ratio and with no side longer than `side`.

    A small image is enlarged by an integer factor, so that each of its pixels becomes a square of the same colour.
    """
    image = image.convert("RGB")
    factor = side // max(image.size)
    if factor >= 1:
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=None)
    return image


def stack(blocks: list[Image.Image], gap: int) -> Image.Image:
    """Places the blocks below each other, left-aligned. Blocks of height 0 are skipped together with their gap."""
    blocks = [block for block in blocks if block.height]
    height = sum(block.height + gap for block in blocks) - gap
    result = Image.new("RGB", (max(block.width for block in blocks), height), PAPER)
    top = 0
    for block in blocks:
        result.paste(block, (0, top))
        top += block.height + gap
    return result


def beside(blocks: list[Image.Image], gap: int) -> Image.Image:
    """Places the blocks next to each other, top-aligned."""
    width = sum(block.width + gap for block in blocks) - gap
    result = Image.new("RGB", (width, max(block.height for block in blocks)), PAPER)
    left = 0
    for block in blocks:
        result.paste(block, (left, 0))
        left += block.width + gap
    return result


@cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A DejaVu font that ships with matplotlib. It covers Latin, Greek, Cyrillic and Arabic; others become boxes."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def text_block(
    text: str,
    font: ImageFont.FreeTypeFont,
    width: int,
    max_lines: int | None = None,
    *,
    align: str = "left",
    ink: str = INK,
) -> Image.Image:
    """Wrapped text as an image that is `width` wide and as tall as its lines. Empty text has height 0."""
    ascent, descent = font.getmetrics()
    lines = wrap(text, font, width, max_lines)
    block = Image.new("RGB", (width, len(lines) * (ascent + descent)), PAPER)
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        left = (width - font.getlength(line)) // 2 if align == "center" else 0
        draw.text((left, number * (ascent + descent)), line, fill=ink, font=font)
    return block


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int | None = None) -> list[str]:
    """Splits text into lines of at most `width`. Text beyond `max_lines` is replaced by an ellipsis."""
    lines = []
    for paragraph in text.splitlines():
        rest = " ".join(paragraph.split())
        while rest:
            end = line_end(rest, font, width)
            lines.append(rest[:end].rstrip())
            rest = rest[end:].lstrip()
    if max_lines is None or len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1].rstrip()
    return [*lines[: max_lines - 1], last + "…"]


def line_end(text: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """Number of characters of `text` on the first line, which ends at a word boundary if one word fits."""
    # There are never more characters on a line than pixels. Without the limit, very long prompts would be slow.
    fitting = bisect_right(range(1, min(len(text), width) + 1), width, key=lambda end: font.getlength(text[:end]))
    if fitting == len(text):
        return fitting
    for end in range(fitting, 0, -1):
        # Chinese and Japanese have no spaces, so a line may end before any of their characters.
        if text[end] == " " or unicodedata.east_asian_width(text[end]) in "WF":
            return end
    return max(fitting, 1)


def save_png(image: Image.Image, path: Path, compress_level: int = 6) -> None:
    """Writes a PNG, completely or not at all.

    Args:
        compress_level: 1 takes a third of the time of 6, for a sixth more bytes.
    """
    with replacing(path) as unfinished:
        image.save(unfinished, format="PNG", compress_level=compress_level)


def plot_curves(history: list[dict], path: Path, *, title: str) -> None:
    """Plots a run's metrics into a PNG: losses, cosine similarities, retention and, if it was measured, progress.

    It has 1200 x 1000 pixels, or 1200 x 1250 with progress.

    Args:
        history: the rows of metrics.jsonl. Each has "step" and any of "loss" (mean over the trained states),
            "loss/state_1" (pure noise) to "loss/state_K", "cosine/state_1" to "cosine/state_K", "prior_loss",
            "retention", "retention/NAME", "progress" and "progress/NAME". Other keys are ignored. If a step occurs
            more than once, as after resuming, the last one counts.
        path: of the PNG.
        title: above the plots.
    """
    has_progress = any(key in row for row in history for key, *_ in PROGRESS_CURVES)
    heights = (3, 2, 2, 2) if has_progress else (3, 2, 2)
    figure = Figure(figsize=(12, 12.5 if has_progress else 10), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # inches
    canvas = FigureCanvasAgg(figure)
    # matplotlib's own wrapping ignores parse_math, but dollar signs in a run's name are not a formula.
    title_lines = wrap(title, load_font("DejaVuSans-Bold", 21), 1150, MAX_HEADING_LINES)
    figure.suptitle("\n".join(title_lines), fontsize=15, fontfamily="DejaVu Sans", fontweight="bold", parse_math=False)
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights)

    for draw, axes in zip((draw_losses, draw_cosines, draw_retention, draw_progress), panels, strict=False):
        draw(axes, history)
    plotted = {key for row in history for key in row if key.startswith(("loss", "cosine", "prior_loss"))}
    is_smoothed = any(len(series(history, key)[0]) > SMOOTH_FROM for key in plotted)
    smoothing = f"\n(losses and cosines of more than {SMOOTH_FROM} points are moving means over 4 % of them)"
    panels[-1].set_xlabel("optimizer step" + smoothing * is_smoothed)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[-1].margins(x=0.02)
    for axes in panels:
        axes.grid(color="#e3e6eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()

    canvas.draw()
    save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)


def draw_losses(axes: Axes, history: list[dict]) -> None:
    states = state_keys(history, "loss")
    left_out = 0
    for key, label, colour in (*states, ("prior_loss", "prior", "#b3261e"), ("loss", "mean", INK)):
        steps, values = series(history, key)
        drawable = np.isfinite(values) & (values > 0)
        if key != "prior_loss":  # exactly zero at the start
            left_out += np.count_nonzero(~drawable)
        draw_series(axes, steps, np.where(drawable, values, np.nan), label, colour, bold=key == "loss")
    axes.set_yscale("log")
    axes.set_ylabel("loss")
    finish_panel(axes, "no loss yet")
    if left_out:
        axes.set_title(f"values not drawn, being zero or not finite: {left_out}", fontsize=10, color="#b3261e")


def draw_cosines(axes: Axes, history: list[dict]) -> None:
    for key, label, colour in state_keys(history, "cosine"):
        steps, values = series(history, key)
        draw_series(axes, steps, np.where(np.isfinite(values), values, np.nan), label, colour)
    axes.set_ylabel("cosine of student's and\nteacher's velocity")
    finish_panel(axes, "no cosine yet")


def draw_retention(axes: Axes, history: list[dict]) -> None:
    curves = [(series(history, key), label, colour) for key, label, colour in RETENTION_CURVES]
    curves = [curve for curve in curves if len(curve[0][0])]
    for (steps, values), label, colour in curves:
        label = label if len(curves) > 1 else None
        axes.plot(steps, values, color=colour, label=label, marker="o", markersize=5, linewidth=1.8)
        axes.axhline(0, linewidth=0)  # includes 0 in the data range, from which the margin above is computed
    axes.set_ylim(bottom=0)
    axes.set_ylabel("retention")
    finish_panel(axes, "no validation yet", title="prompts")


def draw_progress(axes: Axes, history: list[dict]) -> None:
    axes.axhline(0, color=FAINT, linewidth=1)
    axes.axhline(100, color=FAINT, linewidth=1, linestyle="--")
    for key, label, colour in PROGRESS_CURVES:
        steps, values = series(history, key)
        draw_series(axes, steps, values, label, colour, bold=key == "progress")
    axes.set_ylabel("progress, % of\nthe teacher's lead")
    finish_panel(axes, "", title="closer by")


def draw_series(
    axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str | np.ndarray, *, bold: bool = False
) -> None:
    """Plots one curve; NaN is a gap. Long curves are smoothed; behind the bold one, its own values are faint."""
    marker = "o"  # makes a single point visible
    if len(steps) > SMOOTH_FROM:
        if bold:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        values = smooth(values, len(values) // 25)
        marker = ""
    if len(steps):
        linewidth, zorder = (2.6, 3) if bold else (1.5, 2)
        axes.plot(
            steps, values, color=colour, label=label, linewidth=linewidth, zorder=zorder, marker=marker, markersize=4
        )


def finish_panel(axes: Axes, empty_text: str, title: str = "visited state") -> None:
    """Adds the legend of the labelled curves, or `empty_text` if nothing is plotted."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, title=title)
    if not axes.lines:
        axes.text(0.5, 0.5, empty_text, transform=axes.transAxes, ha="center", va="center", color=FAINT, fontsize=13)
        axes.set_yticks([])


def state_keys(history: list[dict], quantity: str) -> list[tuple[str, str, np.ndarray]]:
    """(key, label, colour) of each visited state, from noise to clean. A state has the same colour in all panels."""
    prefix = f"{quantity}/state_"
    numbers = sorted({int(key.removeprefix(prefix)) for row in history for key in row if key.startswith(prefix)})
    colours = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(numbers)))
    return [
        (f"{prefix}{number}", f"{number} (noise)" if number == 1 else str(number), colour)
        for number, colour in zip(numbers, colours, strict=True)
    ]


def series(history: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one key, sorted by step; two arrays of equal length."""
    points = sorted({row["step"]: row[key] for row in history if key in row}.items())
    return np.array([step for step, _ in points]), np.array([value for _, value in points], dtype=float)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean with the shape of `values`. NaN is ignored, and the window is truncated at the ends."""
    known = np.isfinite(values)
    ones = np.ones(window)
    total = np.convolve(np.where(known, values, 0.0), ones, mode="same")
    count = np.convolve(known, ones, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
