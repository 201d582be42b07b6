"""The cells of a data set that hold pictures: which files they may name.

A data set from elsewhere may name any file of this machine, or an address. It would be trained on, and drawn on sheets
that may be published.
"""

import functools
import itertools
import os
from contextlib import suppress
from pathlib import Path

import datasets
import pyarrow
import pyarrow.compute as pc
from huggingface_hub.constants import HF_HUB_CACHE

from ..errors import InputError
from .files import FolderFiles, is_inside, warn_of_links_out
from .pictures import DatasetCell, PictureFile


# Data sets whose paths `datasets` has found itself. In the others, such as Parquet, the table's author wrote them.
FOLDER_BUILDERS = ("imagefolder",)


def check_data_files(data_files: dict[str, list[str]] | None, folder: Path) -> None:
    """Checks the files that a data set on disk consists of, by split: its README.md may name others.

    Raises:
        InputError: one of them is outside the data set's folder.
    """
    paths = FoundPaths(folder, [])
    for file in itertools.chain.from_iterable((data_files or {}).values()):
        if paths.file(str(file)) is None:
            raise InputError(
                f"--dataset_name {folder}: its README.md names {str(file)!r}, not a file in the folder; move it there"
            )


def picture_files(
    columns: list[datasets.Dataset], name: str, cache_dir: str | None
) -> list[list[tuple[PictureFile, ...]]]:
    """The encoded pictures in each row of each column: one, or those of its list.

    Args:
        columns: data sets of one column each. A cell is {"bytes": ..., "path": ...}, or a list of those.
        name: `--dataset_name`.
        cache_dir: folder for downloaded data sets. Default: the cache of `datasets`.

    Raises:
        InputError: a cell names an address, or a file that is not part of the data set, or is a list of nothing.
    """
    folder = Path(name) if Path(name).is_dir() else None
    caches = [HF_HUB_CACHE, cache_dir or datasets.config.HF_DATASETS_CACHE]
    checks = {True: FoundPaths(folder, caches), False: WrittenPaths(folder)}
    found, files = [], {}
    for dataset in columns:
        check = checks[dataset.builder_name in FOLDER_BUILDERS]
        (column,) = dataset.column_names
        cells = dataset.with_format("arrow")
        rows = []
        for row, paths in enumerate(_named_paths(cells[:][column])):
            place = f"row {row} of {name}, column {column!r}"
            if isinstance(paths, list):
                if not paths:
                    raise InputError(f"{place}: is an empty list; put a picture to edit into it, or remove the row")
                pictures = [
                    (f"{place}, item {item + 1} of {len(paths)}", path, DatasetCell(cells, row, column, item))
                    for item, path in enumerate(paths)
                ]
            else:
                pictures = [(place, paths, DatasetCell(cells, row, column))]
            rows.append(tuple(_picture_file(*picture, check) for picture in pictures))
        found.append(rows)
        files |= {file.name: file.source for row in rows for file in row if isinstance(file.source, Path)}
    if folder is not None:
        warn_of_links_out(folder, files)
    return found


def _picture_file(place: str, path: str | None, cell: DatasetCell, check: "WrittenPaths") -> PictureFile:
    """The picture in a cell, which names a path or contains it."""
    file = None if path is None else check.file(path)
    if path is not None and file is None and not check.is_in_archive(path):
        raise InputError(
            f"{place}: {path!r} is not a file of the data set; put the pictures into its folder, or into the column "
            "itself"
        )
    return PictureFile(place, file or cell)


def _named_paths(cells: pyarrow.ChunkedArray) -> list[str | None] | list[list[str | None]]:
    """The path in each cell, or in each item of it, that names a picture instead of containing it."""
    if pyarrow.types.is_struct(cells.type):
        is_named = pc.is_null(pc.struct_field(cells, "bytes"))
        return pc.if_else(is_named, pc.struct_field(cells, "path"), None).to_pylist()
    paths = iter(_named_paths(pc.list_flatten(cells)))
    lengths = pc.fill_null(pc.list_value_length(cells), 0).to_pylist()
    return [list(itertools.islice(paths, length)) for length in lengths]


class WrittenPaths:
    """Paths that the data set's author wrote. Only those of files inside its folder are followed, links included.

    Args:
        folder: the data set's folder; None for a data set on the Hub.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._root = None if folder is None else os.path.realpath(folder)

    def file(self, path: str) -> Path | None:
        """The file that a cell means. A path may be absolute, or relative to the folder or to the current folder."""
        if "://" in path or self.folder is None:
            return None
        if not os.path.isabs(path):
            with suppress(InputError):
                path = self._files.path(self._files.find(path, ""))
        return Path(path) if self._is_allowed(path) else None

    def is_in_archive(self, path: str) -> bool:
        """Whether a path names a file in an archive, zip://PICTURE::ARCHIVE, that may be read."""
        *inner, archive = path.split("::")
        is_zip = bool(inner) and all(part.startswith("zip://") for part in inner)
        return is_zip and "://" not in archive and self._is_allowed(archive)

    def _is_allowed(self, path: str | Path) -> bool:
        try:
            return self._root is not None and is_inside(path, self._root)
        except ValueError:  # a zero byte
            return False

    @functools.cached_property
    def _files(self) -> FolderFiles:
        return FolderFiles(self.folder)


class FoundPaths(WrittenPaths):
    """Paths that `datasets` found itself: in the folder, where they may be links, or in one of its caches."""

    def __init__(self, folder: Path | None, caches: list[str | Path]):
        super().__init__(folder)
        self._roots = [*map(os.path.realpath, caches)]

    def file(self, path: str) -> Path | None:
        return None if "://" in path or not self._is_allowed(path) else Path(path)

    def _is_allowed(self, path: str | Path) -> bool:
        if self.folder is not None and Path(os.path.abspath(path)).is_relative_to(os.path.abspath(self.folder)):
            return True
        return super()._is_allowed(path) or any(is_inside(path, root) for root in self._roots)
