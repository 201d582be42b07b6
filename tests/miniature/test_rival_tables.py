"""The committed comparisons with rivals, and the pages that show them."""

import json
from pathlib import Path

import pytest

from benchmarks.miniature.architectures import ARCHITECTURES
from benchmarks.miniature.files import MODEL, REPOSITORY
from benchmarks.miniature.rival_methods import CHEAPER, INDIFFERENCE, RECIPES, choice
from benchmarks.miniature.rival_report import EVIDENCE_COLUMNS, report_table, setting, study_table


RESULTS, PAGE = MODEL.parent / "results", MODEL.parent / "rivals.md"
models = pytest.mark.parametrize("model", ARCHITECTURES)


def committed(model: str, suffix: str) -> Path:
    return RESULTS / f"rivals_{model}{suffix}"


@models
def test_the_reported_settings_are_those_that_the_committed_grids_choose(model):
    results = json.loads(committed(model, ".json").read_text())
    assert results["grid"].keys() == RECIPES.keys()
    architecture = ARCHITECTURES[model]
    for name, entries in results["grid"].items():
        recipe = RECIPES[name]
        rivals = [recipe.at(*(entry[key] for key in ("learning_rate", "steps", "scale"))) for entry in entries]
        measured = [(rival, entry["result"]) for rival, entry in zip(rivals, entries, strict=True)]
        chosen, cheaper = choice(measured), choice(measured, INDIFFERENCE)
        assert setting(chosen) == results["chosen"][name], name
        assert setting(cheaper) == results["chosen"].get(f"{name}{CHEAPER}", setting(chosen)), name
        assert all(result["steps"] == setting(chosen)["steps"] for result in results["reported"][name].values())
        if not chosen.is_delta:  # whose cost depends on what is transferred
            cost = round(chosen.cost(setting(chosen)["steps"], architecture))
            assert {result["forwards"] for result in results["reported"][name].values()} == {cost}, name


@models
def test_the_pages_show_the_committed_comparison(model):
    results, report = json.loads(committed(model, ".json").read_text()), committed(model, ".md").read_text()
    reported = {name: [*by_folder.values()] for name, by_folder in results["reported"].items()}
    evidence, page = (REPOSITORY / "docs/evidence.md").read_text(), PAGE.read_text()
    assert report_table(reported) in report
    assert report_table(reported, EVIDENCE_COLUMNS, has_strengths=False) in evidence
    assert f"rivals_{model}.png" in evidence and f"rivals_{model}_sheet.png" in page
    if results["study"]:
        assert study_table(results["study"]) in report and study_table(results["study"]) in page
