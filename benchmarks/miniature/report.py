"""Writes the experiment's tables, plots and contact sheets."""

import json
import os
import platform
from importlib.metadata import version

from benchmarks.miniature.concepts import CONCEPTS, wrong_word_task
from benchmarks.miniature.methods import RECIPES, Run, RunsByMethod, all_runs, runs_by_method, runs_of, with_rate
from benchmarks.miniature.plans import ON_OBJECT, Comparison, Plan
from benchmarks.miniature.plots import concept_sheet, plot, step_sheet
from benchmarks.miniature.runs import Experiment
from benchmarks.miniature.tables import (
    COLUMNS_NOTE,
    GRID_NOTE,
    grid_table,
    missed_text,
    retention_text,
    step_table,
    table,
)
from dopsd.sheets import beside, save_png


NUM_OLD_PROMPTS = 2  # on a sheet


def write(experiment: Experiment, plan: Plan) -> None:
    """Writes results.json, results.md, plots and sheets into the experiment's folder, and prints the tables.

    All runs must have their results.
    """
    first, *others = plan.comparisons
    write_results(experiment, plan)
    sections = [introduction(experiment, first), *first_sections(experiment, first)]
    sections += [comparison_section(experiment, comparison) for comparison in others]
    sections += [retention_section(experiment, plan), step_section(experiment, plan)]
    text = "\n\n".join(sections)
    (experiment.folder / "results.md").write_text(text + "\n")
    print(text)
    write_plots(experiment, plan.comparisons)
    write_sheets(experiment, plan)
    print(f"\nSheets and plots: {experiment.folder}")


def results_of(experiment: Experiment, runs: RunsByMethod) -> dict[str, list[dict]]:
    return {name: [experiment.result(run) for run in method_runs] for name, method_runs in runs.items()}


def write_results(experiment: Experiment, plan: Plan) -> None:
    """Writes results.json: the folder of each run and its result, with the results by step count where there are."""
    runs = all_runs(*(comparison.runs for comparison in plan.comparisons))
    results = {str(run.folder): experiment.result(run) for run in runs}
    for run in all_runs(plan.by_step_count):
        results[str(run.folder)]["step_counts"] = experiment.results_by_step_count(run, plan.step_counts)
    (experiment.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def introduction(experiment: Experiment, first: Comparison) -> str:
    return (
        f"# {experiment.architecture.title}: results of `python -m benchmarks.miniature.experiment --model "
        f"{experiment.architecture.name}`\n\n{experiment.num_train_steps} steps per run "
        f"where nothing else is said, {experiment.eval_count} pictures per task, seeds "
        f"{', '.join(map(str, first.seeds))}. {machine()}."
    )


def machine() -> str:
    """The kind of machine, and versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))
    return f"{os.cpu_count()} CPU cores, {platform.machine()}; {versions}"


def first_sections(experiment: Experiment, first: Comparison) -> list[str]:
    """The first table, over all concepts and for each concept."""
    results = results_of(experiment, first.runs)
    sections = [f"## {first.title}\n\n{table(results)}\n\n{COLUMNS_NOTE}"]
    if missed := missed_text(results):
        sections.append(missed)
    for concept in first.concepts:
        part = runs_by_method(first.methods, (concept,), first.seeds)
        sections.append(f"### {concept.name}\n\n{table(results_of(experiment, part))}")
    return sections


def comparison_section(experiment: Experiment, comparison: Comparison) -> str:
    heading = f"## {comparison.title}\n\n"
    if comparison.name.startswith("grid"):
        return heading + f"{GRID_NOTE}\n\n{grid_table(grid_results(comparison, experiment.result))}"
    return heading + table(results_of(experiment, comparison.runs))


def grid_results(comparison: Comparison, result_of) -> dict[str, dict[float, dict]]:
    """The results of each recipe by learning rate.

    Args:
        result_of: (run) -> its result.
    """
    (concept,), (seed,) = comparison.concepts, comparison.seeds
    epsilon = comparison.methods[0].flags["adam_epsilon"]
    return {
        recipe.name: {
            rate: result_of(Run(concept, seed, with_rate(recipe, epsilon, rate))) for rate in comparison.rates
        }
        for recipe in RECIPES
    }


def retention_section(experiment: Experiment, plan: Plan) -> str:
    results = [experiment.result(run) for run in all_runs(*(comparison.runs for comparison in plan.comparisons))]
    text = retention_text(results_of(experiment, retention_runs(plan)), results)
    return f"## Retention, {ON_OBJECT}\n\n{text}"


def retention_runs(plan: Plan) -> RunsByMethod:
    """The runs whose retention is compared with their other figures."""
    seeds = plan.comparisons[0].seeds
    return {name: runs_of(method, CONCEPTS[:1], seeds) for name, method in plan.retained.items()}


def step_section(experiment: Experiment, plan: Plan) -> str:
    results = {
        name: [experiment.results_by_step_count(run, plan.step_counts) for run in runs]
        for name, runs in plan.by_step_count.items()
    }
    runs = all_runs(plan.by_step_count)
    concepts, seeds = dict.fromkeys(run.concept.name for run in runs), dict.fromkeys(str(run.seed) for run in runs)
    return (
        f"## Numbers of sampling steps; made for {experiment.architecture.num_steps}\n\n"
        f"Concepts: {', '.join(concepts)}. Seeds: {', '.join(seeds)}.\n\n{step_table(results)}"
    )


def write_plots(experiment: Experiment, comparisons: list[Comparison]) -> None:
    base = experiment.result(comparisons[0].runs["base"][0])
    for comparison in comparisons:
        if not comparison.name.startswith("grid") and CONCEPTS[0] in comparison.concepts:
            plot(results_of(experiment, comparison.runs), base, experiment.folder / f"{comparison.name}.png")


def write_sheets(experiment: Experiment, plan: Plan) -> None:
    """Writes sheet.png, with the concepts next to each other for the first seed, and step_counts.png."""
    first = plan.comparisons[0].runs
    old_prompts = experiment.evaluator.old.prompts[:NUM_OLD_PROMPTS]
    sheets = []
    for base in first["base"]:
        same = {
            name: next(run for run in first[method.name] if (run.concept, run.seed) == (base.concept, base.seed))
            for name, method in plan.shown.items()
        }
        pipelines = {name: experiment.load(run) for name, run in same.items()}
        variant = " variant" if base.concept.name == "two-colour" else ""
        prompts = [*old_prompts, *wrong_word_task(base.concept, 1).prompts]
        sheets.append(
            concept_sheet(base.concept, base.seed, pipelines, prompts, title=f"A new {base.concept.name}{variant}")
        )
    save_png(beside(sheets, 0), experiment.folder / "sheet.png")

    concept = all_runs(plan.by_step_count)[0].concept
    pipelines = {name: experiment.load(runs[0]) for name, runs in plan.by_step_count.items()}
    sheet = step_sheet(concept, pipelines, old_prompts[0], plan.step_counts)
    save_png(sheet, experiment.folder / "step_counts.png")
