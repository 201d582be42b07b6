"""Contact sheets of the editor's lessons."""

import torch
from PIL import Image

from benchmarks.miniature import world
from benchmarks.miniature.concepts import concept_task
from benchmarks.miniature.edit_tasks import edit_task
from benchmarks.miniature.edits import PAIR_SUFFIX
from benchmarks.miniature.evaluate import final_latents
from benchmarks.miniature.lessons import MEASURED_EDITS, NUM_PAIRS, EditLesson, LeakLesson
from benchmarks.miniature.parts import NUM_STEPS
from benchmarks.miniature.tasks import Task
from dopsd.sheets import Cell, contact_sheet
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline


CELL_PIXELS = 128
NUM_NEW, NUM_OTHER = 3, 2  # rows of an edit's sheet


def draw_task(pipeline: Flux2KleinDOPSDPipeline, task: Task) -> list[Image.Image]:
    """A picture per prompt, from the seeds 0, 1, 2..."""
    seeds = list(range(len(task.prompts)))
    latents = final_latents(pipeline, task.prompts, seeds, references=task.references)
    return pipeline.decode(latents)


def pictures_of(real: torch.Tensor) -> list[Image.Image]:
    return [world.to_image(picture.permute(1, 2, 0).numpy()) for picture in real]


def edit_sheet(lesson: EditLesson, pipelines: dict[str, Flux2KleinDOPSDPipeline]) -> Image.Image:
    """Rows: new sources, then edits that the editor knows. Columns: source, the pipelines and the teacher, target.

    Args:
        pipelines: "base" is the first.
    """
    new, taught = lesson.new_task(NUM_NEW), lesson.new_task(NUM_NEW, with_target=True)
    others = edit_task(MEASURED_EDITS, NUM_OTHER, seed=8)
    teacher = [*draw_task(pipelines["base"], taught), *[None] * NUM_OTHER]
    columns = {name: [*draw_task(pipe, new), *draw_task(pipe, others)] for name, pipe in pipelines.items()}
    columns = {
        "source": [*new.references, *others.references],
        "base": columns.pop("base"),
        "teacher": teacher,
        **columns,
    }
    columns["target"] = [*pictures_of(new.real), *pictures_of(others.real)]
    return contact_sheet(
        f"{lesson.instruction!r}, learned from {NUM_PAIRS} pairs",
        list(columns),
        rows_of([*new.prompts, *others.prompts], list(columns.values())),
        note=f"The teacher sees source and target, and the prompt with {PAIR_SUFFIX!r}. Pictures of a row start from "
        f"the same noise; {NUM_STEPS} steps.",
        cell_pixels=CELL_PIXELS,
        accent_columns=[len(columns) - 2],
    )


def leak_sheet(lesson: LeakLesson, seed: int, pipelines: dict[str, Flux2KleinDOPSDPipeline]) -> Image.Image:
    """Rows: prompts, each with several seeds. Columns: the pipelines; last, training pictures."""
    backgrounds = [*lesson.backgrounds, *lesson.concept.other_backgrounds]
    asked = [*lesson.backgrounds, *backgrounds]
    task = concept_task(lesson.concept, len(asked))
    prompts = [world.caption(lesson.word, background) for background in asked]
    task = Task(prompts, [], task.wanted, asked, task.real)
    images, _ = lesson.pictures(seed)
    columns = {name: draw_task(pipe, task) for name, pipe in pipelines.items()}
    columns["training pictures"] = [*images, *[None] * (len(asked) - len(images))]
    return contact_sheet(
        f"A new object, lesson {lesson.name!r}",
        list(columns),
        rows_of(prompts, list(columns.values())),
        note=f"Pictures of a row start from the same noise; {NUM_STEPS} steps.",
        cell_pixels=CELL_PIXELS,
    )


def rows_of(labels: list[str], columns: list[list[Image.Image | None]]) -> list[tuple[str, list[Cell]]]:
    """Rows of a contact sheet from its columns."""
    rows = zip(*columns, strict=True)
    return [(f'"{label}"', [Cell(image) for image in row]) for label, row in zip(labels, rows, strict=True)]
