"""Writes the experiment's tables, plots and contact sheets."""

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version

from benchmarks.miniature.concepts import CONCEPTS, Concept, Renaming, wrong_word_task
from benchmarks.miniature.methods import (
    BASE,
    DOPSD,
    DOPSD_BOTH,
    LEARNING_RATE_GRIDS,
    LIVE,
    PUBLISHED,
    RECIPES,
    SFT,
    Method,
    Run,
    RunsByMethod,
    all_runs,
    runs_by_method,
    runs_of,
    with_rate,
)
from benchmarks.miniature.plots import concept_sheet, plot, step_sheet
from benchmarks.miniature.runs import STEP_COUNTS, Experiment
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


@dataclass(frozen=True)
class Comparison:
    """A table of the report.

    Attributes:
        name: of its plot, and in the code.
        has_stacks: whether the LoRAs of two concepts are measured together.
    """

    name: str
    title: str
    methods: tuple[Method, ...]
    concepts: tuple[Concept | Renaming, ...]
    seeds: tuple[int, ...]
    has_stacks: bool = False

    @property
    def runs(self) -> RunsByMethod:
        return runs_by_method(self.methods, self.concepts, self.seeds)


def write(experiment: Experiment, comparisons: list[Comparison], by_step_count: RunsByMethod) -> None:
    """Writes results.json, results.md, plots and sheets into the experiment's folder, and prints the tables.

    All runs must have their results. The first comparison is shown for each concept, and on the sheets.
    """
    first, *others = comparisons
    write_results(experiment, comparisons, by_step_count)
    sections = [introduction(experiment, first), *first_sections(experiment, first)]
    sections += [comparison_section(experiment, comparison) for comparison in others]
    sections.append(retention_section(experiment, comparisons))
    sections.append(step_section(experiment, by_step_count))
    text = "\n\n".join(sections)
    (experiment.folder / "results.md").write_text(text + "\n")
    print(text)
    write_plots(experiment, comparisons)
    write_sheets(experiment, first.runs, by_step_count)
    print(f"\nSheets and plots: {experiment.folder}")


def results_of(experiment: Experiment, runs: RunsByMethod) -> dict[str, list[dict]]:
    return {name: [experiment.result(run) for run in method_runs] for name, method_runs in runs.items()}


def write_results(experiment: Experiment, comparisons: list[Comparison], by_step_count: RunsByMethod) -> None:
    """Writes results.json: the folder of each run and its result, with the results by step count where there are."""
    runs = all_runs(*(comparison.runs for comparison in comparisons))
    results = {str(run.folder): experiment.result(run) for run in runs}
    for run in all_runs(by_step_count):
        results[str(run.folder)]["step_counts"] = experiment.results_by_step_count(run)
    (experiment.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def introduction(experiment: Experiment, first: Comparison) -> str:
    return (
        f"# Results of `python -m benchmarks.miniature.experiment`\n\n{experiment.num_train_steps} steps per run "
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
            rate: result_of(Run(concept, seed, with_rate(recipe, epsilon, rate)))
            for rate in LEARNING_RATE_GRIDS[epsilon]
        }
        for recipe in RECIPES
    }


def retention_section(experiment: Experiment, comparisons: list[Comparison]) -> str:
    results = [experiment.result(run) for run in all_runs(*(comparison.runs for comparison in comparisons))]
    text = retention_text(results_of(experiment, retention_runs(comparisons)), results)
    return f"## Retention, concept {CONCEPTS[0].name!r}\n\n{text}"


def retention_runs(comparisons: list[Comparison]) -> RunsByMethod:
    """The runs whose retention is compared with their other figures."""
    methods = {"base": BASE, "D-OPSD": DOPSD, "SFT": SFT, "D-OPSD, one state + prior": DOPSD_BOTH}
    if any(comparison.name == "ablations" for comparison in comparisons):
        methods |= {"D-OPSD, large epsilon": PUBLISHED, "a live teacher": LIVE}
    return {name: runs_of(method, CONCEPTS[:1], comparisons[0].seeds) for name, method in methods.items()}


def step_section(experiment: Experiment, by_step_count: RunsByMethod) -> str:
    results = {name: [experiment.results_by_step_count(run) for run in runs] for name, runs in by_step_count.items()}
    run = all_runs(by_step_count)[0]
    return (
        f"## Numbers of sampling steps; made for {experiment.architecture.num_steps}\n\n"
        f"Concept {run.concept.name!r}, seed {run.seed}.\n\n{step_table(results)}"
    )


def write_plots(experiment: Experiment, comparisons: list[Comparison]) -> None:
    base = experiment.result(comparisons[0].runs["base"][0])
    for comparison in comparisons:
        if not comparison.name.startswith("grid") and CONCEPTS[0] in comparison.concepts:
            plot(results_of(experiment, comparison.runs), base, experiment.folder / f"{comparison.name}.png")


def write_sheets(experiment: Experiment, first: RunsByMethod, by_step_count: RunsByMethod) -> None:
    """Writes sheet.png, with the concepts next to each other for the first seed, and step_counts.png."""
    old_prompts = experiment.evaluator.old.prompts[:NUM_OLD_PROMPTS]
    sheets = []
    for base in first["base"]:
        same = {
            name: next(run for run in first[method.name] if (run.concept, run.seed) == (base.concept, base.seed))
            for name, method in {"base": BASE, "SFT": SFT, "D-OPSD": DOPSD, "D-OPSD with prior": DOPSD_BOTH}.items()
        }
        pipelines = {name: experiment.load(run) for name, run in same.items()}
        variant = " variant" if base.concept.name == "two-colour" else ""
        prompts = [*old_prompts, *wrong_word_task(base.concept, 1).prompts]
        sheets.append(
            concept_sheet(base.concept, base.seed, pipelines, prompts, title=f"A new {base.concept.name}{variant}")
        )
    save_png(beside(sheets, 0), experiment.folder / "sheet.png")

    concept = all_runs(by_step_count)[0].concept
    pipelines = {name: experiment.load(runs[0]) for name, runs in by_step_count.items()}
    sheet = step_sheet(concept, pipelines, old_prompts[0], STEP_COUNTS)
    save_png(sheet, experiment.folder / "step_counts.png")
