"""Runs functions in worker processes that end with their parent."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from threading import Thread

from tqdm.auto import tqdm


def run_in_waves(
    waves: Sequence[tuple[Callable, Sequence]], num_workers: int, *, initializer: Callable, initargs: tuple
) -> None:
    """Calls each wave's function with each of its arguments, `num_workers` calls at a time.

    A wave starts when the one before it is complete. After an error, no further call is started.

    Args:
        waves: (function, arguments) pairs. The functions' results are ignored.
        initializer: called with `initargs` in every worker process when it starts.

    Raises:
        Exception: the first error that a call raises.
    """
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(initializer, initargs),
    )
    try:
        with tqdm(total=sum(len(arguments) for _, arguments in waves), desc="Runs") as bar:
            for function, arguments in waves:
                for future in as_completed([pool.submit(function, argument) for argument in arguments]):
                    future.result()
                    bar.update()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(initializer: Callable, initargs: tuple) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    initializer(*initargs)


def _end_with_parent() -> None:
    """Otherwise the workers of a killed process would continue, and do the same work as the next one's."""
    parent_process().join()
    os._exit(1)
