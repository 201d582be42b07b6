"""Teaches the miniature a domain, by training the whole transformer and by LoRA.

    python -m benchmarks.miniature.teach_domain --output_dir domain-results

Run the same command again to continue a stopped experiment: finished runs are kept. D-OPSD's runs use
`train_dopsd_flux2.py` itself. Each method's learning rate is chosen on a seed of its own.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; set before a library reads it

import argparse
from pathlib import Path

from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.concepts import MAX_EVAL_COUNT
from benchmarks.miniature.domain_base import assemble_base
from benchmarks.miniature.domain_report import write_report
from benchmarks.miniature.domain_runs import FULL, LORA, SEEDS, DomainComparison
from benchmarks.miniature.evaluate import NUM_RETENTION_PROMPTS
from benchmarks.miniature.files import check_settings, make_folder
from benchmarks.miniature.lesson_runs import LessonExperiment
from benchmarks.miniature.methods import NUM_TRAIN_STEPS, Run
from benchmarks.miniature.workers import Work, disable_progress_bars, run_side_by_side
from dopsd.errors import InputError


EVAL_COUNT = 96


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("domain-results"), help="Folder for runs and tables.")
    parser.add_argument("--only", choices=(FULL, LORA), help="Train only in this way. Default: in both.")
    parser.add_argument(
        "--num_train_steps", type=positive_int, default=NUM_TRAIN_STEPS, help="Training steps per run."
    )
    parser.add_argument("--eval_count", type=positive_int, default=EVAL_COUNT, help="Pictures per task.")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="Seeds of the runs.")
    parser.add_argument("--num_workers", type=positive_int, default=os.cpu_count(), help="Runs at the same time.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not NUM_RETENTION_PROMPTS <= args.eval_count <= MAX_EVAL_COUNT:
        raise InputError(f"--eval_count {args.eval_count}: give {NUM_RETENTION_PROMPTS} to {MAX_EVAL_COUNT}")
    make_folder(args.output_dir, flag="--output_dir")
    folder = args.output_dir.resolve()
    experiment = LessonExperiment(
        model=assemble_base(folder / "base"),
        folder=folder,
        num_train_steps=args.num_train_steps,
        steps_per_evaluation=args.num_train_steps,
        eval_count=args.eval_count,
    )
    check_settings(experiment.folder, experiment.settings, flag="--output_dir")
    disable_progress_bars()
    # For the workers and the training script, which read it when they start.
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.num_workers))
    modes = (FULL, LORA) if args.only is None else (args.only,)
    comparison = DomainComparison(experiment.result, modes, tuple(args.seeds))

    def make(runs: list[Run]) -> None:
        run_side_by_side(experiment, Work(runs, stacks=[], timed=[], by_step_count=[]), args.num_workers)

    make(comparison.grid_runs)
    make(comparison.runs)
    write_report(experiment, comparison)


if __name__ == "__main__":
    run(main)
