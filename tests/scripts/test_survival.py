"""Kills, signals and full disks: what a long run must survive."""

import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from command_line import LORA_FILE, run_as_main, run_with_small_files, same_weights, succeed, weights
from dopsd.history import read_history
from dopsd.output import checkpoint_step, list_checkpoints
from models import ONE_MODEL, SLOW
from waiting import wait_until


@pytest.fixture
def command_line(arguments, tmp_path):
    """The command line of a run with many checkpoints that can be continued. All runs share the encodings."""

    def make(folder: str, steps: int = 20, **flags) -> list[str]:
        common = {
            "learning_rate": 1e-3,
            "max_train_steps": steps,
            "checkpointing_steps": 2,
            "lora_dropout": 0.1,
            "lr_scheduler": "cosine",
            "context_cache_dir": tmp_path / "cache",
            "resume_from_checkpoint": "latest",
        }
        return arguments(folder, **common | flags)

    return make


def steps_of(folder: Path) -> list[int]:
    return [checkpoint_step(path) for path in list_checkpoints(folder)]


def num_logged(folder: Path) -> int:
    return len(read_history(folder))


def assert_checkpoints_are_complete(folder: Path) -> None:
    for checkpoint in list_checkpoints(folder):
        assert load_file(checkpoint / "adapters.safetensors") and weights(checkpoint)
        assert torch.load(checkpoint / "trainer_state.pt", weights_only=True)


# Kills


def kill_and_resume(command, command_line, tmp_path, num_kills: int, seed: int, steps: int) -> int:
    """Kills one run at random moments until it may end; returns how many kills left an unfinished checkpoint."""
    succeed(command(*command_line("undisturbed", steps, checkpointing_steps=9999)))
    rng = random.Random(seed)
    folder = tmp_path / "killed"
    num_unfinished = 0
    for number in range(num_kills):
        process, log = command.start(*command_line("killed", steps))
        moment = ("step", "save", "start")[number % 3]
        if moment != "start":
            num_wanted = rng.randrange(1, 2 + steps * (number + 1) // (num_kills + 2))
            wait_until(lambda log=log: "Steps:" in log.read_text(errors="replace"), process, log)
            wait_until(lambda num_wanted=num_wanted: num_logged(folder) >= num_wanted, process, log)
        if moment == "save":
            wait_until(lambda: list(folder.glob(".checkpoint-*.tmp")), process, log)
        else:
            process.join(timeout=rng.uniform(0, 0.4 if moment == "start" else 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        num_unfinished += moment == "save" and bool(list(folder.glob(".checkpoint-*.tmp")))
        assert_checkpoints_are_complete(folder)
    succeed(command(*command_line("killed", steps)))
    assert same_weights(tmp_path / "undisturbed", folder)
    assert [line["step"] for line in read_history(folder)] == list(range(1, steps + 1))
    assert not list(folder.glob(".checkpoint-*"))
    return num_unfinished


@ONE_MODEL
@SLOW
def test_kills_at_random_moments_change_no_weight(command, command_line, tmp_path):
    assert kill_and_resume(command, command_line, tmp_path, num_kills=6, seed=0, steps=60) > 0


@pytest.mark.exhaustive
def test_twenty_kills_at_random_moments_change_no_weight(command, command_line, tmp_path):
    assert kill_and_resume(command, command_line, tmp_path, num_kills=20, seed=1, steps=200) > 0


# Signals


@ONE_MODEL
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=SLOW)])
def test_a_signal_ends_the_step_saves_and_says_how_to_continue(command, command_line, tmp_path, number):
    succeed(command(*command_line("undisturbed")))
    process, log = command.start(*command_line("stopped", checkpointing_steps=1000))
    wait_until(lambda: num_logged(tmp_path / "stopped"), process, log)
    os.kill(process.pid, number)
    process.join(timeout=60)
    assert process.exitcode == 128 + number
    text = log.read_text(errors="replace")
    (step,) = steps_of(tmp_path / "stopped")
    assert 0 < step < 20
    assert f"Stopped after step {step} ({number.name}); checkpoint-{step} is saved" in text
    assert "--resume_from_checkpoint latest" in text and "Traceback" not in text
    assert f"stopped at step {step}" in (tmp_path / "stopped/report.html").read_text()
    assert not (tmp_path / "stopped" / LORA_FILE).exists()
    succeed(command(*command_line("stopped")))
    assert same_weights(tmp_path / "undisturbed", tmp_path / "stopped")


@ONE_MODEL
@SLOW
def test_a_closed_terminal_before_the_first_step_is_one_line(command, command_line, tmp_path):
    process, log = command.start(*command_line("closed", steps=9999))
    wait_until(lambda: "Reading pictures" in log.read_text(errors="replace"), process, log)
    os.kill(process.pid, signal.SIGHUP)
    process.join(timeout=60)
    text = log.read_text(errors="replace")
    assert process.exitcode == 128 + signal.SIGHUP and "Traceback" not in text
    assert "SIGHUP before the first step; finished encodings are kept" in text and not steps_of(tmp_path / "closed")


def launch(script: str, arguments: list[str], log: str, pid_file: str) -> None:
    """Runs the script in a child of this process, as `accelerate launch` does."""
    if pid := os.fork():
        Path(pid_file).write_text(str(pid))
        os.waitpid(pid, 0)
        os._exit(0)
    try:
        run_as_main(script, arguments, log)
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code)


@ONE_MODEL
@SLOW
@pytest.mark.parametrize("moment", ["Reading pictures", "loss="])
def test_a_run_whose_launcher_was_killed_saves_and_stops(forkserver, model, command_line, tmp_path, moment):
    folder, log, pid_file = tmp_path / "orphan", forkserver.new_log(), tmp_path / "pid"
    texts = command_line("orphan", steps=9999, checkpointing_steps=9999)
    launcher = forkserver.start(launch, str(model.script_path), texts, str(log), str(pid_file))
    wait_until(lambda: moment in log.read_text(errors="replace"), launcher, log)
    run = psutil.Process(int(pid_file.read_text()))
    launcher.kill()
    launcher.join()
    run.wait(timeout=60)
    text = log.read_text(errors="replace")
    (step,) = steps_of(folder)
    assert f"Stopped after step {step} (its launcher has ended); checkpoint-{step} is saved" in text
    assert num_logged(folder) == step < 9999


# Files that cannot be written


@ONE_MODEL
@SLOW
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones_and_one_line(
    forkserver, command, model, command_line, tmp_path
):
    run = tmp_path / "run"
    succeed(command(*command_line("run", steps=2)))
    before = (run / "checkpoint-2" / LORA_FILE).read_bytes()
    sizes = [(run / "checkpoint-2" / name).stat().st_size for name in ("adapters.safetensors", "trainer_state.pt")]
    assert sizes[0] < sizes[1]
    # The start of the first file, its middle, the end of the second file: writers differ in what they raise.
    for num_bytes in (8 * 1024, sizes[0] // 2, sum(sizes) // 2):
        pipe = tmp_path / f"{num_bytes}.log"  # a pipe has no size
        os.mkfifo(pipe)
        with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), errors="replace") as log:
            texts = command_line("run", steps=6)
            process = forkserver.start(run_with_small_files, str(model.script_path), texts, str(pipe), num_bytes)
            process.join(timeout=120)
            text = log.read()
        errors = [line for line in text.splitlines() if line.startswith(model.script_path.name + ": error: ")]
        assert process.exitcode == 1 and "Traceback" not in text, text
        assert len(errors) == 1 and "checkpoint-4 could not be written" in errors[0], text
        assert "checkpoint-2 is complete" in errors[0]
        assert steps_of(run) == [2] and not list(run.glob(".checkpoint-*"))
        assert (run / "checkpoint-2" / LORA_FILE).read_bytes() == before
    succeed(command(*command_line("run", steps=6)))
    assert steps_of(run) == [2, 4, 6]


@ONE_MODEL
@SLOW
def test_a_lora_that_cannot_be_written_at_the_end_is_saved_elsewhere(command, command_line, tmp_path):
    succeed(command(*command_line("undisturbed", steps=2)))
    (tmp_path / f"run/.{LORA_FILE}.tmp").mkdir(parents=True)  # in the way of the writer
    error = command(*command_line("run", steps=2, checkpointing_steps=9999)).error
    assert f"{LORA_FILE} could not be written" in error
    elsewhere = re.search("the LoRA is in (.*), move it", error)[1]
    assert same_weights(tmp_path / "undisturbed", elsewhere)
    shutil.rmtree(elsewhere)
