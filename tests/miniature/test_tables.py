import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from benchmarks.miniature import methods, zimage_methods
from benchmarks.miniature.files import MODEL, REPOSITORY
from benchmarks.miniature.methods import RunsByMethod
from benchmarks.miniature.plans import Comparison, Plan, klein_plan, zimage_plan
from benchmarks.miniature.report import grid_results, retention_runs
from benchmarks.miniature.tables import (
    MAIN_COLUMNS,
    README_METHODS,
    best_rate,
    grid_table,
    missed_text,
    readme_table,
    retention_text,
    step_table,
    table,
    value_of,
)


def test_a_table_has_means_and_standard_deviations():
    results = [
        {"new": {"exact": value, "background": 1, "detail": 1, "fd": 0.1, "poses": 12}, "steps": 400}
        for value in (0.5, 0.7)
    ]
    assert value_of(results[0], "concept") == 0.5 and value_of(results[0], "retention") is None
    row = table({"D-OPSD": results}).splitlines()[-1]
    assert row.startswith("| D-OPSD | 400 | 0.60 ± 0.14 | 1.00 ± 0.00 |") and row.endswith("| - |")


def test_runs_that_missed_the_accuracy_are_counted():
    results = {"D-OPSD": [{"steps": 3}], "stopped": [{"reached": True}, {"reached": False}, {"reached": False}]}
    assert missed_text(results) == "stopped: reached in 1 of 3 runs; the others ran to the end."
    assert missed_text({"stopped": [{"reached": True}]}) == ""


def test_retention_is_ranked_beside_the_metrics_that_it_stands_for():
    results = {
        "base": [{"old": {"exact": 1.0, "fd": 0.1}, "retention": 0.0}],
        "D-OPSD": [{"old": {"exact": 0.8, "fd": 0.2}, "retention": 0.3, "retention_logged": 0.29}],
        "SFT": [{"old": {"exact": 0.1, "fd": 0.15}, "retention": 0.8}],
    }
    text = retention_text(results, sum(results.values(), []))
    assert "retention: base 0.000, D-OPSD 0.300, SFT 0.800" in text
    assert "old: exact: base 1.000, D-OPSD 0.800, SFT 0.100" in text
    assert "old: FD: base 0.100, SFT 0.150, D-OPSD 0.200" in text
    assert "at most 1e-02, in 1 runs" in text


def test_the_projects_readme_compares_costs_with_the_published_method():
    results = {name: [{"new": {"exact": 0.5}, "forwards": 50}] for name in README_METHODS}
    results |= {"base": [{"new": {"exact": 0.0}}], "D-OPSD": [{"forwards": 100}, {"forwards": 100}]}
    lines = readme_table(results).splitlines()
    assert lines[0].startswith("| | new object right | old prompts right |") and lines[0].endswith("| cost |")
    assert lines[2] == "| the model before | 0.00 | - | - | - | - | - |"
    assert lines[-1].startswith("| **D-OPSD as trained here** | 0.50 |") and lines[-1].endswith("| 0.50 |")


def test_the_best_learning_rate_learns_and_remembers():
    def result(new: float, old: float, wrong: float) -> dict:
        return {"new": {"exact": new}, "old": {"exact": old}, "wrong_words": {"exact": wrong}}

    by_rate = {1e-3: result(0.9, 0.8, 0.9), 3e-3: result(0.9, 0.9, 0.1), 1e-2: result(0.8, 1.0, 0.1)}
    assert best_rate(by_rate) == 3e-3  # of two equals the one that learns more
    assert best_rate(by_rate | {1e-4: result(0.9, 0.9, 0.1)}) == 1e-4  # then the smaller one
    text = grid_table({"SFT": by_rate}).splitlines()
    assert text[0] == "| | 0.001 | 0.003 | 0.01 |"
    assert text[-1] == "| SFT | 0.90 / 0.80 / 0.90 | **0.90 / 0.90 / 0.10** | 0.80 / 1.00 / 0.10 |"


@dataclass(frozen=True)
class Committed:
    """An experiment whose results are in the repository.

    Attributes:
        rates: of each method, for each epsilon.
        page: that shows the tables.
    """

    folder: Path
    page: Path
    plan: Plan
    rates: list[tuple[float, ...]]

    @cached_property
    def results(self) -> dict:
        return json.loads((self.folder / "results.json").read_text())

    def rows(self, runs: RunsByMethod) -> dict[str, list[dict]]:
        return {name: [self.results[str(run.folder)] for run in some] for name, some in runs.items()}

    def grid(self, comparison: Comparison) -> dict[str, dict[float, dict]]:
        return grid_results(comparison, lambda run: self.results[str(run.folder)])


RESULTS, PAGES = MODEL.parent / "results", MODEL.parent
KLEIN_EXPERIMENT = Committed(
    RESULTS, PAGES / "README.md", klein_plan(is_quick=False), [*methods.LEARNING_RATES.values()]
)
ZIMAGE_EXPERIMENT = Committed(
    RESULTS / "zimage", PAGES / "zimage.md", zimage_plan(is_quick=False), [zimage_methods.LEARNING_RATES]
)
experiments = pytest.mark.parametrize("committed", [KLEIN_EXPERIMENT, ZIMAGE_EXPERIMENT], ids=["klein", "zimage"])


@experiments
def test_the_learning_rates_of_the_tables_are_the_best_of_the_committed_grids(committed):
    grids = [comparison for comparison in committed.plan.comparisons if comparison.name.startswith("grid")]
    assert len(grids) == len(committed.rates)
    for comparison, rates in zip(grids, committed.rates, strict=True):
        assert tuple(map(best_rate, committed.grid(comparison).values())) == rates


@experiments
def test_the_pages_show_the_committed_results(committed):
    report, page, plan = (committed.folder / "results.md").read_text(), committed.page.read_text(), committed.plan
    for comparison in plan.comparisons:
        if comparison.name.startswith("grid"):
            text = grid_table(committed.grid(comparison))
            assert text in report and text in page
        else:
            rows = committed.rows(comparison.runs)
            assert table(rows) in report and table(rows, MAIN_COLUMNS) in page
    by_count = committed.rows(plan.by_step_count).items()
    steps = step_table({name: [result["step_counts"] for result in results] for name, results in by_count})
    assert steps in report and steps in page
    text = retention_text(committed.rows(retention_runs(plan)), [*committed.results.values()])
    lines = [line for line in text.splitlines()[2:] if line]
    assert len(lines) == 4 and all(line in report and line in page for line in lines)


def test_the_projects_readme_shows_the_committed_results():
    rows = KLEIN_EXPERIMENT.rows(KLEIN_EXPERIMENT.plan.comparisons[0].runs)
    assert readme_table(rows) in (REPOSITORY / "README.md").read_text()
