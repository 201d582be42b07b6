"""The runs: the training script as a process of its own, and what it leaves."""

import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.miniature.files import REPOSITORY
from benchmarks.real_shapes.checkpoint import CAPTION_COLUMN, Files, Subject
from dopsd.errors import DOPSDError
from dopsd.history import read_history
from dopsd.model import Model
from dopsd.output import list_checkpoints


POLL_SECONDS = 0.02
NUM_FIRST_STEPS = 2  # they warm up, or compile
CHECKPOINTING_STEPS = 2  # of a run that is killed
PLANNED = re.compile(r"(\S.*?) +(\d+\.\d)(?:   .*)?")  # a line of the plan's table


@dataclass(frozen=True)
class Run:
    """Flags of the training script; whether the run is killed after a checkpoint and then resumed."""

    flags: tuple[str, ...] = ()
    is_killed: bool = False


PRESETS = ("8gb", "12gb", "16gb", "24gb", "48gb", "80gb")
RUNS = {
    "lora": Run(),
    "killed": Run(is_killed=True),
    "published": Run(("--num_trained_states", "4", "--with_prior_preservation", "false")),
    "vlm": Run(("--teacher_context", "vlm")),
    "checkpointing": Run(("--gradient_checkpointing",)),
    "int8": Run(("--quantize", "int8")),
    "float8": Run(("--quantize", "float8")),
    "nf4": Run(("--quantize", "nf4")),
    "8bit-adam": Run(("--use_8bit_adam",)),
    "offload": Run(("--offload_transformer", "--gradient_checkpointing")),
    "drawing": Run(
        ("--validation_steps", "1000", "--num_validation_images", "1", "--ignore_exam", "--gradient_checkpointing")
    ),
    "compile": Run(("--compile",)),
} | {name: Run(("--preset", name)) for name in PRESETS}


@dataclass
class Row:
    """What was measured of a run.

    Attributes:
        flags: those that differ from the other runs'.
        error: last line of a run that failed.
        step_seconds: of each step.
        losses: of each step.
        peak_gb: most GPU memory that a step had allocated; on a CPU, resident memory.
        host_gb: most resident memory of the process, with the files that it had mapped.
        planned_gb: peak of each phase, as `--dry_run` computes it.
        run_seconds: of the whole run, with imports, loading and encoding.
        change: of a picture of the stock pipeline by what was trained, see `drawn_change`.
    """

    name: str
    flags: list[str]
    error: str | None = None
    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_gb: float | None = None
    host_gb: float | None = None
    planned_gb: dict[str, float] = field(default_factory=dict)
    run_seconds: float | None = None
    change: float | None = None
    remarks: list[str] = field(default_factory=list)


class RunFailed(DOPSDError):
    """A run ended with an error, or without its metrics. The message is its last line."""


@dataclass(frozen=True)
class Runner:
    """Runs a training script on the files of a subject.

    Args:
        mode: flags of all runs, such as `--train_mode full`.
        run_limit: seconds after which a process is killed.
    """

    subject: Subject
    model: Model
    files: Files
    num_steps: int
    mode: tuple[str, ...]
    run_limit: float

    def output_dir(self, name: str) -> Path:
        return self.files.folder / "runs" / name

    def log(self, name: str) -> Path:
        return self.files.folder / "logs" / f"{name}.log"

    def command(self, name: str, flags: list[str]) -> list[str]:
        """Flags that are given later win."""
        own = {
            "pretrained_model_name_or_path": self.files.checkpoint,
            "instance_data_dir": self.files.photographs,
            "caption_column": CAPTION_COLUMN,
            "output_dir": self.output_dir(name),
            "context_cache_dir": self.files.cache,
            "resolution": self.subject.side,
            "max_train_steps": self.num_steps,
            "seed": 0,
            "validation_steps": 0,
            "report_to": "none",
        }
        pairs = [text for flag, value in own.items() for text in (f"--{flag}", str(value))]
        if not {"--preset", "--mixed_precision"} & set(flags):
            pairs += ["--mixed_precision", "bf16"]
        if "vlm" in flags or ("--teacher_context" not in flags and next(iter(self.model.teacher_contexts)) == "vlm"):
            pairs += ["--vlm_model_name_or_path", str(self.files.vlm)]
        return [sys.executable, str(REPOSITORY / f"{self.subject.shape.script}.py"), *pairs, *flags]

    def measure(self, name: str, run: Run) -> Row:
        """Trains and, at the same time, computes the plan of the same run. A run that fails is a row, too."""
        flags = [*self.mode, *run.flags]
        row = Row(name, flags)
        shutil.rmtree(self.output_dir(name), ignore_errors=True)
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        plan_log = self.log(name).with_suffix(".plan")
        with open(self.log(name), "w") as log, open(plan_log, "w") as plan:
            planning = subprocess.Popen([*self.command(name, flags), "--dry_run"], stdout=plan, stderr=plan)
            began = time.perf_counter()
            try:
                row.host_gb = self.train(name, flags, run, log)
                row.run_seconds = time.perf_counter() - began
            except RunFailed as error:
                row.error = str(error)
            finally:
                self.wait(planning)
        row.planned_gb = planned(plan_log.read_text())
        self.read_metrics(row)
        return row

    def train(self, name: str, flags: list[str], run: Run, log) -> float:
        """Returns the process's peak of host memory, in GB."""
        command = self.command(name, flags)
        start = partial(subprocess.Popen, stdout=log, stderr=subprocess.STDOUT)
        if run.is_killed:
            command += ["--checkpointing_steps", str(CHECKPOINTING_STEPS)]
            killed = start(command)
            self.wait(killed, lambda: bool(list_checkpoints(self.output_dir(name))))
            if killed.returncode != -9 or not list_checkpoints(self.output_dir(name)):
                raise RunFailed(f"not killed after a checkpoint, but ended: {last_line(self.log(name))}")
            command += ["--resume_from_checkpoint", "latest"]
        process = start(command)
        host_gb = self.wait(process)
        if process.returncode:
            raise RunFailed(f"exit status {process.returncode}: {last_line(self.log(name))}")
        return host_gb

    def wait(self, process: subprocess.Popen, should_kill: Callable[[], bool] = lambda: False) -> float:
        """Waits for a process, which is killed after `run_limit` seconds. Returns its peak of host memory, in GB."""
        last = time.monotonic() + self.run_limit
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return usage.ru_maxrss * 1024 / 1e9
            if time.monotonic() > last or should_kill():
                process.kill()
            time.sleep(POLL_SECONDS)

    def read_metrics(self, row: Row) -> None:
        """Fills in what the steps logged. Some have been logged before an error, too."""
        # Lines without times are those of drawing.
        history = [line for line in read_history(self.output_dir(row.name)) if "seconds_per_step" in line]
        row.step_seconds = [line["seconds_per_step"] for line in history]
        row.losses = [line["loss"] for line in history]
        row.peak_gb = max((line["peak_memory_gb"] for line in history), default=None)
        steps = [line["step"] for line in history]
        if row.error is None and steps != list(range(1, self.num_steps + 1)):
            row.error = f"logged the steps {steps}, not 1 to {self.num_steps}"
        elif not all(map(math.isfinite, row.losses)):
            row.error = "a loss is not finite"
        row.remarks += re.findall(
            r"Compiled \d+ graphs.*|--compile: the compiler failed.*", self.log(row.name).read_text()
        )


def last_line(log: Path) -> str:
    """The last thing that a process printed, or the end of it."""
    lines = re.split(r"[\r\n]", log.read_text(errors="replace"))
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing was printed")[-500:]


def planned(text: str) -> dict[str, float]:
    """GB by phase, from what `--dry_run` printed."""
    _, _, table = text.partition(f"{'GB':<24}{'peak':>6}\n")
    lines = table.partition("\n\n")[0].splitlines()
    return {match[1]: float(match[2]) for match in map(PLANNED.fullmatch, lines) if match}


def difference_of_losses(row: Row, other: Row) -> float | None:
    """Largest relative difference of a step's loss; None if a run did not finish."""
    if row.error or other.error:
        return None
    return max(abs(one - two) / abs(two) for one, two in zip(row.losses, other.losses, strict=True))
