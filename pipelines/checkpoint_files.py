"""Access to single files of a checkpoint, in a folder or on the Hub, with one-line errors."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from dopsd.errors import InputError
from dopsd.loading import LOAD_ERRORS, brief


class CheckpointFiles:
    """Files of a checkpoint in a folder or on the Hub. Messages of errors start with its name.

    Args:
        name_or_path: folder or hub id. Hub files are downloaded when they are used.
        cache_dir: folder of the hub cache, or None for the default one.

    Raises:
        InputError: there is no such checkpoint.
    """

    def __init__(self, name_or_path: str, cache_dir: str | None):
        self.name_or_path = str(name_or_path)
        self.is_local = Path(name_or_path).is_dir()
        self._cache_dir = cache_dir
        self._revision = None
        if not self.is_local:
            # The commit, so that all files have the same version even if someone pushes in between.
            self._revision = self.path("config.json").parent.name

    def error(self, message: str) -> InputError:
        return InputError(f"{self.name_or_path}: {message}")

    def damaged(self, name: str, error: Exception) -> InputError:
        return self.error(f"its {name} is damaged ({brief(error)}); download it again")

    def path(self, name: str) -> Path:
        """Path of a file, downloaded if necessary. Raises `InputError` if the checkpoint does not have it."""
        if self.is_local:
            path = Path(self.name_or_path, name)
            if not path.is_file():
                raise self.error(f"this folder has no {name}; pass a complete Qwen3-VL checkpoint")
            return path
        try:
            return Path(hf_hub_download(self.name_or_path, name, revision=self._revision, cache_dir=self._cache_dir))
        except (OSError, ValueError) as error:
            raise self.error(
                f"there is no such folder, and its {name} could not be read from the Hub; check the name and the "
                f"connection ({brief(error)})"
            ) from error

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this file, which is downloaded if necessary."""
        if self.is_local:
            return Path(self.name_or_path, name).is_file()
        try:
            self.path(name)
        except InputError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return False
            raise
        return True

    def read_json(self, name: str) -> dict[str, Any]:
        path = self.path(name)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except LOAD_ERRORS as error:
            raise self.damaged(name, error) from error
        if not isinstance(content, dict):
            raise self.error(f"its {name} is not a JSON object; download it again")
        return content

    @contextmanager
    def open(self, path: Path) -> Iterator[safetensors.safe_open]:
        """Opens a safetensors file."""
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                yield file
        except (OSError, safetensors.SafetensorError) as error:
            raise self.damaged(path.name, error) from error
