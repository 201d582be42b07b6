"""The metrics of a run: sent to the trackers, and kept in metrics.jsonl in the output folder."""

import json
import os
from pathlib import Path

from accelerate import Accelerator

from .output import reporting_write_errors


HISTORY_FILE = "metrics.jsonl"


def read_history(folder: Path) -> list[dict]:
    """The logged metrics, one dictionary per line. A last line that a killed run did not finish is left out."""
    path = folder / HISTORY_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewind_history(folder: Path, step: int) -> None:
    """Removes what an interrupted run logged after the checkpoint from which this run continues."""
    kept = [line for line in read_history(folder) if line["step"] <= step]
    unfinished = folder / f".{HISTORY_FILE}.tmp"
    with reporting_write_errors(folder, HISTORY_FILE):
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(unfinished, folder / HISTORY_FILE)


def last_retention(folder: Path) -> float | None:
    """The retention measured last; None if it was never measured."""
    figures = [line["retention"] for line in read_history(folder) if "retention" in line]
    return figures[-1] if figures else None


def log_metrics(accelerator: Accelerator, folder: Path, step: int, metrics: dict[str, float]) -> None:
    """Sends metrics to the trackers and appends them to the run's history."""
    accelerator.log(metrics, step=step)
    if accelerator.is_main_process:
        with reporting_write_errors(folder, HISTORY_FILE):
            with open(folder / HISTORY_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
