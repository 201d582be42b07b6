import pytest


@pytest.fixture(autouse=True)
def quiet_datasets(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()
