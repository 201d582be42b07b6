import json

from benchmarks.miniature.concepts import CONCEPTS
from benchmarks.miniature.experiment import SEEDS
from benchmarks.miniature.files import MODEL, REPOSITORY
from benchmarks.miniature.methods import ABLATIONS, BASE, DOPSD, FIRST_TABLE, SFT, STEP_TABLE, Run, runs_of
from benchmarks.miniature.tables import missed_text, retention_text, step_table, table, value_of


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
    results = [
        (BASE, {"old": {"exact": 1.0, "fd": 0.1}, "retention": 0.0}),
        (DOPSD, {"old": {"exact": 0.8, "fd": 0.2}, "retention": 0.3, "retention_logged": 0.29}),
        (SFT, {"old": {"exact": 0.1, "fd": 0.15}, "retention": 0.8}),
    ]
    text = retention_text([(Run(CONCEPTS[0], 0, method), result) for method, result in results])
    assert "retention: base 0.000, D-OPSD 0.300, SFT 0.800" in text
    assert "old: exact: base 1.000, D-OPSD 0.800, SFT 0.100" in text
    assert "old: FD: base 0.100, SFT 0.150, D-OPSD 0.200" in text
    assert "at most 1e-02, in 1 runs" in text


def test_the_readmes_show_the_committed_results():
    folder = MODEL.parent / "results"
    results = json.loads((folder / "results.json").read_text())
    report, readme = (folder / "results.md").read_text(), (MODEL.parent / "README.md").read_text()

    def rows(methods, concepts, seeds=SEEDS, part=lambda result: result):
        return {
            method.name: [part(results[str(run.folder)]) for run in runs_of(method, concepts, seeds)]
            for method in methods
        }

    first = table(rows(FIRST_TABLE, CONCEPTS))
    ablations = table(rows(ABLATIONS, CONCEPTS[:1]))
    steps = step_table(rows(STEP_TABLE, CONCEPTS[:1], SEEDS[:1], lambda result: result["step_counts"]))
    assert first in report and first in readme and first in (REPOSITORY / "README.md").read_text()
    assert ablations in report and ablations in readme
    assert steps in report and steps in readme
    runs = [run for method in (*FIRST_TABLE, *ABLATIONS) for run in runs_of(method, CONCEPTS[:1], SEEDS)]
    ranking = retention_text([(run, results[str(run.folder)]) for run in runs])
    lines = [line for line in ranking.splitlines() if line.startswith("- ")]
    assert len(lines) == 3
    for line in lines:
        assert line in report and line in readme
