import torch

from dopsd.memory import peak_memory_gb, reset_peak_memory


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
