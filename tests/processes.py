"""The processes of a run on one or several machines, as threads of this process."""

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from dopsd.errors import DOPSDError
from short_runs import one_process


class Processes:
    """Threads that exchange objects as processes do. Only one runs at a time; the others wait for it in an exchange.

    Args:
        monkeypatch: replaces the exchange that `dopsd.sharing` uses.
        sizes: number of processes on each machine.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *sizes: int):
        places = [(machine, local) for machine, size in enumerate(sizes) for local in range(size)]
        self.machines = [machine for machine, _ in places]
        self.accelerators = [
            one_process(
                num_processes=len(places),
                process_index=index,
                local_process_index=local,
                is_main_process=index == 0,
                is_local_main_process=local == 0,
            )
            for index, (_, local) in enumerate(places)
        ]
        self._running = threading.Lock()
        self._barrier = threading.Barrier(len(places), timeout=30)
        self._thread = threading.local()
        self._sent: list[bytes] = [b""] * len(places)
        monkeypatch.setattr("dopsd.sharing.gather_object", self._gather)

    def _gather(self, items: list) -> list:
        self._sent[self._thread.index] = pickle.dumps(items)
        self._wait()
        gathered = [item for sent in self._sent for item in pickle.loads(sent)]
        self._wait()
        return gathered

    def _wait(self) -> None:
        self._running.release()
        try:
            self._barrier.wait()
        finally:
            self._running.acquire()

    def run(self, work: Callable[[SimpleNamespace], Any]) -> list[Any]:
        """What each process returns for its accelerator, or the `DOPSDError` that ends it."""

        def run_one(index: int) -> Any:
            self._thread.index = index
            with self._running:
                try:
                    return work(self.accelerators[index])
                except DOPSDError as error:
                    return error
                except BaseException:
                    self._barrier.abort()
                    raise

        with ThreadPoolExecutor(len(self.accelerators)) as pool:
            return list(pool.map(run_one, range(len(self.accelerators))))
