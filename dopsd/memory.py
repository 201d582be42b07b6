"""Peak memory of training."""

import psutil
import torch


def reset_peak_memory() -> None:
    """Forgets the peak so far: the encoders', or that of drawing, which needs the VAE."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gb() -> float:
    """Peak memory allocated on the GPU since the last reset, in GB; on a CPU, the resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9
