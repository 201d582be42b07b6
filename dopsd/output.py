"""The output folder of a run: which checkpoints are in it, and how errors while writing are reported."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import InputError, OutputError, first_line


LORA_FILE = "pytorch_lora_weights.safetensors"
CHECKPOINT_FILES = ("adapters.safetensors", "trainer_state.pt", "state.json")


def make_output_dir(folder: Path) -> None:
    """Creates the folder.

    Raises:
        InputError: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({error.strerror}); choose another") from error


def checkpoint_step(path: Path) -> int:
    """The step of a complete checkpoint's folder, or -1 for anything else."""
    number = path.name.removeprefix("checkpoint-")
    is_complete = all((path / name).is_file() for name in CHECKPOINT_FILES)
    return int(number) if number != path.name and number.isdecimal() and is_complete else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in an output folder, oldest first."""
    found = [path for path in folder.iterdir() if checkpoint_step(path) >= 0] if folder.is_dir() else []
    return sorted(found, key=checkpoint_step)


def remove_unfinished_checkpoints(folder: Path) -> None:
    """Removes what a killed run was writing or deleting."""
    for path in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def reporting_write_errors(folder: Path, what: str) -> Iterator[None]:
    """Turns an error while writing `what` into an `OutputError` that says which checkpoint is safe."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        safe = [path.name for path in list_checkpoints(folder)[-1:]] or ["no checkpoint"]
        raise OutputError(
            f"--output_dir {folder}: {what} could not be written ({first_line(error)}); {safe[0]} is complete: make "
            "room, then run the same command with --resume_from_checkpoint latest"
        ) from error


def sync_to_disk(path: Path) -> None:
    """Flushes a file or folder to disk. Without it, a rename may survive a power cut that the content does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
