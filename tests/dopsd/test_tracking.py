import os
import resource
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from test_stopping import logged

from dopsd.command_line import parse_settings
from dopsd.errors import InputError
from dopsd.tracking import end_training, start_trackers, track
from train_dopsd_flux2 import MODEL


class Tracker:
    def __init__(self, name, error=None):
        self.name, self.error, self.num_calls = name, error, 0

    def finish(self):
        self.num_calls += 1
        if self.error:
            raise self.error


@pytest.fixture
def accelerator():
    trackers = [Tracker("bad", OSError(28, "No space left on device")), Tracker("good")]
    return SimpleNamespace(trackers=trackers, end_training=lambda: None)


def test_a_tracker_that_fails_is_dropped_with_one_warning(accelerator, caplog):
    bad, good = accelerator.trackers
    for _ in range(3):
        track(accelerator, Tracker.finish)
    assert (bad.num_calls, good.num_calls) == (1, 3) and accelerator.trackers == [good]
    (record,) = caplog.records
    assert "--report_to bad: has failed ([Errno 28] No space left on device); the run goes on" in record.getMessage()


def test_a_tracker_that_fails_at_the_end_does_not_end_the_run_with_an_error(accelerator):
    end_training(accelerator)
    assert not accelerator.trackers


def test_a_tracker_that_cannot_start_is_one_line(monkeypatch):
    def fail(name, config):
        assert "hub_token" not in config and config["rank"] == "4"
        raise OSError("no\nnetwork")

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # restored after the test
    settings = SimpleNamespace(
        flat=lambda: {"rank": 4, "hub_token": "hf_secret"}, training=SimpleNamespace(report_to="wandb")
    )
    with pytest.raises(InputError, match=r"^--report_to wandb: cannot be started \(no\); check the tracker, or pass"):
        start_trackers(SimpleNamespace(init_trackers=fail), "project", settings)


def fill_the_disk(folder: str) -> None:
    """TensorBoard writes in a thread, which meets a limit for the size of a file as on a full disk."""
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=folder)
    start_trackers(accelerator, "run", parse_settings(MODEL, "", ["--pretrained_model_name_or_path", "a/model"]))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    for step in range(200):
        track(accelerator, lambda tracker, step=step: tracker.log({"loss": 0.5}, step=step))
        time.sleep(0.002)
    end_training(accelerator)


def test_tensorboard_on_a_full_disk_is_one_warning_without_a_traceback(forkserver, tmp_path):
    pipe = tmp_path / "pipe"  # has no size, which the limit would hold for
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), errors="replace") as log:
        process = forkserver.start(logged, str(pipe), fill_the_disk, str(tmp_path / "run"))
        process.join(timeout=120)
        text = log.read()
    assert process.exitcode == 0, text
    assert text.count("--report_to tensorboard: has failed") == 1 and "Traceback" not in text, text
