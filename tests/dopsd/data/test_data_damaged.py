"""Captions and metadata that are damaged, or far larger than any caption."""

import json

import datasets
import pytest

from data_helpers import assert_names, error_of, read_folder, read_pictures, write_jsonl, write_pictures
from dopsd.text import MAX_CAPTION_CHARACTERS


LONG = "x" * (MAX_CAPTION_CHARACTERS + 1)
GOOD = '{"file_name": "a.png", "text": "a dog"}'


def row(text):
    return f'{{"file_name": "b.png", "text": {text}}}'


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (row(r'"half \ud83d"'), ["column 'text'", r"'\ud83d'", "half of a character"]),
        (row(r'"half \ude00 of it"'), ["column 'text'", r"'\ude00'"]),
        (row(r'"a\u0000b"'), ["column 'text'", "zero byte"]),
        (row(json.dumps(LONG)), ["column 'text'", "20,001 characters"]),
        (row("9" * 5000), ["a number that is too long"]),
        (row("-" + "9" * 5000), ["a number that is too long"]),
        (row("[" * 200_000), ["brackets in too many levels"]),
        (row('{"a":' * 200_000), ["brackets in too many levels"]),
        (row("1e999"), ["column 'text'", "inf"]),
    ],
    ids=["low half", "high half", "zero", "long", "digits", "minus", "brackets", "braces", "infinity"],
)
def test_damaged_rows_are_one_line_that_names_file_and_line(tmp_path, line, parts):
    write_pictures(tmp_path, "a.png", "b.png")
    write_jsonl(tmp_path, GOOD, "", line)
    message = error_of(read_folder, tmp_path, caption_column=["text"])
    assert_names(message, "metadata.jsonl line 3", *parts)
    assert len(message) < 400


def test_whole_emoji_are_text(tmp_path):
    write_pictures(tmp_path, "b.png")
    write_jsonl(tmp_path, row(r'"\ud83d\ude00"'))
    assert read_folder(tmp_path, caption_column=["text"])[0].captions == ("😀",)


@pytest.mark.parametrize(
    ("value", "parts"),
    [(LONG, ["line 2, column 'text'", "20,001 characters"]), ("x" * 15_000_000, ["line 2", "not valid CSV"])],
    ids=["long", "huge"],
)
def test_captions_that_are_too_long_in_csv(tmp_path, value, parts):
    write_pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\na.png,{value}\n")
    assert_names(error_of(read_folder, tmp_path, caption_column=["text"]), "metadata.csv", *parts)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (LONG.encode(), ["20,001 characters"]),
        (b"x" * 15_000_000, ["15,000,000 bytes", "shorten it"]),
        ("a dog".encode("utf-16-le"), ["zero byte", "UTF-8"]),
        ("half \ud83d".encode("utf-8", "surrogatepass"), ["not UTF-8", "byte 5"]),
    ],
    ids=["long", "huge", "UTF-16", "half"],
)
def test_damaged_text_files_are_one_line(tmp_path, data, parts):
    write_pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(data)
    message = error_of(read_folder, tmp_path)
    assert_names(message, "a.txt", *parts)
    assert len(message) < 400


def test_a_caption_may_have_the_longest_length(tmp_path):
    write_pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("犬" * MAX_CAPTION_CHARACTERS, encoding="utf-8")
    assert len(read_folder(tmp_path)[0].captions[0]) == MAX_CAPTION_CHARACTERS


@pytest.mark.parametrize("line", [row(json.dumps(LONG)), row(r'"half \ud83d"'), row("[" * 20_000)])
def test_damaged_data_sets_are_one_line(tmp_path, monkeypatch, line):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    write_jsonl(tmp_path / "data", GOOD.replace("file_name", "image"), line, name="train.jsonl")
    write_pictures(tmp_path / "data", ".hidden.png")
    message = error_of(
        read_pictures,
        dataset_name=str(tmp_path / "data"),
        cache_dir=str(tmp_path / "cache"),
        caption_column=["text"],
        teacher_caption_column="text",
    )
    assert_names(message, str(tmp_path / "data"))
    assert len(message) < 400
