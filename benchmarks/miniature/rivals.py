"""Compares D-OPSD with what owners of few-step models do today: a grid for each, the best of it on other runs.

    python -m benchmarks.miniature.rivals --model klein --output_dir klein-rivals

Run the same command again to continue a stopped comparison: finished runs are kept. First the models that rivals need
are trained, once (`once.py`). Then each method is trained with all settings of its grid on one concept and one seed,
and with the setting that is chosen from these on other concepts and seeds; at last, on klein, where off-policy breaks
is looked for. `--quick` has one setting for some methods, one concept and one seed, and no study.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; set before a library reads it

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from benchmarks.miniature import rival_report
from benchmarks.miniature.architecture import Architecture
from benchmarks.miniature.architectures import architecture_in
from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.concepts import MAX_EVAL_COUNT
from benchmarks.miniature.evaluate import add_model_flag, check_evaluation
from benchmarks.miniature.experiment import EVAL_COUNT, QUICK_EVAL_COUNT
from benchmarks.miniature.files import check_settings, make_folder
from benchmarks.miniature.methods import NUM_TRAIN_STEPS
from benchmarks.miniature.once import OnceSettings, waves_of
from benchmarks.miniature.plans import SEEDS, TUNING_SEED
from benchmarks.miniature.processes import run_in_waves
from benchmarks.miniature.rival_methods import RECIPES, REPORTED_CONCEPTS, Recipe, RivalPlan, RivalRun
from benchmarks.miniature.rival_runs import GRID_COUNT, RivalExperiment
from benchmarks.miniature.rival_study import study
from benchmarks.miniature.workers import disable_progress_bars
from benchmarks.miniature.zimage import ZIMAGE


QUICK_NAMES = (
    "SFT + prior pictures",
    "SFT + prior pictures, repaired",
    "training adapter + prior pictures",
    "undistilled + prior pictures",
    "off-policy + prior, cached, 1 state",
    "delta of the adapter + prior",
    "D-OPSD, 1 state + prior",
)
MOST_PICTURES = MAX_EVAL_COUNT - 2 * GRID_COUNT  # the grids' come after these; some of them repeat a prompt
SECOND = (1,)  # learning rate and number of steps of a quick grid
NUM_REPORTED_SEEDS = 2
QUICK_ONCE = OnceSettings(num_pictures=256, adapter_steps=100, undistilled_steps=100, repair_steps=60)

worker_experiment: RivalExperiment  # in a worker process only


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_flag(parser)
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="Folder for runs, tables and plots. Default: miniature-rivals-MODEL; with --quick "
        "miniature-rivals-MODEL-quick.",
    )
    parser.add_argument(
        "--num_train_steps",
        type=positive_int,
        default=NUM_TRAIN_STEPS,
        help=f"Training steps of a run that the tables count as {NUM_TRAIN_STEPS}; other numbers are in proportion.",
    )
    parser.add_argument("--eval_count", type=positive_int, help="Pictures per task that are measured.")
    parser.add_argument("--num_workers", type=positive_int, default=os.cpu_count(), help="Runs at the same time.")
    parser.add_argument("--quick", action="store_true", help="One setting, concept and seed, some methods, no study.")
    args = parser.parse_args()
    if args.eval_count is None:
        args.eval_count = QUICK_EVAL_COUNT if args.quick else EVAL_COUNT
    return args


def main() -> None:
    args = parse_args()
    check_evaluation(args.model, args.eval_count, MOST_PICTURES)
    if args.output_dir is None:
        name = f"miniature-rivals-{architecture_in(args.model).name}"
        args.output_dir = Path(f"{name}-quick" if args.quick else name)
    make_folder(args.output_dir, flag="--output_dir")
    experiment = RivalExperiment(
        model=args.model.resolve(),
        folder=args.output_dir.resolve(),
        num_train_steps=args.num_train_steps,
        steps_per_evaluation=args.num_train_steps,
        eval_count=args.eval_count,
        once_settings=QUICK_ONCE if args.quick else OnceSettings(),
    )
    disable_progress_bars()
    check_settings(args.output_dir, experiment.settings, flag="--output_dir")
    # For the workers and the training script, which read it when they start.
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.num_workers))
    plan = make_plan(experiment, is_quick=args.quick)
    run_all(experiment, plan, args.num_workers)
    rival_report.write(experiment, plan)


def make_plan(experiment: RivalExperiment, *, is_quick: bool) -> RivalPlan:
    results = experiment.short_result, experiment.many_step_result
    if is_quick:
        return RivalPlan(
            *results,
            QUICK_NAMES,
            REPORTED_CONCEPTS[:1],
            SEEDS[:1],
            TUNING_SEED,
            kept_rates=SECOND,
            kept_steps=SECOND,
        )
    # Z-Image-Turbo's 8 steps make measuring twice as long: its grids leave out the smallest number of training steps,
    # and where off-policy breaks is looked for on klein only.
    is_zimage = experiment.architecture is ZIMAGE
    return RivalPlan(
        *results,
        (*RECIPES,),
        REPORTED_CONCEPTS,
        SEEDS[:NUM_REPORTED_SEEDS],
        TUNING_SEED,
        kept_steps=(1, 2, 3) if is_zimage else (0, 1, 2, 3),
        study_seeds=() if is_zimage else SEEDS[:1],
    )


def run_all(experiment: RivalExperiment, plan: RivalPlan, num_workers: int) -> None:
    """Makes all results, with one run per worker at a time."""
    start = {"initializer": _start_worker, "initargs": (replace(experiment),)}  # a copy without what is cached
    run_in_waves(waves_of(experiment.once, _make_once), num_workers, **start)

    def grids(recipes: Iterable[Recipe]) -> list[RivalRun]:
        return slowest_first([run for recipe in recipes for run in plan.grid(recipe)], experiment.architecture)

    first = [
        (_make_short_result, [*grids(plan.recipes(needing_others=False)), plan.base_run]),
        (_make_many_step_result, grids(plan.sources)),
    ]
    run_in_waves(first, num_workers, **start)
    run_in_waves([(_make_short_result, grids(plan.recipes(needing_others=True)))], num_workers, **start)
    reported = {run.folder: run for runs in plan.reported.values() for run in runs}
    sources = [run for run in reported.values() if run.method.source is None]
    others = [run for run in reported.values() if run.method.source is not None]
    used = {run.source.folder: run.source for run in others}  # trained before, since several runs may use one LoRA
    has_stacks = plan.concepts == experiment.stacked_concepts  # the next concept's LoRA is trained as well
    trained = [run for run in reported.values() if run.method.is_trained]
    stacked = [run for run in trained if has_stacks and run.concept == plan.concepts[0]]
    tried = [run for run in trained if run.seed == plan.seeds[0]]
    studied = [run for by_method in study(plan).values() for runs in by_method.values() for run in runs]
    waves = [
        (_make_result, slowest_first(sources, experiment.architecture)),
        (_make_lora, slowest_first(used.values(), experiment.architecture)),
        (_make_result, slowest_first(others, experiment.architecture)),
        (_make_stack, stacked),
        (_make_strengths, tried),
        (_make_short_result, slowest_first({run.folder: run for run in studied}.values(), experiment.architecture)),
    ]
    run_in_waves(waves, num_workers, **start)


def slowest_first(runs: Iterable[RivalRun], architecture: Architecture) -> list[RivalRun]:
    """So that the last run does not leave the other workers idle for long."""

    def cost(run: RivalRun) -> float:
        return run.method.cost(run.method.num_steps(NUM_TRAIN_STEPS), architecture) if run.method.is_trained else 0.0

    return sorted(runs, key=cost, reverse=True)


def _start_worker(experiment: RivalExperiment) -> None:
    global worker_experiment
    disable_progress_bars()
    worker_experiment = experiment


def _make_once(part: str) -> None:
    worker_experiment.once.figures(part)


def _make_lora(run: RivalRun) -> None:
    worker_experiment.trained(run)


def _make_short_result(run: RivalRun) -> None:
    worker_experiment.short_result(run)


def _make_many_step_result(run: RivalRun) -> None:
    worker_experiment.many_step_result(run)


def _make_strengths(run: RivalRun) -> None:
    worker_experiment.strengths(run)


def _make_result(run: RivalRun) -> None:
    worker_experiment.result(run)


def _make_stack(run: RivalRun) -> None:
    worker_experiment.stack(run)


if __name__ == "__main__":
    run(main)
