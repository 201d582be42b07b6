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
    pairs,
    pictures,
    run_checkpoints,
)
