"""Teaches the miniature a domain, by training the whole transformer and by LoRA.

    python -m benchmarks.miniature.teach_domain --output_dir domain-results

Run the same command again to continue a stopped experiment: finished runs are kept. D-OPSD's runs use
`train_dopsd_flux2.py` itself. Each method's learning rate is chosen on a seed of its own.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; set before a library reads it


from benchmarks.miniature.command_line import run
from benchmarks.miniature.domain_base import assemble_base
from benchmarks.miniature.domain_report import write_report
from benchmarks.miniature.domain_runs import FULL, LORA, SEEDS, DomainComparison
from benchmarks.miniature.lesson_runs import open_experiment, parse_lesson_args
from benchmarks.miniature.methods import Run
from benchmarks.miniature.workers import Work, disable_progress_bars, run_side_by_side


EVAL_COUNT = 96


def main() -> None:
    args = parse_lesson_args(
        __doc__,
        "domain-results",
        (FULL, LORA),
        "Train only in this way. Default: in both.",
        eval_count=EVAL_COUNT,
        seeds=SEEDS,
    )
    experiment = open_experiment(args, "base", assemble_base)
    disable_progress_bars()
    # For the workers and the training script, which read it when they start.
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.num_workers))
    modes = (FULL, LORA) if args.only is None else (args.only,)
    comparison = DomainComparison(experiment.result, modes, tuple(args.seeds))

    def make(runs: list[Run]) -> None:
        run_side_by_side(experiment, Work(runs), args.num_workers)

    make(comparison.grid_runs)
    make(comparison.runs)
    write_report(experiment, comparison)


if __name__ == "__main__":
    run(main)
