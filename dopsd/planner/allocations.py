"""Counts the memory that tensor operations allocate."""

import weakref
from collections.abc import Iterable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode


CUDA_GRANULARITY = 512  # CUDA's caching allocator hands out multiples of this many bytes.


def pinned_bytes(num_bytes: int) -> int:
    """What torch allocates of pinned host memory for a tensor of so many bytes: the next power of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of the storages that operators create while it is entered, and their peak.

    A storage counts once, however many views it has, until it is freed. Tensors from outside do not count. Works with
    real, fake and meta tensors. It does not see what a kernel allocates within a single operator.

    Args:
        granularity: each storage is rounded up to a multiple of this many bytes.

    Attributes:
        live, peak: bytes now, and at most so far.
    """

    def __init__(self, granularity: int = 1):
        super().__init__()
        self.granularity = granularity
        self.live = self.peak = 0
        self._known: set[int] = set()

    def reset_peak(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Those that no operator has created come from outside; their views must not count either.
        for storage in _storages((args, kwargs)):
            self._add(storage, 0)
        result = func(*args, **kwargs)
        for storage in _storages(result):
            self._add(storage, -(-storage.nbytes() // self.granularity) * self.granularity)
        return result

    def _add(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        # torch keeps one Python object per storage, which dies with it.
        weakref.finalize(storage, self._remove, key, num_bytes).atexit = False

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({storage._cdata: storage.nbytes() for storage in _storages(list(tensors))}.values())


def module_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once. The module may be on the meta device."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def _storages(value: object) -> Iterator[torch.UntypedStorage]:
    """Of all tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value.untyped_storage()
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _storages(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _storages(item)
