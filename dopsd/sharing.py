"""How the processes of a run share work on files, and end together if one of them fails."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from .errors import DOPSDError


Item = TypeVar("Item")
Result = TypeVar("Result")


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
    index = accelerator.local_process_index
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
