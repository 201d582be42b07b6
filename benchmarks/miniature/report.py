"""Writes the experiment's tables, plots and contact sheets."""

import json
import os
import platform
from importlib.metadata import version

from benchmarks.miniature.methods import RunsByMethod, all_runs
from benchmarks.miniature.parts import NUM_STEPS
from benchmarks.miniature.plots import concept_sheet, plot, step_sheet
from benchmarks.miniature.runs import STEP_COUNTS, Experiment
from benchmarks.miniature.tables import (
    COLUMNS_NOTE,
    FAIRNESS_NOTE,
    missed_text,
    retention_text,
    step_table,
    table,
)
from dopsd.sheets import beside, save_png


NUM_OLD_PROMPTS = 2  # on a sheet


def write(experiment: Experiment, first: RunsByMethod, ablations: RunsByMethod, by_step_count: RunsByMethod) -> None:
    """Writes results.json, results.md, plots and sheets into the experiment's folder, and prints the tables.

    All runs must have their results.
    """
    write_results(experiment, first, ablations, by_step_count)
    sections = [introduction(experiment, first), *first_sections(experiment, first)]
    if ablations:
        sections.append(ablation_section(experiment, ablations))
    sections += [
        retention_section(experiment, first, ablations),
        step_section(experiment, by_step_count),
    ]
    text = "\n\n".join(sections)
    (experiment.folder / "results.md").write_text(text + "\n")
    print(text)
    write_plots(experiment, first, ablations)
    write_sheets(experiment, first, by_step_count)
    print(f"\nSheets and plots: {experiment.folder}")


def results_of(experiment: Experiment, runs: RunsByMethod) -> dict[str, list[dict]]:
    return {name: [experiment.result(run) for run in method_runs] for name, method_runs in runs.items()}


def write_results(
    experiment: Experiment, first: RunsByMethod, ablations: RunsByMethod, by_step_count: RunsByMethod
) -> None:
    """Writes results.json: the folder of each run and its result, with the results by step count where there are."""
    results = {str(run.folder): experiment.result(run) for run in all_runs(first, ablations)}
    for run in all_runs(by_step_count):
        results[str(run.folder)]["step_counts"] = experiment.results_by_step_count(run)
    (experiment.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def introduction(experiment: Experiment, first: RunsByMethod) -> str:
    seeds = sorted({run.seed for run in all_runs(first)})
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))
    return (
        f"# Results of `python -m benchmarks.miniature.experiment`\n\n{experiment.num_train_steps} steps per run, "
        f"{experiment.eval_count} pictures per task, seeds {', '.join(map(str, seeds))}. {os.cpu_count()} CPU "
        f"cores, {platform.machine()}; {versions}."
    )


def first_sections(experiment: Experiment, first: RunsByMethod) -> list[str]:
    """The first table, over all concepts and for each concept."""
    results = results_of(experiment, first)
    sections = [f"## First table\n\n{table(results)}\n\n{COLUMNS_NOTE}\n\n{FAIRNESS_NOTE}"]
    if missed := missed_text(results):
        sections.append(missed)
    for concept in dict.fromkeys(run.concept for run in all_runs(first)):
        part = {name: [run for run in runs if run.concept == concept] for name, runs in first.items()}
        sections.append(f"### {concept.name}\n\n{table(results_of(experiment, part))}")
    return sections


def ablation_section(experiment: Experiment, ablations: RunsByMethod) -> str:
    concept = all_runs(ablations)[0].concept
    return f"## Ablations, concept {concept.name!r}\n\n{table(results_of(experiment, ablations))}"


def retention_section(experiment: Experiment, first: RunsByMethod, ablations: RunsByMethod) -> str:
    results = [(run, experiment.result(run)) for run in all_runs(first, ablations)]
    return f"## Retention\n\n{retention_text(results)}"


def step_section(experiment: Experiment, by_step_count: RunsByMethod) -> str:
    results = {name: [experiment.results_by_step_count(run) for run in runs] for name, runs in by_step_count.items()}
    run = all_runs(by_step_count)[0]
    return (
        f"## Numbers of sampling steps; trained at {NUM_STEPS}\n\nConcept {run.concept.name!r}, seed {run.seed}.\n\n"
        f"{step_table(results)}"
    )


def write_plots(experiment: Experiment, first: RunsByMethod, ablations: RunsByMethod) -> None:
    base = experiment.result(first["base"][0])
    plot(results_of(experiment, first), base, experiment.folder / "first_table.png")
    if ablations:
        plot(results_of(experiment, ablations), base, experiment.folder / "ablations.png")


def write_sheets(experiment: Experiment, first: RunsByMethod, by_step_count: RunsByMethod) -> None:
    """Writes sheet.png, with the concepts next to each other for the first seed, and step_counts.png."""
    old_prompts = experiment.evaluator.old.prompts[:NUM_OLD_PROMPTS]
    sheets = []
    for base in first["base"]:
        same = {
            name: next(run for run in first[name] if (run.concept, run.seed) == (base.concept, base.seed))
            for name in ("base", "SFT", "D-OPSD")
        }
        pipelines = {name: experiment.load(run) for name, run in same.items()}
        variant = " variant" if base.concept.name == "two-colour" else ""
        title = f"A new {base.concept.name}{variant}"
        sheets.append(concept_sheet(base.concept, base.seed, pipelines, old_prompts, title=title))
    save_png(beside(sheets, 0), experiment.folder / "sheet.png")

    concept = all_runs(by_step_count)[0].concept
    pipelines = {name: experiment.load(runs[0]) for name, runs in by_step_count.items()}
    sheet = step_sheet(concept, pipelines, old_prompts[0], STEP_COUNTS)
    save_png(sheet, experiment.folder / "step_counts.png")
