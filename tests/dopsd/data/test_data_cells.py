"""Which files the cells of a data set may name."""

import io
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_helpers import BLUE, RED, assert_names, error_of, read_pictures, warnings_in, write_jsonl, write_pictures
from dopsd.data.cells import FoundPaths, WrittenPaths
from dopsd.data.images import read_image


def write_parquet(folder, *cells):
    """A cell is a path, or {"bytes": ..., "path": ...}."""
    folder.mkdir(exist_ok=True)
    cells = [{"bytes": None, "path": cell} if isinstance(cell, str) else cell for cell in cells]
    column = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    # Not by `datasets`, which looks at the paths.
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    pq.write_table(pa.table({"image": column}, schema=schema), folder / "train.parquet")


def read_dataset(tmp_path, **flags):
    flags = {"instance_prompt": "a dog"} | flags
    return read_pictures(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), **flags)


@pytest.fixture
def outside(tmp_path):
    write_pictures(tmp_path, "outside/secret.png", "data-2/secret.png")
    return tmp_path / "outside/secret.png"


@pytest.mark.parametrize(
    "path",
    [
        "{outside}",
        "file://{outside}",
        "file://{data}/a.png",
        "http://127.0.0.1/a.png",
        "https://127.0.0.1/a.png",
        "hf://datasets/a/b/a.png",
        "../outside/secret.png",
        "{data}/../outside/secret.png",
        "{data}-2/secret.png",
        "link/secret.png",
        "zip://secret.png::{outside}.zip",
        "zip://a.png::http://127.0.0.1/a.zip",
        "simplecache::file://{outside}",
        "reference://a.png::{data}/a.png",
        "a\0b.png",
        "gone.png",
        "x" * 5000,
    ],
)
def test_a_path_that_leads_out_of_a_table_is_an_error_that_names_row_and_path(tmp_path, outside, path):
    path = path.format(outside=outside, data=tmp_path / "data")
    write_pictures(tmp_path / "data", "a.png")
    (tmp_path / "data/link").symlink_to(tmp_path / "outside")
    (tmp_path / "data/a.png").rename(tmp_path / "data/.a.png")  # not for datasets' imagefolder
    write_parquet(tmp_path / "data", {"bytes": picture_bytes(BLUE), "path": None}, path)
    message = error_of(read_dataset, tmp_path)
    assert_names(message, "row 1 of ", "'image'", "not a file of the data set", repr(path)[:20])


def picture_bytes(color):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_path_beside_the_picture_itself_is_only_its_name(tmp_path, outside):
    write_parquet(tmp_path / "data", {"bytes": picture_bytes(BLUE), "path": str(outside)})
    (picture,) = read_dataset(tmp_path)
    assert read_image(picture).getpixel((0, 0)) == BLUE


def test_paths_inside_the_folder_may_be_relative_or_absolute(tmp_path, caplog, monkeypatch):
    write_pictures(tmp_path / "data", "sub/a.png")
    monkeypatch.chdir(tmp_path)
    write_parquet(
        tmp_path / "data", "sub/a.png", str(tmp_path / "data/sub/a.png"), "data/sub/a.png", r"sub\A.png", "./sub/a.png"
    )
    pictures = read_dataset(tmp_path)
    assert [read_image(picture).getpixel((0, 0)) for picture in pictures] == [RED] * 5
    assert {picture.source.resolve() for picture in pictures} == {tmp_path / "data/sub/a.png"}
    assert not warnings_in(caplog)


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
def test_other_tables_may_not_lead_out_either(tmp_path, outside, name):
    (tmp_path / "data").mkdir()
    if name.endswith("csv"):
        (tmp_path / "data" / name).write_text(f"photo\n{outside}\n")
    else:
        write_jsonl(tmp_path / "data", {"photo": str(outside)}, name=name)
    message = error_of(read_dataset, tmp_path, image_column="photo")
    assert_names(message, "row 0 of ", "'photo'", str(outside))


def test_a_picture_in_an_archive_of_the_folder_is_read(tmp_path):
    write_pictures(tmp_path, "a.png")
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data/.pictures.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    write_parquet(tmp_path / "data", f"zip://a.png::{tmp_path / 'data/.pictures.zip'}")
    (picture,) = read_dataset(tmp_path)
    assert read_image(picture).getpixel((0, 0)) == RED


def test_links_out_of_an_imagefolder_are_followed_with_one_warning(tmp_path, outside, caplog):
    write_pictures(tmp_path / "data", "a.png", "b.png")
    (tmp_path / "data/c.png").symlink_to(outside)
    (tmp_path / "data/d.png").symlink_to(outside)
    assert [read_image(picture).size for picture in read_dataset(tmp_path)] == [(8, 8)] * 4
    (warning,) = warnings_in(caplog)
    assert_names(warning, "row 2 of", str(outside), "2 of 4 files")


@pytest.mark.parametrize("pattern", ["../outside/*.png", "{outside}", "../data-2/*.png"])
def test_the_card_of_a_data_set_may_not_name_files_outside(tmp_path, outside, pattern):
    write_pictures(tmp_path / "data", "a.png")
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {pattern.format(outside=outside)!r}\n---\n"
    (tmp_path / "data/README.md").write_text(card)
    assert_names(
        error_of(read_dataset, tmp_path), "--dataset_name", "README.md", "secret.png", "not a file in the folder"
    )


def test_the_card_of_a_data_set_may_name_its_files(tmp_path):
    write_pictures(tmp_path / "data", "test.png", "validation.png")
    card = "---\nconfigs:\n- config_name: default\n  data_files: '*.png'\n---\n"
    (tmp_path / "data/README.md").write_text(card)
    assert len(read_dataset(tmp_path)) == 2


def test_a_hub_data_set_may_name_no_file(tmp_path, outside):
    paths = WrittenPaths(None)
    for path in (str(outside), "a.png", f"zip://a.png::{outside}"):
        assert paths.file(path) is None and not paths.is_in_archive(path)


def test_what_datasets_found_itself_may_be_in_its_caches(tmp_path, outside):
    write_pictures(tmp_path / "cache", "downloads/a.png")
    paths = FoundPaths(None, [tmp_path / "cache"])
    cached = str(tmp_path / "cache/downloads/a.png")
    assert paths.file(cached) == Path(cached)
    assert paths.is_in_archive(f"zip://a.png::{cached}")
    assert paths.file(str(outside)) is None
    assert not paths.is_in_archive(f"zip://a.png::{outside}")


def test_columns_that_are_no_captions_are_not_proposed(tmp_path):
    write_pictures(tmp_path / "data", "a.png")
    (tmp_path / "data/a.png").rename(tmp_path / "data/.a.png")
    row = {"photo": "a.png", "mask": "m.png", "year": 1984, "text": "a dog"}
    write_jsonl(tmp_path / "data", row, name="train.jsonl")
    message = error_of(read_dataset, tmp_path, image_column="photo", instance_prompt=None)
    assert_names(message, "--caption_column with one or more of 'text', or one --instance_prompt")
    row.pop("text")
    write_jsonl(tmp_path / "data", row, name="train.jsonl")
    message = error_of(read_dataset, tmp_path, image_column="photo", instance_prompt=None)
    assert "--caption_column" not in message


def test_the_picture_column_is_not_proposed_for_captions(tmp_path, caplog):
    write_parquet(tmp_path / "data", {"bytes": picture_bytes(BLUE), "path": None})
    read_dataset(tmp_path)
    assert not warnings_in(caplog)
    message = error_of(read_dataset, tmp_path, instance_prompt=None)
    assert_names(message, "pass one --instance_prompt")
    assert "'image'" not in message
