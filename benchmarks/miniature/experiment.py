"""Teaches the miniature new concepts with D-OPSD and with other methods, and compares the results.

    python -m benchmarks.miniature.experiment --output_dir miniature-results

Run the same command again to continue a stopped experiment: finished runs are kept. `--quick` does one concept, one
seed and the methods of the first table, and measures fewer pictures. D-OPSD's runs use `train_dopsd_flux2.py` itself.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; set before a library reads it

import argparse
from pathlib import Path

from benchmarks.miniature import report
from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.concepts import CONCEPTS
from benchmarks.miniature.evaluate import NUM_RETENTION_PROMPTS
from benchmarks.miniature.files import MODEL, check_model, check_settings, make_folder
from benchmarks.miniature.methods import (
    ABLATIONS,
    FIRST_TABLE,
    NUM_TRAIN_STEPS,
    STEP_TABLE,
    all_runs,
    runs_by_method,
)
from benchmarks.miniature.runs import Experiment
from benchmarks.miniature.workers import disable_progress_bars, run_side_by_side
from dopsd.errors import InputError


SEEDS = (0, 1, 2)
EVAL_COUNT, QUICK_EVAL_COUNT = 64, 48
STEPS_PER_EVALUATION, QUICK_STEPS_PER_EVALUATION = 20, 30


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="Folder of the miniature. Default: the shipped one.")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="Folder for runs, tables and sheets. Default: miniature-results; with --quick miniature-quick.",
    )
    parser.add_argument(
        "--num_train_steps",
        type=positive_int,
        default=NUM_TRAIN_STEPS,
        help="Training steps per run.",
    )
    parser.add_argument(
        "--eval_count",
        type=positive_int,
        help=f"Pictures per task that are measured. Default: {EVAL_COUNT}; with --quick {QUICK_EVAL_COUNT}.",
    )
    parser.add_argument(
        "--num_workers",
        type=positive_int,
        help="Runs at the same time. Default: one per core; with --quick one on all cores.",
    )
    parser.add_argument("--quick", action="store_true", help="Only one concept, one seed and the first table.")
    args = parser.parse_args()
    if args.output_dir is None:
        args.output_dir = Path("miniature-quick" if args.quick else "miniature-results")
    if args.eval_count is None:
        args.eval_count = QUICK_EVAL_COUNT if args.quick else EVAL_COUNT
    if args.num_workers is None:
        args.num_workers = 1 if args.quick else os.cpu_count()
    return args


def main() -> None:
    args = parse_args()
    check_model(args.model)
    if args.eval_count < NUM_RETENTION_PROMPTS:
        raise InputError(f"--eval_count {args.eval_count}: give {NUM_RETENTION_PROMPTS} or more")
    make_folder(args.output_dir, flag="--output_dir")
    experiment = Experiment(
        model=args.model.resolve(),
        folder=args.output_dir.resolve(),
        num_train_steps=args.num_train_steps,
        steps_per_evaluation=QUICK_STEPS_PER_EVALUATION if args.quick else STEPS_PER_EVALUATION,
        eval_count=args.eval_count,
    )
    check_settings(args.output_dir, experiment.settings, flag="--output_dir")
    disable_progress_bars()

    concepts, seeds = (CONCEPTS[:1], SEEDS[:1]) if args.quick else (CONCEPTS, SEEDS)
    first = runs_by_method(FIRST_TABLE, concepts, seeds)
    ablations = {} if args.quick else runs_by_method(ABLATIONS, concepts[:1], seeds)
    by_step_count = runs_by_method(STEP_TABLE, concepts[:1], seeds[:1])

    # For the workers and the training script, which read it when they start.
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.num_workers))
    run_side_by_side(experiment, all_runs(first, ablations), all_runs(by_step_count), args.num_workers)
    report.write(experiment, first, ablations, by_step_count)


if __name__ == "__main__":
    run(main)
