"""results.json, results.csv, and the tables of a comparison as text."""

import csv
import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ..errors import InputError, first_line
from ..files import read_regular_file
from ..output import naming_file, replacing
from .columns import (
    COPIES,
    DETAIL,
    DETAIL_UNRELATED,
    DIVERSITY,
    FOLLOWING,
    LEAKAGE,
    LIKENESS,
    MASKED,
    RETENTION,
    SCORE,
    SHARPNESS,
    SHARPNESS_UNRELATED,
    quantity_of,
)
from .comparison import Column, Comparison, Figure, Prompt


RESULTS_FILE, CSV_FILE = "results.json", "results.csv"
FORMAT = 1
REFERENCE = "training pictures"
# Those that say most, for tables that have room for only a few.
MAIN = (
    *(LIKENESS, f"{LIKENESS}_{MASKED}", SCORE, COPIES, FOLLOWING, SHARPNESS, DETAIL, DIVERSITY),
    RETENTION,
    *LEAKAGE.values(),
)
COARSE = (SHARPNESS, SHARPNESS_UNRELATED, DETAIL, DETAIL_UNRELATED, SCORE)  # printed with two digits
HEADING_CHARACTERS = 12
ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}


# Files


def write_results(folder: Path, comparison: Comparison) -> None:
    """Writes results.json and results.csv. Raises `OutputError` if one cannot be written."""
    content = {"format": FORMAT, **asdict(comparison)}
    for path, text in (
        (folder / RESULTS_FILE, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False, default=str)),
        (folder / CSV_FILE, as_csv(comparison)),
    ):
        with naming_file(path), replacing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def read_results(path: Path) -> Comparison:
    """The comparison in a results.json.

    Raises:
        InputError: it cannot be read, or is none.
    """
    try:
        content = json.loads(read_regular_file(path))
        if (found := content.pop("format", None)) != FORMAT:
            raise ValueError(f"its format is {found}, not {FORMAT}")
        content["prompts"] = [Prompt(**prompt) for prompt in content["prompts"]]
        content["columns"] = [Column(**column) for column in content["columns"]]
        content["figures"] = {name: as_figures(found) for name, found in content["figures"].items()}
        content["reference"] = as_figures(content["reference"])
        return Comparison(**content)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"{path}: is not the {RESULTS_FILE} of a comparison ({first_line(error)})") from error


def as_figures(content: dict[str, dict]) -> dict[str, Figure]:
    return {key: Figure(**figure) for key, figure in content.items()}


def as_csv(comparison: Comparison) -> str:
    """A row per contender, and one for the training pictures among themselves.

    Each column has four: the mean, its spread over prompts and over seeds, and the number of pictures or pairs. The
    feature model is in the heading.
    """
    headings = ["name"]
    for column in comparison.columns:
        model = f" [{column.model}]" if column.model else ""
        headings += [f"{column.key}{part}{model}" for part in ("", " over prompts", " over seeds", " count")]
    lines = []
    writer = csv.writer(_Lines(lines), lineterminator="\n")
    writer.writerow(headings)
    for name, figures in [*comparison.figures.items(), (f"({REFERENCE})", comparison.reference)]:
        row = [name]
        for column in comparison.columns:
            figure = figures.get(column.key)
            row += [""] * 4 if figure is None else [*asdict(figure).values()]
        writer.writerow(row)
    return "".join(lines)


class _Lines:
    """A file for `csv.writer` that collects what is written."""

    def __init__(self, lines: list[str]):
        self.write = lines.append


# Text


def shown(column: Column, figure: Figure | None) -> str:
    """The mean as it is printed; "" without a figure."""
    if figure is None:
        return ""
    quantity = quantity_of(column)
    if quantity == COPIES:
        return f"{100 * figure.mean:.0f} %"
    if quantity in LEAKAGE.values():
        return f"{figure.mean:+.3f}"
    return f"{figure.mean:.2f}" if quantity in COARSE else f"{figure.mean:.3f}"


def main_columns(comparison: Comparison) -> list[Column]:
    """One for each of the quantities in `MAIN`, DINO's where two models have measured it."""
    first: dict[str, Column] = {}
    for column in comparison.columns:
        first.setdefault(quantity_of(column), column)
    return [first[quantity] for quantity in MAIN if quantity in first]


def table_rows(comparison: Comparison, columns: Iterable[Column]) -> list[list[str]]:
    """A row per contender: its name and its figures; and the training pictures' if they have one of these figures."""
    columns = list(columns)
    rows = [
        [name, *(shown(column, figures.get(column.key)) for column in columns)]
        for name, figures in comparison.figures.items()
    ]
    if any(column.key in comparison.reference for column in columns):
        rows.append([f"({REFERENCE})", *(shown(column, comparison.reference.get(column.key)) for column in columns)])
    return rows


def headings(columns: Iterable[Column]) -> list[str]:
    """With arrows for the direction that is better."""
    return ["", *(f"{column.label}{ARROWS[column.is_better]}" for column in columns)]


def table_text(comparison: Comparison) -> str:
    """The main figures for the terminal: a line per contender, below headings of several lines."""
    columns = main_columns(comparison)
    wrapped = [textwrap.wrap(text, HEADING_CHARACTERS) for text in headings(columns)]
    height = max(map(len, wrapped))
    above = [[*[""] * (height - len(lines)), *lines] for lines in wrapped]
    rows = [*map(list, zip(*above, strict=True)), *table_rows(comparison, columns)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *texts in rows:
        aligned = (text.rjust(width) for text, width in zip(texts, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)


def markdown_table(comparison: Comparison) -> str:
    """The main figures for a model card."""
    columns = main_columns(comparison)

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rows = [headings(columns), ["---", *["---:"] * len(columns)], *table_rows(comparison, columns)]
    return "\n".join(map(line, rows))
