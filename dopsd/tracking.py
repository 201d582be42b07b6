"""Trackers (TensorBoard, Weights & Biases, Comet). A tracker that fails is dropped; it does not end the run."""

import threading
from collections.abc import Callable

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import GeneralTracker

from .errors import InputError, first_line
from .settings import Settings


logger = get_logger(__name__)


def start_trackers(accelerator: Accelerator, tracker_name: str, settings: Settings) -> None:
    """Starts the trackers with the run's settings, without the token.

    Raises:
        InputError: one of them cannot be started.
    """
    # TensorBoard's thread raises what its caller gets anyway; without this, the traceback of a full disk is printed.
    threading.excepthook = _ignore_writer_threads
    shown = {name: str(value) for name, value in settings.flat().items() if name != "hub_token"}
    try:
        accelerator.init_trackers(tracker_name, config=shown)
    except Exception as error:  # each tracker has errors of its own
        raise InputError(
            f"--report_to {settings.training.report_to}: cannot be started ({first_line(error)}); check the tracker, "
            "or pass --report_to none (metrics.jsonl and curves.png are written in any case)"
        ) from error


def _ignore_writer_threads(details: threading.ExceptHookArgs) -> None:
    if type(details.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
        threading.__excepthook__(details)


def track(accelerator: Accelerator, call: Callable[[GeneralTracker], None]) -> None:
    """Calls a function with every tracker. One for which it fails is not used again."""
    for tracker in list(accelerator.trackers):
        try:
            call(tracker)
        except Exception as error:  # each tracker has errors of its own
            accelerator.trackers.remove(tracker)
            logger.warning(f"--report_to {tracker.name}: has failed ({first_line(error)}); the run goes on without it")


def end_training(accelerator: Accelerator, message: str | None = None) -> None:
    """Closes the trackers and the process group, and logs the message."""
    if message is not None:
        logger.info(message)
    track(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers = []
    accelerator.end_training()
