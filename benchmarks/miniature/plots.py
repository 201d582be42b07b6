"""Plots and contact sheets of the experiment's results."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from diffusers import DiffusionPipeline
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from PIL import Image

from benchmarks.miniature import world
from benchmarks.miniature.architectures import architecture_of
from benchmarks.miniature.concepts import NUM_PICTURES, Concept, training_pictures
from benchmarks.miniature.evaluate import final_latents
from benchmarks.miniature.tables import value_of, values_of
from dopsd.sheets import Cell, contact_sheet, stack


CELL_PIXELS = 128
# Columns of `concept_sheet` and their headings.
SHEET_COLUMNS = {
    "base": "base\nthe prompt alone",
    "teacher": "teacher\nbase, with a picture",
    "SFT": "SFT\nLoRA; the prompt alone",
    "D-OPSD": "D-OPSD\nLoRA; the prompt alone",
    "D-OPSD with prior": "D-OPSD with prior\nLoRA; the prompt alone",
    "pictures": "the pictures\n",
}
# Columns of `plot` and what is good.
PLOT_COLUMNS = {
    "concept": "higher is better",
    "detail": "real pictures: 1",
    "places": "higher is better",
    "old: exact": "higher is better",
    "old: detail": "real pictures: 1",
    "neighbours": "higher is better",
    "wrong words": "lower is better",
    "forwards": "cost",
}


def plot(results: dict[str, list[dict]], base: dict, path: Path) -> None:
    """One panel per metric, one line per method: a dot per run, a diamond for their mean. Dashed: the base model.

    Args:
        results: the name of each method and the results of its runs.
        base: a result of the base model.
    """
    fig, all_axes = plt.subplots(
        1, len(PLOT_COLUMNS), figsize=(18, 1.3 + 0.36 * len(results)), layout="constrained", sharey=True
    )
    for axes, column in zip(all_axes, PLOT_COLUMNS, strict=True):
        draw_panel(axes, results, base, column)
    all_axes[0].set_yticks(range(len(results)), list(results))
    all_axes[0].invert_yaxis()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def draw_panel(axes: Axes, results: dict[str, list[dict]], base: dict, column: str) -> None:
    for line, (name, method_results) in enumerate(results.items()):
        values = values_of(method_results, column)
        colour = "#d9480f" if "D-OPSD" in name and "SFT" not in name else "#495057"
        axes.scatter(values, [line] * len(values), s=14, alpha=0.5, color=colour)
        if values:
            axes.scatter(np.mean(values), line, s=80, color=colour, marker="D")
    if (base_value := value_of(base, column)) is not None:
        axes.axvline(base_value, color="#868e96", linewidth=1, linestyle="--")
    if "detail" in column:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([0.5, 0.6, 0.8, 1, 1.3, 2, 4]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{column}\n({PLOT_COLUMNS[column]})", fontsize=10)
    axes.grid(color="#e3e6eb", linewidth=0.8)
    axes.set_axisbelow(True)


def draw(
    pipeline: DiffusionPipeline,
    prompt: str,
    seed: int,
    *,
    reference: Image.Image | None = None,
    num_steps: int | None = None,
) -> Image.Image:
    """One picture by the pipeline."""
    references = [] if reference is None else [reference]
    return pipeline.decode(final_latents(pipeline, [prompt], [seed], references=references, num_steps=num_steps))[0]


def concept_sheet(
    concept: Concept,
    seed: int,
    pipelines: dict[str, DiffusionPipeline],
    old_prompts: list[str],
    *,
    title: str,
    captions: dict[str, tuple[str, str]] | None = None,
) -> Image.Image:
    """A sheet with columns for the pipelines, the teacher and the training pictures; old prompts are at the bottom.

    Args:
        pipelines: their names are among `SHEET_COLUMNS`; "base" and "D-OPSD" are needed. The last one stands out.
        captions: for each column, the text below its last new and its last old picture.
    """
    new_captions, old_captions = ({name: texts[i] for name, texts in (captions or {}).items()} for i in (0, 1))
    columns = [name for name in SHEET_COLUMNS if name in {*pipelines, "teacher", "pictures"}]
    accents = [columns.index("D-OPSD with prior" if "D-OPSD with prior" in columns else "D-OPSD")]
    new_sheet = contact_sheet(
        title,
        [SHEET_COLUMNS[name] for name in columns],
        sheet_rows(columns, draw_new_prompts(concept, seed, pipelines), new_captions),
        note=f"The word {concept.word!r} was taught with {NUM_PICTURES} pictures, none of them on these backgrounds. "
        f"Pictures of a row start from the same noise; {architecture_of(pipelines['base']).num_steps} steps.",
        cell_pixels=CELL_PIXELS,
        accent_columns=accents,
    )
    old_rows = [(prompt, draw_all(pipelines, prompt, number)) for number, prompt in enumerate(old_prompts)]
    old_sheet = contact_sheet(
        "Old prompts and another unknown word: these should stay as the base model draws them",
        [name if name in pipelines else "" for name in columns],
        sheet_rows(columns, old_rows, old_captions),
        cell_pixels=CELL_PIXELS,
        accent_columns=accents,
    )
    return stack([new_sheet, old_sheet], 0)


def draw_all(pipelines: dict[str, DiffusionPipeline], prompt: str, seed: int) -> dict[str, Image.Image]:
    return {name: draw(pipeline, prompt, seed) for name, pipeline in pipelines.items()}


def draw_new_prompts(
    concept: Concept, seed: int, pipelines: dict[str, DiffusionPipeline]
) -> list[tuple[str, dict[str, Image.Image]]]:
    """(prompt, column -> picture) for each background that no training picture shows."""
    images, _ = training_pictures(concept, seed)
    rows = []
    for number, background in enumerate(concept.other_backgrounds):
        prompt = world.caption(concept.word, background)
        teacher = draw(pipelines["base"], prompt + world.REFERENCE_SUFFIX, number, reference=images[number])
        pictures = {"teacher": teacher, "pictures": images[number]}
        rows.append((prompt, pictures | draw_all(pipelines, prompt, number)))
    return rows


def sheet_rows(
    columns: list[str], rows: list[tuple[str, dict[str, Image.Image]]], captions: dict[str, str]
) -> list[tuple[str, list[Cell]]]:
    """Rows of a contact sheet, with captions in the last one.

    Args:
        rows: (prompt, column -> picture).
        captions: column -> caption.
    """
    last = len(rows) - 1
    return [
        (
            f'"{prompt}"',
            [Cell(pictures.get(name), captions.get(name, "") if row == last else "") for name in columns],
        )
        for row, (prompt, pictures) in enumerate(rows)
    ]


def step_sheet(
    concept: Concept, pipelines: dict[str, DiffusionPipeline], old_prompt: str, step_counts: tuple[int, ...]
) -> Image.Image:
    """A new and an old prompt with one column per number of sampling steps and one row per method."""
    new_prompt = world.caption(concept.word, concept.other_backgrounds[0])
    rows = []
    for name, pipeline in pipelines.items():
        cells = [
            Cell(draw(pipeline, prompt, 0, num_steps=count))
            for prompt in (new_prompt, old_prompt)
            for count in step_counts
        ]
        rows.append((name, cells))
    columns = [f"{count} step{'s' * (count > 1)}" for count in step_counts]
    return contact_sheet(
        f'"{new_prompt}" | "{old_prompt}"',
        2 * columns,
        rows,
        note=f"All pictures start from the same noise. All models are made for "
        f"{architecture_of(next(iter(pipelines.values()))).num_steps} steps.",
        cell_pixels=CELL_PIXELS,
    )
