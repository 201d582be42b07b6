"""Runs the training scripts for a few steps on models of the published shapes with random weights.

Nothing is downloaded. Each run has other flags; its time and memory are listed beside what `--dry_run` computes:

    python -m benchmarks.real_shapes --model klein-4b --work_dir /tmp/real_shapes

trains LoRAs on one GPU. A run that is killed is resumed, and what it trained is drawn by the stock pipeline.
`--runs` takes names, and runs of your own as NAME='--flag value'. Results are written after each run.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; set before a library reads it

import argparse
import gc
import json
import math
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.files import REPOSITORY, make_folder, replacing
from benchmarks.miniature.tables import markdown
from benchmarks.real_shapes.checkpoint import SUBJECTS, Files
from benchmarks.real_shapes.evaluation import EVALUATIONS, Evaluation, evaluate, make_feature_models
from benchmarks.real_shapes.runs import NUM_FIRST_STEPS, RUNS, Row, Run, Runner, difference_of_losses
from benchmarks.real_shapes.stock import drawn_change
from benchmarks.startup import load_script
from benchmarks.step_report import environment
from dopsd.errors import InputError, first_line


DEFAULT_RUNS = ("lora", "killed", "vlm", "int8", "nf4", "offload", "compile")
EVALUATION_HEADINGS = (
    *("s per picture", "drawing: peak, GB", "measuring, s", "measuring: peak, GB", "whole run, s", "result"),
)
HEADINGS = ("s per step", "peak, GB", "planned, GB", "host, GB", "planned, GB", "whole run, s", "result")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", choices=SUBJECTS, type=str.lower, required=True, help="Shapes of the model.")
    parser.add_argument("--work_dir", type=Path, required=True, help="Folder for weights, runs and logs: 20 to 40 GB.")
    parser.add_argument("--output_dir", type=Path, help="Folder for the results. Default: --work_dir.")
    parser.add_argument(
        "--runs",
        nargs="+",
        default=DEFAULT_RUNS,
        metavar="NAME",
        help=f"Runs, in this order: {', '.join(RUNS)}, or NAME='--flag value'; one "
        "whose name begins with killed is killed and resumed.",
    )
    parser.add_argument("--drawn_runs", nargs="*", default=["killed"], metavar="NAME", help="Runs to draw with.")
    parser.add_argument(
        "--evaluated_run",
        metavar="NAME",
        help="Run whose LoRA evaluate_lora.py compares with the base. Default: none.",
    )
    parser.add_argument("--train_mode", help="Of all runs, as in the training scripts. Default: theirs.")
    parser.add_argument("--num_steps", type=positive_int, default=6, help="Steps per run.")
    parser.add_argument("--time_limit", type=float, default=math.inf, help="Begin no run after so many seconds.")
    parser.add_argument("--run_limit", type=float, default=math.inf, help="Kill a process after so many seconds.")
    return parser.parse_args()


def chosen_runs(texts: list[str]) -> dict[str, Run]:
    """Raises `InputError` if there is no run of a name."""
    chosen = {}
    for text in texts:
        name, is_own, flags = text.partition("=")
        if not is_own and name not in RUNS:
            raise InputError(f"--runs {name}: there is no such run; choose from {', '.join(RUNS)}, or give its flags")
        own = Run(tuple(shlex.split(flags)), is_killed=name.startswith("killed"))
        chosen[name] = own if is_own else RUNS[name]
    return chosen


def report(model: str, machine: dict[str, str], rows: list[Row], evaluations: Sequence[Evaluation] = ()) -> str:
    """The results as a page of Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in machine.items())
    table = markdown(list(HEADINGS), [[f"{row.name}: `{' '.join(row.flags)}`", *cells(row)] for row in rows])
    note = (
        f"Seconds: the median of the steps after the first {NUM_FIRST_STEPS}. Planned: training and host memory as "
        "`--dry_run` computes them. Host: the most that the process had resident, mapped files included."
    )
    parts = [f"# {model}", versions, table, note]
    if evaluations:
        compared = [[f"`evaluate_lora.py {' '.join(one.flags)}`", *evaluation_cells(one)] for one in evaluations]
        parts.append(markdown(list(EVALUATION_HEADINGS), compared))
    return "\n\n".join(parts) + "\n"


def cells(row: Row) -> list[str]:
    later = row.step_seconds[NUM_FIRST_STEPS:]
    figures = [
        statistics.median(later) if later else None,
        row.peak_gb,
        row.planned_gb.get("training"),
        row.host_gb,
        row.planned_gb.get("host memory"),
        row.run_seconds,
    ]
    remarks = [*row.remarks]
    if row.change is not None:
        remarks.append(f"the stock pipeline's picture changes by {row.change:.1e}")
    result = "; ".join([row.error or "trained", *remarks]).replace("|", "\\|")
    return [*("-" if figure is None else f"{figure:.3g}" for figure in figures), result]


def main() -> None:
    args = parse_args()
    runs, subject = chosen_runs(args.runs), SUBJECTS[args.model]
    if args.model != "tiny" and not torch.cuda.is_available():
        raise InputError(f"--model {args.model}: needs a GPU; choose tiny on a CPU")
    output_dir = args.output_dir or args.work_dir
    for flag, folder in (("--work_dir", args.work_dir), ("--output_dir", output_dir)):
        make_folder(folder, flag=flag)
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_script(REPOSITORY / f"{subject.shape.script}.py").MODEL
    files = Files(args.work_dir.resolve() / args.model)
    files.make(subject, model, device)
    free_memory()
    print(f"{files.folder}: made or found after {time.monotonic() - started:.0f} seconds", flush=True)
    mode = () if args.train_mode is None else ("--train_mode", args.train_mode)
    runner = Runner(subject, model, files, args.num_steps, mode, args.run_limit)
    machine, rows = environment(), {}
    for name, one in runs.items():
        if time.monotonic() - started > args.time_limit:
            print(f"{name}: not begun, --time_limit is over", flush=True)
            continue
        row = rows[name] = runner.measure(name, one)
        if name in args.drawn_runs and row.error is None:
            draw(row, runner, device)
        if one.is_killed and "lora" in rows and (difference := difference_of_losses(row, rows["lora"])) is not None:
            row.remarks.append(f"losses differ by at most {difference:.1e} from those of the run that was not killed")
        print(f"{time.monotonic() - started:.0f} s, {name}: {' | '.join(cells(row))}", flush=True)
        write_results(args, output_dir, machine, [*rows.values()])
    if args.evaluated_run in rows and rows[args.evaluated_run].error is None:
        evaluations = compare(runner, args.evaluated_run, device)
        write_results(args, output_dir, machine, [*rows.values()], evaluations)


def write_results(
    args: argparse.Namespace,
    folder: Path,
    machine: dict[str, str],
    rows: list[Row],
    evaluations: Sequence[Evaluation] = (),
) -> None:
    """Writes real-shapes-MODEL.json and .md."""
    results = {"environment": machine, "rows": [*map(asdict, rows)], "evaluations": [*map(asdict, evaluations)]}
    texts = {".json": json.dumps(results, indent=2), ".md": report(args.model, machine, rows, evaluations)}
    for suffix, text in texts.items():
        with replacing(folder / f"real-shapes-{args.model}{suffix}") as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def compare(runner: Runner, name: str, device: torch.device) -> list[Evaluation]:
    """Runs `evaluate_lora.py` on what a run has left, once with each of `EVALUATIONS`."""
    files, folder = runner.files, runner.files.folder / "evaluation"
    make_feature_models(folder, device, is_small=device.type == "cpu")
    free_memory()
    found = []
    for flags in EVALUATIONS:
        log = runner.log(f"evaluation-{len(found)}")
        places = files.checkpoint, files.photographs, folder
        found.append(evaluate(runner.output_dir(name), *places, runner.subject.side, flags, log))
        print(f"evaluate_lora.py {' '.join(flags)}: {' | '.join(evaluation_cells(found[-1]))}", flush=True)
    return found


def evaluation_cells(one: Evaluation) -> list[str]:
    figures = [
        one.drawing_seconds / one.num_drawn if one.num_drawn and one.drawing_seconds else None,
        one.drawing_gb,
        one.measuring_seconds,
        one.measuring_gb,
        one.run_seconds,
    ]
    return [*("-" if figure is None else f"{figure:.3g}" for figure in figures), one.error or "compared"]


def draw(row: Row, runner: Runner, device: torch.device) -> None:
    """Fills in `change`, or the error: the other runs go on whatever is wrong with this one's weights."""
    trained = runner.output_dir(row.name)
    try:
        row.change = drawn_change(runner.model, runner.files.checkpoint, trained, runner.subject.side, device)
    except Exception as error:
        row.error = f"trained, but not drawn: {type(error).__name__}: {first_line(error)}"
    free_memory()


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main)
