import io
import shutil
import zipfile

import datasets
import pytest
from PIL import Image

from data_helpers import (
    BLUE,
    RED,
    assert_names,
    captions_of,
    error_of,
    read_folder,
    read_pictures,
    warnings_in,
    write_jsonl,
    write_pictures,
)
from dopsd.data.checking import check_pictures
from dopsd.data.images import read_image


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


def read_dataset(folder, tmp_path, **flags):
    return read_pictures(dataset_name=str(folder), cache_dir=str(tmp_path / "cache"), **flags)


def sizes_of(pictures):
    return [one.size for one in check_pictures(pictures, resolution=64, disable_progress=True)]


def test_parquet_dataset(parquet_dataset, tmp_path, caplog):
    pictures = read_dataset(parquet_dataset, tmp_path, caption_column=["text", "short"])
    assert captions_of(pictures) == {
        f"row 0 of {parquet_dataset}": ("a red dog", "dog"),
        f"row 1 of {parquet_dataset}": ("None", "dog"),
        f"row 2 of {parquet_dataset}": ("007", "dog"),
    }
    assert sizes_of(pictures[:2]) == [(4, 6), (4, 6)]
    assert [read_image(picture).getpixel((0, 0)) for picture in pictures[:2]] == [RED, BLUE]
    message = error_of(sizes_of, pictures)
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
        ({}, ["--caption_column", "--instance_prompt", "more of 'text', 'short', 'gaps', 'blank', or"]),
        ({"caption_column": ["prompt"]}, ["--caption_column prompt", "'text'", "'short'"]),
        ({"caption_column": ["text", "gaps"]}, ["row 1 of", "'gaps'", "None"]),
        ({"caption_column": ["blank"]}, ["row 2 of", "'blank'"]),
        ({"caption_column": ["year"]}, ["row 0 of", "'year'", "1984"]),
        ({"caption_column": ["image"]}, ["row 0 of", "'image'"]),
        ({"image_column": "picture", "caption_column": ["text"]}, ["--image_column picture", "'image'"]),
        ({"image_column": "year", "caption_column": ["text"]}, ["--image_column year", "no pictures"]),
        ({"dataset_config_name": "fr", "caption_column": ["text"]}, ["cannot be loaded", "--dataset_config_name"]),
        (
            {"caption_column": ["text"], "teacher_caption_column": "long"},
            ["--teacher_caption_column long", "'text', 'short'"],
        ),
        ({"caption_column": ["text"], "teacher_caption_column": "gaps"}, ["row 1 of", "'gaps'", "None"]),
    ],
)
def test_dataset_errors(parquet_dataset, tmp_path, flags, parts):
    message = error_of(read_dataset, parquet_dataset, tmp_path, **flags)
    assert_names(message, str(parquet_dataset), *parts)


def test_dataset_that_cannot_be_loaded(tmp_path):
    message = error_of(read_dataset, tmp_path / "gone", tmp_path, instance_prompt="x")
    assert_names(message, "--dataset_name", "gone", "cannot be loaded")


def test_dataset_without_a_train_split(parquet_dataset, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(parquet_dataset / "train.parquet", tmp_path / "data/test.parquet")
    message = error_of(read_dataset, tmp_path / "data", tmp_path, instance_prompt="x")
    assert_names(message, "--dataset_name", "no split named train", "'test'", "subfolder named train")
    (tmp_path / "data/train").mkdir()
    (tmp_path / "data/test.parquet").rename(tmp_path / "data/train/test.parquet")  # as the message says
    assert len(read_dataset(tmp_path / "data", tmp_path, instance_prompt="x")) == 3


def test_dataset_with_an_empty_split(tmp_path):
    (tmp_path / "data").mkdir()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    empty = datasets.Dataset.from_dict({"image": [], "text": []}, features=features)
    empty.to_parquet(tmp_path / "data/train.parquet")
    message = error_of(read_dataset, tmp_path / "data", tmp_path, instance_prompt="x")
    assert_names(message, "--dataset_name", "no data")


def test_dataset_whose_image_column_contains_paths(tmp_path):
    write_pictures(tmp_path, "data/pictures/a.png")
    write_jsonl(tmp_path / "data", {"photo": str(tmp_path / "data/pictures/a.png"), "text": "a dog"}, name="t.jsonl")
    (picture,) = read_dataset(tmp_path / "data", tmp_path, image_column="photo", caption_column=["text"])
    assert picture.captions == ("a dog",)
    assert read_image(picture).getpixel((0, 0)) == RED


# The teacher's captions


def test_teacher_captions(parquet_dataset, tmp_path):
    pictures = read_dataset(parquet_dataset, tmp_path, caption_column=["short"], teacher_caption_column="text")
    assert [picture.captions for picture in pictures] == [("dog",)] * 3
    assert [picture.teacher_caption for picture in pictures] == ["a red dog", "None", "007"]
    assert sizes_of(pictures[:2]) == [(4, 6), (4, 6)]
    same = read_dataset(parquet_dataset, tmp_path, caption_column=["text"], teacher_caption_column="text")
    assert [picture.teacher_caption for picture in same] == ["a red dog", "None", "007"]


def test_teacher_captions_need_no_pictures(tmp_path):
    data = tmp_path / "data"
    rows = [{"short": "a dog", "long": "a big dog"}, {"short": "a cat", "long": "a fat cat"}]
    write_jsonl(data, *rows, name="train.jsonl")
    flags = {"caption_column": ["short"], "teacher_caption_column": "long"}
    pictures = read_dataset(data, tmp_path, **flags)
    assert captions_of(pictures) == {f"row 0 of {data}": ("a dog",), f"row 1 of {data}": ("a cat",)}
    assert [picture.teacher_caption for picture in pictures] == ["a big dog", "a fat cat"]
    assert sizes_of(pictures) == [(64, 64), (64, 64)]  # the resolution
    assert [one.digest for one in check_pictures(pictures, resolution=64, disable_progress=True)] == ["", ""]
    # Pictures are needed if a flag names their column, or without teacher captions.
    message = error_of(read_dataset, data, tmp_path, **flags, image_column="photo")
    assert_names(message, "--image_column photo", "'short', 'long'")
    message = error_of(read_dataset, data, tmp_path, caption_column=["short"])
    assert_names(message, "--image_column image", "'short', 'long'")


# Folders that `datasets` reads as an imagefolder


def test_local_imagefolder(tmp_path):
    write_pictures(tmp_path / "data", "a.png", "b/c.png")
    write_jsonl(tmp_path / "data", {"file_name": "a.png", "text": "a dog"}, {"file_name": "b/c.png", "text": "a cat"})
    pictures = read_dataset(tmp_path / "data", tmp_path, caption_column=["text"])
    assert [picture.captions for picture in pictures] == [("a dog",), ("a cat",)]
    assert sizes_of(pictures) == [(8, 8), (8, 8)]


def test_local_imagefolder_of_classes_takes_the_prompt(tmp_path):
    write_pictures(tmp_path / "data", "dog/a.png", "cat/b.png")
    pictures = read_dataset(tmp_path / "data", tmp_path, instance_prompt="a pet")
    assert [picture.captions for picture in pictures] == [("a pet",)] * 2


def test_local_imagefolder_of_editing_pairs(tmp_path):
    write_pictures(tmp_path / "data", "0_before.png", "0_after.png")
    row = {"source_file_name": "0_before.png", "target_file_name": "0_after.png", "text": "paint it red"}
    write_jsonl(tmp_path / "data", row)
    (picture,) = read_dataset(tmp_path / "data", tmp_path, image_column="target", caption_column=["text"])
    assert read_image(picture).size == (8, 8)


def test_local_imagefolder_from_an_archive(tmp_path):
    write_pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data/pictures.zip", "w") as archive:
        for name in ("a.png", "b.png"):
            archive.write(tmp_path / name, name)
    pictures = read_dataset(tmp_path / "data", tmp_path, instance_prompt="x")
    assert sizes_of(pictures) == [(8, 8), (8, 8)]


def test_local_imagefolder_that_drops_names_is_an_error(tmp_path):
    write_pictures(tmp_path / "data", "train_a.png", "sub/b.png", "c.png")
    message = error_of(read_dataset, tmp_path / "data", tmp_path, instance_prompt="x")
    assert_names(message, "--dataset_name", " c.png", "2 of 3", "--instance_data_dir")
    assert len(read_folder(tmp_path / "data", instance_prompt="x")) == 3


def test_local_imagefolder_that_drops_pictures_without_a_row_is_an_error(tmp_path):
    write_pictures(tmp_path / "data", "a.png", "b.png")
    write_jsonl(tmp_path / "data", {"file_name": "a.png", "text": "a dog"})
    message = error_of(read_dataset, tmp_path / "data", tmp_path, caption_column=["text"])
    assert_names(message, "b.png", "1 of 2", "--instance_data_dir")


def test_local_imagefolder_of_names_with_test_only_is_an_error(tmp_path):
    write_pictures(tmp_path / "data", "a.png", "test_b.png")
    message = error_of(read_dataset, tmp_path / "data", tmp_path, instance_prompt="x")
    assert_names(message, "no split named train", "'test'", "--instance_data_dir")


def test_parquet_beside_a_loose_picture_is_no_imagefolder(parquet_dataset, tmp_path):
    shutil.copytree(parquet_dataset, tmp_path / "data")
    shutil.copy(parquet_dataset / "train.parquet", tmp_path / "data/train-2.parquet")
    write_pictures(tmp_path / "data", "preview.png")
    assert len(read_dataset(tmp_path / "data", tmp_path, caption_column=["text"])) == 6
