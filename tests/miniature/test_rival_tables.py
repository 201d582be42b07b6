"""The committed comparisons with rivals, and the pages that show them."""

import json
from pathlib import Path

import pytest

from benchmarks.miniature.architectures import ARCHITECTURES
from benchmarks.miniature.files import MODEL, REPOSITORY
from benchmarks.miniature.plans import SEEDS
from benchmarks.miniature.rival_methods import CHEAPER, FAMILIES, INDIFFERENCE, RECIPES, choice
from benchmarks.miniature.rival_report import EVIDENCE_COLUMNS, recipe_of, report_table, setting, study_table
from benchmarks.miniature.rival_runs import STRENGTHS
from benchmarks.miniature.rival_study import CONDITIONS, HELD, UNHELD


RESULTS, PAGE = MODEL.parent / "results", MODEL.parent / "rivals.md"
# Families whose LoRAs were not sampled at other strengths; the page says why.
WITHOUT_STRENGTHS = {
    "klein": (),
    "zimage": ("repair LoRA", "training adapter", "undistilled model", "delta transfer"),
}
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


def test_the_study_on_klein_is_complete_and_shown():
    study = json.loads(committed("klein", ".json").read_text())["study"]
    assert study.keys() == CONDITIONS.keys()
    for by_method in study.values():
        assert by_method.keys() >= {*HELD, *UNHELD}
        assert all({"new", "old"} <= result.keys() for results in by_method.values() for result in results)
    table = study_table(study)
    assert table in committed("klein", ".md").read_text() and table in PAGE.read_text()


@models
def test_the_first_seed_of_each_method_with_strengths_has_all_of_them(model):
    reported = json.loads(committed(model, ".json").read_text())["reported"]
    without = {recipe.name for family in WITHOUT_STRENGTHS[model] for recipe in FAMILIES[family]}
    first_seed = str(SEEDS[0])
    for name, by_folder in reported.items():
        recipe = recipe_of(name)
        has_strengths = recipe is not None and recipe.name not in without
        for folder, result in by_folder.items():
            _, _, seed, _ = Path(folder).parts
            wanted = STRENGTHS if has_strengths and seed == first_seed else ()
            assert {key for key in result if key.startswith("at_")} == {f"at_{strength}" for strength in wanted}, (
                folder
            )
            assert all({"new", "old"} == result[f"at_{strength}"].keys() for strength in wanted), folder
