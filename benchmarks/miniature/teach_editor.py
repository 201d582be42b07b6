"""Teaches the editor edits, by pairs of pictures, and an object whose pictures share more than the object.

    python -m benchmarks.miniature.teach_editor --output_dir editor-results

Run the same command again to continue a stopped experiment: finished runs are kept. D-OPSD's runs use
`train_dopsd_flux2.py` itself.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; set before a library reads it

import json
from collections.abc import Sequence

from PIL import Image

from benchmarks.miniature.command_line import run
from benchmarks.miniature.editor import assemble_editor
from benchmarks.miniature.lesson_runs import (
    EDIT_COLUMNS,
    EDIT_METHODS,
    LEAK_COLUMNS,
    LEAK_METHODS,
    Lesson,
    LessonExperiment,
    lesson_table,
    open_experiment,
    parse_lesson_args,
)
from benchmarks.miniature.lesson_sheets import edit_sheet, leak_sheet
from benchmarks.miniature.lessons import EDIT_LESSONS, LEAK_LESSONS, EditLesson
from benchmarks.miniature.methods import Run, RunsByMethod, all_runs, runs_by_method
from benchmarks.miniature.report import machine
from benchmarks.miniature.workers import Work, disable_progress_bars, run_side_by_side
from dopsd.sheets import save_png


Groups = dict[str, dict[Lesson, RunsByMethod]]  # part -> lesson -> runs
SEEDS = (0, 1, 2)
EVAL_COUNT = 64
EDITING, LEAKING = "editing", "leaking"
COLUMNS = {EDITING: EDIT_COLUMNS, LEAKING: LEAK_COLUMNS}
PARTS = {EDITING: (EDIT_LESSONS, EDIT_METHODS), LEAKING: (LEAK_LESSONS, LEAK_METHODS)}
NOTES = {
    EDITING: """\
Mean ± standard deviation over seeds, at the deployed number of steps, on sources that no training pair shows. edit:
share of pictures with the edited object right. background, place: share that keep them. all three: share of pictures
with all of these. detail: amplitude of the grain, 1 for real pictures. residual: errors in the object's square, 1 for
real pictures. other edits: share of pictures with all three right, of edits that the editor knows by words. old: share
of right pictures of prompts without a source. wrong words: share of pictures that show the taught edit although the
instruction has another made-up word; 0 is right.""",
    LEAKING: """\
Mean ± standard deviation over seeds, at the deployed number of steps. concept: share of pictures with the new object
right, on backgrounds that no training picture shows. background: share on the background asked for. places: effective
number of places, of 8. trained places: share of pictures at one of the training pictures' two places; .25 without a
preference. seen: of prompts on the training pictures' own backgrounds; own place: share at the place that training
pictures on that background have; .125 without a preference. old, wrong words: as in the first experiment's tables.""",
}


def main() -> None:
    args = parse_lesson_args(
        __doc__, "editor-results", PARTS, "Only these lessons. Default: all.", eval_count=EVAL_COUNT, seeds=SEEDS
    )
    experiment = open_experiment(args, "editor", assemble_editor)
    disable_progress_bars()
    groups = {
        part: {lesson: runs_by_method(methods, (lesson,), tuple(args.seeds)) for lesson in lessons}
        for part, (lessons, methods) in PARTS.items()
        if args.only in (None, part)
    }
    # For the workers and the training script, which read it when they start.
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.num_workers))
    run_side_by_side(experiment, Work(runs_of_all(groups)), args.num_workers)
    write_report(experiment, groups, args.seeds)


def runs_of_all(groups: Groups) -> list[Run]:
    return all_runs(*(runs for lessons in groups.values() for runs in lessons.values()))


def write_report(experiment: LessonExperiment, groups: Groups, seeds: Sequence[int]) -> None:
    """Writes editor.json, editor.md and a sheet per lesson into the experiment's folder, and prints the tables."""
    results = {str(run.folder): experiment.result(run) for run in runs_of_all(groups)}
    (experiment.folder / "editor.json").write_text(json.dumps(results, indent=1) + "\n")
    sections = [
        f"# Results of `python -m benchmarks.miniature.teach_editor`\n\n{experiment.num_train_steps} steps per run, "
        f"{experiment.eval_count} pictures per task, seeds {', '.join(map(str, seeds))}. {machine()}."
    ]
    for part, lessons in groups.items():
        sections.append(f"## {part.capitalize()}\n\n{NOTES[part]}")
        for lesson, runs in lessons.items():
            of_methods = {
                name: [results[str(run.folder)] for run in method_runs] for name, method_runs in runs.items()
            }
            table = lesson_table(of_methods, COLUMNS[part])
            sections.append(f"### Lesson {lesson.name!r}: {lesson.title}\n\n{table}")
            save_png(draw_sheet(experiment, lesson, runs), experiment.folder / f"editor_{lesson.name}.png")
    text = "\n\n".join(sections)
    (experiment.folder / "editor.md").write_text(text + "\n")
    print(text)


def draw_sheet(experiment: LessonExperiment, lesson: Lesson, runs: RunsByMethod) -> Image.Image:
    """The lesson's sheet, of each method's first run."""
    first = [(name, method_runs[0]) for name, method_runs in runs.items()]
    pipelines = {name: experiment.load(run) for name, run in first if run.method.kind != "teacher"}
    if isinstance(lesson, EditLesson):
        return edit_sheet(lesson, pipelines)
    return leak_sheet(lesson, first[-1][1].seed, pipelines)


if __name__ == "__main__":
    run(main)
