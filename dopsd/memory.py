"""Peak memory, of training and of other stages."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from accelerate.logging import get_logger


logger = get_logger(__name__)


def reset_peak_memory() -> None:
    """Forgets the peak so far: the encoders', or that of drawing, which needs the VAE."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gb() -> float:
    """Peak memory allocated on the GPU since the last reset, in GB; on a CPU, the resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


def peak_host_memory_gb() -> float:
    """Most resident memory of this process so far, in GB: on a CPU also the model's, mapped files included."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # not on Windows

    # In kilobytes on Linux, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def log_host_memory() -> None:
    """Logs the peak of host memory, which loading the models decides."""
    logger.info(f"Host memory peak so far: {peak_host_memory_gb():.1f} GB")


@contextmanager
def logging_cost(stage: str) -> Iterator[None]:
    """Context that logs how long a stage took and its peak memory, see `peak_memory_gb`. Nothing after an error."""
    reset_peak_memory()
    began = time.perf_counter()
    yield
    logger.info(f"{stage} took {time.perf_counter() - began:.1f} s, with a peak of {peak_memory_gb():.2f} GB")
