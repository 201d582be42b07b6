"""Makes the results of many runs in worker processes."""

from dataclasses import dataclass, field, replace
from functools import partial

import diffusers
import transformers

from benchmarks.miniature.methods import Run
from benchmarks.miniature.processes import run_in_waves
from benchmarks.miniature.runs import Experiment


worker_experiment: Experiment  # in a worker process only


@dataclass(frozen=True)
class Work:
    """What an experiment computes.

    Attributes:
        runs: to be trained and measured.
        stacks: of these, the ones to be measured together with another concept's.
        timed: of these, the ones whose training steps are timed.
        by_step_count: of these, the ones to be measured at several numbers of sampling steps.
        step_counts: these numbers.
    """

    runs: list[Run]
    stacks: list[Run] = field(default_factory=list)
    timed: list[Run] = field(default_factory=list)
    by_step_count: list[Run] = field(default_factory=list)
    step_counts: tuple[int, ...] = ()


def run_side_by_side(experiment: Experiment, work: Work, num_workers: int) -> None:
    """Makes all results, with one run per worker at a time. Times are measured afterwards, one run after the other.

    Raises:
        TrainingFailed: a training failed. Runs that have not started by then are left out.
    """
    # D-OPSD first, since its runs take longest: otherwise the last one runs alone while other cores are idle.
    runs = sorted(work.runs, key=lambda run: run.method.kind != "dopsd")
    waves = [
        (_make_result, [run for run in runs if not run.method.stops_at_dopsd]),
        (_make_result, [run for run in runs if run.method.stops_at_dopsd]),
        (_make_stack, work.stacks),
        (partial(_make_results_by_step_count, step_counts=work.step_counts), work.by_step_count),
    ]
    # A copy, since the workers need not receive what `experiment` has cached.
    start = {"initializer": _start_worker, "initargs": (replace(experiment),)}
    run_in_waves(waves, num_workers, **start)
    run_in_waves([(_time_steps, work.timed)], 1, **start)


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


def _make_results_by_step_count(run: Run, step_counts: tuple[int, ...]) -> None:
    worker_experiment.results_by_step_count(run, step_counts)


def _make_stack(run: Run) -> None:
    worker_experiment.stack(run)


def _time_steps(run: Run) -> None:
    worker_experiment.step_seconds(run)
