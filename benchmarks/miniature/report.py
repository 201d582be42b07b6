"""The experiment's results for people: tables, plots and contact sheets."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator
from PIL import Image

import world
from concepts import NUM_PICTURES, Concept, pictures_of
from dopsd.sheets import Cell, beside, contact_sheet, save_png, stack
from exam import final_latents
from parts import NUM_STEPS
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline


if TYPE_CHECKING:
    from experiment import Experiment, Run

CELL_PIXELS = 128
NUM_OLD_PROMPTS = 2  # on a sheet

# Heading -> where a result has the figure.
COLUMNS = {
    "concept": ("new", "exact"),
    "background": ("new", "background"),
    "detail": ("new", "detail"),
    "residual": ("new", "residual"),
    "FD": ("new", "fd"),
    "places": ("new", "poses"),
    "old: exact": ("old", "exact"),
    "old: detail": ("old", "detail"),
    "old: residual": ("old", "residual"),
    "old: FD": ("old", "fd"),
    "old: places": ("old", "poses"),
    "retention": ("retention", None),
}
COLUMNS_NOTE = f"""\
Mean ± standard deviation over runs, at the deployed steps. concept: share of pictures in which shape, texture and
colours of the new object are right, asked for on backgrounds that no training picture shows. background: share with
the background asked for. detail: amplitude of the grain, real pictures = 1; blur has less, noise more.
residual: what is wrong in the object's square, such as ragged edges; real pictures = 1. FD: Frechet distance of random
features to real pictures, lower is better. places: effective number of the objects' places, of {len(world.POSES)}.
old: the same for objects that the base knows. retention: as training logs it, 0 = unchanged. The base has one run a
concept."""
FAIRNESS_NOTE = """\
What favours D-OPSD: its teacher is almost perfect in this world; learning rate, schedule, epsilon, batch and steps
were chosen by its own runs on the object with seed 0. SFT has the same settings, which were not chosen for it, and as
many states a step. With AdamW's own epsilon (in the ablations) it learns the object about as well and keeps more of
the old prompts, though far fewer than D-OPSD. SFT trains at all sigmas, as usual, of which the base knows four (the
ablations have SFT at these four). What favours both: the base was taught that describing words count over a picture
and over unknown words."""
STEP_COLUMNS = ("concept", "detail", "residual", "old: exact", "old: detail", "old: residual")


def write(
    experiment: "Experiment",
    first: dict[str, list["Run"]],
    ablations: dict[str, list["Run"]],
    by_step_count: dict[str, list["Run"]],
) -> None:
    """Writes results.md, plots and sheets into the experiment's folder, from results that exist; prints the tables.

    Args:
        first, ablations, by_step_count: each row's name and runs.
    """
    folder = experiment.folder
    known = {str(run.folder): run for runs in (*first.values(), *ablations.values()) for run in runs}
    results = {name: experiment.result(run) for name, run in known.items()}
    for runs in by_step_count.values():
        for run in runs:
            results[str(run.folder)]["step_counts"] = experiment.results_by_step_count(run)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    rows = {name: [experiment.result(run) for run in runs] for name, runs in first.items()}
    seeds = sorted({run.seed for runs in first.values() for run in runs})
    text = [
        f"{setting_text(experiment, seeds)}\n\n## First table\n\n{table(rows)}\n\n{COLUMNS_NOTE}\n\n{FAIRNESS_NOTE}"
    ]
    if missed := missed_text(rows):
        text.append(missed)
    concepts = {run.concept: None for runs in first.values() for run in runs}
    for concept in concepts:
        part = {
            name: [experiment.result(run) for run in runs if run.concept == concept] for name, runs in first.items()
        }
        text.append(f"### {concept.name}\n\n{table(part)}")
    (base, *_) = (experiment.result(run) for run in first["base"])
    plot(rows, base, folder / "first_table.png")
    if ablations:
        rows = {name: [experiment.result(run) for run in runs] for name, runs in ablations.items()}
        concept = next(iter(ablations.values()))[0].concept
        text.append(f"## Ablations, concept {concept.name!r}\n\n{table(rows)}")
        plot(rows, base, folder / "ablations.png")
    text.append(f"## Retention\n\n{retention_text(experiment, list(known.values()))}")
    step_rows = {name: [experiment.results_by_step_count(run) for run in runs] for name, runs in by_step_count.items()}
    run = next(iter(by_step_count.values()))[0]
    text.append(
        f"## Steps of the sampler, trained at {NUM_STEPS}\n\nConcept {run.concept.name!r}, seed {run.seed}.\n\n"
        f"{step_table(step_rows)}"
    )
    (folder / "results.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))
    write_sheet(experiment, first, folder / "sheet.png")
    write_step_sheet(experiment, {name: runs[0] for name, runs in by_step_count.items()}, folder / "step_counts.png")
    print(f"\nSheets and plots: {folder}")


# Tables


def setting_text(experiment: "Experiment", seeds: list[int]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))
    return (
        f"# What `python benchmarks/miniature/experiment.py` wrote\n\n{experiment.num_train_steps} steps a run, "
        f"{experiment.examiner.count} pictures of a kind, seeds {', '.join(map(str, seeds))}. {os.cpu_count()} CPU "
        f"cores, {platform.machine()}; {versions}."
    )


def missed_text(rows: dict[str, list[dict]]) -> str:
    """How many runs that were to stop at an accuracy never got there; nothing where all did."""
    lines = []
    for name, results in rows.items():
        reached = [result.get("reached", False) for result in results if "reached" in result]
        if reached and not all(reached):
            lines.append(f"{name}: reached in {sum(reached)} of {len(reached)} runs; the others ran to the end.")
    return "\n".join(lines)


def figure(result: dict, column: str) -> float | None:
    part, name = COLUMNS[column]
    value = result.get(part)
    return value if name is None or value is None else value.get(name)


def spread(results: list[dict], column: str) -> str:
    """Mean and standard deviation, or a dash where nothing was measured."""
    values = [value for value in (figure(result, column) for result in results) if value is not None]
    if not values:
        return "-"
    digits = 1 if "places" in column else 3 if "FD" in column else 2
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def table(rows: dict[str, list[dict]]) -> str:
    """Markdown, a row a method."""
    lines = ["| | steps | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, results in rows.items():
        steps = [result["steps"] for result in results if "steps" in result]
        cells = [f"{np.mean(steps):.0f}" if steps else "-", *(spread(results, column) for column in COLUMNS)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def step_table(rows: dict[str, list[dict[str, dict]]]) -> str:
    """Markdown: a row a method and number of sampling steps."""
    lines = ["| | sampling steps | " + " | ".join(STEP_COLUMNS) + " |", "|---" * (len(STEP_COLUMNS) + 2) + "|"]
    for name, results in rows.items():
        for count in results[0]:
            cells = [spread([result[count] for result in results], column) for column in STEP_COLUMNS]
            lines.append(f"| {name} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def retention_text(experiment: "Experiment", runs: list["Run"]) -> str:
    """Whether retention ranks the methods of one concept as figures of old prompts do."""
    concept = runs[0].concept
    rows = {}
    for run in runs:
        if run.concept == concept and run.method.kind != "teacher" and not run.method.stops_at_dopsd:
            name = run.method.name if run.method.kind != "dopsd" or run.method.flags else "D-OPSD"
            rows.setdefault(name, []).append(experiment.result(run))
    names = [name for name in ("base", "D-OPSD", "SFT", "teacher: live") if name in rows]
    lines = [f"Concept {concept.name!r}, from least to most harm, by each figure's mean:", ""]
    for column, is_better_high in (("retention", False), ("old: exact", True), ("old: FD", False)):
        means = {name: np.mean([figure(result, column) for result in rows[name]]) for name in names}
        order = sorted(names, key=lambda name: -means[name] if is_better_high else means[name])
        lines.append(f"- {column}: " + ", ".join(f"{name} {means[name]:.3f}" for name in order))
    gaps = [
        abs(result["retention"] - result["retention_logged"])
        for result in (experiment.result(run) for run in runs)
        if "retention_logged" in result
    ]
    if gaps:
        lines += ["", f"What training logged differs from this by at most {max(gaps):.0e}, in {len(gaps)} runs."]
    return "\n".join(lines)


# Pictures


def plot(rows: dict[str, list[dict]], base: dict, path: Path) -> None:
    """A panel a figure, a line a method: a point a run and a larger one their mean; dashed: the base."""
    columns = ("concept", "detail", "places", "old: exact", "old: detail", "retention")
    directions = {"detail": "real pictures: 1", "old: detail": "real pictures: 1", "retention": "lower is better"}
    names = list(rows)
    drawing, axes = plt.subplots(
        1, len(columns), figsize=(15, 1.3 + 0.36 * len(names)), layout="constrained", sharey=True
    )
    for axis, column in zip(axes, columns, strict=True):
        for line, name in enumerate(names):
            values = [value for value in (figure(result, column) for result in rows[name]) if value is not None]
            color = "#d9480f" if "D-OPSD:" in name or name == "D-OPSD" else "#495057"
            axis.scatter(values, [line] * len(values), s=14, alpha=0.5, color=color)
            if values:
                axis.scatter(np.mean(values), line, s=80, color=color, marker="D")
        axis.axvline(figure(base, column), color="#868e96", linewidth=1, linestyle="--")
        axis.set_title(f"{column}\n({directions.get(column, 'higher is better')})", fontsize=10)
        if "detail" in column:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(FixedLocator([0.5, 0.6, 0.8, 1, 1.3, 2, 4]))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(color="#e3e6eb", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    drawing.savefig(path, dpi=100)
    plt.close(drawing)


def draw(
    pipeline: Flux2KleinDOPSDPipeline,
    prompt: str,
    seed: int,
    *,
    reference: Image.Image | None = None,
    num_steps: int = NUM_STEPS,
) -> Image.Image:
    """One picture as the pipeline draws it."""
    references = [] if reference is None else [reference]
    return pipeline.decode(final_latents(pipeline, [prompt], [seed], references=references, num_steps=num_steps))[0]


def concept_sheet(
    concept: Concept,
    seed: int,
    pipelines: dict[str, Flux2KleinDOPSDPipeline],
    old_prompts: list[str],
    *,
    title: str,
    captions: dict[str, tuple[str, str]] | None = None,
) -> Image.Image:
    """New prompts: base, teacher with the picture, SFT, D-OPSD, the pictures; old prompts below.

    Args:
        pipelines: "base", "SFT" and "D-OPSD".
        captions: by column, what stands under its last new and its last old picture.
    """
    images, _ = pictures_of(concept, seed)
    headings = ["base", "teacher", "SFT", "D-OPSD", "the pictures"]
    new, old = [], []
    for number, background in enumerate(concept.other_backgrounds):
        prompt = world.caption(concept.word, background)
        drawn = {name: draw(pipeline, prompt, number) for name, pipeline in pipelines.items()}
        drawn["teacher"] = draw(pipelines["base"], prompt + world.REFERENCE_SUFFIX, number, reference=images[number])
        drawn["the pictures"] = images[number]
        new.append((prompt, [drawn[name] for name in headings]))
    for number, prompt in enumerate(old_prompts):
        drawn = {name: draw(pipeline, prompt, number) for name, pipeline in pipelines.items()}
        old.append((prompt, [drawn.get(name) for name in headings]))
    captions = captions or {}

    subtitles = ["the prompt alone", "base, with a picture", "LoRA; the prompt alone", "LoRA; the prompt alone", ""]
    columns = [f"{heading}\n{subtitle}" for heading, subtitle in zip(headings, subtitles, strict=True)]
    return stack(
        [
            contact_sheet(
                title,
                columns,
                sheet_rows(new, headings, captions, 0),
                note=f"The word {concept.word!r} was taught from {NUM_PICTURES} pictures, none on these backgrounds. "
                f"A row starts from one noise; {NUM_STEPS} steps.",
                cell_pixels=CELL_PIXELS,
            ),
            contact_sheet(
                "Old prompts: these should stay as the base draws them",
                ["base", "", "SFT", "D-OPSD", ""],
                sheet_rows(old, headings, captions, 1),
                cell_pixels=CELL_PIXELS,
            ),
        ],
        0,
    )


def sheet_rows(
    rows: list[tuple[str, list[Image.Image | None]]],
    headings: list[str],
    captions: dict[str, tuple[str, str]],
    part: int,
) -> list[tuple[str, list[Cell]]]:
    """Rows of a contact sheet; the last one's cells have the captions of that part."""
    texts = [[""] * len(headings)] * (len(rows) - 1) + [[captions.get(name, ("", ""))[part] for name in headings]]
    return [
        (f'"{label}"', [Cell(image, text) for image, text in zip(images, line, strict=True)])
        for (label, images), line in zip(rows, texts, strict=True)
    ]


def write_sheet(experiment: "Experiment", first: dict[str, list["Run"]], path: Path) -> None:
    """The first seed's `concept_sheet` of every concept, side by side."""
    old_prompts = experiment.examiner.old.prompts[:NUM_OLD_PROMPTS]
    sheets = []
    for base in first["base"]:
        pipelines = {name: experiment.load(_same(first[name], base)) for name in ("base", "SFT", "D-OPSD")}
        title = f"A new {base.concept.name}" if base.concept.name != "two-colour" else "A new two-colour variant"
        sheets.append(concept_sheet(base.concept, base.seed, pipelines, old_prompts, title=title))
    save_png(beside(sheets, 0), path)


def _same(runs: list["Run"], wanted: "Run") -> "Run":
    """The run of the same concept and seed."""
    return next(run for run in runs if (run.concept, run.seed) == (wanted.concept, wanted.seed))


def write_step_sheet(experiment: "Experiment", runs: dict[str, "Run"], path: Path) -> None:
    """A new and an old prompt, a column for each number of sampling steps, a row for each method."""
    concept = next(iter(runs.values())).concept
    new_prompt = world.caption(concept.word, concept.other_backgrounds[0])
    old_prompt = experiment.examiner.old.prompts[0]
    pipelines = {name: experiment.load(run) for name, run in runs.items()}
    counts = [int(count) for count in experiment.results_by_step_count(next(iter(runs.values())))]
    rows = []
    for name, pipeline in pipelines.items():
        cells = [
            Cell(draw(pipeline, prompt, 0, num_steps=count)) for prompt in (new_prompt, old_prompt) for count in counts
        ]
        rows.append((name, cells))
    columns = [f"{count} step{'s' * (count > 1)}" for count in counts]
    sheet = contact_sheet(
        f'"{new_prompt}" | "{old_prompt}"',
        2 * columns,
        rows,
        note=f"One noise. All models are made for {NUM_STEPS} steps.",
        cell_pixels=CELL_PIXELS,
    )
    save_png(sheet, path)
