"""Shared by the tests of `dopsd.data`: small data sets on disk, and checks of error messages."""

import json
import logging
import re

import pytest
from PIL import Image

from dopsd.data import sources
from dopsd.data.pictures import Picture
from dopsd.errors import InputError
from dopsd.settings import DataSettings
from dopsd.sizes import SizeLimits
from dopsd.terminal import MAX_REFUSAL_CHARACTERS, as_line
from short_runs import one_process


RED, GREEN, BLUE, YELLOW, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255)
LIMITS = SizeLimits(pixels_per_token=16, min_side=64, max_tokens=4300)


def write_pictures(folder, *names, size=(8, 8)):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, RED).save(folder / name)


def write_jsonl(folder, *rows, name="metadata.jsonl"):
    """One line per row; a row that is a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_pictures(*, teacher_caption_column=None, cache_dir=None, **flags):
    return sources.read_pictures(
        DataSettings(**flags), one_process(), teacher_caption_column=teacher_caption_column, cache_dir=cache_dir
    )


def read_folder(folder, **flags):
    return read_pictures(instance_data_dir=str(folder), **flags)


def as_picture(path):
    return Picture(path.name, ("a dog",), path)


def some_pictures(count, captions=("a dog",)):
    return [Picture(f"{index}.png", captions, None) for index in range(count)]


def captions_of(pictures):
    return {picture.name: picture.captions for picture in pictures}


def error_of(function, *args, **kwargs):
    """The `InputError` as a script prints it: one line of the form "flag or file: problem; what to do"."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = as_line(str(caught.value), MAX_REFUSAL_CHARACTERS)
    assert re.fullmatch(r"[^\n]+: [^\n]+; [^\n]+[^\n.]", message), message
    return message


def assert_names(message, *parts):
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
