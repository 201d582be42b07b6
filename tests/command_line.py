"""Runs a script's command line for the tests that mirror it."""

import multiprocessing
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parents[1]
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass
class Result:
    code: int
    log: str
    script: Path

    @property
    def error(self) -> str:
        """The one line that a failed run leaves, without log lines and progress bars."""
        assert "Traceback" not in self.log, self.log
        lines = [line for line in self.log.splitlines() if line.startswith(self.script.name + ": error: ")]
        assert self.code != 0 and len(lines) == 1, self.log
        assert self.log.rstrip().endswith(lines[0]), self.log
        return lines[0]


def run_as_main(script: str, arguments: list[str], log: str) -> None:
    """In a child process: the script as `python SCRIPT ARGUMENTS` runs it."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


class Forkserver:
    """A process that has the scripts' imports, to fork their runs from: 1 second each, not 8."""

    def __init__(self, logs: Path):
        paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.environ["ACCELERATE_USE_CPU"] = "true"
        self.logs = logs
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["train_dopsd_flux2", "train_dopsd_zimage", "prodigyopt", "bitsandbytes", "torch.utils.tensorboard"]
        )

    def start(self, script: Path, arguments: tuple) -> tuple[multiprocessing.Process, Path]:
        """The running process, and the file that its output goes to."""
        log = self.logs / f"{len(list(self.logs.iterdir()))}.log"
        log.touch()
        texts = [str(argument) for argument in arguments]
        process = self.context.Process(target=run_as_main, args=(str(script), texts, str(log)))
        process.start()
        return process, log


@dataclass(frozen=True)
class Command:
    """One script's command line."""

    forkserver: Forkserver
    script: Path

    def start(self, *arguments) -> tuple[multiprocessing.Process, Path]:
        return self.forkserver.start(self.script, arguments)

    def __call__(self, *arguments) -> Result:
        process, log = self.start(*arguments)
        process.join(timeout=300)
        assert process.exitcode is not None, "the run hangs"
        return Result(process.exitcode, log.read_text(errors="replace"), self.script)


def succeed(result: Result) -> Result:
    assert result.code == 0, result.log
    return result


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / LORA_FILE)


def same_weights(first, second) -> bool:
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
