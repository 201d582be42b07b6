"""Imports every area's kinds of faults."""

from . import (  # noqa: F401
    caches,
    captions,
    configs,
    data_sets,
    flags,
    histories,
    loras,
    model_checkpoints,
    moments,
    output_folders,
    pictures,
    run_checkpoints,
)
