"""Writes how `evaluate_lora.py` ranks LoRAs of the miniature beside how the exact reader ranks them."""

import json
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.miniature.files import replacing
from benchmarks.miniature.report import machine
from benchmarks.miniature.tables import markdown
from dopsd.evaluation.comparison import BASE, Comparison


class Pair(NamedTuple):
    """A column of the comparison, and the exact figure that it stands for: more of one should be more of the other.

    Attributes:
        apart: how far two contenders' exact figures are at least apart to count as different.
    """

    column: str
    exact: str
    apart: float


BASE_COLOUR, LORA_COLOUR, OTHER_STRENGTH = "#495057", "#d9480f", "#adb5bd"
SHARE, GRAIN = 0.15, 0.05  # a share of 48 drawings has a standard error of up to 0.07
PAIRS = (
    Pair("likeness/dino", "subject", SHARE),
    Pair("likeness/clip", "subject", SHARE),
    Pair("likeness_masked/dino", "subject", SHARE),
    Pair("likeness_masked/clip", "subject", SHARE),
    Pair("closeness/dino", "copies", SHARE),
    Pair("copies", "copies", SHARE),
    Pair("following/clip", "as asked", SHARE),
    Pair("sharpness", "detail", GRAIN),
    Pair("sharpness_unrelated", "old detail", GRAIN),
    Pair("detail", "detail", GRAIN),
    Pair("detail_unrelated", "old detail", GRAIN),
    Pair("diversity/dino", "changing", SHARE),
    Pair("retention/dino", "old same", SHARE),
    Pair("retention/dino", "old right", SHARE),
    Pair("following_unrelated/clip", "old right", SHARE),
    Pair("leakage_neighbours/dino", "neighbours", SHARE),
    Pair("leakage_neighbours/clip", "neighbours", SHARE),
    Pair("leakage_words/dino", "other words", SHARE),
    Pair("leakage_words/clip", "other words", SHARE),
)
SHORT = (
    *("likeness_masked/dino", "closeness/dino", "copies", "diversity/dino", "sharpness", "detail", "retention/dino"),
    "leakage_words/dino",
)
EXACT_NOTE = """\
Shares of drawings. subject: of the concept's prompts, with the concept; as asked: on the background asked for, too;
copies: with the concept at the place and on the background of a training picture. detail: grain of these drawings
over the base's. changing: pairs of seeds of one prompt that differ in place or object. old right: of unrelated
prompts, with what is asked for; old same: in place, object and background like the base's from the same noise; old
detail: their grain over the base's. neighbours, other words: drawings of these prompts with the concept, less the
base's share."""
RANK_NOTE = f"""\
rank correlation: Spearman's, over the contenders that have both figures. apart: pairs of contenders whose exact
figures differ by {SHARE:g} ({GRAIN:g} for details) or more; swapped: how many of these the column orders the other
way, or not at all; and the one of them that is furthest apart."""


def results(settings: dict, quality: dict, found: Comparison, exact: dict[str, dict[str, float]]) -> dict:
    """All that the report shows, as JSON keeps it."""
    return {
        "settings": settings,
        "feature_models": quality,
        "columns": {column.key: column.label for column in found.columns},
        "figures": {
            name: {key: round(figure.mean, 4) for key, figure in figures.items()}
            for name, figures in found.figures.items()
        },
        "exact": exact,
    }


def write(folder: Path, found: dict) -> None:
    """Writes comparison.json, .md and .png into the folder, and prints the tables.

    Args:
        found: see `results`.
    """
    with replacing(folder / "comparison.json") as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n")
    text = report(found)
    (folder / "comparison.md").write_text(text + "\n")
    plot(found, folder / "comparison.png")
    print(text)
    print(f"\nTables and plot: {folder}")


def report(found: dict) -> str:
    settings, quality = found["settings"], found["feature_models"]
    counts = ", ".join(f"{count} {role}" for role, count in settings["num_prompts"].items())
    at_one = [name for name in found["exact"] if not is_other_strength(name)]
    return "\n\n".join(
        [
            "# What evaluate_lora.py measures beside an exact reader",
            f"`python -m benchmarks.miniature.comparison`; prompts: {counts}; {settings['num_seeds']} drawings of "
            f"each. {machine()}.",
            f"## Rankings\n\n{rank_table(found)}\n\n{RANK_NOTE}",
            f"## Exact figures\n\n{exact_table(found)}\n\n{EXACT_NOTE}",
            f"## The same drawings by evaluate_lora.py\n\n{figure_table(found, [*found['figures']])}",
            f"## The feature models, on objects that they were never shown\n\n{quality_table(quality)}",
            f"## Side by side, at full strength\n\n{short_table(found, at_one)}",
        ]
    )


class Ranking(NamedTuple):
    """How a column orders contenders beside the exact reader.

    Attributes:
        correlation: Spearman's; None if one of the two is the same for all.
        swaps: (better, worse) by the exact reader, of the pairs that the column orders the other way or not at all;
            the pair that is furthest apart comes first.
        num_apart: pairs that the exact reader tells apart.
    """

    correlation: float | None
    swaps: list[tuple[str, str]]
    num_apart: int


def ranking(found: dict, pair: Pair) -> Ranking | None:
    """None if the column was not measured."""
    figures, exact = found["figures"], found["exact"]
    names = [name for name in exact if pair.exact in exact[name] and pair.column in figures.get(name, {})]
    if len(names) < 2:
        return None
    truth = {name: exact[name][pair.exact] for name in names}
    value = {name: figures[name][pair.column] for name in names}
    ordered = [
        (better, worse)
        for one in combinations(names, 2)
        for better, worse in (sorted(one, key=truth.get, reverse=True),)
        if truth[better] - truth[worse] >= pair.apart - 1e-9
    ]
    swaps = [(better, worse) for better, worse in ordered if value[better] <= value[worse]]
    swaps.sort(key=lambda swap: truth[swap[1]] - truth[swap[0]])
    return Ranking(spearman([*truth.values()], [*value.values()]), swaps, len(ordered))


def spearman(first: list[float], second: list[float]) -> float | None:
    """Rank correlation, -1 to 1; equal values share their mean rank. None if all values of one list are equal."""
    if len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def ranks(values: list[float]) -> np.ndarray:
    """(N,), from 1; the mean of their ranks for equal values."""
    array = np.asarray(values)
    return np.array([(np.sum(array < value) + np.sum(array <= value) + 1) / 2 for value in array])


def rank_table(found: dict) -> str:
    rows = []
    for pair in PAIRS:
        if (ranked := ranking(found, pair)) is None:
            continue
        worst = "-"
        if ranked.swaps:
            better, worse = ranked.swaps[0]
            worst = f"{worse} ({value(found, worse, pair)}) above {better} ({value(found, better, pair)})"
        swapped = f"{len(ranked.swaps)} of {ranked.num_apart}"
        rows.append([found["columns"][pair.column], pair.exact, correlation_text(ranked), swapped, worst])
    return markdown(["exact figure", "rank correlation", "swapped / apart", "the worst one (exact)"], rows)


def value(found: dict, name: str, pair: Pair) -> str:
    return f"{found['exact'][name][pair.exact]:.2f}"


def exact_table(found: dict) -> str:
    names = list(dict.fromkeys(pair.exact for pair in PAIRS))
    return markdown(names, [[name, *cells(figures, names)] for name, figures in found["exact"].items()])


def figure_table(found: dict, contenders: list[str]) -> str:
    keys = [*found["columns"]]
    rows = [[name, *cells(found["figures"][name], keys)] for name in contenders]
    return markdown([found["columns"][key] for key in keys], rows)


def short_table(found: dict, contenders: list[str]) -> str:
    """Exact figures and columns side by side."""
    shown = [pair for pair in PAIRS if pair.column in found["columns"] and pair.column in SHORT]
    headings = [text for pair in shown for text in (f"{pair.exact} (exact)", found["columns"][pair.column])]
    headings = list(dict.fromkeys(headings))
    rows = []
    for name in contenders:
        row = {}
        for pair in shown:
            row[f"{pair.exact} (exact)"] = cells(found["exact"][name], [pair.exact])[0]
            row[found["columns"][pair.column]] = cells(found["figures"][name], [pair.column])[0]
        rows.append([name, *(row[heading] for heading in headings)])
    return markdown(headings, rows)


def cells(figures: dict[str, float], keys: list[str]) -> list[str]:
    return [f"{figures[key]:.2f}" if key in figures else "-" for key in keys]


def quality_table(quality: dict[str, dict[str, float]]) -> str:
    rows = [
        [name, ", ".join(f"{key.replace('_', ' ')} {share:.2f}" for key, share in figures.items())]
        for name, figures in quality.items()
    ]
    return markdown(["shares of pictures"], rows)


def plot(found: dict, path: Path) -> None:
    """A panel per pair: exact figure (x) and column (y); a dot per contender, named at full strength."""
    shown = [(pair, ranked) for pair in PAIRS if (ranked := ranking(found, pair)) is not None]
    num_columns = 4
    num_rows = -(-len(shown) // num_columns)
    size = (4.4 * num_columns, 3.3 * num_rows)
    fig, all_axes = plt.subplots(num_rows, num_columns, figsize=size, layout="constrained", squeeze=False)
    for axes, (pair, ranked) in zip(all_axes.flat, shown, strict=False):
        draw_panel(axes, found, pair)
        title = f"{found['columns'][pair.column]}\nrank correlation {correlation_text(ranked)}, swapped "
        axes.set_title(f"{title}{len(ranked.swaps)} of {ranked.num_apart}", fontsize=9)
    for axes in all_axes.flat[len(shown) :]:
        axes.axis("off")
    fig.savefig(path, dpi=80)
    plt.close(fig)


def draw_panel(axes: Axes, found: dict, pair: Pair) -> None:
    points = {
        name: (found["exact"][name][pair.exact], figures[pair.column])
        for name, figures in found["figures"].items()
        if pair.column in figures and pair.exact in found["exact"][name]
    }
    for name, point in points.items():
        colour = OTHER_STRENGTH if is_other_strength(name) else BASE_COLOUR if name == BASE else LORA_COLOUR
        axes.scatter(*point, s=16 if is_other_strength(name) else 34, color=colour, zorder=2)
    named = sorted((name for name in points if not is_other_strength(name)), key=lambda name: points[name][1])
    low, high = axes.get_ylim()
    # Names stand at the right, from bottom to top in the order of their points, far enough apart to be read.
    heights = spread_out([(points[name][1] - low) / (high - low) for name in named], 0.085)
    for name, height in zip(named, heights, strict=True):
        axes.annotate(
            name,
            points[name],
            xytext=(1.04, height),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": OTHER_STRENGTH, "linewidth": 0.6},
        )
    axes.set_xlabel(f"{pair.exact} (exact)", fontsize=9)
    axes.grid(color="#e3e6eb", linewidth=0.8)
    axes.set_axisbelow(True)


def spread_out(heights: list[float], gap: float) -> list[float]:
    """Ascending heights moved so that neighbours are at least `gap` apart, around their middle."""
    moved = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    shift = (sum(moved) - sum(heights)) / max(1, len(heights))
    return [height - shift for height in moved]


def is_other_strength(name: str) -> bool:
    """Whether a contender's name says another strength than 1."""
    return " x" in name


def correlation_text(ranked: Ranking) -> str:
    return "-" if ranked.correlation is None else f"{ranked.correlation:.2f}"
