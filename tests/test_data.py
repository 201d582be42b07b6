"""The data section of the training script: pictures, captions, decoding, buckets, crops and the order of samples."""

import argparse
import io
import itertools
import json
import logging
import shutil
import struct
import zipfile
import zlib

import datasets
import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image

import train_dopsd_flux2 as script
from dopsd.errors import InputError


RED, GREEN, BLUE, YELLOW, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255)


@pytest.fixture(autouse=True, scope="module")
def accelerate_state():
    PartialState()  # accelerate's logger refuses to log without it


@pytest.fixture(autouse=True)
def quiet_datasets(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()


def make_args(**changed):
    defaults = dict(
        instance_data_dir=None,
        dataset_name=None,
        dataset_config_name=None,
        cache_dir=None,
        image_column="image",
        caption_column=None,
        instance_prompt=None,
        repeats=1,
        resolution=1024,
        use_aspect_ratio_buckets=False,
        aspect_ratio_buckets=None,
        center_crop=False,
        random_flip=False,
        train_batch_size=1,
        seed=0,
        teacher_context="edit",
        teacher_caption_column=None,
    )
    assert changed.keys() <= defaults.keys()
    return argparse.Namespace(**(defaults | changed))


def write_pictures(folder, *names, size=(8, 8)):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, RED).save(folder / name)


def write_jsonl(folder, *rows, name="metadata.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_folder(folder, **changed):
    return script.read_pictures(make_args(instance_data_dir=str(folder), **changed))


def captions_of(pictures):
    return {picture.name: picture.captions for picture in pictures}


def error_of(function, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.endswith("."), message
    return message


def assert_names(message, *parts):
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def as_picture(path):
    return script.Picture(path.name, ("a dog",), path)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, color_type, rows, transparency=None):
    """A PNG as bytes, for kinds that Pillow reads and does not write. `rows`: each row's bytes."""
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    )
    if transparency is not None:
        data += png_chunk(b"tRNS", transparency)
    return data + png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + png_chunk(b"IEND", b"")


# ---- Where the pictures are ----


def test_both_or_neither_source_is_an_error(tmp_path):
    for args in (make_args(), make_args(instance_data_dir=str(tmp_path), dataset_name="a/b")):
        assert_names(error_of(script.read_pictures, args), "--instance_data_dir", "--dataset_name")


def test_folder_that_is_missing_a_file_or_without_pictures(tmp_path):
    write_pictures(tmp_path, "a.png", ".hidden/b.png", "empty/__pycache__/c.png", "empty/.d.png")
    assert_names(error_of(read_folder, tmp_path / "gone"), "--instance_data_dir", "gone", "does not exist")
    assert_names(error_of(read_folder, tmp_path / "a.png"), "--instance_data_dir", "a.png", "is a file")
    assert_names(error_of(read_folder, tmp_path / "empty", instance_prompt="x"), "--instance_data_dir", "no picture")


def test_pictures_are_found_below_the_folder_in_order_and_hidden_ones_are_not(tmp_path):
    names = ["B.JPG", "a-b/x.png", "a/b/c.webp", "a/z.jpeg", "train.png", "my_test_1.png", "val/validation.bmp"]
    write_pictures(tmp_path, *names, ".git/x.png", "__MACOSX/x.png", "a/.x.png", "a/__x.png")
    pictures = read_folder(tmp_path, instance_prompt="a dog")
    assert [picture.name for picture in pictures] == sorted(names)
    assert all(picture.captions == ("a dog",) for picture in pictures)
    assert [picture.source for picture in pictures] == [tmp_path / name for name in sorted(names)]


def test_a_hidden_part_above_the_folder_hides_nothing(tmp_path):
    write_pictures(tmp_path, ".cache/pictures/a.png")
    assert len(read_folder(tmp_path / ".cache/pictures", instance_prompt="x")) == 1


def test_links_are_followed_and_a_loop_ends(tmp_path):
    write_pictures(tmp_path, "outside/a.png", "folder/b.png")
    (tmp_path / "folder/link").symlink_to(tmp_path / "outside")
    (tmp_path / "folder/loop").symlink_to(tmp_path / "folder")
    (tmp_path / "outside/back").symlink_to(tmp_path / "folder")
    assert list(captions_of(read_folder(tmp_path / "folder", instance_prompt="x"))) == ["b.png", "link/a.png"]


def test_a_dangling_link_is_an_error_and_not_a_gap(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert_names(error_of(script.read_image, read_folder(tmp_path, instance_prompt="x")[0]), "a.png")


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.TGA", "a.ICNS", "a.avif", "a.heic", "a.pict", "a.svg"])
def test_names_of_pictures(name):
    assert script.is_picture(name)


@pytest.mark.parametrize("name", ["a.txt", "a.mp4", "a.mpeg", "a.pdf", "a.hdf", "a.jpg.json", "png", "a"])
def test_names_of_other_files(name):
    assert not script.is_picture(name)


def test_heic_is_a_picture_and_its_error_says_convert(tmp_path):
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    pictures = read_folder(tmp_path, instance_prompt="x")
    assert [picture.name for picture in pictures] == ["a.HEIC"]
    message = error_of(script.read_image, pictures[0])
    assert_names(message, "a.HEIC", "unknown format", "convert it to JPEG or PNG")
    assert str(tmp_path) not in message


def test_other_files_are_ignored_with_one_warning_that_names_five(tmp_path, caplog):
    write_pictures(tmp_path, "a.png")
    for name in ("b.mp4", "c.md", "d.json", "e.pdf", "f.mpeg", "g.zip", "h"):
        (tmp_path / name).write_bytes(b"x")
    assert len(read_folder(tmp_path, instance_prompt="x")) == 1
    (warning,) = warnings_in(caplog)
    assert_names(warning, "b.mp4, c.md, d.json, e.pdf, f.mpeg and 2 more")
    assert "a.png" not in warning


def test_no_warning_where_every_file_is_used(tmp_path, caplog):
    write_pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a dog")
    read_folder(tmp_path)
    assert not warnings_in(caplog)


# ---- Captions: one prompt ----


@pytest.mark.parametrize("prompt", [None, "", "  \n"])
def test_no_caption_at_all_names_the_three_ways(tmp_path, prompt):
    write_pictures(tmp_path, "a.png")
    message = error_of(read_folder, tmp_path, instance_prompt=prompt)
    assert_names(message, "--instance_data_dir", "--instance_prompt", ".txt", "metadata.jsonl", "metadata.csv")


@pytest.mark.parametrize("with_sidecar", [False, True])
@pytest.mark.parametrize(
    ("flag", "value"), [("caption_column", ["text"]), ("image_column", "target")], ids=lambda value: str(value)
)
def test_column_flags_need_metadata(tmp_path, flag, value, with_sidecar):
    write_pictures(tmp_path, "a.png")
    if with_sidecar:
        (tmp_path / "a.txt").write_text("a dog")
    message = error_of(read_folder, tmp_path, instance_prompt="x", **{flag: value})
    assert_names(message, f"--{flag}", "metadata.jsonl")


# ---- Captions: .txt files ----


def test_sidecars(tmp_path, caplog):
    write_pictures(tmp_path, "a.png", "sub/b.c.jpg", "sub/d.webp", "e.png", "e.jpg")
    (tmp_path / "a.txt").write_bytes("\ufeff  ein Hündchen\r\n".encode())
    (tmp_path / "sub/b.c.txt").write_text("two\nlines\n", encoding="utf-8")
    (tmp_path / "sub/d.TXT").write_text("007", encoding="utf-8")
    (tmp_path / "e.txt").write_text("both", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("not a caption", encoding="utf-8")
    assert captions_of(read_folder(tmp_path)) == {
        "a.png": ("ein Hündchen",),
        "e.jpg": ("both",),
        "e.png": ("both",),
        "sub/b.c.jpg": ("two\nlines",),
        "sub/d.webp": ("007",),
    }
    assert not warnings_in(caplog)


def test_sidecars_win_over_the_prompt_with_a_warning(tmp_path, caplog):
    write_pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a dog")
    assert captions_of(read_folder(tmp_path, instance_prompt="a cat")) == {"a.png": ("a dog",)}
    (warning,) = warnings_in(caplog)
    assert_names(warning, "--instance_prompt", ".txt")


def test_a_hidden_sidecar_is_none(tmp_path):
    write_pictures(tmp_path, "a.png")
    (tmp_path / ".a.txt").write_text("a dog")
    assert captions_of(read_folder(tmp_path, instance_prompt="a cat")) == {"a.png": ("a cat",)}


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"a.txt": b"a dog"}, ["sub/b.png", "sub/b.txt"]),
        ({"a.txt": b"a dog", "b.txt": b"elsewhere"}, ["sub/b.png", "sub/b.txt"]),
        ({"a.txt": b"a dog", "sub/b.txt": b"a cat", "sub/notes.txt": b"x"}, ["sub/notes.txt", "no picture"]),
        ({"a.txt": b"a dog", "sub/b.txt": b"\xff\xfea\0"}, ["sub/b.txt", "UTF-8"]),
        ({"a.txt": b"a dog", "sub/b.txt": b"d\xf6g"}, ["sub/b.txt", "UTF-8", "byte 1"]),
        ({"a.txt": b"a dog", "sub/b.txt": b""}, ["sub/b.txt", "empty"]),
        ({"a.txt": b"a dog", "sub/b.txt": b"\xef\xbb\xbf \n"}, ["sub/b.txt", "empty"]),
    ],
)
def test_sidecar_errors(tmp_path, files, parts):
    write_pictures(tmp_path, "a.png", "sub/b.png")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert_names(error_of(read_folder, tmp_path, instance_prompt="no way out"), *parts)


# ---- Captions: metadata ----


def test_metadata_jsonl(tmp_path, caplog):
    write_pictures(tmp_path, "b.png", "sub/a.png", "test_c.png")
    write_jsonl(
        tmp_path,
        {"file_name": "sub/../sub/a.png", "text": "null", "long": " kept as it is\n", "width": 8},
        "",
        {"file_name": "./b.png", "text": "a\u2028b", "long": "ö"},
        '{"file_name": "test_c.png", "text": "raw \u2028 separator", "long": "x"}\r',
    )
    text = (tmp_path / "metadata.jsonl").read_text(encoding="utf-8")
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8-sig")
    assert captions_of(read_folder(tmp_path, caption_column=["text"])) == {
        "b.png": ("a\u2028b",),
        "sub/a.png": ("null",),
        "test_c.png": ("raw \u2028 separator",),
    }
    two = captions_of(read_folder(tmp_path, caption_column=["long", "text"]))
    assert two["sub/a.png"] == (" kept as it is\n", "null")
    assert list(two) == ["b.png", "sub/a.png", "test_c.png"]
    assert not warnings_in(caplog)


def test_metadata_csv_keeps_text_as_it_is(tmp_path):
    names = [f"{index}.png" for index in range(6)]
    write_pictures(tmp_path, *names)
    values = ["None", "1984", "007", '"a, ""quoted"" dog"', '"two\r\nlines"', "nan"]
    rows = "".join(f"{name},{value}\r\n" for name, value in zip(names, values, strict=True))
    (tmp_path / "metadata.csv").write_bytes(("\ufefffile_name,my text\r\n" + rows + "\r\n").encode())
    expected = ["None", "1984", "007", 'a, "quoted" dog', "two\r\nlines", "nan"]
    captions = captions_of(read_folder(tmp_path, caption_column=["my text"]))
    assert captions == {name: (value,) for name, value in zip(names, expected, strict=True)}


def test_metadata_with_a_prompt_and_no_caption_column(tmp_path, caplog):
    write_pictures(tmp_path, "a.png")
    write_jsonl(tmp_path, {"file_name": "a.png", "text": "unused", "long": None})
    assert captions_of(read_folder(tmp_path, instance_prompt="a dog")) == {"a.png": ("a dog",)}
    (warning,) = warnings_in(caplog)
    assert_names(warning, "--instance_prompt", "--caption_column", "'text'", "'long'")


def test_caption_column_wins_over_the_prompt_with_a_warning(tmp_path, caplog):
    write_pictures(tmp_path, "a.png")
    write_jsonl(tmp_path, {"file_name": "a.png", "text": "a dog"})
    read = read_folder(tmp_path, instance_prompt="a cat", caption_column=["text"])
    assert captions_of(read) == {"a.png": ("a dog",)}
    (warning,) = warnings_in(caplog)
    assert_names(warning, "--instance_prompt is not used")


def test_editing_pairs_name_their_picture_column(tmp_path):
    write_pictures(tmp_path, "0_before.png", "0_after.png")
    row = {"source_file_name": "./0_before.png", "target_file_name": "0_after.png", "text": "paint it red"}
    write_jsonl(tmp_path, row)
    read = read_folder(tmp_path, image_column="target", caption_column=["text"])
    assert captions_of(read) == {"0_after.png": ("paint it red",)}
    message = error_of(read_folder, tmp_path, caption_column=["text"])
    assert_names(message, "metadata.jsonl", "'file_name'", "'source_file_name'", "'target_file_name'")
    write_jsonl(tmp_path, {"file_name": "0_before.png", "target_file_name": "0_after.png", "text": "paint it red"})
    assert len(read_folder(tmp_path, image_column="target", caption_column=["text"])) == 1


def test_metadata_may_name_a_link(tmp_path):
    write_pictures(tmp_path, "outside/a.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.png").symlink_to(tmp_path / "outside/a.png")
    write_jsonl(tmp_path / "folder", {"file_name": "a.png", "text": "a dog"})
    assert captions_of(read_folder(tmp_path / "folder", caption_column=["text"])) == {"a.png": ("a dog",)}


GOOD = {"file_name": "a.png", "text": "a dog"}


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([GOOD, "{'file_name': 1}"], ["metadata.jsonl line 2", "JSON"]),
        ([GOOD, '["b.png", "a cat"]'], ["metadata.jsonl line 2", "not an object"]),
        ([], ["metadata.jsonl", "no row"]),
        (
            [{"file": "a.png", "text": "x"}],
            ["metadata.jsonl", "'file_name'", "'file', 'text'", "--image_column image"],
        ),
        ([GOOD, "", {"text": "a cat"}], ["metadata.jsonl line 3", "'file_name'", "None"]),
        ([GOOD, {"file_name": None, "text": "x"}], ["metadata.jsonl line 2", "'file_name'", "None"]),
        ([GOOD, {"file_name": " ", "text": "x"}], ["metadata.jsonl line 2", "'file_name'", "' '"]),
        ([GOOD, {"file_name": 7, "text": "x"}], ["metadata.jsonl line 2", "'file_name'", "7"]),
        ([GOOD, {"file_name": ["b.png"], "text": "x"}], ["metadata.jsonl line 2", "'file_name'", "b.png"]),
        ([GOOD, {"file_name": "/etc/b.png", "text": "x"}], ["metadata.jsonl line 2", "/etc/b.png", "leads out"]),
        ([GOOD, {"file_name": "../b.png", "text": "x"}], ["metadata.jsonl line 2", "../b.png", "leads out"]),
        ([GOOD, {"file_name": "s/../../b.png", "text": "x"}], ["metadata.jsonl line 2", "leads out"]),
        ([GOOD, {"file_name": "c.png", "text": "x"}], ["metadata.jsonl line 2", "c.png", "no such file"]),
        ([GOOD, {"file_name": ".", "text": "x"}], ["metadata.jsonl line 2", "no such file"]),
        ([GOOD, GOOD | {"file_name": "./a.png"}], ["metadata.jsonl line 2", "a.png", "line 1", "columns"]),
        ([GOOD], ["b.png", "metadata.jsonl", "1 of 2"]),
        ([GOOD, {"file_name": "b.png"}], ["metadata.jsonl line 2", "'text'", "None"]),
        ([GOOD, {"file_name": "b.png", "text": None}], ["metadata.jsonl line 2", "'text'", "None"]),
        ([GOOD, {"file_name": "b.png", "text": " \t"}], ["metadata.jsonl line 2", "'text'"]),
        ([GOOD, {"file_name": "b.png", "text": ""}], ["metadata.jsonl line 2", "'text'"]),
        ([GOOD, {"file_name": "b.png", "text": 1984}], ["metadata.jsonl line 2", "'text'", "1984"]),
        ([GOOD, {"file_name": "b.png", "text": ["x"]}], ["metadata.jsonl line 2", "'text'"]),
    ],
)
def test_metadata_jsonl_errors(tmp_path, rows, parts):
    write_pictures(tmp_path / "folder", "a.png", "b.png")
    write_pictures(tmp_path, "b.png")  # where a path that leads out would arrive
    write_jsonl(tmp_path / "folder", *rows)
    message = error_of(read_folder, tmp_path / "folder", caption_column=["text"])
    assert_names(message, *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"", ["metadata.csv", "no row"]),
        (b"file_name,text\n\n", ["metadata.csv", "no row"]),
        (b"file_name;text\na.png;a dog\n", ["metadata.csv", "'file_name;text'"]),
        (b'file_name,text\na.png,"two\nlines"\nb.png\n', ["metadata.csv line 4", "1 cells for 2 columns"]),
        (b"file_name,text\na.png,a dog, a cat\nb.png,x\n", ["metadata.csv line 2", "3 cells for 2 columns"]),
        (b'file_name,text\na.png,"a dog\nb.png,x\n', ["metadata.csv line 2", "not CSV"]),
        (b"file_name,text,text\na.png,a,b\nb.png,a,b\n", ["metadata.csv", "twice", "'text', 'text'"]),
        (b"file_name,text\na.png,\nb.png,x\n", ["metadata.csv line 2", "'text'", "''"]),
        (b"file_name,text\na.png,d\xf6g\nb.png,x\n", ["metadata.csv", "UTF-8"]),
        (b"file_name,text\na.png,x\n\nb.jpg,x\n", ["metadata.csv line 4", "b.jpg", "no such file"]),
    ],
)
def test_metadata_csv_errors(tmp_path, text, parts):
    write_pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_bytes(text)
    assert_names(error_of(read_folder, tmp_path, caption_column=["text"]), *parts)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({}, ["metadata.jsonl", "--caption_column", "--instance_prompt", "'text'"]),
        ({"instance_prompt": "  "}, ["metadata.jsonl", "--caption_column", "--instance_prompt", "'text'"]),
        ({"caption_column": ["text", "prompt"]}, ["--caption_column prompt", "metadata.jsonl", "'file_name', 'text'"]),
        ({"image_column": "x", "caption_column": ["text"]}, ["--image_column x", "'x_file_name'", "'file_name'"]),
    ],
)
def test_metadata_flag_errors(tmp_path, flags, parts):
    write_pictures(tmp_path, "a.png")
    write_jsonl(tmp_path, GOOD)
    assert_names(error_of(read_folder, tmp_path, **flags), *parts)


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (["metadata.jsonl", "metadata.csv"], ["metadata.csv", "metadata.jsonl", "keep one"]),
        (["metadata.jsonl", "a.txt"], ["metadata.jsonl", "a.txt"]),
        (["sub/metadata.jsonl"], ["sub/metadata.jsonl", "top"]),
        (["metadata.csv", "sub/metadata.csv"], ["sub/metadata.csv", "top"]),
        (["metadata.parquet"], ["metadata.parquet", "--dataset_name"]),
        (["sub/metadata.parquet"], ["sub/metadata.parquet", "--dataset_name"]),
    ],
)
def test_metadata_files_that_conflict(tmp_path, files, parts):
    write_pictures(tmp_path, "a.png", "sub/b.png")
    for name in files:
        (tmp_path / name).write_text("x")
    assert_names(error_of(read_folder, tmp_path, caption_column=["text"]), *parts)


# ---- Data sets ----


@pytest.fixture(scope="module")
def parquet_dataset(tmp_path_factory):
    """Three rows: a red PNG and a blue one as bytes, and no picture; captions in several states."""

    def encoded(color):
        buffer = io.BytesIO()
        Image.new("RGB", (6, 4), color).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    folder = tmp_path_factory.mktemp("parquet")
    columns = {
        "image": [encoded(RED), encoded(BLUE), None],
        "text": ["a red dog", "None", "007"],
        "short": ["dog", "dog", "dog"],
        "gaps": ["dog", None, "dog"],
        "blank": ["dog", "dog", " "],
        "year": [1984, 1985, 1986],
    }
    features = datasets.Features(
        {name: datasets.Image() if name == "image" else datasets.Value("string") for name in columns}
        | {"year": datasets.Value("int64")}
    )
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    return folder


def read_dataset(folder, tmp_path, **changed):
    return script.read_pictures(make_args(dataset_name=str(folder), cache_dir=str(tmp_path / "cache"), **changed))


def test_parquet_dataset(parquet_dataset, tmp_path, caplog):
    pictures = read_dataset(parquet_dataset, tmp_path, caption_column=["text", "short"])
    assert captions_of(pictures) == {
        f"row 0 of {parquet_dataset}": ("a red dog", "dog"),
        f"row 1 of {parquet_dataset}": ("None", "dog"),
        f"row 2 of {parquet_dataset}": ("007", "dog"),
    }
    assert script.check_pictures(pictures[:2], resolution=64, disable_progress=True) == [(4, 6), (4, 6)]
    assert [script.read_image(picture).getpixel((0, 0)) for picture in pictures[:2]] == [RED, BLUE]
    message = error_of(script.check_pictures, pictures, resolution=64, disable_progress=True)
    assert_names(message, f"row 2 of {parquet_dataset}", "'image'", "empty")
    assert (tmp_path / "cache").is_dir()
    assert not warnings_in(caplog)


def test_dataset_with_a_prompt(parquet_dataset, tmp_path, caplog):
    pictures = read_dataset(parquet_dataset, tmp_path, instance_prompt="a dog")
    assert [picture.captions for picture in pictures] == [("a dog",)] * 3
    (warning,) = warnings_in(caplog)
    assert_names(warning, "--instance_prompt", "--caption_column", "'text'")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({}, ["--caption_column", "--instance_prompt", "'text'", "'year'"]),
        ({"caption_column": ["prompt"]}, ["--caption_column prompt", "'text'", "'short'"]),
        ({"caption_column": ["text", "gaps"]}, ["row 1 of", "'gaps'", "None"]),
        ({"caption_column": ["blank"]}, ["row 2 of", "'blank'"]),
        ({"caption_column": ["year"]}, ["row 0 of", "'year'", "1984"]),
        ({"caption_column": ["image"]}, ["row 0 of", "'image'"]),
        ({"image_column": "picture", "caption_column": ["text"]}, ["--image_column picture", "'image'"]),
        ({"image_column": "year", "caption_column": ["text"]}, ["--image_column year", "no pictures"]),
        ({"dataset_config_name": "fr", "caption_column": ["text"]}, ["cannot be loaded", "--dataset_config_name"]),
    ],
)
def test_dataset_errors(parquet_dataset, tmp_path, flags, parts):
    message = error_of(read_dataset, parquet_dataset, tmp_path, **flags)
    assert_names(message, str(parquet_dataset), *parts)


def test_dataset_that_cannot_be_loaded(tmp_path):
    message = error_of(read_dataset, tmp_path / "gone", tmp_path, instance_prompt="x")
    assert_names(message, "--dataset_name", "gone", "cannot be loaded")


def test_dataset_without_a_split_train(parquet_dataset, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(parquet_dataset / "train.parquet", tmp_path / "data/test.parquet")
    message = error_of(read_dataset, tmp_path / "data", tmp_path, instance_prompt="x")
    assert_names(message, "--dataset_name", "no split train", "'test'")


def test_dataset_with_an_empty_split(tmp_path):
    (tmp_path / "data").mkdir()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    empty = datasets.Dataset.from_dict({"image": [], "text": []}, features=features)
    empty.to_parquet(tmp_path / "data/train.parquet")
    message = error_of(read_dataset, tmp_path / "data", tmp_path, instance_prompt="x")
    assert_names(message, "--dataset_name", "no data")


def test_dataset_whose_image_column_holds_paths(tmp_path):
    write_pictures(tmp_path, "pictures/a.png")
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data", {"photo": str(tmp_path / "pictures/a.png"), "text": "a dog"}, name="train.jsonl")
    (picture,) = read_dataset(tmp_path / "data", tmp_path, image_column="photo", caption_column=["text"])
    assert picture.captions == ("a dog",)
    assert script.read_image(picture).getpixel((0, 0)) == RED


def test_local_imagefolder(tmp_path):
    write_pictures(tmp_path / "data", "a.png", "b/c.png")
    write_jsonl(tmp_path / "data", {"file_name": "a.png", "text": "a dog"}, {"file_name": "b/c.png", "text": "a cat"})
    pictures = read_dataset(tmp_path / "data", tmp_path, caption_column=["text"])
    assert [picture.captions for picture in pictures] == [("a dog",), ("a cat",)]
    assert script.check_pictures(pictures, resolution=64, disable_progress=True) == [(8, 8), (8, 8)]


def test_local_imagefolder_of_classes_takes_the_prompt(tmp_path):
    write_pictures(tmp_path / "data", "dog/a.png", "cat/b.png")
    pictures = read_dataset(tmp_path / "data", tmp_path, instance_prompt="a pet")
    assert [picture.captions for picture in pictures] == [("a pet",)] * 2


def test_local_imagefolder_of_editing_pairs(tmp_path):
    write_pictures(tmp_path / "data", "0_before.png", "0_after.png")
    row = {"source_file_name": "0_before.png", "target_file_name": "0_after.png", "text": "paint it red"}
    write_jsonl(tmp_path / "data", row)
    (picture,) = read_dataset(tmp_path / "data", tmp_path, image_column="target", caption_column=["text"])
    assert script.read_image(picture).size == (8, 8)


def test_local_imagefolder_from_an_archive(tmp_path):
    write_pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data/pictures.zip", "w") as archive:
        for name in ("a.png", "b.png"):
            archive.write(tmp_path / name, name)
    pictures = read_dataset(tmp_path / "data", tmp_path, instance_prompt="x")
    assert script.check_pictures(pictures, resolution=64, disable_progress=True) == [(8, 8), (8, 8)]


def test_local_imagefolder_that_drops_names_is_an_error(tmp_path):
    write_pictures(tmp_path / "data", "train_a.png", "sub/b.png", "c.png")
    message = error_of(read_dataset, tmp_path / "data", tmp_path, instance_prompt="x")
    assert_names(message, "--dataset_name", " c.png", "2 of 3", "--instance_data_dir")
    assert len(read_folder(tmp_path / "data", instance_prompt="x")) == 3


def test_local_imagefolder_that_drops_pictures_without_a_row_is_an_error(tmp_path):
    write_pictures(tmp_path / "data", "a.png", "b.png")
    write_jsonl(tmp_path / "data", GOOD)
    message = error_of(read_dataset, tmp_path / "data", tmp_path, caption_column=["text"])
    assert_names(message, "b.png", "1 of 2", "--instance_data_dir")


def test_local_imagefolder_of_names_with_test_only_is_an_error(tmp_path):
    write_pictures(tmp_path / "data", "a.png", "test_b.png")
    message = error_of(read_dataset, tmp_path / "data", tmp_path, instance_prompt="x")
    assert_names(message, "no split train", "'test'", "--instance_data_dir")


def test_parquet_beside_a_loose_picture_is_no_imagefolder(parquet_dataset, tmp_path):
    shutil.copytree(parquet_dataset, tmp_path / "data")
    shutil.copy(parquet_dataset / "train.parquet", tmp_path / "data/train-2.parquet")
    write_pictures(tmp_path / "data", "preview.png")
    assert len(read_dataset(tmp_path / "data", tmp_path, caption_column=["text"])) == 6


# ---- Decoding ----


def gradient(mode, *pixels):
    """A picture of one row."""
    image = Image.new(mode, (len(pixels), 1))
    for index, pixel in enumerate(pixels):
        image.putpixel((index, 0), pixel)
    return image


def palette(color_mode, *colors):
    image = gradient("P", *range(len(colors)))
    image.putpalette([value for color in colors for value in color], color_mode)
    return image


def with_transparency(image, value):
    image.info["transparency"] = value
    return image


def pixels_of(image):
    return [tuple(map(int, pixel)) for pixel in np.asarray(image).reshape(-1, 3)]


HALF = (255, 127, 127)  # red with alpha 128 on white


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (gradient("1", 0, 255), "png", [(0, 0, 0), WHITE]),
        (gradient("L", 0, 77, 255), "png", [(0, 0, 0), (77, 77, 77), WHITE]),
        (gradient("LA", (77, 255), (0, 0), (0, 128)), "png", [(77,) * 3, WHITE, (127,) * 3]),
        (palette("RGB", RED, GREEN), "png", [RED, GREEN]),
        (palette("RGB", RED, GREEN), "gif", [RED, GREEN]),
        (with_transparency(palette("RGB", RED, GREEN), b"\x80\xff"), "png", [HALF, GREEN]),
        (with_transparency(palette("RGB", RED, GREEN), 1), "gif", [RED, WHITE]),
        (gradient("RGB", RED, (1, 2, 3)), "png", [RED, (1, 2, 3)]),
        (with_transparency(gradient("RGB", RED, GREEN), GREEN), "png", [RED, WHITE]),
        (with_transparency(gradient("L", 7, 9), 7), "png", [WHITE, (9, 9, 9)]),
        (with_transparency(gradient("1", 255, 0), 0), "png", [WHITE, WHITE]),
        (gradient("RGBA", (*RED, 255), (*RED, 0), (*RED, 128)), "png", [RED, WHITE, HALF]),
        (gradient("RGBA", (*RED, 255), (*RED, 0), (*RED, 128)), "tiff", [RED, WHITE, HALF]),
        (gradient("CMYK", (0, 255, 255, 0), (0, 0, 0, 0), (0, 0, 0, 255)), "tiff", [RED, WHITE, (0, 0, 0)]),
        (gradient("I;16", 0, 1000, 32896, 65535), "png", [(0,) * 3, (4,) * 3, (128,) * 3, WHITE]),
        (gradient("I;16", 0, 1000, 32896, 65535), "tiff", [(0,) * 3, (4,) * 3, (128,) * 3, WHITE]),
        (gradient("I;16B", 0, 1000, 32896, 65535), "tiff", [(0,) * 3, (4,) * 3, (128,) * 3, WHITE]),
        (gradient("I", 0, 1000, 32896, 65535), "tiff", [(0,) * 3, (4,) * 3, (128,) * 3, WHITE]),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "mode", ""),
)
def test_every_mode_becomes_rgb(tmp_path, image, suffix, expected):
    path = tmp_path / f"a.{suffix}"
    image.save(path)
    read = script.read_image(as_picture(path))
    assert read.mode == "RGB" and pixels_of(read) == expected


def test_the_files_above_hold_the_modes_that_they_are_for(tmp_path):
    """Otherwise the test above would say nothing of them."""
    for mode, suffix in [("I;16", "png"), ("I;16B", "tiff"), ("I", "tiff"), ("CMYK", "tiff"), ("LAB", "tiff")]:
        Image.new(mode, (1, 1)).save(tmp_path / f"a.{suffix}")
        with Image.open(tmp_path / f"a.{suffix}") as image:
            assert image.mode == mode


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (gradient("PA", (0, 255), (0, 0)), [(0, 0, 0), WHITE]),
        (gradient("RGBa", (*RED, 255), (128, 0, 0, 128), (0, 0, 0, 0)), [RED, HALF, WHITE]),
        (gradient("La", (77, 255), (0, 128), (0, 0)), [(77,) * 3, (127,) * 3, WHITE]),
        (palette("RGBA", (*RED, 255), (*RED, 0)), [RED, WHITE]),
        (gradient("YCbCr", (0, 128, 128), (255, 128, 128)), [(0, 0, 0), WHITE]),
        (gradient("HSV", (0, 255, 255), (0, 0, 255)), [RED, WHITE]),
        (gradient("RGBX", (*RED, 0)), [RED]),
        (gradient("I;16L", 1000, 65535), [(4,) * 3, WHITE]),
        (gradient("I;16N", 1000, 65535), [(4,) * 3, WHITE]),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_modes_that_few_files_have(image, expected):
    assert pixels_of(script.to_rgb(image)) == expected


def test_premultiplied_grey_tiff(tmp_path):
    gradient("LA", (0, 128), (77, 255)).save(tmp_path / "a.tiff")
    straight, premultiplied = (struct.pack("<HHIHH", 338, 3, 1, value, 0) for value in (2, 1))  # tag ExtraSamples
    data = (tmp_path / "a.tiff").read_bytes()
    assert data.count(straight) == 1
    (tmp_path / "a.tiff").write_bytes(data.replace(straight, premultiplied))
    with Image.open(tmp_path / "a.tiff") as image:
        assert image.mode == "La"
    assert pixels_of(script.read_image(as_picture(tmp_path / "a.tiff"))) == [(127,) * 3, (77,) * 3]


def test_transparent_16_bit_grey(tmp_path):
    rows = [struct.pack(">3H", 1000, 1001, 65535)]
    (tmp_path / "a.png").write_bytes(png(3, 1, 16, 0, rows, transparency=struct.pack(">H", 1000)))
    assert pixels_of(script.read_image(as_picture(tmp_path / "a.png"))) == [WHITE, (4,) * 3, WHITE]


def test_16_bit_pgm(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">2H", 32896, 65535))
    assert pixels_of(script.read_image(as_picture(tmp_path / "a.pgm"))) == [(128,) * 3, WHITE]


def test_lab_tiff(tmp_path):
    gradient("LAB", (0, 128, 128), (255, 128, 128), (138, 209, 198)).save(tmp_path / "a.tiff")
    read = np.asarray(script.read_image(as_picture(tmp_path / "a.tiff")), dtype=int)
    assert abs(read - [[(0, 0, 0), WHITE, RED]]).max() <= 6  # LAB has 8 bits


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB", "YCbCr"])
def test_jpegs(tmp_path, mode):
    """A CMYK JPEG with Adobe's marker is stored inverted."""
    Image.new("RGB", (16, 16), (200, 60, 60)).convert(mode).save(tmp_path / "a.jpg", quality=95)
    expected = Image.new("RGB", (16, 16), (200, 60, 60)).convert(mode).convert("RGB").getpixel((8, 8))
    read = script.read_image(as_picture(tmp_path / "a.jpg")).getpixel((8, 8))
    assert max(abs(a - b) for a, b in zip(read, expected, strict=True)) <= 4
    assert mode != "CMYK" or b"Adobe" in (tmp_path / "a.jpg").read_bytes()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_the_first_frame_of_several(tmp_path, suffix):
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    lossless = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], **lossless)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert image.n_frames == 2
    assert script.read_image(as_picture(tmp_path / f"a.{suffix}")).getpixel((4, 4)) == RED


# The four corners, from the left top clockwise, of a picture stored as red, green, blue, yellow: EXIF's table.
UPRIGHT_CORNERS = {
    1: [RED, GREEN, BLUE, YELLOW],
    2: [GREEN, RED, YELLOW, BLUE],
    3: [BLUE, YELLOW, RED, GREEN],
    4: [YELLOW, BLUE, GREEN, RED],
    5: [RED, YELLOW, BLUE, GREEN],
    6: [YELLOW, RED, GREEN, BLUE],
    7: [BLUE, GREEN, RED, YELLOW],
    8: [GREEN, BLUE, YELLOW, RED],
}


def corners(image):
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(place) for place in ((0, 0), (right, 0), (right, bottom), (0, bottom))]


def stored_corners():
    image = Image.new("RGB", (24, 16), WHITE)
    for place, color in zip(((0, 0), (23, 0), (23, 15), (0, 15)), (RED, GREEN, BLUE, YELLOW), strict=True):
        image.putpixel(place, color)
    return image


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", UPRIGHT_CORNERS)
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if suffix == "webp" else {}
    stored_corners().save(tmp_path / f"a.{suffix}", exif=exif, **lossless)
    picture = as_picture(tmp_path / f"a.{suffix}")
    assert corners(script.read_image(picture)) == UPRIGHT_CORNERS[orientation]
    upright = (24, 16) if orientation >= 5 else (16, 24)  # (height, width)
    assert script.check_pictures([picture], resolution=64, disable_progress=True) == [upright]


def test_jpeg_with_orientation_and_a_tag_that_cannot_be_written_again(tmp_path):
    """exif_transpose alone raises on this one."""
    entries = [(0x0100, 2, 4, b"abc\0"), (0x0112, 3, 1, struct.pack("<HH", 6, 0))]  # width as text
    packed = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)
    Image.new("RGB", (24, 16), RED).save(tmp_path / "a.jpg", exif=exif)
    assert script.read_image(as_picture(tmp_path / "a.jpg")).size == (16, 24)


def encoded(image, file_format, **settings):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **settings)
    return buffer.getvalue()


def damaged_files():
    """Together they raise every kind of error that the reader expects, but for struct.error."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    whole_png, whole_jpeg, whole_avif = (encoded(noise, file_format) for file_format in ("PNG", "JPEG", "AVIF"))
    small_avif, tiff = (encoded(Image.new("RGB", (16, 16)), file_format) for file_format in ("AVIF", "TIFF"))
    return {
        "empty.png": b"",
        "text.jpg": b"<html>not found</html>",
        "cut.png": whole_png[: len(whole_png) // 2],
        "cut.jpg": whole_jpeg[: len(whole_jpeg) // 2],
        "cut.avif": whole_avif[: len(whole_avif) // 2],
        "bad_end.avif": small_avif[:-3] + bytes([small_avif[-3] ^ 255]) + small_avif[-2:],
        "bad_exif.webp": encoded(noise, "WEBP", exif=b"Exif\0\0IM*\0\x08\0\0\0"),
        "bad_tag.tiff": tiff.replace(struct.pack("<HH", 273, 4), struct.pack("<HH", 273, 2)),  # an offset as text
        "bad_profile.png": whole_png[:-12] + png_chunk(b"iCCP", b"") + whole_png[-12:],
        "bad_checksum.png": whole_png[:60] + bytes([whole_png[60] ^ 255]) + whole_png[61:],
        "bad_number.ppm": b"P6 x 1 255\n" + bytes(3),
        "bomb.png": png(20000, 20000, 8, 0, []),
    }


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_pictures_are_errors_that_name_them(tmp_path, name):
    (tmp_path / name).write_bytes(damaged_files()[name])
    message = error_of(script.check_pictures, [as_picture(tmp_path / name)], resolution=64, disable_progress=True)
    assert_names(message, name, "cannot be read", "JPEG or PNG")
    assert "0x" not in message


def test_a_picture_deleted_meanwhile(tmp_path):
    assert_names(error_of(script.read_image, as_picture(tmp_path / "a.png")), "a.png", "No such file")


@pytest.mark.parametrize(("mode", "pixel"), [("F", 0.5), ("I", 65536), ("I", -1)])
def test_pixels_of_unknown_range_are_errors(tmp_path, mode, pixel):
    gradient(mode, pixel).save(tmp_path / "a.tiff")
    assert_names(error_of(script.read_image, as_picture(tmp_path / "a.tiff")), "a.tiff", "convert it")


# ---- Geometry ----


@pytest.mark.parametrize("resolution", [64, 512, 1024, 1040])
def test_resolutions_that_are_right(resolution):
    script.check_geometry(make_args(resolution=resolution))


@pytest.mark.parametrize(
    ("resolution", "part"),
    [
        (0, "64"),
        (-64, "64"),
        (48, "64"),
        (100, "multiples of 16"),
        (1023, "multiples of 16"),
        (1056, "4356 image tokens"),
    ],
)
def test_resolutions_that_are_wrong(resolution, part):
    message = error_of(script.check_geometry, make_args(resolution=resolution))
    assert_names(message, f"--resolution {resolution} ", part)


def test_buckets_that_are_right():
    buckets = "64,64; 64,512 ;1376,800;800,1376"  # 4300 tokens exactly
    script.check_geometry(make_args(use_aspect_ratio_buckets=True, aspect_ratio_buckets=buckets))


@pytest.mark.parametrize(
    ("buckets", "parts"),
    [
        ("", []),
        ("1024", ["'1024'", "height,width"]),
        ("1024x1024", ["height,width"]),
        ("512,512;", ["height,width"]),
        ("512,-512", ["height,width"]),
        ("0,512", ["height,width"]),
        ("512,512;520,512", ["520,512", "multiples of 16"]),
        ("512,512;512,520", ["512,520", "multiples of 16"]),
        ("48,512", ["48,512", "64"]),
        ("512,48", ["512,48", "64"]),
        ("64,528", ["64,528", "8:1"]),
        ("528,64", ["528,64", "8:1"]),
        ("1104,1008", ["1104,1008", "4347 image tokens"]),
    ],
)
def test_buckets_that_are_wrong(buckets, parts):
    args = make_args(use_aspect_ratio_buckets=True, aspect_ratio_buckets=buckets)
    assert_names(error_of(script.check_geometry, args), "--aspect_ratio_buckets", *parts)


def test_a_list_of_buckets_needs_the_flag_that_turns_buckets_on():
    message = error_of(script.check_geometry, make_args(aspect_ratio_buckets="512,512"))
    assert_names(message, "--aspect_ratio_buckets", "--use_aspect_ratio_buckets")


@pytest.mark.parametrize(
    ("size", "flags", "bucket"),
    [
        ((3000, 2000), {}, (1024, 1024)),
        ((100, 100), {"resolution": 512}, (512, 512)),
        ((2000, 2000), {"use_aspect_ratio_buckets": True}, (1024, 1024)),
        ((3000, 2000), {"use_aspect_ratio_buckets": True}, (1248, 832)),
        ((2000, 3000), {"use_aspect_ratio_buckets": True}, (832, 1248)),
        ((1000, 9000), {"use_aspect_ratio_buckets": True}, (720, 1456)),
        ((300, 200), {"use_aspect_ratio_buckets": True}, (304, 208)),  # not enlarged: 245 pixels squared
        ((3000, 2000), {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "512,512;768,512"}, (768, 512)),
        ((2000, 3000), {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "512,512;768,512"}, (512, 512)),
    ],
)
def test_bucket_for(size, flags, bucket):
    assert script.bucket_for(*size, make_args(**flags)) == bucket


def some_pictures(count, captions=("a dog",)):
    return [script.Picture(f"{index}.png", captions, None) for index in range(count)]


def test_every_resolution_of_the_ladder_stays_within_the_limits():
    """What the largest --resolution gives, and that small ones are an error."""
    args = make_args(resolution=1040, use_aspect_ratio_buckets=True)
    sizes = [(height, width) for height in range(200, 4000, 190) for width in range(200, 4000, 190)]
    pictures = [script.Picture("a.png", ("x",), None)] * len(sizes)
    for example in script.plan_examples(pictures, sizes, args):
        assert script.size_problem(*example.bucket) is None


def test_a_picture_too_small_for_the_ladder_is_an_error():
    args = make_args(use_aspect_ratio_buckets=True)
    pictures = some_pictures(2)
    message = error_of(script.plan_examples, pictures, [(600, 400), (60, 40)], args)
    assert_names(message, "1.png", "60x40", "--resolution 1024", "64 pixels")


def test_crops_are_drawn_once_for_each_picture_and_repeat():
    pictures = some_pictures(3)
    sizes = [(600, 400)] * 3
    args = make_args(resolution=64, repeats=4)
    examples = script.plan_examples(pictures, sizes, args)
    assert [(example.picture, example.repeat) for example in examples] == list(itertools.product(range(3), range(4)))
    assert {example.bucket for example in examples} == {(64, 64)}
    centerings = [example.centering for example in examples]
    assert len({*centerings}) == 12
    assert all(0 <= value <= 1 for centering in centerings for value in centering)
    # Tall pictures: the crop has a place to draw along the height alone.
    assert max(y for _, y in centerings) > 0.6 and min(y for _, y in centerings) < 0.4
    assert {x for x, _ in centerings} == {0.5}
    assert script.plan_examples(pictures, sizes, args) == examples
    assert script.plan_examples(pictures[:1], sizes[:1], args) == examples[:4]  # a crop asks no other picture
    args.seed = 1
    assert not {*centerings} & {example.centering for example in script.plan_examples(pictures, sizes, args)}


def test_a_picture_of_the_buckets_shape_has_one_crop():
    args = make_args(resolution=64, repeats=5)
    examples = script.plan_examples(some_pictures(1), [(128, 128)], args)
    assert [example.centering for example in examples] == [(0.5, 0.5)] * 5


def test_center_crop():
    args = make_args(resolution=64, repeats=2, center_crop=True)
    examples = script.plan_examples(some_pictures(1), [(600, 400)], args)
    assert [example.centering for example in examples] == [(0.5, 0.5)] * 2


def striped(width, height, axis):
    """A picture whose red value grows from left to right (axis 1) or from top to bottom (axis 0)."""
    ramp = np.indices((height, width))[axis].astype(np.uint8)
    return Image.fromarray(np.stack([ramp, 0 * ramp, 0 * ramp], axis=-1))


@pytest.mark.parametrize(("centering", "first"), [((0.0, 0.5), 0), ((1.0, 0.5), 96), ((0.5, 0.0), 48)])
def test_crop_of_a_wide_picture(centering, first):
    example = script.Example(0, 0, (64, 64), centering)
    cropped = script.crop_image(striped(160, 64, axis=1), example, flip=False)
    assert cropped.size == (64, 64)
    assert np.asarray(cropped)[10, :, 0].tolist() == list(range(first, first + 64))
    mirrored = script.crop_image(striped(160, 64, axis=1), example, flip=True)
    assert np.asarray(mirrored)[10, :, 0].tolist() == list(range(first, first + 64))[::-1]


@pytest.mark.parametrize(("centering", "first"), [((0.5, 0.0), 0), ((0.5, 1.0), 96)])
def test_crop_of_a_tall_picture(centering, first):
    cropped = script.crop_image(striped(64, 160, axis=0), script.Example(0, 0, (64, 64), centering), flip=False)
    assert np.asarray(cropped)[:, 10, 0].tolist() == list(range(first, first + 64))


def test_crop_scales_to_the_bucket():
    cropped = script.crop_image(
        Image.new("RGB", (333, 77), BLUE), script.Example(0, 0, (96, 160), (0.3, 0.9)), flip=False
    )
    assert cropped.size == (160, 96) and cropped.getpixel((80, 48)) == BLUE


# ---- Order ----


def two_buckets(captions=("a dog",)):
    """Seven examples of one bucket and four of another, mixed."""
    pictures = some_pictures(11, captions)
    buckets = [(64, 96) if index % 3 == 1 else (64, 64) for index in range(11)]
    return pictures, [script.Example(index, 0, bucket, (0.5, 0.5)) for index, bucket in enumerate(buckets)]


def make_order(captions=("a dog",), batch_size=3, random_flip=False, seed=0):
    return script.SampleOrder(*two_buckets(captions), batch_size=batch_size, random_flip=random_flip, seed=seed)


def one_epoch(order, epoch):
    return [order.batch(epoch * order.num_batches + place) for place in range(order.num_batches)]


@pytest.mark.parametrize(("batch_size", "num_batches"), [(1, 11), (2, 6), (3, 5), (4, 3), (100, 2)])
def test_every_example_comes_once_in_an_epoch_in_batches_of_one_bucket(batch_size, num_batches):
    _, examples = two_buckets()
    order = make_order(batch_size=batch_size)
    assert order.num_batches == num_batches
    for epoch in range(4):
        batches = one_epoch(order, epoch)
        assert sorted(sample.example for batch in batches for sample in batch) == list(range(11))
        assert {sample.epoch for batch in batches for sample in batch} == {epoch}
        for batch in batches:
            assert 1 <= len(batch) <= batch_size
            assert len({examples[sample.example].bucket for sample in batch}) == 1


def test_epochs_are_shuffled_anew_inside_and_across_batches():
    order = make_order()
    epochs = [one_epoch(order, epoch) for epoch in range(8)]
    orders = {tuple(sample.example for batch in batches for sample in batch) for batches in epochs}
    assert len(orders) == 8
    company = {frozenset(frozenset(sample.example for sample in batch) for batch in batches) for batches in epochs}
    assert len(company) > 4  # who is batched with whom
    _, examples = two_buckets()
    buckets = {tuple(examples[batch[0].example].bucket for batch in batches) for batches in epochs}
    assert len(buckets) > 2  # which bucket comes when


def test_a_batch_is_the_same_from_any_object_in_any_order_of_calls():
    flags = dict(captions=("a", "b", "c"), random_flip=True, seed=5)
    forwards = make_order(**flags)
    expected = [forwards.batch(index) for index in range(40)]
    backwards = make_order(**flags)
    assert [backwards.batch(index) for index in reversed(range(40))] == expected[::-1]
    assert make_order(**flags).batch(33) == expected[33]
    other_seed = make_order(**flags | {"seed": 6})
    assert [other_seed.batch(index) for index in range(40)] != expected


def test_draws_do_not_depend_on_each_other():
    """The order stays when flips or captions are added, so that runs can be compared."""
    plain = [sample.example for batch in one_epoch(make_order(), 0) for sample in batch]
    drawn = make_order(captions=("a", "b"), random_flip=True)
    assert [sample.example for batch in one_epoch(drawn, 0) for sample in batch] == plain


def test_captions_mix_over_epochs():
    order = make_order(captions=("a", "b", "c"))
    samples = [sample for epoch in range(40) for batch in one_epoch(order, epoch) for sample in batch]
    for example in range(11):
        assert {sample.caption for sample in samples if sample.example == example} == {0, 1, 2}
    counts = [sum(sample.caption == caption for sample in samples) for caption in range(3)]
    assert sum(counts) == 440 and min(counts) > 110
    assert len({sample.caption for batch in one_epoch(order, 0) for sample in batch}) > 1


def test_captions_are_counted_per_picture():
    pictures = [script.Picture("a.png", ("x",), None), script.Picture("b.png", ("x", "y"), None)]
    examples = [script.Example(index, repeat, (64, 64), (0.5, 0.5)) for index in (1, 0) for repeat in (0, 1)]
    order = script.SampleOrder(pictures, examples, batch_size=1, random_flip=False, seed=0)
    samples = [order.batch(index)[0] for index in range(200)]
    assert {sample.caption for sample in samples if sample.example in (2, 3)} == {0}
    assert {sample.caption for sample in samples if sample.example in (0, 1)} == {0, 1}


def test_flips():
    samples = [
        sample for epoch in range(40) for batch in one_epoch(make_order(random_flip=True), epoch) for sample in batch
    ]
    assert 170 < sum(sample.flip for sample in samples) < 270  # of 440
    for example in range(11):
        assert {sample.flip for sample in samples if sample.example == example} == {True, False}
    assert not any(sample.flip for epoch in range(5) for batch in one_epoch(make_order(), epoch) for sample in batch)


def test_noise_seed():
    sample = script.Sample(example=3, epoch=2, caption=0, flip=False)
    assert script.noise_seed(7, sample) == script.noise_seed(7, script.Sample(3, 2, caption=1, flip=True))
    places = [script.Sample(example, epoch, 0, False) for example in range(30) for epoch in range(30)]
    seeds = {script.noise_seed(seed, place) for place in places for seed in (0, 1)}
    assert len(seeds) == 1800
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62
    assert script.noise_seed(0, script.Sample(0, 0, 0, False)) == 3063214539133759720


def test_draws_are_the_same_on_every_machine():
    """Fixed values: a change here changes what a resumed run sees."""
    order = make_order(captions=("a", "b", "c"), random_flip=True)
    assert order.batch(8) == [
        script.Sample(example=1, epoch=1, caption=0, flip=False),
        script.Sample(example=4, epoch=1, caption=1, flip=True),
        script.Sample(example=10, epoch=1, caption=0, flip=True),
    ]
    tall, wide = script.plan_examples(some_pictures(2), [(80, 64), (64, 80)], make_args(resolution=64))
    assert tall.centering == (0.5, 0.06165086885984905)
    assert wide.centering == (0.1385553791119012, 0.5)
