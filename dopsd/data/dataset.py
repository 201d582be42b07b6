"""Pictures and captions from `--dataset_name`, read by `datasets`."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets

from ..errors import InputError, first_line
from ..settings import DataSettings
from .captions import check_column, find_caption_columns, may_hold_captions, quoted
from .cells import check_data_files, picture_sources
from .files import visible_files
from .pictures import Picture, is_picture


NUM_ROWS_OF_TEXT = 10  # as many are read to see whether a column holds captions


def read_dataset(settings: DataSettings, teacher_caption_column: str | None, cache_dir: str | None) -> list[Picture]:
    """The pictures of `--dataset_name`, in row order. See `sources.read_pictures` for the arguments and errors."""
    name, image_column = settings.dataset_name, settings.image_column
    if settings.multiline_captions is not None:
        raise InputError("--multiline_captions: goes with --instance_data_dir; drop the flag")
    dataset = _load_train_split(name, settings.dataset_config_name, cache_dir)
    columns = dataset.column_names
    captions_only = teacher_caption_column is not None and image_column == "image" and "image" not in columns
    if not captions_only:
        check_column("--image_column", image_column, columns, name)
    text_columns = [column for column in columns if column != image_column and _is_text_column(dataset, column)]
    captions = find_caption_columns(columns, text_columns, name, settings, teacher_caption_column)
    # Without any column, `datasets` would report no rows.
    rows = dataset.select_columns(captions.names) if captions.names else [{}] * len(dataset)
    if captions_only:
        sources = [None] * len(dataset)
    else:
        sources = picture_sources(_undecoded_images(dataset, name, image_column), name, image_column, cache_dir)
    return [
        captions.picture(row, place=f"row {index} of {name}", source=source)
        for index, (row, source) in enumerate(zip(rows, sources, strict=True))
    ]


def _load_train_split(name: str, config_name: str | None, cache_dir: str | None) -> datasets.Dataset:
    try:
        if os.path.isdir(name):
            _check_regular_files(Path(name))
            with tempfile.TemporaryDirectory() as scratch:  # it writes there, and --cache_dir may be in the folder
                builder = datasets.load_dataset_builder(name, config_name, cache_dir=scratch)
            check_data_files(builder.config.data_files, Path(name))
        splits = datasets.load_dataset(name, config_name, cache_dir=cache_dir)
    except InputError:
        raise
    except Exception as error:  # load_dataset documents no base class for its errors
        raise InputError(
            f"--dataset_name {name}: cannot be loaded ({first_line(error)}); check the name and --dataset_config_name"
        ) from error
    if "train" not in splits:
        raise InputError(
            f"--dataset_name {name}: has no split named train, only {quoted(splits)}; move its files into a subfolder "
            "named train, or pass a folder of pictures as --instance_data_dir"
        )
    return splits["train"]


def _check_regular_files(folder: Path) -> None:
    """Raises `InputError` for a pipe, socket or device, which `datasets` would wait for or read without end."""
    for path in visible_files(folder):
        if path.exists() and not path.is_file():
            raise InputError(f"--dataset_name {folder}: {path.name} is not a regular file; move it elsewhere")


def _is_text_column(dataset: datasets.Dataset, column: str) -> bool:
    if getattr(dataset.features[column], "dtype", None) not in ("string", "large_string"):
        return False
    return may_hold_captions(dataset.select_columns([column])[:NUM_ROWS_OF_TEXT][column])


def _undecoded_images(dataset: datasets.Dataset, name: str, image_column: str) -> datasets.Dataset:
    """The image column alone, with cells of the form {"bytes": ..., "path": ...}.

    Cells are not decoded by `datasets`, so that `images.read_image` treats the pictures of all sources alike. Columns
    of paths or of bytes work too.
    """
    try:
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"--image_column {image_column}: this column of {name} contains no pictures ({first_line(error)}); choose "
            "another one"
        ) from error
    if dataset.builder_name == "imagefolder" and Path(name).is_dir():
        _check_none_left_out(dataset, Path(name))
    return dataset.select_columns([image_column])


def _check_none_left_out(dataset: datasets.Dataset, folder: Path) -> None:
    """Raises `InputError` if the data set does not have all pictures of its folder.

    `datasets` silently skips pictures without a metadata row, and chooses splits by the words train, val and test in
    file names.
    """
    kept = {os.path.realpath(path) for path in _cell_paths(dataset.with_format("arrow")[:].to_pylist())}
    pictures = sorted(path for path in visible_files(folder) if is_picture(path.name))
    left_out = [path for path in pictures if os.path.realpath(path) not in kept]
    if left_out:
        raise InputError(
            f"--dataset_name {folder}: does not read {left_out[0].relative_to(folder).as_posix()} ({len(left_out)} of "
            f"{len(pictures)} pictures are left out: without a metadata row, in a folder that starts with __, or "
            f"because of file names with train, val or test); pass --instance_data_dir {folder} instead"
        )


def _cell_paths(cell: object) -> Iterator[str]:
    """Yields the paths of undecoded pictures, {"bytes": ..., "path": ...}, in nested lists and dictionaries."""
    if isinstance(cell, dict):
        if isinstance(cell.get("path"), str):
            yield cell["path"]
        cell = list(cell.values())
    if isinstance(cell, list):
        for inner in cell:
            yield from _cell_paths(inner)
