"""What was found out about files, kept on disk for later runs."""

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4


# A file that has just changed may change again within the resolution of its times, which is 2 s on some disks.
SETTLED_NANOSECONDS = 2 * 10**9


def file_state(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file: its size in bytes, and when its content and its status changed, in ns.

    A copy that keeps the first time has another second one. None if there is no such file, or if it has changed so
    recently that another change might not show.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    times = status.st_mtime_ns, status.st_ctime_ns
    return None if time.time_ns() - max(times) < SETTLED_NANOSECONDS else (status.st_size, *times)


class Findings:
    """Values in JSON types by key. Processes and runs append to files of their own, so that none waits for another.

    Nothing is lost with a line that a killed process has left unfinished, or if the folder cannot be written: it is
    only found out again.

    Args:
        folder: with the files KEY VALUE, created by the first `add`. None: nothing is kept.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._own_name = f"{uuid4().hex}.jsonl"

    def read(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that have one. Only these are held in memory."""
        wanted, found = {key.encode(): key for key in keys}, {}
        for path in [] if self.folder is None else sorted(self.folder.glob("*.jsonl")):
            with suppress(OSError), path.open("rb") as lines:
                for line in lines:
                    key, _, value = line.partition(b" ")
                    if key in wanted:
                        with suppress(ValueError):
                            found[wanted[key]] = json.loads(value)
        return found

    def add(self, values: dict[str, Any]) -> None:
        if self.folder is None or not values:
            return
        lines = "".join(f"{key} {json.dumps(value)}\n" for key, value in values.items())
        with suppress(OSError):  # such as a read-only disk
            os.makedirs(self.folder, exist_ok=True)
            with (self.folder / self._own_name).open("a") as file:
                file.write(lines)
