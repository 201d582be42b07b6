"""Finding files in a folder, and reading them."""

import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from accelerate.logging import get_logger

from ..errors import InputError
from ..files import read_regular_file
from ..text import printable


logger = get_logger(__name__)

SKIPPED_NAMES = ("__MACOSX", "__pycache__")


def visible_files(folder: Path, parents: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields the files in a folder and its subfolders. Follows links.

    Files and subfolders whose names start with ".", and those that macOS and Python leave behind, are skipped.

    Args:
        folder: the folder to search.
        parents: the resolved folders that are being searched already, for the recursion.

    Raises:
        InputError: a folder cannot be read.
    """
    parents = (*parents, os.path.realpath(folder))
    try:
        children = list(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); correct that, or move it elsewhere") from error
    for path in children:
        if path.name.startswith(".") or path.name in SKIPPED_NAMES:
            continue
        if not os.path.isdir(path):
            yield path
        elif os.path.realpath(path) not in parents:  # a link to a parent folder would recurse forever
            yield from visible_files(path, parents)


def relative_name(path: Path, folder: Path) -> str:
    """The path relative to the folder, with slashes. UTF-8 is decoded even if the locale's encoding is another one."""
    return os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "surrogateescape")


def is_inside(path: str | Path, root: str) -> bool:
    """Whether a path, with all links followed, is inside a folder.

    Args:
        root: `os.path.realpath` of the folder.
    """
    return os.path.realpath(path).startswith(os.path.join(root, ""))


def warn_of_links_out(folder: Path, paths: dict[str, Path]) -> None:
    """Warns once of all files that are read although they are outside the folder: name -> path."""
    root = os.path.realpath(folder)
    outside = [name for name, path in paths.items() if not is_inside(path, root)]
    if outside:
        name = outside[0]
        target = os.path.realpath(paths[name])
        logger.warning(
            printable(f"{name}: is a link to {target}; {len(outside)} of {len(paths)} files read are outside {folder}")
        )


class NameIndex:
    """Finds names as people write them: upper or lower case, composed or decomposed accents.

    Args:
        names: the existing names.
    """

    def __init__(self, names: Iterable[str]):
        self.names = dict.fromkeys(names)
        self._alike: dict[str, list[str]] = {}
        for name in self.names:
            self._alike.setdefault(_folded(name), []).append(name)

    def find(self, name: str) -> list[str]:
        """The name itself if it exists, else all names that differ from it in case or in the form of accents."""
        return [name] if name in self.names else self._alike.get(_folded(name), [])


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


class FolderFiles:
    """The visible files of a folder.

    Attributes:
        folder: the folder.
        paths: name relative to the folder -> path, sorted by name.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        found = {relative_name(path, folder): path for path in visible_files(folder)}
        self.paths = dict(sorted(found.items()))

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex(self.paths)

    def find(self, written: str, place: str) -> str:
        """The name of the file that a path in a metadata file or data set means.

        Case, the form of accents, and the separators of Windows may differ if no file has exactly this name. Hidden
        files are found too.

        Args:
            written: the path, relative to the folder.
            place: where it is written, in error messages.

        Raises:
            InputError: there is no such file, there are several, or the path leads out of the folder.
        """
        for spelling in dict.fromkeys([written, written.replace("\\", "/")]):
            name = posixpath.normpath(spelling)
            if os.path.isabs(spelling) or name.split("/")[0] == "..":
                raise InputError(
                    f"{place}: {written!r} is outside --instance_data_dir; give a path inside that folder"
                )
            found = self._index.find(name)
            if len(found) > 1:
                raise InputError(f"{place}: {written!r} may be {found[0]!r} or {found[1]!r}; write one of them")
            if found:
                return found[0]
            if _is_file(self.folder, name):
                return name
        raise InputError(f"{place}: there is no file {written!r}; correct the path or delete the row")

    def path(self, name: str) -> Path:
        """The path of a file that `find` has found."""
        return self.paths.get(name) or _native_path(self.folder, name)


def _native_path(folder: Path, name: str) -> Path:
    return folder / os.fsdecode(name.encode("utf-8", "surrogateescape"))


def _is_file(folder: Path, name: str) -> bool:
    try:
        return _native_path(folder, name).is_file()
    except (OSError, UnicodeEncodeError):  # the name is too long, or contains half of a surrogate pair
        return False


def read_text(path: Path, name: str, *, max_bytes: int | None = None) -> str:
    """Reads a UTF-8 file, with or without a byte order mark. Line endings are kept as they are.

    Args:
        path: the file.
        name: the file in error messages.
        max_bytes: a longer file is not read.

    Raises:
        InputError: it cannot be read, is too long, or is not UTF-8.
    """
    try:
        if max_bytes is not None and path.stat().st_size > max_bytes:
            raise InputError(f"{name}: is too long for captions ({path.stat().st_size:,} bytes); shorten it")
        return read_regular_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}); correct that, or remove it") from error
