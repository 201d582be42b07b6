"""Teaches the miniature new concepts with D-OPSD and with other methods, and compares the results.

    python -m benchmarks.miniature.experiment --output_dir miniature-results

Run the same command again to continue a stopped experiment: finished runs are kept. `--quick` does one concept, one
seed and some methods of the first table, and measures fewer pictures, no stacks and no times. D-OPSD's runs use
`train_dopsd_flux2.py` itself.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; set before a library reads it

import argparse
from pathlib import Path

from benchmarks.miniature import report
from benchmarks.miniature.architectures import architecture_in
from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.concepts import MAX_EVAL_COUNT
from benchmarks.miniature.evaluate import add_model_flag, check_evaluation
from benchmarks.miniature.files import check_settings, make_folder
from benchmarks.miniature.methods import NUM_TRAIN_STEPS, all_runs
from benchmarks.miniature.plans import Plan, make_plan
from benchmarks.miniature.runs import Experiment, timed_run
from benchmarks.miniature.workers import Work, disable_progress_bars, run_side_by_side


EVAL_COUNT, QUICK_EVAL_COUNT = 64, 48
STEPS_PER_EVALUATION, QUICK_STEPS_PER_EVALUATION = 20, 30


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_flag(parser)
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="Folder for runs, tables and sheets. Default: miniature-results-MODEL; with --quick "
        "miniature-quick-MODEL.",
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
    parser.add_argument("--quick", action="store_true", help="Only one concept, one seed and some methods.")
    args = parser.parse_args()
    if args.eval_count is None:
        args.eval_count = QUICK_EVAL_COUNT if args.quick else EVAL_COUNT
    if args.num_workers is None:
        args.num_workers = 1 if args.quick else os.cpu_count()
    return args


def main() -> None:
    args = parse_args()
    check_evaluation(args.model, args.eval_count, MAX_EVAL_COUNT)
    args.output_dir = args.output_dir or default_folder(args.model, is_quick=args.quick)
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

    plan = make_plan(experiment.architecture, is_quick=args.quick)

    # For the workers and the training script, which read it when they start.
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.num_workers))
    run_side_by_side(experiment, make_work(plan), args.num_workers)
    report.write(experiment, plan)


def default_folder(model: Path, *, is_quick: bool) -> Path:
    """For the results of this miniature, in the current folder."""
    return Path(f"miniature-{'quick' if is_quick else 'results'}-{architecture_in(model).name}")


def make_work(plan: Plan) -> Work:
    """The runs of the plan. Steps are timed of the methods of which stacks are measured."""
    stacked = [comparison.runs for comparison in plan.comparisons if comparison.has_stacks]
    stacks = [run for run in all_runs(*stacked) if run.method.is_trained]
    return Work(
        runs=all_runs(*(comparison.runs for comparison in plan.comparisons)),
        stacks=stacks,
        timed=list({timed_run(run).folder: run for run in stacks}.values()),
        by_step_count=all_runs(plan.by_step_count),
        step_counts=plan.step_counts,
    )


if __name__ == "__main__":
    run(main)
