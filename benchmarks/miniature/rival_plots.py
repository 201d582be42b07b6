"""The plot of every setting of every method: what is learned against what is kept, and both against the cost."""

from collections.abc import Callable
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.miniature.rival_methods import FAMILIES, RECIPES
from benchmarks.miniature.tables import value_of


COLOURS = ("#d9480f", "#1b6b8f", "#1b7f5c")  # of a family's methods
OTHERS = "#d5d9e0"
# By the number of steps: what it is called, and matplotlib's marker.
MARKERS = {60: ("triangle", "v"), 120: ("circle", "o"), 240: ("square", "s"), 480: ("diamond", "D")}
Point = tuple[float, float]
PointOf = Callable[[dict], Point]


def plot_fronts(grid: dict[str, list[dict]], chosen: dict[str, dict], base: dict, once_costs: str, path: Path) -> None:
    """A column per family, with all other methods' points in grey.

    Above: old exact (x) and concept (y), with the front of each method. Below: cost in forwards (x) and the mean of
    the two (y).

    Args:
        grid: of each method, its settings with their results.
        chosen: of each method, the setting that is reported, whose point is ringed.
        base: the base model's result, measured like the grid's.
        once_costs: says what the marks behind methods' names cost.
    """
    families = {name: [recipe.name for recipe in recipes if recipe.name in grid] for name, recipes in FAMILIES.items()}
    families = {name: methods for name, methods in families.items() if methods}
    fig, all_axes = plt.subplots(
        2, len(families), figsize=(3.4 * len(families), 7.4), layout="constrained", squeeze=False
    )
    for column, (family, methods) in enumerate(families.items()):
        for axes, point_of in zip(all_axes[:, column], (kept_and_learned, cost_and_mean), strict=True):
            for name, entries in grid.items():
                if name not in methods:
                    points = [point_of(entry) for entry in entries]
                    axes.scatter(*zip(*points, strict=True), s=9, color=OTHERS, zorder=1)
            for name, colour in zip(methods, COLOURS, strict=False):
                draw_method(axes, grid[name], chosen[name], point_of, colour, name + RECIPES[name].mark)
            axes.grid(color="#e3e6eb", linewidth=0.8)
            axes.set_axisbelow(True)
        top, bottom = all_axes[:, column]
        top.axvline(value_of(base, "old: exact"), color="#868e96", linewidth=1, linestyle="--")
        top.set(title=family, xlabel="old: exact", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        bottom.set(xlabel="cost in forwards", xscale="log", ylim=(-0.03, 1.03))
        bottom.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    all_axes[0, 0].set_ylabel("concept")
    all_axes[1, 0].set_ylabel("mean of concept and old: exact")
    steps = ", ".join(f"{name} {count}" for count, (name, _) in MARKERS.items())
    fig.suptitle(f"All settings of each method; ringed: chosen. Steps: {steps}. Grey: the other methods.", fontsize=11)
    fig.supxlabel(once_costs, fontsize=9)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def draw_method(axes: Axes, entries: list[dict], chosen: dict, point_of: PointOf, colour: str, label: str) -> None:
    """The points of one method, the front that they form, and a ring around the chosen one."""
    points = [point_of(entry) for entry in entries]
    for entry, point in zip(entries, points, strict=True):
        axes.scatter(*point, s=26, color=colour, marker=MARKERS[entry["steps"]][1], zorder=3)
        if chosen.items() <= entry.items():
            axes.scatter(*point, s=130, facecolors="none", edgecolors=colour, linewidths=1.6, zorder=4)
    is_cheap_better = point_of is cost_and_mean
    line = front(points, is_small_x_better=is_cheap_better)
    axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.2, zorder=2, label=label)


def kept_and_learned(entry: dict) -> Point:
    return value_of(entry["result"], "old: exact"), value_of(entry["result"], "concept")


def cost_and_mean(entry: dict) -> Point:
    return entry["result"]["forwards"], sum(kept_and_learned(entry)) / 2


def front(points: list[Point], *, is_small_x_better: bool) -> list[Point]:
    """The points that no other one beats in both coordinates, in the order of x. More y is better."""
    best = []
    for x, y in sorted(points, key=lambda point: (point[0] if is_small_x_better else -point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return sorted(best)
