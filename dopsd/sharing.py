"""How the processes of a run, and the threads of a process, share work on files, and end together if one fails."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from .errors import DOPSDError


Item = TypeVar("Item")
Result = TypeVar("Result")

# Threads of a process that read files: reading, hashing and decoding JPEG happen outside of Python's lock.
NUM_READERS = 4
# Items that they are given at a time: a task that waits takes 2 KB.
NUM_WAITING = 256


def in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yields the results in the order of the items, and raises the first error in this order."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for start in range(0, len(items), NUM_WAITING):
            yield from pool.map(work, items[start : start + NUM_WAITING])


@contextmanager
def failing_together() -> Iterator[None]:
    """Waits at the end for all processes. A `DOPSDError` in any of them is raised in all of them.

    Without it, the others would wait for the one that has failed.
    """
    own = None
    try:
        yield
    except DOPSDError as error:
        own = error
    for error in gather_object([own]):
        if error is not None:
            raise error


def machine_of_each_process(accelerator: Accelerator) -> list[int]:
    """The number of each process's machine, from 0."""
    # Processes are numbered machine by machine, so the next machine begins wherever the local index is 0.
    counts = accumulate(int(index == 0) for index in gather_object([accelerator.local_process_index]))
    return [count - 1 for count in counts]


def machine_share(items: list[Item], accelerator: Accelerator) -> list[Item]:
    """The part of the items that falls to this process, if the processes of its machine share them."""
    machines = machine_of_each_process(accelerator)
    count = machines.count(machines[accelerator.process_index])
    return part_of(items, accelerator.local_process_index, count)


def part_of(items: list[Item], index: int, count: int) -> list[Item]:
    """The part with this index, if the items are divided into `count` parts of about the same length."""
    return items[len(items) * index // count : len(items) * (index + 1) // count]


def share_on_each_machine(
    work: Callable[[list[Item]], list[Result]], items: list[Item], accelerator: Accelerator
) -> list[list[Result]]:
    """Does the work on every machine, because each may have files of its own, and shares it among its processes.

    Args:
        work: takes a part of the items. It may raise a `DOPSDError`.
        items: the same in all processes of a machine.

    Returns:
        The results of each machine, in the order of the items. All processes get the results of all machines.

    Raises:
        DOPSDError: the work has failed in some process.
    """
    with failing_together():
        results = work(machine_share(items, accelerator))
    by_machine: dict[int, list[Result]] = {}
    for machine, part in zip(machine_of_each_process(accelerator), gather_object([results]), strict=True):
        by_machine.setdefault(machine, []).extend(part)
    return list(by_machine.values())


def share_on_own_machine(
    work: Callable[[list[Item]], list[Result]], items: list[Item], accelerator: Accelerator
) -> list[Result]:
    """The results of this process's machine, see `share_on_each_machine`."""
    by_machine = share_on_each_machine(work, items, accelerator)
    return by_machine[machine_of_each_process(accelerator)[accelerator.process_index]]
