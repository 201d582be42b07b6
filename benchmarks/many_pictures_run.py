"""The training script, run by `many_pictures`, which notes time, memory and work of each stage as it ends."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dopsd.contexts
import dopsd.data.checking
import dopsd.data.folder
import dopsd.data.training_data
from benchmarks.startup import load_script
from dopsd.checkpoints import Checkpoints
from dopsd.command_line import parse_settings
from dopsd.context_cache import ContextCache
from dopsd.step import TrainingStep


SCRIPT = load_script()

# What is measured, in the order of `main`: label -> where the function is found, and its name.
STAGES = {
    "captions": (dopsd.data.training_data, "read_pictures"),
    "pictures": (dopsd.data.training_data, "check_pictures"),
    "crops and order": (dopsd.data.training_data, "plan_examples"),
    "lengths of prompts": (SCRIPT, "resolve_prompts"),
    "prompts of the prior": (SCRIPT, "prior_prompts"),
    "resume contract": (SCRIPT, "resume_contract"),
    "cache": (SCRIPT, "fill_cache"),
    "checkpoint, loading": (Checkpoints, "load"),
    "step": (TrainingStep, "__call__"),
    "checkpoint, saving": (Checkpoints, "save"),
}
# Work that is counted.
COUNTED = {
    "captions": (dopsd.data.folder, "read_lines"),
    "pictures": (dopsd.data.checking, "decode"),
    "verified": (ContextCache, "is_valid"),
    "encoded": (ContextCache, "save"),
}


class Recorder:
    """Writes a line of JSON for each stage that has ended, so that those of a killed run are known.

    Args:
        path: file of this process.
    """

    def __init__(self, path: Path):
        self.path = path
        self.counts = dict.fromkeys(COUNTED, 0)
        for name, (owner, function) in COUNTED.items():
            setattr(owner, function, self._counted(name, getattr(owner, function)))
        for name, (owner, function) in STAGES.items():
            setattr(owner, function, self._measured(name, getattr(owner, function)))
        self.write("imports", 0.0, 0.0)

    def _counted(self, name: str, work: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            return work(*args, **kwargs)

        return wrapper

    def _measured(self, name: str, stage: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            seconds, cpu_seconds = time.perf_counter(), time.process_time()
            try:
                return stage(*args, **kwargs)
            finally:
                self.write(name, time.perf_counter() - seconds, time.process_time() - cpu_seconds)

        return wrapper

    def write(self, stage: str, seconds: float, cpu_seconds: float) -> None:
        line = {"stage": stage, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes()}
        with self.path.open("a") as file:
            file.write(json.dumps(line | {"counts": self.counts}) + "\n")


def peak_bytes() -> int:
    """This process's largest resident memory since the peak was last reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    records, *flags = sys.argv[1:]
    recorder = Recorder(Path(records) / f"{os.environ.get('RANK', '0')}.jsonl")
    try:
        SCRIPT.main(parse_settings(SCRIPT.MODEL, "", flags))
    finally:
        recorder.write("all", 0.0, 0.0)
