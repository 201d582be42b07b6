"""Tables and sheet of the runs that teach a domain."""

import json

from PIL import Image

from benchmarks.miniature.domain_runs import DEFAULT, DomainComparison
from benchmarks.miniature.domains import DOMAIN, NUM_DOMAIN_PICTURES
from benchmarks.miniature.lesson_runs import LessonExperiment, lesson_table
from benchmarks.miniature.lesson_sheets import CELL_PIXELS, draw_task, pictures_of, rows_of
from benchmarks.miniature.metrics import frechet_distance
from benchmarks.miniature.parts import NUM_STEPS
from benchmarks.miniature.report import machine
from benchmarks.miniature.tables import markdown
from benchmarks.miniature.tasks import Task
from dopsd.sheets import contact_sheet, save_png


# Heading -> where a result has the value, and its digits.
COLUMNS = {
    "right": ("new", "whole", 2),
    "look": ("new", "look", 2),
    "object": ("new", "exact", 2),
    "FD": ("new", "latent_fd", 2),
    "detail": ("new", "detail", 2),
    "residual": ("new", "residual", 2),
    "old": ("old", "ordinary", 2),
    "old: look": ("old", "look", 2),
    "old: object": ("old", "exact", 2),
    "old: FD": ("old", "latent_fd", 2),
    "old: detail": ("old", "detail", 2),
    "old: residual": ("old", "residual", 2),
    "wrong words": ("wrong_words", "look", 2),
}
GRID_FIGURES = (("new", "whole", 2), ("old", "ordinary", 2), ("wrong_words", "look", 2), ("new", "latent_fd", 2))
NOTE = """\
Mean ± standard deviation over seeds, at the deployed number of steps, on prompts of objects that no training picture
shows. right: share of pictures with the right object and the domain's look. look, object: shares with either. FD:
Frechet distance of the VAE's latents (mean and deviation of each channel) to real pictures of what is asked for;
{floor:.2f} between two such sets. detail: amplitude of the grain, 1 for real pictures. residual: errors in the
object's square, 1 for real pictures. old: of the same prompts without the new word, share of right pictures as the
base draws them; old: look and old: object: shares with the domain's look, and with the right object in either look.
wrong words: share with the domain's look, of prompts with another made-up word; 0 is right."""
GRID_NOTE = """\
right / old / wrong words / FD of one run each, at seed {seed}. Bold: the rate of the tables, which has the largest sum
of right and old."""
NUM_NEW, NUM_OLD, NUM_WRONG = 3, 2, 1  # rows of the sheet


def write_report(experiment: LessonExperiment, comparison: DomainComparison) -> None:
    """Writes domain.json, domain.md and domain.png into the experiment's folder, and prints the tables."""
    by_method = comparison.by_method
    runs = {str(run.folder): run for run in (*comparison.grid_runs, *comparison.runs)}
    results = {folder: experiment.result(run) for folder, run in runs.items()}
    (experiment.folder / "domain.json").write_text(json.dumps(results, indent=1) + "\n")
    table = lesson_table(
        {name: [results[str(run.folder)] for run in method_runs] for name, method_runs in by_method.items()}, COLUMNS
    )
    seeds = ", ".join(map(str, comparison.seeds))
    text = "\n\n".join(
        [
            f"# Results of `python -m benchmarks.miniature.teach_domain`\n\n{experiment.num_train_steps} steps per "
            f"run, {experiment.eval_count} pictures per task, seeds {seeds}. {machine()}.",
            f"## {DOMAIN.title}\n\n{NOTE.format(floor=fd_floor(experiment.eval_count))}\n\n{table}",
            f"## Learning rates\n\n{GRID_NOTE.format(seed=comparison.grid_seed)}",
            *(grid_table(experiment, comparison, mode) for mode in comparison.modes),
        ]
    )
    (experiment.folder / "domain.md").write_text(text + "\n")
    print(text)
    save_png(draw_sheet(experiment, comparison), experiment.folder / "domain.png")


def fd_floor(count: int) -> float:
    """The distance between two sets of pictures of the domain that show what the new prompts ask for."""
    new = DOMAIN.new_task(count)
    return frechet_distance(DOMAIN.new_task(count, seed=55).real, new.real, DOMAIN.features)


def grid_table(experiment: LessonExperiment, comparison: DomainComparison, mode: str) -> str:
    """One row per method that trains in this mode, one column per learning rate."""
    chosen = comparison.chosen_rates
    rows = []
    for name, by_rate in comparison.grid_in(mode).items():
        cells = []
        for rate, run in by_rate.items():
            result = experiment.result(run)
            text = " / ".join(f"{result[part][figure]:.{digits}f}" for part, figure, digits in GRID_FIGURES)
            cells.append(f"**{text}**" if rate == chosen[name] else text)
        rows.append([name, *cells])
    return markdown([f"{rate:g}" for rate in by_rate], rows)


def sheet_tasks(seed: int) -> list[Task]:
    tasks = DOMAIN.tasks(max(NUM_NEW, NUM_OLD, NUM_WRONG), seed)
    counts = {"new": NUM_NEW, "old": NUM_OLD, "wrong_words": NUM_WRONG}
    return [
        Task(task.prompts[:count], [], task.wanted[:count], task.backgrounds[:count], task.real[:count])
        for task, count in ((tasks[name], count) for name, count in counts.items())
    ]


def draw_sheet(experiment: LessonExperiment, comparison: DomainComparison) -> Image.Image:
    """Rows: new prompts, old ones, one with another made-up word. Columns: each method's first run; last, what is
    asked for."""
    tasks = sheet_tasks(comparison.seeds[0])
    first = {name: runs[0] for name, runs in comparison.by_method.items() if runs[0].method.kind != "teacher"}
    columns = {}
    for name, run in first.items():
        pipeline = experiment.load(run)
        columns[name.replace(DEFAULT, "the default")] = [
            image for task in tasks for image in draw_task(pipeline, task)
        ]
    columns["what is asked for"] = [image for task in tasks for image in pictures_of(task.real)]
    return contact_sheet(
        f"A domain of {NUM_DOMAIN_PICTURES} pictures, the word {DOMAIN.word!r}",
        list(columns),
        rows_of([prompt for task in tasks for prompt in task.prompts], list(columns.values())),
        note="No training picture shows these objects. The last rows, without the word, should stay as the base draws "
        f"them. Pictures of a row start from the same noise; {NUM_STEPS} steps.",
        cell_pixels=CELL_PIXELS,
    )
