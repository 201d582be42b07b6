"""The output folder of a run: its lock, its checkpoints' names, and writing files so that none is ever incomplete."""

import errno
import itertools
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from .errors import InputError, OutputError, first_line
from .files import read_regular_file
from .sharing import failing_together


logger = get_logger(__name__)

LORA_FILE, ADAPTERS_FILE = "pytorch_lora_weights.safetensors", "adapters.safetensors"
MODEL_INDEX, TRANSFORMER_DIR = "model_index.json", "transformer"
HISTORY_FILE = "metrics.jsonl"
NEEDED_FILES = (HISTORY_FILE, LORA_FILE, MODEL_INDEX)  # what a run cannot do without
RESULTS = (LORA_FILE, TRANSFORMER_DIR, MODEL_INDEX)  # what a finished run leaves: some of these
CHANGE_KEY = "d-opsd_change"  # in the header of an extracted LoRA's file
CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
LOCK_FILE, OWNER_FILE = ".lock", ".lock-owner.json"

# Errors that mean that content is lost. Others come from file systems that cannot sync, such as CIFS folders.
LOST_CONTENT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
IN_THE_WAY = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_output_dir(folder: Path, accelerator: Accelerator) -> FileLock | None:
    """Creates the folder, and locks it against other runs.

    Returns:
        The main process's lock. The system releases it when the process ends, however it ends.

    Raises:
        InputError: the folder cannot be written, or another run is writing to it. All processes raise it.
    """
    lock = None
    with failing_together():
        if accelerator.is_main_process:
            make_output_dir(folder)
            check_nothing_in_the_way(folder, NEEDED_FILES)
            lock = lock_output_dir(folder)
    return lock


def make_output_dir(folder: Path) -> None:
    """Creates the folder.

    Raises:
        InputError: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError, RecursionError) as error:  # a NUL byte; thousands of parent folders
        raise InputError(f"--output_dir {folder}: cannot be written ({first_line(error)}); choose another") from error


def check_nothing_in_the_way(folder: Path, names: Iterable[str], folders: Iterable[str] = ()) -> None:
    """Checks that what the run cannot do without can be written, before it trains.

    Args:
        names: of these files.
        folders: names of folders, besides those of training.

    Raises:
        InputError: a folder has the name of a file, or a file that of a folder.
    """
    for path in folder.iterdir():
        is_folder = CHECKPOINT_NAME.fullmatch(path.name) or path.name in (TRANSFORMER_DIR, *folders)
        if is_folder and not path.is_dir():
            raise InputError(f"--output_dir {folder}: its {path.name} is not a folder; remove it")
    for name in names:
        if os.path.lexists(folder / name) and not (folder / name).is_file():
            raise InputError(f"--output_dir {folder}: its {name} is not a file; remove it")


def lock_output_dir(folder: Path) -> FileLock:
    """Locks the folder for this process.

    Raises:
        InputError: another process has locked it.
    """
    # A soft lock is a file, which a killed run would leave.
    options = {"fallback_to_soft": False} if "fallback_to_soft" in signature(FileLock.__init__).parameters else {}
    lock = FileLock(folder / LOCK_FILE, **options)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise InputError(
            f"--output_dir {folder}: {_owner(folder)} is writing to it; wait for it to end, or choose another folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        logger.warning(f"--output_dir {folder}: cannot be locked ({first_line(error)}); start no second run in it")
        return lock
    with suppress(OSError), replacing(folder / OWNER_FILE) as unfinished:
        unfinished.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
    return lock


def _owner(folder: Path) -> str:
    try:
        owner = json.loads(read_regular_file(folder / OWNER_FILE))
        return f"another run (process {owner['pid']} on {owner['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"


def check_is_shared(folder: Path, accelerator: Accelerator) -> None:
    """Checks that the folder is the same one for all processes, each of which will write a part of a checkpoint.

    Raises:
        InputError: it is not. All processes raise it.
    """
    mark = None
    with failing_together():
        if accelerator.is_main_process:
            with naming_file(folder / ".shared"):
                mark = Path(tempfile.mkstemp(prefix=".shared-", dir=folder)[1])
    (name,) = broadcast_object_list([mark and mark.name])
    try:
        with failing_together():
            if not (folder / name).is_file():
                raise InputError(
                    f"--output_dir {folder}: is not the same folder on all machines; give one that they share, since "
                    "each writes a part of a checkpoint"
                )
    finally:
        if mark is not None:
            remove(mark)


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint folder's name, or -1 for anything else. The folder may be incomplete or damaged."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    return int(match[1]) if match and path.is_dir() else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in an output folder, oldest first."""
    found = [path for path in folder.iterdir() if checkpoint_step(path) >= 0] if folder.is_dir() else []
    return sorted(found, key=checkpoint_step)


def pipeline_parts(folder: Path) -> list[str]:
    """The folders of the components of the pipeline in a folder; none if there is no pipeline.

    Raises:
        InputError: its `MODEL_INDEX` is damaged.
    """
    path = folder / MODEL_INDEX
    try:
        names = [*json.loads(read_regular_file(path))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be used ({first_line(error)}); copy it from the pretrained model") from error
    return [name for name in names if str(name).isidentifier() and (folder / name).is_dir()]


class LoRAOfChange(NamedTuple):
    """What the LoRA beside a whole model holds of its change.

    Attributes:
        share: of the sum of squares over all weights.
    """

    rank: int
    share: float

    @property
    def header(self) -> dict[str, str]:
        """For the LoRA's file. Loaders ignore it."""
        return {CHANGE_KEY: json.dumps(self._asdict())}


def extracted_lora(folder: Path) -> LoRAOfChange | None:
    """The LoRA that was extracted from the whole model in a folder; None if there is none."""
    try:
        with safe_open(folder / LORA_FILE, "pt") as opened:
            text = (opened.metadata() or {}).get(CHANGE_KEY)
    except (OSError, SafetensorError):
        return None
    return None if text is None else LoRAOfChange(**json.loads(text))


def numbered_sheets(folder: Path, kind: str) -> dict[int, str]:
    """Step -> file name of the sheets of one kind, such as validation-250.png, in the order of the steps."""
    found = (re.fullmatch(rf"{kind}-(\d+)\.png", path.name) for path in folder.iterdir())
    return dict(sorted((int(match[1]), match[0]) for match in found if match))


def tidy_output_dir(folder: Path, first_step: int) -> None:
    """Removes what a killed run was writing or deleting, and moves newer checkpoints away.

    Checkpoints after `first_step` are damaged, or the run would have started from them.

    Raises:
        OutputError: one of them cannot be moved.
    """
    transformer = folder / TRANSFORMER_DIR
    if set_aside(transformer).exists() and not transformer.exists():
        set_aside(transformer).rename(transformer)
    for path in (*folder.glob(".checkpoint-*.tmp"), unfinished(transformer), set_aside(transformer)):
        remove(path)
    for path in list_checkpoints(folder):
        if checkpoint_step(path) > first_step:
            aside = unused_name(path.with_name(f"{path.name}.damaged"))
            with reporting_write_errors(folder, aside.name):
                path.rename(aside)
            logger.warning(f"Moved the damaged {path.name} to {aside}")


def replace_folder(new: Path, old: Path) -> None:
    """Puts a complete folder in the place of another one, or of none.

    If the run is killed between the two renames, `tidy_output_dir` puts the old one back.
    """
    aside = set_aside(old)
    remove(aside)
    if old.exists():
        old.rename(aside)
    new.rename(old)
    sync_to_disk(old.parent)
    remove(aside)


def set_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def unused_name(path: Path) -> Path:
    """The path, or one with a number after it that is not in use."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


def remove(path: Path) -> None:
    """Removes a file or a folder as far as possible: on NFS, files that are open elsewhere stay."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


@contextmanager
def reporting_write_errors(folder: Path, what: str) -> Iterator[None]:
    """Turns an error while writing `what`, which ends the run, into an `OutputError` that says what is safe."""
    try:
        with naming_file(Path(what)):
            yield
    except OutputError as error:
        safe = [path.name for path in list_checkpoints(folder)[-1:]] or ["no checkpoint"]
        raise OutputError(
            f"--output_dir {folder}: {error}, then run the same command with --resume_from_checkpoint latest; "
            f"{safe[0]} is complete"
        ) from error.__cause__


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turns an error while writing a file into an `OutputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        advice = "make room" if is_full(error) else "make it writable"
        if getattr(error, "errno", None) in IN_THE_WAY:
            advice = "remove what is in its place"
        raise OutputError(f"{path} could not be written ({first_line(error)}): {advice}") from error


def is_full(error: Exception) -> bool:
    """Whether a write failed because the disk is full, which libraries report without an error number."""
    return getattr(error, "errno", None) is None or error.errno in FULL_DISK


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden temporary file beside `path`, which replaces it on success and is removed on failure.

    So `path` never holds an incomplete file, even after a power cut.
    """
    temporary = unfinished(path)
    with suppress(FileNotFoundError):  # left by a killed run, or a link to another file
        temporary.unlink()
    try:
        yield temporary
        sync_to_disk(temporary)
        os.replace(temporary, path)
        sync_to_disk(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def unfinished(path: Path) -> Path:
    """The hidden name of a file or folder while it is written."""
    return path.with_name(f".{path.name}.tmp")


def sync_to_disk(path: Path) -> None:
    """Flushes a file or folder to disk, where the file system can.

    Without it, a rename may survive a power cut that the content does not.

    Raises:
        OSError: content is lost, because the disk is full or broken.
    """
    # Windows syncs only what is open for writing, and opens no folders.
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR
    try:
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in LOST_CONTENT:
            raise
