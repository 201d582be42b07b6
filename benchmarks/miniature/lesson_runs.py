"""Trains and measures the runs that teach the editor, each of them once, and writes their tables."""

import argparse
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.miniature.baselines import EncodedPictures
from benchmarks.miniature.command_line import HelpFormatter, positive_int
from benchmarks.miniature.concepts import MAX_EVAL_COUNT
from benchmarks.miniature.edits import COPY_SUFFIX, PLACE_SUFFIX
from benchmarks.miniature.evaluate import NUM_RETENTION_PROMPTS, sample
from benchmarks.miniature.files import check_settings, make_folder
from benchmarks.miniature.lessons import HELD_EDITS, EditLesson, LeakLesson
from benchmarks.miniature.methods import BASE, DOPSD, DOPSD_BOTH, NUM_TRAIN_STEPS, SFT, TEACHER, Method, Run, variant
from benchmarks.miniature.runs import Experiment
from benchmarks.miniature.tables import markdown, mean_and_deviation
from benchmarks.miniature.world import REFERENCE_SUFFIX
from dopsd.errors import InputError
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline


EDIT_METHODS = (
    BASE,
    replace(TEACHER, name="teacher (base with source and target)"),
    SFT,
    DOPSD,
    replace(DOPSD_BOTH, name="D-OPSD, one state + prior (the default)"),
)


# What the teacher takes from its picture, and the suffix that makes it do so.
SUFFIXES = {"all": COPY_SUFFIX, "object and place": PLACE_SUFFIX, "object": REFERENCE_SUFFIX}


def seeing(picture: str, copied: str) -> Method:
    """D-OPSD as the script trains by default, with a teacher that sees the target or another picture."""
    flags = {"teacher_picture": picture, "teacher_prompt_suffix": SUFFIXES[copied]}
    return variant(f"D-OPSD, teacher copies {copied} of {TEACHER_PICTURES[picture]}", DOPSD_BOTH, **flags)


TEACHER_PICTURES = {"target": "the target", "other": "another picture"}
LEAK_METHODS = (
    BASE,
    *(
        Method(f"teacher that copies {copied}", "teacher", {"teacher_prompt_suffix": suffix})
        for copied, suffix in SUFFIXES.items()
    ),
    SFT,
    *(seeing(picture, copied) for copied in SUFFIXES for picture in TEACHER_PICTURES),
)
# Heading -> where a result has the value, and its digits.
EDIT_COLUMNS = {
    "edit": ("new", "exact", 2),
    "background": ("new", "background", 2),
    "place": ("new", "place", 2),
    "all three": ("new", "whole", 2),
    "detail": ("new", "detail", 2),
    "residual": ("new", "residual", 2),
    "other edits": ("edits", "whole", 2),
    "old": ("old", "exact", 2),
    "old: detail": ("old", "detail", 2),
    "wrong words": ("wrong_words", "exact", 2),
}
LEAK_COLUMNS = {
    "concept": ("new", "exact", 2),
    "background": ("new", "background", 2),
    "places": ("new", "poses", 1),
    "trained places": ("new", "trained_places", 2),
    "detail": ("new", "detail", 2),
    "residual": ("new", "residual", 2),
    "seen: background": ("seen", "background", 2),
    "seen: places": ("seen", "poses", 1),
    "seen: own place": ("seen", "own_place", 2),
    "old": ("old", "exact", 2),
    "wrong words": ("wrong_words", "exact", 2),
}
Lesson = EditLesson | LeakLesson


class LessonExperiment(Experiment):
    """Runs whose "concept" is a lesson for the editor."""

    def _measure(self, run: Run) -> dict:
        trained = self.trained(run) if run.method.is_trained else {}
        pipeline = self.load(run)
        tasks = run.concept.tasks(self.eval_count, run.seed)
        if run.method.kind == "teacher":
            suffix = run.method.flags.get("teacher_prompt_suffix", "")
            tasks = run.concept.teacher_tasks(self.eval_count, run.seed, suffix)
        figures = {
            name: run.concept.measure(sample(pipeline, task), task, run.seed, self.evaluator.reader)
            for name, task in tasks.items()
        }
        return figures | {"retention": self.evaluator.retention(pipeline)} | trained

    def _prior_flags(self, run: Run, folder: Path) -> dict[str, object]:
        """Prior preservation of an edit also holds known instructions, with the training pairs' sources."""
        flags = super()._prior_flags(run, folder)
        if flags and isinstance(run.concept, EditLesson):
            flags["class_prompt"] = [edit.instruction for edit in HELD_EDITS]
        return flags

    def _encoded_pictures(self, run: Run, pipeline: Flux2KleinDOPSDPipeline) -> EncodedPictures:
        return run.concept.encoded_pictures(pipeline, run.seed)


def lesson_table(results: dict[str, list[dict]], columns: dict[str, tuple[str, str, int]]) -> str:
    """One row per method: mean ± standard deviation over its runs, a dash where nothing was measured."""
    rows = []
    for name, runs in results.items():
        steps = [result["steps"] for result in runs if "steps" in result]
        cells = [f"{np.mean(steps):.0f}" if steps else "-"]
        for part, figure, digits in columns.values():
            values = [result[part][figure] for result in runs if figure in result.get(part, {})]
            cells.append(mean_and_deviation(values, digits) if values else "-")
        rows.append([name, *cells])
    return markdown(["steps", *columns], rows)


def parse_lesson_args(
    description: str, output_dir: str, only: Iterable[str], only_help: str, *, eval_count: int, seeds: tuple[int, ...]
) -> argparse.Namespace:
    """The command line of an experiment with lessons, with its own defaults and choices."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir), help="Folder for runs and tables.")
    parser.add_argument("--only", choices=only, help=only_help)
    parser.add_argument(
        "--num_train_steps", type=positive_int, default=NUM_TRAIN_STEPS, help="Training steps per run."
    )
    parser.add_argument("--eval_count", type=positive_int, default=eval_count, help="Pictures per task.")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help="Seeds of the runs.")
    parser.add_argument("--num_workers", type=positive_int, default=os.cpu_count(), help="Runs at the same time.")
    return parser.parse_args()


def open_experiment(args: argparse.Namespace, name: str, assemble: Callable[[Path], Path]) -> LessonExperiment:
    """The experiment in `--output_dir`, new or continued, with the model that `assemble` writes into folder `name`.

    Raises:
        InputError: a flag is wrong, or the folder is another experiment's.
    """
    if not NUM_RETENTION_PROMPTS <= args.eval_count <= MAX_EVAL_COUNT:
        raise InputError(f"--eval_count {args.eval_count}: give {NUM_RETENTION_PROMPTS} to {MAX_EVAL_COUNT}")
    make_folder(args.output_dir, flag="--output_dir")
    folder = args.output_dir.resolve()
    experiment = LessonExperiment(
        model=assemble(folder / name),
        folder=folder,
        num_train_steps=args.num_train_steps,
        steps_per_evaluation=args.num_train_steps,
        eval_count=args.eval_count,
    )
    check_settings(folder, experiment.settings, flag="--output_dir")
    return experiment
