"""The experiment's results as Markdown."""

from collections.abc import Collection

import numpy as np

from benchmarks.miniature import world


# Heading -> where a result has the value.
COLUMNS = {
    "concept": ("new", "exact"),
    "background": ("new", "background"),
    "detail": ("new", "detail"),
    "residual": ("new", "residual"),
    "FD": ("new", "fd"),
    "places": ("new", "poses"),
    "old: exact": ("old", "exact"),
    "old: detail": ("old", "detail"),
    "old: residual": ("old", "residual"),
    "old: FD": ("old", "fd"),
    "old: places": ("old", "poses"),
    "neighbours": ("neighbours", "exact"),
    "wrong words": ("wrong_words", "exact"),
    "stack": ("stack", "exact"),
    "stack: old": ("stack", "old"),
    "retention": ("retention", None),
    "forwards": ("forwards", None),
    "seconds": ("seconds", None),
}
# Of the tables in the miniature's README.
MAIN_COLUMNS = (
    *(
        "concept",
        "residual",
        "places",
        "old: exact",
        "old: detail",
        "neighbours",
        "wrong words",
        "stack",
        "stack: old",
    ),
    *("forwards", "seconds"),
)
# Of the table in the project's README: methods and columns, and what they are called there.
README_METHODS = {
    "base": "the model before",
    "SFT": "ordinary LoRA training (SFT)",
    "SFT + prior pictures": "SFT with DreamBooth's prior pictures",
    "D-OPSD": "D-OPSD as published",
    "D-OPSD, one state + prior": "**D-OPSD as trained here**",
}
README_COLUMNS = {
    "concept": "new object right",
    "old: exact": "old prompts right",
    "wrong words": "other unknown words draw it",
    "stack": "two LoRAs, both right",
    "old: detail": "few-step detail",
}
STEP_COLUMNS = ("concept", "detail", "residual", "old: exact", "old: detail", "old: residual")
COLUMNS_NOTE = f"""\
Mean ± standard deviation over runs, at the deployed number of steps. concept: share of pictures in which shape,
texture and colours of the new object are right, on backgrounds that no training picture shows. background: share of
pictures on the background asked for. detail: amplitude of the grain, 1 for real pictures; blurred ones have less,
noisy ones more. residual: errors in the object's square, such as ragged edges, 1 for real pictures. FD: Frechet
distance of random features to real pictures, lower is better. places: effective number of places at which objects are
drawn, of {len(world.POSES)}. old: the same for objects that the base model knows. neighbours: share of right pictures
of known objects that differ from the new one in shape, texture or colours only. wrong words: share of the pictures of
other made-up words that show the new object; 0 is right. stack: with the LoRAs of two concepts at full strength, share
of right pictures of these; stack: old, of known objects. retention: as the training script logs it, 0 = unchanged.
forwards: cost of the training in forward passes of the student for one picture. seconds: of the training steps, on one
core. The base model has one run per concept."""
GRID_NOTE = """\
concept / old: exact / wrong words of one run each. Bold: the learning rate of the tables, which has the
largest sum of concept and old: exact. The seed is none of the tables'."""


def value_of(result: dict, column: str) -> float | None:
    """A result's value in a column of the table; None if it was not measured."""
    part, name = COLUMNS[column]
    value = result.get(part)
    return value if name is None or value is None else value.get(name)


def values_of(results: list[dict], column: str) -> list[float]:
    """The values that were measured."""
    return [value for value in (value_of(result, column) for result in results) if value is not None]


def spread(results: list[dict], column: str) -> str:
    """Mean and standard deviation, or a dash if nothing was measured."""
    values = values_of(results, column)
    if not values:
        return "-"
    if column in ("forwards", "seconds"):
        return f"{np.mean(values):.0f}"
    return mean_and_deviation(values, 1 if "places" in column else 3 if "FD" in column else 2)


def mean_and_deviation(values: list[float], digits: int) -> str:
    """Of at least one value; the standard deviation of two or more."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column has no heading."""
    lines = ["| | " + " | ".join(headings) + " |", "|---" * (len(headings) + 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def table(results: dict[str, list[dict]], columns: Collection[str] = COLUMNS) -> str:
    """One row per method.

    Args:
        results: the name of each method and the results of its runs.
    """
    rows = []
    for name, method_results in results.items():
        steps = [result["steps"] for result in method_results if "steps" in result]
        cells = [spread(method_results, column) for column in columns]
        rows.append([name, f"{np.mean(steps):.0f}" if steps else "-", *cells])
    return markdown(["steps", *columns], rows)


def readme_table(results: dict[str, list[dict]]) -> str:
    """The table in the project's README. Its last column is the cost relative to D-OPSD's.

    Args:
        results: of `README_METHODS`.
    """
    cost_of = {name: np.mean(values_of(results[name], "forwards") or [0]) for name in README_METHODS}
    rows = []
    for name, label in README_METHODS.items():
        cells = [spread(results[name], column) for column in README_COLUMNS]
        rows.append([label, *cells, f"{cost_of[name] / cost_of['D-OPSD']:.2f}" if cost_of[name] else "-"])
    return markdown([*README_COLUMNS.values(), "cost"], rows)


def score(result: dict) -> float:
    """What learning rates are chosen by."""
    return value_of(result, "concept") + value_of(result, "old: exact")


def grid_table(results: dict[str, dict[float, dict]]) -> str:
    """One row per method, one column per learning rate: concept, old: exact and wrong words. The best is bold.

    Args:
        results: the name of each method, its learning rates and their results.
    """
    rows = []
    for name, by_rate in results.items():
        chosen = best_rate(by_rate)
        cells = []
        for rate, result in by_rate.items():
            text = " / ".join(f"{value_of(result, c):.2f}" for c in ("concept", "old: exact", "wrong words"))
            cells.append(f"**{text}**" if rate == chosen else text)
        rows.append([name, *cells])
    return markdown([f"{rate:g}" for rate in next(iter(results.values()))], rows)


def best_rate(by_rate: dict[float, dict]) -> float:
    """The learning rate with the best score; of equals the one that learns more, then the smaller one."""
    return max(by_rate, key=lambda rate: (round(score(by_rate[rate]), 2), value_of(by_rate[rate], "concept"), -rate))


def step_table(results: dict[str, list[dict[str, dict]]]) -> str:
    """One row per method and number of sampling steps.

    Args:
        results: the name of each method and the results by step count of its runs.
    """
    rows = []
    for name, method_results in results.items():
        for count in method_results[0]:
            cells = [spread([result[count] for result in method_results], column) for column in STEP_COLUMNS]
            rows.append([name, count, *cells])
    return markdown(["sampling steps", *STEP_COLUMNS], rows)


def missed_text(results: dict[str, list[dict]]) -> str:
    """How many of the runs that were to stop at an accuracy reached it; empty if all did."""
    lines = []
    for name, method_results in results.items():
        reached = [result["reached"] for result in method_results if "reached" in result]
        if not all(reached):
            lines.append(f"{name}: reached in {sum(reached)} of {len(reached)} runs; the others ran to the end.")
    return "\n".join(lines)


def retention_text(results: dict[str, list[dict]], all_results: list[dict]) -> str:
    """Whether retention ranks methods like the metrics on old prompts do.

    Args:
        results: methods, and the results of their runs on one concept.
        all_results: of the runs whose logged retention is compared with the measured one.
    """
    lines = ["From least to most harm, by each figure's mean:", ""]
    for column, is_better_high in (("retention", False), ("old: exact", True), ("old: FD", False)):
        means = {name: np.mean(values_of(method_results, column)) for name, method_results in results.items()}
        order = sorted(means, key=means.get, reverse=is_better_high)
        lines.append(f"- {column}: " + ", ".join(f"{name} {means[name]:.3f}" for name in order))
    gaps = [abs(result["retention"] - result["retention_logged"]) for result in all_results if is_logged(result)]
    if gaps:
        lines += ["", f"What training logged differs from this by at most {max(gaps):.0e}, in {len(gaps)} runs."]
    return "\n".join(lines)


def is_logged(result: dict) -> bool:
    return result.get("retention_logged") is not None
