"""Writes tables, plot and sheet of D-OPSD and its rivals."""

import json
from collections.abc import Sequence

from PIL import Image

from benchmarks.miniature.concepts import training_pictures
from benchmarks.miniature.costs import NUM_ROLLOUT_STEPS
from benchmarks.miniature.methods import NUM_TRAIN_STEPS
from benchmarks.miniature.once import NEEDED, SAMPLES
from benchmarks.miniature.plots import CELL_PIXELS, draw
from benchmarks.miniature.report import machine
from benchmarks.miniature.rival_methods import (
    CHEAPER,
    GRID_CONCEPT,
    INDIFFERENCE,
    MARKS,
    RECIPES,
    Recipe,
    Rival,
    RivalPlan,
    RivalRun,
)
from benchmarks.miniature.rival_plots import plot_fronts
from benchmarks.miniature.rival_runs import NUM_MANY_STEPS, STRENGTHS, RivalExperiment
from benchmarks.miniature.rival_study import study
from benchmarks.miniature.tables import COLUMNS_NOTE, markdown, retention_text, spread, value_of
from benchmarks.miniature.world import REFERENCE_SUFFIX, caption
from dopsd.sheets import Cell, contact_sheet, save_png


COLUMNS = (
    *("concept", "detail", "residual", "FD", "places", "old: exact", "old: detail", "old: residual", "neighbours"),
    *("wrong words", "stack", "stack: old", "retention", "forwards"),
)
EVIDENCE_COLUMNS = (  # in docs/evidence.md
    *("concept", "old: exact", "wrong words", "residual", "places", "detail", "old: detail", "stack", "stack: old"),
    *("retention", "forwards"),
)
SHORT_COLUMNS = ("concept", "old: exact", "detail", "old: detail", "residual", "places", "forwards")
STUDY_COLUMNS = ("concept", "old: exact", "detail", "old: detail", "residual", "old: residual", "places")
GRID_NOTE = """\
concept / old: exact of one run each. Bold: the setting that is reported. scale: of the repair LoRA, or of the change
that delta transfer teaches."""
CHOSEN_NOTE = f"""\
The runs that the settings were chosen by: the largest sum of concept and old: exact, and of equals the cheapest.
"cheaper": the cheapest of those within {INDIFFERENCE:g} of the best, where that is another. Detail has no part in the
choice. "at the end of": the chosen rate, number of steps or scale is
the smallest or largest of the grid, so that the method may be better beyond it."""
STUDY_NOTE = """\
Off-policy at the setting that was chosen for D-OPSD, and at its own if that is another, on the concept, prompts and
noise by which settings were chosen, but with the first of the reported seeds. "±": mean and standard deviation of
five seeds."""
FOLLOWED_NOTE = f"""\
What delta transfer teaches, without a student: few steps along the base's velocity and the change that the LoRA makes
in the many-step model. That LoRA was chosen by what the many-step model draws with it in {NUM_MANY_STEPS} steps, on
the concept and the pictures of the grids ("many-step model")."""
FOLLOWED_COLUMNS = ("concept", "old: exact", "detail", "old: detail", "residual", "places")


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
    once = {part: experiment.once.figures(part) for part in NEEDED}
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
        f"## Each method at its chosen setting\n\n{report_table(reported)}\n\n{COLUMNS_NOTE} "
        f"{report_note(experiment, plan)}",
        *concept_sections(experiment, plan),
        f"## What was chosen\n\n{chosen_table(plan)}\n\n{CHOSEN_NOTE}",
        f"## Grids\n\n{GRID_NOTE}\n\n{grid_table(plan)}",
        f"## Trained once\n\n{once_table(experiment, once)}",
    ]
    if followed := followed_table(experiment, plan):
        sections.append(f"## What delta transfer follows\n\n{followed}\n\n{FOLLOWED_NOTE}")
    if studied:
        sections.append(f"## Where off-policy breaks\n\n{study_table(studied)}\n\n{STUDY_NOTE}")
    sections.append(f"## Retention\n\n{retention_section(reported)}")
    text = "\n\n".join(sections)
    (experiment.folder / f"{stem}.md").write_text(text + "\n")
    print(text)
    plot_fronts(
        everything["grid"],
        everything["chosen"],
        plan.short_result(plan.base_run),
        marks_text(experiment, plan),
        experiment.folder / f"{stem}.png",
    )
    save_png(sheet(experiment, plan), experiment.folder / f"{stem}_sheet.png")
    print(f"\nTables, plot and sheet: {experiment.folder}")


def introduction(experiment: RivalExperiment, plan: RivalPlan) -> str:
    return (
        f"# {experiment.architecture.title}: D-OPSD and its rivals\n\n"
        f"`python -m benchmarks.miniature.rivals --model {experiment.architecture.name}`; concepts "
        f"{', '.join(concept.name for concept in plan.concepts)}, seeds {', '.join(map(str, plan.seeds))}, "
        f"{experiment.eval_count} pictures per task. Grids: concept {GRID_CONCEPT.name}, seed {plan.grid_seed}, "
        f"{experiment.short_count} pictures per task. {machine()}."
    )


def report_note(experiment: RivalExperiment, plan: RivalPlan) -> str:
    """What the numbers of the first table rest on."""
    deployed = experiment.architecture.num_steps
    lines = [
        "strength: of the LoRA at sampling, instead of 1, with the first seed only.",
        f"Settings were chosen on concept {GRID_CONCEPT.name} and seed {plan.grid_seed}, by other prompts for known "
        "objects and other noise; neither is reported.",
        "Flow matching draws noise and sigma once per picture and step, sigma with the deployed sampler's shift, "
        f"{experiment.shift:.2g}.",
    ]
    if deployed != NUM_ROLLOUT_STEPS:
        lines.append(
            f"D-OPSD, off-policy and delta transfer train at the states of {NUM_ROLLOUT_STEPS} steps; sampling takes "
            f"the deployed {deployed}."
        )
    return "\n".join([*lines, marks_text(experiment, plan)])


def marks_text(experiment: RivalExperiment, plan: RivalPlan) -> str:
    """What the plan's methods need once per model, whatever is taught; empty if nothing."""
    needed = {RECIPES[name].once_part for name in plan.names}
    names = {"adapter": "pictures and adapter", "undistilled": "pictures and undistilled model"}
    amounts = [
        f"{mark}: {names.get(part, 'the same as A, and the repair LoRA')}, {experiment.once.whole_cost(part):,.0f}"
        for part, mark in MARKS.items()
        if part in needed
    ]
    return f"Once per model, in forwards: {'; '.join(amounts)}." if amounts else ""


def setting(rival: Rival) -> dict:
    return {
        "learning_rate": rival.flags["learning_rate"],
        "steps": rival.num_steps(NUM_TRAIN_STEPS),
        "scale": rival.scale,
    }


def grid_results(plan: RivalPlan, recipe: Recipe) -> list[dict]:
    """The result of each setting of the grid, with the setting."""
    return [setting(run.method) | {"result": plan.short_result(run)} for run in plan.grid(recipe)]


def report_table(
    reported: dict[str, list[dict]], columns: Sequence[str] = COLUMNS, *, has_strengths: bool = True
) -> str:
    """One row per method. Strengths come last.

    Args:
        columns: the last one has the marks of what is trained once behind it.
    """
    rows, strengths = [], STRENGTHS if has_strengths else ()
    for name, results in reported.items():
        row = [name, *(spread(results, column) for column in columns)]
        row[-1] += mark_of(name)
        for strength in strengths:
            at_strength = [result.get(f"at_{strength}", {}) for result in results]
            row += [spread(at_strength, column) for column in ("concept", "old: exact")]
        rows.append(row)
    headings = [f"strength {strength}{what}" for strength in strengths for what in ("", ": old")]
    return markdown([*columns, *headings], rows)


def recipe_of(name: str) -> Recipe | None:
    """Of a row of the tables; None for the base and the teacher."""
    return RECIPES.get(name.removesuffix(CHEAPER))


def mark_of(name: str) -> str:
    recipe = recipe_of(name)
    return recipe.mark if recipe else ""


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
    for rival in plan.tuned:
        grid, chosen = grid_results(plan, recipe_of(rival.name)), setting(rival)
        (result,) = [entry["result"] for entry in grid if chosen.items() <= entry.items()]
        cells = [spread([result], column) for column in SHORT_COLUMNS]
        cells[-1] += mark_of(rival.name)
        values = [f"{chosen[key]:g}" for key in ("learning_rate", "steps", "scale")]
        rows.append([rival.name, *values, ends(chosen, grid), *cells])
    return markdown(["learning rate", "steps", "scale", "at the end of", *SHORT_COLUMNS], rows)


def ends(chosen: dict, grid: list[dict]) -> str:
    """Which of the chosen values are the smallest or largest of the grid."""
    labels = []
    for name, label in (("learning_rate", "rates"), ("steps", "steps"), ("scale", "scales")):
        values = {entry[name] for entry in grid}
        if len(values) > 1 and chosen[name] in (min(values), max(values)):
            labels.append(label)
    return ", ".join(labels) or "-"


def grid_table(plan: RivalPlan) -> str:
    """One row per method, number of steps and scale, one column per learning rate."""
    grids = {name: grid_results(plan, RECIPES[name]) for name in plan.names}
    rates = sorted({entry["learning_rate"] for grid in grids.values() for entry in grid})
    rows = []
    for name, grid in grids.items():
        chosen = setting(plan.chosen(RECIPES[name]))
        for num_steps, scale in sorted({(entry["steps"], entry["scale"]) for entry in grid}):
            texts = dict.fromkeys(rates, "-")
            for entry in grid:
                if (entry["steps"], entry["scale"]) == (num_steps, scale):
                    text = " / ".join(f"{value_of(entry['result'], c):.2f}" for c in ("concept", "old: exact"))
                    texts[entry["learning_rate"]] = f"**{text}**" if chosen.items() <= entry.items() else text
            rows.append([name, str(num_steps), f"{scale:g}", *texts.values()])
    return markdown(["steps", "scale", *(f"{rate:g}" for rate in rates)], rows)


def once_table(experiment: RivalExperiment, once: dict[str, dict]) -> str:
    """What each part draws for prompts of known objects, at the deployed and at many steps, and its loss by sigma."""
    settings = experiment.once_settings
    counts = list(once[SAMPLES]["drawn"])
    names = {"samples": "base, which draws the samples", "repair": "base with adapter and repair LoRA"}
    rows = []
    for part, figures in once.items():
        drawn = [figures["drawn"][count] for count in counts]
        cells = [f"{values[name]:.2f}" for values in drawn for name in ("exact", "detail", "residual")]
        losses = [f"{loss:.3f}" for loss in figures["loss"].values()]
        rows.append([names.get(part, part), str(figures["forwards"]), *cells, *losses])
    headings = [f"{name}, {count} steps" for count in counts for name in ("old: exact", "detail", "residual")]
    headings += [f"loss at {sigma}" for sigma in once[SAMPLES]["loss"]]
    note = (
        f"Adapter and undistilled model: {settings.adapter_steps} and {settings.undistilled_steps} steps of "
        f"{settings.batch_size} of {settings.num_pictures} samples, at peak learning rates of "
        f"{settings.adapter_rate:g} and {settings.undistilled_rate:g}; repair LoRA: {settings.repair_steps} steps at "
        f"{settings.repair_rate:g}. These costs are not in the other tables' forwards. loss: of flow matching at one "
        f"sigma, on {experiment.once.num_withheld} samples that were not trained on."
    )
    return markdown(["forwards", *headings], rows) + f"\n\n{note}"


def followed_table(experiment: RivalExperiment, plan: RivalPlan) -> str:
    """For each delta transfer, what it follows on the reported runs; empty without any."""
    rows = []
    for name, runs in plan.reported.items():
        if not runs[0].method.is_delta:
            continue
        method = runs[0].method
        source = RivalRun(GRID_CONCEPT, plan.grid_seed, method.source)
        for label, results in (
            (f"{name}: many-step model", [plan.many_step_result(source)]),
            (f"{name}: followed", [experiment.result(run)["followed"] for run in runs]),
            (f"{name}: student", [experiment.result(run) for run in runs]),
        ):
            cells = [spread(results, column) for column in FOLLOWED_COLUMNS]
            trained = setting(method.source)
            values = [trained["learning_rate"], trained["steps"], method.scale]
            rows.append([label, *(f"{value:g}" for value in values), *cells])
    headings = ["its rate", "its steps", "scale", *FOLLOWED_COLUMNS]
    return markdown(headings, rows) if rows else ""


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


def sheet(experiment: RivalExperiment, plan: RivalPlan) -> Image.Image:
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
