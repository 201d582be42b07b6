"""What may happen to a long run: a second run, a signal while it draws, a full disk, a log without a reader."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import LORA_FILE, run_as_main, same_weights, succeed
from dopsd.history import read_history
from dopsd.output import checkpoint_step, list_checkpoints
from models import ONE_MODEL, SLOW
from waiting import wait_until


pytestmark = [ONE_MODEL, SLOW]


# Two runs in one folder


def test_a_second_run_in_the_same_folder_is_refused_and_harms_nothing(command, arguments, tmp_path):
    folder = tmp_path / "run"
    texts = arguments("run", max_train_steps=9999, checkpointing_steps=9999)
    process, log = command.start(*texts)
    wait_until(lambda: len(read_history(folder)) > 2, process, log)
    (folder / ".checkpoint-2.tmp").mkdir()  # as if the first run were writing it
    error = command(*arguments("run", resume_from_checkpoint="latest")).error
    assert f"--output_dir {folder}: another run (process {process.pid} on " in error
    assert (folder / ".checkpoint-2.tmp").is_dir() and process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    succeed(command(*arguments("run", resume_from_checkpoint="latest")))


# Signals while drawing

MANY_IMAGES = {
    "validation_steps": 2,
    "num_validation_images": 200,
    "validation_prompt": ["a ball"],
    "max_train_steps": 4,
    "checkpointing_steps": 9999,
    "resume_from_checkpoint": "latest",
}


def test_a_signal_during_validation_saves_before_the_rest_is_drawn(command, arguments, tmp_path):
    folder = tmp_path / "run"
    process, log = command.start(*arguments("run", **MANY_IMAGES))
    wait_until(lambda: len(read_history(folder)) == 2 and "Validation:" in log.read_text(), process, log)
    os.kill(process.pid, signal.SIGUSR1)
    process.join(timeout=60)
    text = log.read_text(errors="replace")
    assert process.exitcode == 128 + signal.SIGUSR1, text
    assert "Validation at step 2 is cut short" in text and "checkpoint-2 is saved" in text
    assert [checkpoint_step(path) for path in list_checkpoints(folder)] == [2]
    assert not (folder / "validation-2.png").exists()
    succeed(command(*arguments("run", **MANY_IMAGES | {"num_validation_images": 1})))
    assert (folder / "validation-2.png").exists() and (folder / "validation-4.png").exists()


# Full disks


def run_with_small_files(script: str, arguments: list[str], log: str, num_bytes: int) -> None:
    """Runs the script with a limit for the size of a file, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    run_as_main(script, arguments, log)


@pytest.fixture
def run_on_a_full_disk(forkserver, model, tmp_path):
    """Runs the script, with its output in a pipe, which has no size; returns the exit code and the output."""

    def run(arguments: list[str], num_bytes: int) -> tuple[int, str]:
        pipe = tmp_path / "log"
        os.mkfifo(pipe)
        with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), errors="replace") as log:
            process = forkserver.start(run_with_small_files, str(model.script_path), arguments, str(pipe), num_bytes)
            process.join(timeout=120)
            text = log.read()
        pipe.unlink()
        return process.exitcode, text

    return run


def test_a_sheet_that_cannot_be_written_is_one_line_and_costs_nothing(
    command, arguments, run_on_a_full_disk, tmp_path
):
    flags = {"max_train_steps": 4, "rank": 1, "context_cache_dir": tmp_path / "cache", "validation_prompt": ["a ball"]}
    drawing = flags | {"validation_steps": 2, "num_validation_images": 1}
    succeed(command(*arguments("undisturbed", **drawing)))
    run = tmp_path / "undisturbed"
    weights = (run / LORA_FILE).stat().st_size
    sheets = [path.stat().st_size for path in run.glob("*.png")]
    assert weights < min(sheets)  # so a limit between the two lets the LoRA through and no sheet
    code, text = run_on_a_full_disk(arguments("full", **drawing), weights + 1024)
    assert code == 0 and "Traceback" not in text, text
    for failed in ("The preview failed", "Validation at step 2 failed", "Validation at step 4 failed"):
        assert sum(failed in line for line in text.splitlines()) == 1, text
    assert same_weights(run, tmp_path / "full")
    assert not list((tmp_path / "full").glob("*.png")) and not list((tmp_path / "full").glob(".*.tmp"))


# A log without a reader


def test_a_run_goes_on_without_the_reader_of_its_log(model, arguments, tmp_path):
    command = [sys.executable, model.script_path, *arguments("piped", max_train_steps=60)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    wait_until(lambda: len(read_history(tmp_path / "piped")) > 2, process, Path(os.devnull))
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "piped" / LORA_FILE).exists() and len(read_history(tmp_path / "piped")) == 60


# Encoding elsewhere


def test_a_cache_filled_by_encode_only_trains_without_a_text_encoder(command, arguments, tmp_path):
    cache = {"context_cache_dir": tmp_path / "cache"}
    succeed(command(*arguments("undisturbed")))
    log = succeed(command(*arguments("encoding", **cache, encode_only=True))).log
    assert "Steps:" not in log and not (tmp_path / "encoding" / LORA_FILE).exists()
    log = succeed(command(*arguments("training", **cache))).log
    assert "Encoding 0 of " in log and "Encoding prompts:" not in log
    assert same_weights(tmp_path / "undisturbed", tmp_path / "training")
