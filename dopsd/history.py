"""The metrics of a run: sent to the trackers, and kept in metrics.jsonl in the output folder."""

import json
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger

from .errors import first_line
from .output import HISTORY_FILE, replacing, reporting_write_errors, sync_to_disk
from .tracking import track


logger = get_logger(__name__)


def read_history(folder: Path) -> list[dict]:
    """The logged metrics, one dictionary per line. A last line that a killed run did not finish is left out.

    Damaged lines, such as the zero bytes that a power cut leaves, are left out with a warning.
    """
    path = folder / HISTORY_FILE
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    rows = [row for row in map(_parse, lines) if row is not None]
    if len(rows) < len(lines):
        logger.warning(f"{path}: {len(lines) - len(rows)} of {len(lines)} lines are damaged and not used")
    return rows


def _parse(line: bytes) -> dict | None:
    """The metrics in a line; None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_valid = isinstance(row, dict) and "step" in row and all(type(value) in (int, float) for value in row.values())
    return row if is_valid else None


def rewind_history(folder: Path, step: int) -> None:
    """Removes damaged lines, and what an interrupted run logged after the checkpoint from which this run continues."""
    kept = [line for line in read_history(folder) if line["step"] <= step]
    with reporting_write_errors(folder, HISTORY_FILE), replacing(folder / HISTORY_FILE) as unfinished:
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def sync_history(folder: Path) -> None:
    """Flushes the history to disk."""
    if (folder / HISTORY_FILE).is_file():
        sync_to_disk(folder / HISTORY_FILE)


def last_retention(folder: Path) -> float | None:
    """The retention measured last; None if it was never measured."""
    figures = [line["retention"] for line in read_history(folder) if "retention" in line]
    return figures[-1] if figures else None


class MetricsLog:
    """Sends metrics to the trackers and appends them to the run's history. Training goes on if neither is possible.

    Args:
        first_step: what an interrupted run logged after this step is removed.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, first_step: int):
        self.accelerator, self.path = accelerator, folder / HISTORY_FILE
        self._has_failed = False
        if accelerator.is_main_process:
            rewind_history(folder, first_step)
        accelerator.wait_for_everyone()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        track(self.accelerator, lambda tracker: tracker.log(metrics, step=step))
        if not self.accelerator.is_main_process:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            if not self._has_failed:
                logger.warning(f"{self.path}: metrics could not be written ({first_line(error)}); training continues")
            self._has_failed = True
