import resource
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from dopsd.memory import log_host_memory, logging_cost, peak_host_memory_gb, peak_memory_gb, reset_peak_memory


def test_the_peak_of_a_gpu_is_counted_from_the_last_reset(monkeypatch):
    peak = {"bytes": 5e9}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak["bytes"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.update(bytes=2e9))
    assert peak_memory_gb() == 5
    reset_peak_memory()
    assert peak_memory_gb() == 2


def test_on_a_cpu_the_resident_memory_counts_and_nothing_is_reset():
    reset_peak_memory()
    assert peak_memory_gb() > 0.01


def test_the_peak_of_host_memory_is_that_of_the_process():
    held = torch.ones(50_000_000)  # 0.2 GB
    resident = psutil.Process().memory_info().rss / 1e9
    del held
    assert 0.2 < 0.95 * resident < peak_host_memory_gb()  # Linux counts with an error of a few pages per core


@pytest.mark.parametrize(("platform", "units"), [("linux", 3e6 / 1.024), ("darwin", 3e9)])
def test_the_units_of_the_peak_depend_on_the_system(monkeypatch, caplog, platform, units):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=units))
    assert peak_host_memory_gb() == pytest.approx(3)
    caplog.set_level("INFO")
    log_host_memory()
    assert "Host memory peak so far: 3.0 GB" in caplog.text


def test_the_cost_of_a_stage_is_logged_with_the_peak_since_it_began(monkeypatch, caplog):
    peak = {"bytes": 5e9}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak["bytes"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.update(bytes=2e9))
    monkeypatch.setattr(time, "perf_counter", iter([10.0, 13.5]).__next__)
    caplog.set_level("INFO")
    with logging_cost("Drawing"):
        pass
    assert "Drawing took 3.5 s, with a peak of 2.00 GB" in caplog.text
    caplog.clear()
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    with pytest.raises(ValueError), logging_cost("Drawing"):
        raise ValueError
    assert not caplog.text
