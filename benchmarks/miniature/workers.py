"""Makes the results of many runs in worker processes."""

from dataclasses import replace

import diffusers
import transformers

from benchmarks.miniature.methods import Run
from benchmarks.miniature.processes import run_in_waves
from benchmarks.miniature.runs import Experiment


worker_experiment: Experiment  # in a worker process only


def run_side_by_side(experiment: Experiment, runs: list[Run], step_runs: list[Run], num_workers: int) -> None:
    """Makes every run's result, then the results by step count of `step_runs`, with one run per worker at a time.

    Raises:
        TrainingFailed: a training failed. Runs that have not started by then are left out.
    """
    # D-OPSD first, since its runs take longest: otherwise the last one runs alone while other cores are idle.
    runs = sorted(runs, key=lambda run: run.method.kind != "dopsd")
    waves = [
        (_make_result, [run for run in runs if not run.method.stops_at_dopsd]),
        (_make_result, [run for run in runs if run.method.stops_at_dopsd]),
        (_make_results_by_step_count, step_runs),
    ]
    # A copy, since the workers need not receive what `experiment` has cached.
    run_in_waves(waves, num_workers, initializer=_start_worker, initargs=(replace(experiment),))


def disable_progress_bars() -> None:
    """For loading models: diffusers' and transformers'."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _start_worker(experiment: Experiment) -> None:
    global worker_experiment
    disable_progress_bars()
    worker_experiment = experiment


def _make_result(run: Run) -> None:
    worker_experiment.result(run)


def _make_results_by_step_count(run: Run) -> None:
    worker_experiment.results_by_step_count(run)
