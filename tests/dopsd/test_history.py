import json
from types import SimpleNamespace

import pytest

from dopsd.errors import OutputError
from dopsd.history import MetricsLog, last_retention, read_history, rewind_history, sync_history
from dopsd.output import HISTORY_FILE


class Tracker:
    """Records what it is sent."""

    name = "recorder"

    def __init__(self):
        self.sent = []

    def log(self, metrics, step):
        self.sent.append((step, metrics))


@pytest.fixture
def accelerator():
    return SimpleNamespace(is_main_process=True, trackers=[Tracker()], wait_for_everyone=lambda: None)


def test_metrics_go_to_the_trackers_and_into_the_history(accelerator, tmp_path):
    assert read_history(tmp_path) == [] and last_retention(tmp_path) is None
    log = MetricsLog(accelerator, tmp_path, first_step=0)
    log.write(1, {"loss": 0.5})
    log.write(1, {"retention": 0.25})
    log.write(2, {"loss": 0.125})
    assert accelerator.trackers[0].sent == [(1, {"loss": 0.5}), (1, {"retention": 0.25}), (2, {"loss": 0.125})]
    assert read_history(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"step": 1, "retention": 0.25},
        {"step": 2, "loss": 0.125},
    ]
    assert last_retention(tmp_path) == 0.25


def test_only_the_main_process_writes_the_history(accelerator, tmp_path):
    accelerator.is_main_process = False
    MetricsLog(accelerator, tmp_path, first_step=0).write(1, {"loss": 0.5})
    assert not list(tmp_path.iterdir())


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


GOOD = b'{"step": 1, "loss": 0.5}\n'


@pytest.mark.parametrize(
    "bad",
    [
        b"\n",
        b"\0" * 40 + b"\n",
        b"\xff\xfe\n",
        b"[1]\n",
        b'{"loss": 1}\n',
        b'{"step": "x"}\n',
        b'{"step": 1, "loss": null}\n',
        b"[" * 100_000 + b"\n",
    ],
    ids=["blank", "zeros", "not UTF-8", "list", "no step", "text", "null", "nested"],
)
def test_damaged_lines_are_left_out_with_a_warning(accelerator, tmp_path, caplog, bad):
    (tmp_path / HISTORY_FILE).write_bytes(GOOD + bad + GOOD)
    assert read_history(tmp_path) == [{"step": 1, "loss": 0.5}] * 2
    assert f"{tmp_path / HISTORY_FILE}: 1 of 3 lines are damaged and not used" in caplog.text
    rewind_history(tmp_path, 1)
    caplog.clear()
    assert read_history(tmp_path) == [{"step": 1, "loss": 0.5}] * 2 and not caplog.records


def test_zero_bytes_at_the_end_as_after_a_power_cut_are_left_out(tmp_path):
    (tmp_path / HISTORY_FILE).write_bytes(GOOD + b"\0" * 4096)
    assert read_history(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_a_history_that_is_no_file_is_empty_and_one_line_when_it_is_replaced(tmp_path):
    (tmp_path / HISTORY_FILE).mkdir()
    assert read_history(tmp_path) == []
    with pytest.raises(OutputError, match=f"{HISTORY_FILE} could not be written"):
        rewind_history(tmp_path, 0)


def test_the_history_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("dopsd.history.sync_to_disk", synced.append)
    sync_history(tmp_path)
    (tmp_path / HISTORY_FILE).write_bytes(GOOD)
    sync_history(tmp_path)
    assert synced == [tmp_path / HISTORY_FILE]


def test_training_goes_on_if_metrics_cannot_be_written_with_one_warning(accelerator, tmp_path, caplog):
    log = MetricsLog(accelerator, tmp_path, first_step=0)
    (tmp_path / HISTORY_FILE).unlink()
    (tmp_path / HISTORY_FILE).mkdir()
    for step in (1, 2):
        log.write(step, {"loss": 0.5})
    (record,) = caplog.records
    assert "metrics could not be written" in record.getMessage() and len(accelerator.trackers[0].sent) == 2
