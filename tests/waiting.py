"""Waits for what a running script does."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_until(condition: Callable[[], Any], process: Any, log: Path, timeout: float = 240) -> None:
    """Returns when the condition is true. Fails with the log if the process ends before.

    Args:
        process: a `multiprocessing` or `subprocess` one.
    """
    end = time.monotonic() + timeout
    while not condition():
        is_running = process.is_alive() if hasattr(process, "is_alive") else process.poll() is None
        assert (is_running and time.monotonic() < end) or condition(), log.read_text(errors="replace")
        time.sleep(0.002)
