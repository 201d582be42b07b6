"""Writes tables, plot and sheet of D-OPSD and its rivals."""

import json

from benchmarks.miniature.concepts import CONCEPTS, training_pictures
from benchmarks.miniature.methods import NUM_TRAIN_STEPS
from benchmarks.miniature.once import SAMPLES, WAVES
from benchmarks.miniature.plots import CELL_PIXELS, draw
from benchmarks.miniature.report import machine
from benchmarks.miniature.rival_methods import RECIPES, Recipe, Rival, RivalPlan
from benchmarks.miniature.rival_plots import plot_fronts
from benchmarks.miniature.rival_runs import STRENGTHS, RivalExperiment
from benchmarks.miniature.rival_study import study
from benchmarks.miniature.tables import COLUMNS_NOTE, markdown, retention_text, spread, value_of
from benchmarks.miniature.world import REFERENCE_SUFFIX, caption
from dopsd.sheets import Cell, contact_sheet, save_png


COLUMNS = (
    *("concept", "detail", "residual", "FD", "places", "old: exact", "old: detail", "old: residual", "neighbours"),
    *("wrong words", "stack", "stack: old", "retention", "forwards"),
)
SHORT_COLUMNS = ("concept", "old: exact", "detail", "old: detail", "residual", "places", "forwards")
STUDY_COLUMNS = ("concept", "old: exact", "detail", "old: detail", "residual", "old: residual", "places")
GRID_NOTE = """\
concept / old: exact of one run each. Bold: the setting that is reported, which has the largest sum of the two."""
CHOSEN_NOTE = """\
The runs that the settings were chosen by. "at the end of": the best rate or number of steps is the smallest or largest
of the grid, so that the method may be better beyond it."""
REPORT_NOTE = """\
strength: of the LoRA at sampling, instead of 1. The settings were chosen on another seed, which is not reported."""


def write(experiment: RivalExperiment, plan: RivalPlan) -> None:
    """Writes rivals_MODEL.json, .md, .png and _sheet.png into the experiment's folder, and prints the tables.

    All runs must have their results.
    """
    stem = f"rivals_{experiment.architecture.name}"
    reported = {name: [experiment.result(run) for run in runs] for name, runs in plan.reported.items()}
    studied = {
        condition: {name: [plan.short_result(run) for run in runs] for name, runs in by_method.items()}
        for condition, by_method in study(plan).items()
    }
    once = {part: experiment.once.figures(part) for wave in WAVES for part in wave}
    everything = {
        "settings": experiment.settings,
        "once": once,
        "grid": {name: grid_results(plan, RECIPES[name]) for name in plan.names},
        "chosen": {rival.name: setting(rival) for rival in plan.tuned},
        "reported": {
            name: {str(run.folder): result for run, result in zip(plan.reported[name], results, strict=True)}
            for name, results in reported.items()
        },
        "study": studied,
    }
    (experiment.folder / f"{stem}.json").write_text(json.dumps(everything, indent=1) + "\n")
    sections = [
        introduction(experiment, plan),
        f"## Each method at its chosen setting\n\n{report_table(reported)}\n\n{COLUMNS_NOTE} {REPORT_NOTE}",
        *concept_sections(experiment, plan),
        f"## What was chosen\n\n{chosen_table(plan)}\n\n{CHOSEN_NOTE}",
        f"## Grids\n\n{GRID_NOTE}\n\n{grid_table(plan)}",
        f"## Trained once\n\n{once_table(experiment, once)}",
    ]
    if studied:
        sections.append(f"## Where off-policy breaks\n\n{study_table(studied)}")
    sections.append(f"## Retention\n\n{retention_section(reported)}")
    text = "\n\n".join(sections)
    (experiment.folder / f"{stem}.md").write_text(text + "\n")
    print(text)
    plot_fronts(everything["grid"], everything["chosen"], reported["base"][0], experiment.folder / f"{stem}.png")
    save_png(sheet(experiment, plan), experiment.folder / f"{stem}_sheet.png")
    print(f"\nTables, plot and sheet: {experiment.folder}")


def introduction(experiment: RivalExperiment, plan: RivalPlan) -> str:
    return (
        f"# {experiment.architecture.title}: D-OPSD and its rivals\n\n"
        f"`python -m benchmarks.miniature.rivals --model {experiment.architecture.name}`; concepts "
        f"{', '.join(concept.name for concept in plan.concepts)}, seeds {', '.join(map(str, plan.seeds))}, "
        f"{experiment.eval_count} pictures per task. Grids: concept {CONCEPTS[0].name}, seed {plan.grid_seed}, "
        f"{experiment.short_count} pictures per task. {machine()}."
    )


def setting(rival: Rival) -> dict:
    return {"learning_rate": rival.flags["learning_rate"], "steps": rival.num_steps(NUM_TRAIN_STEPS)}


def grid_results(plan: RivalPlan, recipe: Recipe) -> list[dict]:
    """The result of each setting of the grid, with the setting."""
    return [setting(run.method) | {"result": plan.short_result(run)} for run in plan.grid(recipe)]


def report_table(reported: dict[str, list[dict]]) -> str:
    """One row per method. Strengths come last."""
    rows = []
    for name, results in reported.items():
        row = [name, *(spread(results, column) for column in COLUMNS)]
        for strength in STRENGTHS:
            at_strength = [result.get(f"at_{strength}", {}) for result in results]
            row += [spread(at_strength, column) for column in ("concept", "old: exact")]
        rows.append(row)
    headings = [f"strength {strength}{what}" for strength in STRENGTHS for what in ("", ": old")]
    return markdown([*COLUMNS, *headings], rows)


def concept_sections(experiment: RivalExperiment, plan: RivalPlan) -> list[str]:
    """The table for each concept, if there are several."""
    if len(plan.concepts) == 1:
        return []
    return [
        f"### {concept.name}\n\n"
        + report_table(
            {
                name: [experiment.result(run) for run in runs if run.concept == concept]
                for name, runs in plan.reported.items()
            }
        )
        for concept in plan.concepts
    ]


def chosen_table(plan: RivalPlan) -> str:
    rows = []
    for name in plan.names:
        recipe, grid = RECIPES[name], grid_results(plan, RECIPES[name])
        chosen = setting(plan.chosen(recipe))
        (result,) = [entry["result"] for entry in grid if chosen.items() <= entry.items()]
        cells = [spread([result], column) for column in SHORT_COLUMNS]
        rows.append([name, f"{chosen['learning_rate']:g}", str(chosen["steps"]), ends(chosen, grid), *cells])
    return markdown(["learning rate", "steps", "at the end of", *SHORT_COLUMNS], rows)


def ends(chosen: dict, grid: list[dict]) -> str:
    """Which of the chosen values are the smallest or largest of the grid."""
    names = {"learning_rate": "rates", "steps": "steps"}
    is_at_end = {
        label: chosen[name] in (min(entry[name] for entry in grid), max(entry[name] for entry in grid))
        for name, label in names.items()
    }
    return ", ".join(label for label, is_end in is_at_end.items() if is_end) or "-"


def grid_table(plan: RivalPlan) -> str:
    """One row per method and number of steps, one column per learning rate."""
    rates = sorted({rate for name in plan.names for rate in plan.rates(RECIPES[name])})
    rows = []
    for name in plan.names:
        grid, chosen = grid_results(plan, RECIPES[name]), setting(plan.chosen(RECIPES[name]))
        for num_steps in plan.grid_steps:
            texts = dict.fromkeys(rates, "-")
            for entry in grid:
                if entry["steps"] == num_steps:
                    text = " / ".join(f"{value_of(entry['result'], c):.2f}" for c in ("concept", "old: exact"))
                    texts[entry["learning_rate"]] = f"**{text}**" if chosen.items() <= entry.items() else text
            rows.append([name, str(num_steps), *texts.values()])
    return markdown(["steps", *(f"{rate:g}" for rate in rates)], rows)


def once_table(experiment: RivalExperiment, once: dict[str, dict]) -> str:
    """What each part draws for prompts of known objects, at the deployed number of steps and at many."""
    settings = experiment.once_settings
    counts = list(once[SAMPLES]["drawn"])
    names = {"samples": "base, which draws the samples", "repair": "base with adapter and repair LoRA"}
    rows = []
    for part, figures in once.items():
        drawn = [figures["drawn"][count] for count in counts]
        cells = [f"{values[name]:.2f}" for values in drawn for name in ("exact", "detail", "residual")]
        rows.append([names.get(part, part), str(figures["forwards"]), *cells])
    headings = [f"{name}, {count} steps" for count in counts for name in ("old: exact", "detail", "residual")]
    note = (
        f"Adapter and undistilled model: {settings.adapter_steps} and {settings.undistilled_steps} steps of "
        f"{settings.batch_size} of {settings.num_pictures} samples, at peak learning rates of "
        f"{settings.adapter_rate:g} and {settings.undistilled_rate:g}; repair LoRA: {settings.repair_steps} steps at "
        f"{settings.repair_rate:g}. These costs are not in the other tables' forwards."
    )
    return markdown(["forwards", *headings], rows) + f"\n\n{note}"


def study_table(studied: dict[str, dict[str, list[dict]]]) -> str:
    rows = [
        [f"{condition}: {name}", *(spread(results, column) for column in STUDY_COLUMNS)]
        for condition, by_method in studied.items()
        for name, results in by_method.items()
    ]
    return markdown([*STUDY_COLUMNS], rows)


def retention_section(reported: dict[str, list[dict]]) -> str:
    measured = {name: results for name, results in reported.items() if "retention" in results[0]}
    return retention_text(measured, [result for results in measured.values() for result in results])


def sheet(experiment: RivalExperiment, plan: RivalPlan):
    """A row per method, of the first concept and seed: prompts for the concept, then old prompts."""
    concept, seed = plan.concepts[0], plan.seeds[0]
    new = [caption(concept.word, background) for background in concept.other_backgrounds]
    old = experiment.evaluator.old.prompts[: len(new)]
    images, _ = training_pictures(concept, seed)
    rows = []
    for name, runs in plan.reported.items():
        pipeline = experiment.load(runs[0])
        is_teacher = runs[0].method.kind == "teacher"
        pictures = [
            draw(pipeline, prompt + REFERENCE_SUFFIX, number, reference=images[number])
            if is_teacher
            else draw(pipeline, prompt, number)
            for number, prompt in enumerate(new)
        ]
        pictures += [None if is_teacher else draw(pipeline, prompt, number) for number, prompt in enumerate(old)]
        rows.append((name, [Cell(picture) for picture in pictures]))
    return contact_sheet(
        f"{experiment.architecture.title}: {concept.name}, seed {seed}",
        [f'"{prompt}"' for prompt in (*new, *old)],
        rows,
        note=f"Pictures of a column start from the same noise; {experiment.architecture.num_steps} steps.",
        cell_pixels=CELL_PIXELS,
    )
