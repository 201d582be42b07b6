"""Runs a training script from its command line, in a process forked from one that already has its imports."""

import multiprocessing
import multiprocessing.forkserver
import os
import resource
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parents[1]
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass
class Result:
    """What a finished run leaves on its output: stdout and stderr together."""

    code: int
    log: str
    script: Path

    @property
    def error(self) -> str:
        """The one line that a failed run ends with."""
        assert "Traceback" not in self.log, self.log
        lines = [line for line in self.log.splitlines() if line.startswith(self.script.name + ": error: ")]
        assert self.code != 0 and len(lines) == 1, self.log
        assert self.log.rstrip().endswith(lines[0]), self.log
        return lines[0]


def run_as_main(script: str, arguments: list[str], log: str) -> None:
    """Runs the script in a child process as `python SCRIPT ARGUMENTS` does."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def run_with_small_files(script: str, arguments: list[str], log: str, num_bytes: int) -> None:
    """Runs the script with a limit for the size of a file, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    run_as_main(script, arguments, log)


class Forkserver:
    """A process that has imported the scripts, from which their runs are forked: an import takes seconds."""

    def __init__(self, logs: Path):
        self.logs = logs
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["preloaded"])
        # The server starts with this environment, and its children inherit it.
        paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(paths), "ACCELERATE_USE_CPU": "true"}
        with patch.dict(os.environ, environment):
            multiprocessing.forkserver.ensure_running()

    def new_log(self) -> Path:
        log = self.logs / f"{len(list(self.logs.iterdir()))}.log"
        log.touch()
        return log

    def start(self, function: Callable[..., None], *arguments) -> BaseProcess:
        """Calls the function, which is at the top level of a module, in a new process."""
        process = self.context.Process(target=function, args=arguments)
        process.start()
        return process


@dataclass(frozen=True)
class Command:
    """One script's command line."""

    forkserver: Forkserver
    script: Path

    def start(self, *arguments) -> tuple[BaseProcess, Path]:
        """The running process, and the file with its output."""
        log = self.forkserver.new_log()
        texts = [str(argument) for argument in arguments]
        return self.forkserver.start(run_as_main, str(self.script), texts, str(log)), log

    def __call__(self, *arguments) -> Result:
        process, log = self.start(*arguments)
        process.join(timeout=300)
        assert process.exitcode is not None, "the run hangs"
        return Result(process.exitcode, log.read_text(errors="replace"), self.script)


def succeed(result: Result) -> Result:
    assert result.code == 0, result.log
    return result


def weights(folder) -> dict[str, torch.Tensor]:
    """The LoRA file in a folder."""
    return load_file(Path(folder) / LORA_FILE)


def same_weights(first, second) -> bool:
    """Whether the LoRA files in two folders hold the same tensors."""
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_close_weights(first, second, **tolerances) -> None:
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerances)
