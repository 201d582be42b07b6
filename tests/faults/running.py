"""Runs a case and judges how it ended."""

import os
import re
import resource
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from command_line import run_as_main, same_weights, weights

from .cases import Case, Verdict


if TYPE_CHECKING:
    from .lab import Lab

MAX_MESSAGE = 400
# Above what a process has mapped when it starts: a fault must not use up the machine's memory.
EXTRA_MEMORY_BYTES = 4 * 2**30
MAX_FILE_BYTES = 2**30

# multiprocessing reads exit codes of all processes whenever it starts one.
_processes = Lock()


@dataclass(frozen=True)
class Run:
    """How a process ended: its exit code, None if it hangs, and its stdout and stderr together."""

    code: int | None
    log: str

    @property
    def lines(self) -> list[str]:
        return re.split(r"[\r\n]+", self.log.rstrip())


@dataclass(frozen=True)
class Outcome:
    verdict: Verdict
    reason: str
    run: Run


def run_confined(script: str, arguments: list[str], log: str, folder: str, max_file_bytes: int) -> None:
    """Runs a script in a child process, in a folder that takes what it writes without being told where.

    Args:
        max_file_bytes: a longer file cannot be written, as on a disk that is full.
    """
    here = Path(folder, "work")
    here.mkdir(exist_ok=True)
    os.chdir(here)
    tempfile.tempdir = str(here)
    mapped_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    for limit, num_bytes in (
        (resource.RLIMIT_AS, mapped_bytes + EXTRA_MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, max_file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (num_bytes, num_bytes))
    run_as_main(script, arguments, log)


def is_running(process: BaseProcess) -> bool:
    """As `is_alive`, but without reading the exit code."""
    return not wait([process.sentinel], 0)


def wait_for(process: BaseProcess, log: Path, timeout: float) -> Run:
    """Waits until the process ends, and ends it if it takes longer than `timeout` seconds."""
    has_ended = bool(wait([process.sentinel], timeout))
    if not has_ended:
        process.kill()
        wait([process.sentinel], 10)
    with _processes:
        process.join(10)
        code = process.exitcode
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return Run(code if has_ended else None, text)


def run_case(lab: "Lab", case: Case, folder: Path) -> Outcome:
    output_dir = folder / "run"
    failure = case.before(lambda **limits: lab.start(case, folder, output_dir, **limits)) if case.before else None
    run = lab.run(case, folder, output_dir)
    if failure is not None:
        return Outcome(*failure, run)
    return Outcome(*judge(case, run, lab.model(case.model).script_path.name, output_dir), run)


def judge(case: Case, run: Run, script: str, output_dir: Path) -> tuple[Verdict, str]:
    """The verdict on a run, and the reason for it in one line."""
    if run.code is None:
        return Verdict.HANG, f"still running; last line: {run.lines[-1]}"
    if case.payload is not None and case.payload.exists():
        return Verdict.TRACEBACK, "code from the input was executed"
    if "Traceback (most recent call last)" in run.log:
        # A traceback's last line is the first one after it that is not indented.
        after = run.log.rpartition("Traceback (most recent call last)")[2]
        found = re.search(r"^[\w.]+(Error|Exception|Exit|Interrupt|Warning)?\b.*$", after, re.MULTILINE)
        return Verdict.TRACEBACK, found[0] if found else run.lines[-1]
    if run.code != 0:
        if problem := message_problem(run, script, output_dir.parent):
            return Verdict.TRACEBACK, problem
        if case.must == "train":
            return Verdict.DIFFERENT, f"refused, although nothing is lost: {run.lines[-1]}"
        return Verdict.REFUSED, run.lines[-1]
    if case.must == "refuse":
        return Verdict.DIFFERENT, "trained, although the input cannot be right"
    if problem := weights_problem(case, output_dir):
        return Verdict.DIFFERENT, problem
    return Verdict.TRAINED, ""


def message_problem(run: Run, script: str, folder: Path) -> str | None:
    """What is wrong with the end of a run that failed, if anything is. `folder` is the case's."""
    last = run.lines[-1]
    messages = [line for line in run.lines if line.startswith(f"{script}: ")]
    if not last.startswith(f"{script}: "):
        return f"exit code {run.code}; the last line is no error of the script: {last}"
    if len(messages) > 1:
        return f"{len(messages)} errors: {last}"
    length = len(last.replace(str(folder.parent), "/data"))  # the length of a temporary folder's name is chance
    if length >= MAX_MESSAGE:
        return f"the error has {length} characters: {last}"
    return None


def weights_problem(case: Case, output_dir: Path) -> str | None:
    """What is wrong with the LoRA of a run that trained, if anything is."""
    try:
        tensors = weights(output_dir)
    except (OSError, SafetensorError) as error:
        return f"exit code 0, but no LoRA: {error}" if case.saves_lora or case.weights else None
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        return "trained, and the LoRA is not finite"
    if case.weights is not None and not same_weights(output_dir, case.weights):
        return "trained, with other weights than without the fault"
    return None
