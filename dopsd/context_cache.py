"""On-disk cache for encoded prompts and pictures, one tensor per file. Entries are verified when they are read."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import safetensors
import safetensors.torch
import torch

from .errors import InputError, OutputError, one_line
from .files import read_regular_file
from .findings import Findings, file_state
from .sharing import in_threads


MIB = 2**20
# One MiB in every 64 and the last MiB of a file are hashed: 0.25 GB of a 16 GB text encoder.
FINGERPRINT_STRIDE = 64 * MIB

# Kept free on the cache's disk for the run's other files.
RESERVE_BYTES = 500 * 10**6

TEMPORARY_SUFFIX = ".safetensors.tmp"
# No save takes this long, so an older temporary file was left by a killed run.
TEMPORARY_MAX_SECONDS = 24 * 3600

KeyPart = str | bytes | int | float | bool | None | list | tuple | dict


def content_key(*parts: KeyPart) -> str:
    """SHA-256 of the parts as 64 hex digits. Equal parts have equal keys.

    1, 1.0, True and "1" are different, and so are ("ab", "c") and ("a", "bc"). The order of a dict's items does not
    matter. A tuple equals a list with the same items, because settings may come from a default or from a JSON file.

    Raises:
        TypeError: a part, or an item in it, has another type.
    """
    return hashlib.sha256(_serialised(parts)).hexdigest()


def _serialised(part: KeyPart) -> bytes:
    """Type, length and content, so that different parts, or sequences of parts, never give the same bytes."""
    if isinstance(part, bytes):
        kind, content = "bytes", part
    elif isinstance(part, (list, tuple)):
        kind, content = "list", b"".join(_serialised(item) for item in part)
    elif isinstance(part, dict):
        kind, content = "dict", b"".join(sorted(_serialised(item) for item in part.items()))
    elif part is None or isinstance(part, (str, int, float)):
        kind, content = "json", json.dumps(part).encode()
    else:
        raise TypeError(f"a key cannot be made of {type(part).__name__}")
    return f"{kind}:{len(content)}:".encode() + content


def checkpoint_fingerprint(folder: Path, subfolders: Iterable[str]) -> str:
    """Identifies components of a checkpoint by the relative paths, sizes and sampled contents of their files.

    Of each file, one MiB in every 64, starting with the first, and the last MiB are read. Copies of a checkpoint have
    the same fingerprint wherever they are. A change that keeps a file's size and falls between the samples is missed.

    Args:
        folder: the checkpoint. Its files may be symbolic links, as in the hub cache.
        subfolders: the components to include, such as "text_encoder" and "tokenizer", in any order.

    Returns:
        64 hex digits.

    Raises:
        InputError: a subfolder is missing.
    """
    files = {}
    for subfolder in subfolders:
        if not (folder / subfolder).is_dir():
            raise InputError(
                f"--pretrained_model_name_or_path {folder}: it has no folder {subfolder}; pass a complete checkpoint"
            )
        for path in (folder / subfolder).rglob("*"):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path
    return files_fingerprint(files)


def files_fingerprint(files: dict[str, Path]) -> str:
    """64 hex digits that identify files by name, size and sampled content (see `checkpoint_fingerprint`)."""
    return content_key({name: _sampled_content(path) for name, path in files.items()})


def _sampled_content(path: Path) -> tuple[int, str]:
    """Size in bytes, and SHA-256 of the sampled MiBs."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for offset in (*range(0, size, FINGERPRINT_STRIDE), max(0, size - MIB)):
            file.seek(offset)
            digest.update(file.read(MIB))
    return size, digest.hexdigest()


class ContextCache:
    """Tensors by key (see `content_key`), each in a safetensors file with a checksum.

    Several processes may load and save at the same time, even the same key: an entry is visible only when complete.

    Args:
        folder: created by the first `save`. Temporary files that killed runs left there over a day ago are removed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._verified = Findings(folder / "verified")
        for path in folder.glob(f"??/*{TEMPORARY_SUFFIX}"):
            # Another process may have removed the file, and the disk of a cache that is only read may be read-only.
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > TEMPORARY_MAX_SECONDS:
                    path.unlink()

    def path(self, key: str) -> Path:
        """Path of the entry, in one of 256 subfolders: a single folder with a million files would be slow."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def is_valid(self, key: str) -> bool:
        """Whether the entry exists and is undamaged. Reads all of it."""
        try:
            self.load(key)
        except InputError:
            return False
        return True

    def load(self, key: str) -> torch.Tensor:
        """The tensor as it was saved, on the CPU.

        Raises:
            InputError: the entry is missing, damaged, or belongs to another key.
        """
        path = self.path(key)
        try:
            data = read_regular_file(path)  # not mapped: the file may change after the check
            tensor = safetensors.torch.load(data)["tensor"]
            recorded = _metadata(data).get("sha256")
        except KeyError:
            reason = "no encoding in it"
        except (OSError, safetensors.SafetensorError) as error:
            reason = one_line(error)
        else:
            if recorded == _checksum(key, tensor):
                return tensor
            reason = "wrong checksum"
        raise InputError(
            f"{path}: this cached encoding is missing or damaged ({reason}); delete the file and resume with "
            "--resume_from_checkpoint latest, which creates it again"
        )

    def save(self, key: str, tensor: torch.Tensor) -> None:
        """Writes or replaces the entry.

        Args:
            tensor: any shape, dtype and device. The dtype is kept.

        Raises:
            OutputError: the disk is full or the folder is not writable. No partial file is left.
        """
        tensor = tensor.cpu().contiguous()
        data = safetensors.torch.save({"tensor": tensor}, {"sha256": _checksum(key, tensor)})
        path = self.path(key)
        temporary = path.with_name(f"{key}.{uuid4().hex}{TEMPORARY_SUFFIX}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"--context_cache_dir {self.folder}: cannot write {path} ({error.strerror}); free some space, make "
                "the folder writable or choose another one. The encodings saved so far are kept"
            ) from error

    def missing(self, keys: Iterable[str], progress: Callable[[list[str]], Iterable[str]] = iter) -> list[str]:
        """The keys without a valid entry, in their order and without duplicates.

        Reads every existing entry, but for those that an earlier call has verified and that have not changed since.

        Args:
            progress: wraps the list of keys whose entries are read, for example in `tqdm`.
        """
        keys = list(dict.fromkeys(keys))
        # Listed first: NFS remembers for a while that a file was missing when it was opened, and another machine may
        # be about to write it.
        listed = {path.stem for path in self.folder.glob("??/*.safetensors")}
        present = [key for key in keys if key in listed]
        del listed  # it may have millions of names
        states = dict(zip(present, in_threads(self._state, present), strict=True))
        verified = self._verified.read(filter(None, states.values()))
        valid = {key for key, state in states.items() if state in verified}
        unverified = [key for key in keys if key in states and key not in valid]
        for key, is_valid in zip(progress(unverified), in_threads(self.is_valid, unverified), strict=True):
            if is_valid:
                valid.add(key)
                self._verified.add({states[key]: None} if states[key] else {})
        return [key for key in keys if key not in valid]

    def _state(self, key: str) -> str | None:
        """Changes with the entry's file; None if that cannot be told."""
        state = file_state(self.path(key))
        return None if state is None else content_key(key, state)

    def check_space(self, num_bytes: int, advice: Iterable[str] = ()) -> None:
        """Checks that this many bytes of new entries fit on the disk. Zero bytes always fit.

        Args:
            advice: what else would help, for the error.

        Raises:
            OutputError: less than `RESERVE_BYTES` would remain free.
        """
        folder = self.folder
        while not os.path.exists(folder):
            folder = folder.parent
        free, needed = shutil.disk_usage(folder).free, num_bytes + RESERVE_BYTES
        if num_bytes > 0 and free < needed:
            remedies = "; ".join(["free some space or choose a folder on a larger disk", *advice])
            raise OutputError(
                f"--context_cache_dir {self.folder}: the encodings need {needed / 1e9:.2f} GB, but its disk has only "
                f"{free / 1e9:.2f} GB free; {remedies}"
            )


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a valid safetensors file: the length of its header in 8 bytes, then the header in JSON."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})


def _checksum(key: str, tensor: torch.Tensor) -> str:
    """SHA-256 of key, dtype, shape and values. The key is included so that a renamed file is noticed."""
    digest = hashlib.sha256(_serialised([key, str(tensor.dtype), list(tensor.shape)]))
    # Flattened because a scalar cannot be viewed as bytes, and as bytes because numpy has no bfloat16.
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
