"""Encodings of prompts and pictures on disk: computed once, checked when read, one tensor a file."""

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

from .errors import InputError


MIB = 2**20
# Of a checkpoint's file, the last MiB and one in 64 are hashed: 0.25 GB of a 16 GB text encoder.
FINGERPRINT_STRIDE = 64 * MIB

# Left free on the cache's disk, for what else the run writes there.
RESERVE_BYTES = 500 * 10**6

TEMPORARY_SUFFIX = ".safetensors.tmp"
# No save takes that long, so an older temporary file is a killed run's.
TEMPORARY_MAX_SECONDS = 24 * 3600

KeyPart = str | bytes | int | float | bool | None | list | tuple | dict


def content_key(*parts: KeyPart) -> str:
    """SHA-256 over the parts, 64 hex digits: equal where the parts are equal.

    1, 1.0, True and "1" differ, "ab", "c" differs from "a", "bc". The order of a dict's items does not count, and
    a tuple equals a list, as a setting may come from a default or from a JSON file.

    Raises:
        TypeError: a part, or what it holds, is of another type.
    """
    return hashlib.sha256(_serialised(parts)).hexdigest()


def _serialised(part: KeyPart) -> bytes:
    """Kind, length and content, so that no two different parts, or rows of parts, give the same bytes."""
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
    """Identifies components of a checkpoint by their files' paths in it, sizes and sampled content.

    Of each file one MiB in 64 is read, from its first, and its last MiB. Copies agree, wherever they lie; a change
    that keeps a file's size and lies between the samples alone goes unseen.

    Args:
        folder: the checkpoint. Its files may be links, as they are in the hub cache.
        subfolders: the components that count, such as "text_encoder" and "tokenizer", in any order.

    Returns:
        64 hex digits.

    Raises:
        InputError: a subfolder is missing.
    """
    files = {}
    for subfolder in subfolders:
        if not (folder / subfolder).is_dir():
            raise InputError(
                f"--pretrained_model_name_or_path {folder}: it has no folder {subfolder}; pass a whole checkpoint"
            )
        for path in (folder / subfolder).rglob("*"):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path
    return files_fingerprint(files)


def files_fingerprint(files: dict[str, Path]) -> str:
    """64 hex digits of files by name, size and sampled content (see `checkpoint_fingerprint`)."""
    return content_key({name: _sampled_content(path) for name, path in files.items()})


def _sampled_content(path: Path) -> tuple[int, str]:
    """Size in bytes, and SHA-256 over the sampled MiBs."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for offset in (*range(0, size, FINGERPRINT_STRIDE), max(0, size - MIB)):
            file.seek(offset)
            digest.update(file.read(MIB))
    return size, digest.hexdigest()


class ContextCache:
    """Tensors by key (see `content_key`), each in a safetensors file with a checksum.

    Several processes may read and save at once, also the same key: an entry appears whole or not at all.
    """

    def __init__(self, folder: Path):
        """Creates nothing; removes the temporary files that killed runs left a day ago or earlier."""
        self.folder = folder
        for path in folder.glob(f"??/*{TEMPORARY_SUFFIX}"):
            # Another process may remove it first, and a cache that is only read may lie on a read-only disk.
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > TEMPORARY_MAX_SECONDS:
                    path.unlink()

    def path(self, key: str) -> Path:
        """Where the entry lies: one of 256 subfolders, since a folder of a million files is slow."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def is_whole(self, key: str) -> bool:
        """Whether `load` would return the entry. Reads all of it."""
        try:
            self.load(key)
        except InputError:
            return False
        return True

    def load(self, key: str) -> torch.Tensor:
        """The tensor as it was saved, on the CPU.

        Raises:
            InputError: the entry is missing, is another key's, or is not what was saved.
        """
        path = self.path(key)
        try:
            with safetensors.safe_open(path, framework="pt") as entry:
                recorded = (entry.metadata() or {}).get("sha256")
                # A copy: safetensors hands out the mapped file, which may still change after it was checked.
                tensor = entry.get_tensor("tensor").clone()
        except (OSError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())
        else:
            if recorded == _checksum(key, tensor):
                return tensor
            reason = "its checksum does not fit"
        raise InputError(
            f"{path}: this cached encoding is missing or damaged ({reason}); "
            "delete it and resume with --resume_from_checkpoint latest, which encodes it again"
        )

    def save(self, key: str, tensor: torch.Tensor) -> None:
        """Writes the entry, or replaces it.

        Args:
            tensor: of any shape, dtype and device; the dtype is kept.

        Raises:
            InputError: the disk is full, or the folder cannot be written. Nothing is left behind.
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
            raise InputError(
                f"--context_cache_dir {self.folder}: cannot write {path} ({error.strerror}); "
                "make room and allow writing there, or name another folder"
            ) from error

    def missing(self, keys: Iterable[str], progress: Callable[[list[str]], Iterable[str]] = iter) -> list[str]:
        """The keys that have no whole entry, each once, in their order. Reads every entry that is there.

        Args:
            progress: wraps the distinct keys, such as `tqdm`.
        """
        return [key for key in progress(list(dict.fromkeys(keys))) if not self.is_whole(key)]

    def check_space(self, num_bytes: int) -> None:
        """Call before encoding what is missing, with its size; nothing to write needs no space.

        Raises:
            InputError: the disk would keep less than `RESERVE_BYTES` free.
        """
        folder = self.folder
        while not os.path.exists(folder):
            folder = folder.parent
        free, needed = shutil.disk_usage(folder).free, num_bytes + RESERVE_BYTES
        if num_bytes > 0 and free < needed:
            raise InputError(
                f"--context_cache_dir {self.folder}: the encodings need {needed / 1e9:.2f} GB and its disk has "
                f"{free / 1e9:.2f} GB free; make room, or name a folder on a larger disk"
            )


def _checksum(key: str, tensor: torch.Tensor) -> str:
    """SHA-256 over all that an entry says, its key included: a file renamed to another key does not fit."""
    digest = hashlib.sha256(_serialised([key, str(tensor.dtype), list(tensor.shape)]))
    # Flat, since a scalar has no bytes view, and as bytes, since numpy has no bfloat16.
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
