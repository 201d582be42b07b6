"""Each test runs in processes of its own: signal handlers belong to a whole process."""

import logging
import os
import signal
import sys
import time

import pytest
import torch
from accelerate import Accelerator

from dopsd.stopping import StopRequest


SIGNALS = [signal.SIGTERM, signal.SIGINT]
WARNINGS = [signal.SIGHUP, signal.SIGUSR1]


@pytest.fixture
def run(forkserver):
    """Runs a function of this file in a process and returns its exit code and its output."""

    def call(function, *arguments):
        log = forkserver.new_log()
        process = forkserver.start(logged, str(log), function, *arguments)
        process.join(timeout=60)
        return process.exitcode, log.read_text()

    return call


def logged(log: str, function, *arguments) -> None:
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.INFO)
    function(*arguments)


def training_stop() -> StopRequest:
    stop = StopRequest()
    stop.begin_training()
    return stop


def stop_on(number: int) -> None:
    accelerator = Accelerator(cpu=True)
    stop = training_stop()
    assert not stop.is_set and not stop.is_set_on_any(accelerator)
    os.kill(os.getpid(), number)
    assert stop.is_set and stop.is_set_on_any(accelerator)
    stop.end_run(accelerator, step=7)


@pytest.mark.parametrize("number", SIGNALS + WARNINGS)
def test_the_first_signal_is_a_request(run, number):
    code, log = run(stop_on, number)
    assert code == 128 + number, log
    assert f"Stopped after step 7 ({number.name}); checkpoint-7 is saved. Continue with the same command and " in log
    assert "--resume_from_checkpoint latest" in log


def stop_before_training(number: int) -> None:
    StopRequest()
    os.kill(os.getpid(), number)
    time.sleep(60)


@pytest.mark.parametrize("number", SIGNALS + WARNINGS)
def test_a_signal_before_training_ends_the_process_with_one_line(run, number):
    code, log = run(stop_before_training, number)
    assert code == 128 + number
    line = f"{number.name} before the first step; finished encodings are kept in the context cache"
    assert log.strip() == line


class OtherProcess:
    """An accelerator whose second process says whether it was asked to stop."""

    device = "cpu"

    def __init__(self, is_asked: bool):
        self.is_asked = is_asked

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return tensor + float(self.is_asked)


def ask_the_other_process() -> None:
    stop = training_stop()
    assert stop.is_set_on_any(OtherProcess(is_asked=True)) and not stop.is_set
    assert not stop.is_set_on_any(OtherProcess(is_asked=False))


def test_a_request_to_another_process_counts(run):
    code, log = run(ask_the_other_process)
    assert code == 0, log


def signal_twice(first: int, second: int) -> None:
    stop = training_stop()
    os.kill(os.getpid(), first)
    assert stop.reason == signal.Signals(first).name
    os.kill(os.getpid(), second)
    time.sleep(60)


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(run, first, second):
    code, log = run(signal_twice, first, second)
    # Python's own handler for SIGINT is not back: the process dies of the signal without a traceback.
    assert code == -second and not log


def warn_and_stop(first: int, second: int) -> None:
    stop = training_stop()
    for number in (first, first, second, first):
        os.kill(os.getpid(), number)
    assert stop.reason == signal.Signals(first).name and stop.exit_code == 128 + first


@pytest.mark.parametrize("first", WARNINGS)
@pytest.mark.parametrize("second", SIGNALS + WARNINGS)
def test_a_closed_terminal_may_be_reported_twice_and_with_another_signal(run, first, second):
    code, log = run(warn_and_stop, first, second)
    assert code == 0, log


def ignore_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = training_stop()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.is_set


def test_hangups_stay_ignored_under_nohup(run):
    code, log = run(ignore_hangups)
    assert code == 0, log


def outlive_the_launcher(file: str) -> None:
    """Writes, in a child of this process, whether a stop is requested: before and after this process has ended."""
    reading, writing = os.pipe()
    if os.fork():
        os.read(reading, 1)
        os._exit(0)
    launcher = os.getppid()
    stop = training_stop()
    before = stop.is_set
    os.write(writing, b"x")
    while os.getppid() == launcher:
        time.sleep(0.01)
    with open(file + ".tmp", "w") as opened:
        opened.write(f"{before} {stop.is_set} {stop.reason} {stop.exit_code}")
    os.rename(file + ".tmp", file)
    sys.stdout.flush()
    os._exit(0)


def test_the_launchers_end_is_a_request(forkserver, tmp_path):
    process = forkserver.start(outlive_the_launcher, str(tmp_path / "said"))
    process.join(timeout=60)
    assert process.exitcode == 0
    end = time.monotonic() + 60
    while not (tmp_path / "said").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert (tmp_path / "said").read_text() == "False True its launcher has ended 1"
