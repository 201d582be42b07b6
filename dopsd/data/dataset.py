"""Pictures and captions from `--dataset_name`, read by `datasets`."""

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from ..errors import InputError, first_line
from ..settings import DataSettings
from .captions import check_column, find_caption_columns, may_hold_captions, quoted
from .cells import check_data_files, picture_files
from .columns import find_picture_columns
from .files import visible_files
from .pictures import DatasetCell, Picture, PictureFile, is_picture


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
    also = find_picture_columns(columns, name, settings, image_column)
    no_captions = (image_column, *also.cond_images, also.group)
    text_columns = [column for column in columns if column not in no_captions and _is_text_column(dataset, column)]
    captions = find_caption_columns(columns, text_columns, name, settings, teacher_caption_column)
    target = None if captions_only else image_column
    targets, cond_images = _pictures(dataset, name, target, also.cond_images, cache_dir)
    # Without any column, `datasets` would report no rows.
    read = list(dict.fromkeys([*captions.names, *([] if also.group is None else [also.group])]))
    rows = dataset.select_columns(read) if read else [{}] * len(dataset)
    places = [f"row {index} of {name}" for index in range(len(dataset))]
    return [
        captions.picture(row, place=place, source=source, cond_images=cond, group=also.group_of(row, place, ""))
        for row, place, source, cond in zip(rows, places, targets, cond_images, strict=True)
    ]


def _pictures(
    dataset: datasets.Dataset,
    name: str,
    image_column: str | None,
    cond_columns: tuple[str, ...],
    cache_dir: str | None,
) -> tuple[list[Path | DatasetCell | None], list[tuple[PictureFile, ...]]]:
    """(target, pictures to edit) of all rows. There are no targets without `image_column`."""
    columns = [] if image_column is None else [_undecoded_images(dataset, name, image_column)]
    columns += [_undecoded_sources(dataset, name, column) for column in cond_columns]
    if columns and dataset.builder_name == "imagefolder" and Path(name).is_dir():
        _check_none_left_out(dataset, Path(name))
    files = picture_files(columns, name, cache_dir)
    targets = [None] * len(dataset)
    if image_column is not None:
        targets = [file.source for (file,) in files.pop(0)]
    cond_images = [
        tuple(itertools.chain.from_iterable(column[row] for column in files)) for row in range(len(dataset))
    ]
    return targets, cond_images


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


def _undecoded_images(dataset: datasets.Dataset, name: str, column: str) -> datasets.Dataset:
    """The column of `--image_column` alone, with cells of the form {"bytes": ..., "path": ...}.

    Cells are not decoded by `datasets`, so that `images.read_image` treats the pictures of all sources alike. Columns
    of paths or of bytes work too.
    """
    return _cast(dataset, datasets.Image(decode=False), f"--image_column {column}", name, column)


def _undecoded_sources(dataset: datasets.Dataset, name: str, column: str) -> datasets.Dataset:
    """A column of `--cond_image_column` alone. Cells are as above, or lists of those."""
    feature, image = dataset.features[column], datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        if isinstance(feature.feature, datasets.Image):  # it has this form, and a cast would copy all pictures
            return dataset.select_columns([column])
        image = datasets.List(image)
    return _cast(dataset, image, f"--cond_image_column {column}", name, column)


def _cast(dataset: datasets.Dataset, feature: Any, flag: str, name: str, column: str) -> datasets.Dataset:
    try:
        return dataset.select_columns([column]).cast_column(column, feature)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"{flag}: this column of {name} contains no pictures ({first_line(error)}); choose another one"
        ) from error


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
