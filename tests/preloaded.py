"""Imported by `command_line.Forkserver`'s process: everything that a run of a script imports."""

import gc

import bitsandbytes  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import prodigyopt  # noqa: F401
import pytest  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import evaluate_lora  # noqa: F401
import train_dopsd_flux2  # noqa: F401
import train_dopsd_zimage  # noqa: F401


# Collecting garbage would copy the memory that a forked run shares with this process: half of a short run's time.
gc.collect()
gc.freeze()
