import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.miniature.files import REPOSITORY
from benchmarks.miniature.processes import run_in_waves


def note(path: Path) -> None:
    path.write_text(str(os.getpid()))


def fail(path: Path) -> None:
    raise ValueError(f"cannot use {path.name}")


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def test_waves_run_in_order_and_an_error_starts_no_further_call(tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    waves = [(note, [first]), (fail, [second]), (note, [third])]
    with pytest.raises(ValueError, match="cannot use second"):
        run_in_waves(waves, 1, initializer=note, initargs=(tmp_path / "started",))
    assert first.read_text() == (tmp_path / "started").read_text() != str(os.getpid())
    assert not third.exists()


def test_a_killed_process_leaves_no_worker_behind(tmp_path):
    program = (
        "from pathlib import Path\n"
        "from test_processes import note, run_in_waves, sleep\n"
        "if __name__ == '__main__':\n"
        f"    run_in_waves([(sleep, [600])], 1, initializer=note, initargs=(Path({str(tmp_path / 'worker')!r}),))"
    )
    path = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    parent = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    worker = psutil.Process(int((tmp_path / "worker").read_text()))
    parent.kill()
    parent.wait()
    worker.wait(timeout=60)
