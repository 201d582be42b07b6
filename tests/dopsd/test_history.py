import json
from types import SimpleNamespace

import pytest

from dopsd.errors import OutputError
from dopsd.history import HISTORY_FILE, last_retention, log_metrics, read_history, rewind_history


@pytest.fixture
def accelerator():
    """Records what is sent to the trackers."""
    sent = []
    return SimpleNamespace(is_main_process=True, sent=sent, log=lambda metrics, step: sent.append((step, metrics)))


def test_metrics_go_to_the_trackers_and_into_the_history(accelerator, tmp_path):
    assert read_history(tmp_path) == [] and last_retention(tmp_path) is None
    log_metrics(accelerator, tmp_path, 1, {"loss": 0.5})
    log_metrics(accelerator, tmp_path, 1, {"retention": 0.25})
    log_metrics(accelerator, tmp_path, 2, {"loss": 0.125})
    assert accelerator.sent == [(1, {"loss": 0.5}), (1, {"retention": 0.25}), (2, {"loss": 0.125})]
    assert read_history(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"step": 1, "retention": 0.25},
        {"step": 2, "loss": 0.125},
    ]
    assert last_retention(tmp_path) == 0.25


def test_only_the_main_process_writes_the_history(accelerator, tmp_path):
    accelerator.is_main_process = False
    log_metrics(accelerator, tmp_path, 1, {"loss": 0.5})
    assert len(accelerator.sent) == 1 and not list(tmp_path.iterdir())


def test_rewinding_removes_later_and_unfinished_lines(tmp_path):
    lines = [{"step": step, "loss": step / 8} for step in (1, 2, 2, 3)]
    (tmp_path / HISTORY_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "lo')
    assert read_history(tmp_path) == lines
    rewind_history(tmp_path, 2)
    assert read_history(tmp_path) == lines[:3]
    assert (tmp_path / HISTORY_FILE).read_text().endswith("\n")
    rewind_history(tmp_path, 0)
    assert read_history(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [HISTORY_FILE]


def test_a_history_that_cannot_be_written_is_one_line(accelerator, tmp_path):
    (tmp_path / HISTORY_FILE).mkdir()
    with pytest.raises(OutputError, match=f"{HISTORY_FILE} could not be written"):
        log_metrics(accelerator, tmp_path, 1, {"loss": 0.5})
