"""The experiment's results as Markdown."""

import numpy as np

from benchmarks.miniature import world
from benchmarks.miniature.methods import Run


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
    "retention": ("retention", None),
}
STEP_COLUMNS = ("concept", "detail", "residual", "old: exact", "old: detail", "old: residual")
COLUMNS_NOTE = f"""\
Mean ± standard deviation over runs, at the deployed number of steps. concept: share of pictures in which shape,
texture and colours of the new object are right, on backgrounds that no training picture shows. background: share of
pictures on the background asked for. detail: amplitude of the grain, 1 for real pictures; blurred ones have less,
noisy ones more. residual: errors in the object's square, such as ragged edges, 1 for real pictures. FD: Frechet
distance of random features to real pictures, lower is better. places: effective number of places at which objects are
drawn, of {len(world.POSES)}. old: the same for objects that the base model knows. retention: as the training script
logs it, 0 = unchanged. The base model has one run per concept."""
FAIRNESS_NOTE = """\
In favour of D-OPSD: its teacher is almost perfect in this world, and its own runs on the object with seed 0 decided
the learning rate, schedule, epsilon, batch size and number of steps. SFT has the same settings, which were not chosen
for it, and sees as many states per step. With AdamW's own epsilon (in the ablations) it learns the object about as
well and keeps more of the old prompts, though far fewer than D-OPSD. SFT trains at all sigmas, as usual; the base
model knows four of them (the ablations have SFT at these four). In favour of both: the base model was taught that
words which describe an object count more than a picture and more than unknown words."""


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
    digits = 1 if "places" in column else 3 if "FD" in column else 2
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column has no heading."""
    lines = ["| | " + " | ".join(headings) + " |", "|---" * (len(headings) + 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def table(results: dict[str, list[dict]]) -> str:
    """One row per method.

    Args:
        results: the name of each method and the results of its runs.
    """
    rows = []
    for name, method_results in results.items():
        steps = [result["steps"] for result in method_results if "steps" in result]
        cells = [spread(method_results, column) for column in COLUMNS]
        rows.append([name, f"{np.mean(steps):.0f}" if steps else "-", *cells])
    return markdown(["steps", *COLUMNS], rows)


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


def retention_text(results: list[tuple[Run, dict]]) -> str:
    """Whether retention ranks the methods like the metrics on old prompts do, on the first run's concept."""
    concept = results[0][0].concept
    by_method = {}
    for run, result in results:
        if run.concept == concept and run.method.kind != "teacher" and not run.method.stops_at_dopsd:
            name = run.method.name if run.method.kind != "dopsd" or run.method.flags else "D-OPSD"
            by_method.setdefault(name, []).append(result)
    names = [name for name in ("base", "D-OPSD", "SFT", "teacher: live") if name in by_method]
    lines = [f"Concept {concept.name!r}, from least to most harm, by each figure's mean:", ""]
    for column, is_better_high in (("retention", False), ("old: exact", True), ("old: FD", False)):
        means = {name: np.mean(values_of(by_method[name], column)) for name in names}
        order = sorted(names, key=means.get, reverse=is_better_high)
        lines.append(f"- {column}: " + ", ".join(f"{name} {means[name]:.3f}" for name in order))
    gaps = [
        abs(result["retention"] - result["retention_logged"]) for _, result in results if "retention_logged" in result
    ]
    if gaps:
        lines += ["", f"What training logged differs from this by at most {max(gaps):.0e}, in {len(gaps)} runs."]
    return "\n".join(lines)
