"""Editing pairs: the pictures that `--cond_image_column` names."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_helpers import (
    BLUE,
    GREEN,
    RED,
    YELLOW,
    assert_names,
    error_of,
    read_pictures,
    warnings_in,
    write_jsonl,
    write_pictures,
)
from dopsd.data.checking import check_pictures
from dopsd.data.images import read_image


def read_folder(folder, *cond_columns, **flags):
    flags = {"caption_column": ["text"]} | flags
    return read_pictures(instance_data_dir=str(folder), cond_image_column=list(cond_columns), **flags)


def read_dataset(folder, *cond_columns, **flags):
    flags = {"caption_column": ["text"], "cache_dir": str(folder.parent / "cache")} | flags
    return read_pictures(dataset_name=str(folder), cond_image_column=list(cond_columns), **flags)


def write_colors(folder, **colors):
    """One picture per color: source=GREEN is source.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, color in colors.items():
        Image.new("RGB", (8, 8), color).save(folder / f"{name}.png")


def sources_of(pictures):
    """Name -> names of the pictures to edit."""
    return {picture.name: [file.name for file in picture.cond_images] for picture in pictures}


def colors_of(pictures):
    """(target, *sources) of each picture."""
    return [tuple(read_image(one).getpixel((0, 0)) for one in (picture, *picture.cond_images)) for picture in pictures]


# A folder


@pytest.mark.parametrize("column", ["source_file_name", "source", "source_file_names"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_column_of_paths_is_found_by_each_of_its_names(tmp_path, caplog, column, suffix):
    write_colors(tmp_path, a=RED, b=BLUE, source=GREEN)
    if suffix == "jsonl":
        rows = [{"file_name": f"{name}.png", "source_file_name": "source.png", "text": "x"} for name in "ab"]
        write_jsonl(tmp_path, *rows)
    else:
        rows = "a.png,source.png,x\nb.png,./Source.png,x\n"
        (tmp_path / "metadata.csv").write_text(f"file_name,source_file_name,text\n{rows}")
    pictures = read_folder(tmp_path, column)
    assert sources_of(pictures) == {"a.png": ["source.png"], "b.png": ["source.png"]}
    assert colors_of(pictures) == [(RED, GREEN), (BLUE, GREEN)]
    assert not warnings_in(caplog)


def test_the_spelling_of_the_flag_goes_first(tmp_path):
    write_pictures(tmp_path, "a.png", "b.png")
    write_jsonl(tmp_path, {"file_name": "a.png", "source": "a.png", "source_file_name": "b.png", "text": "x"})
    assert sources_of(read_folder(tmp_path, "source")) == {"a.png": ["a.png"]}
    assert sources_of(read_folder(tmp_path, "source_file_name")) == {"a.png": ["b.png"]}


def test_lists_and_several_columns_follow_each_other(tmp_path):
    names = [f"{letter}.png" for letter in "abcdef"]
    write_pictures(tmp_path, *names)
    write_jsonl(
        tmp_path,
        {"file_name": "a.png", "style": "f.png", "source_file_names": ["e.png", "d.png", "e.png"], "text": "x"},
        {"file_name": "b.png", "style": ["c.png", "a.png"], "source_file_names": ["d.png"], "text": "x"},
    )
    pictures = read_folder(tmp_path, "source", "style")
    assert sources_of(pictures) == {
        "a.png": ["e.png", "d.png", "e.png", "f.png"],
        "b.png": ["d.png", "c.png", "a.png"],  # the target of another row
    }
    assert sources_of(read_folder(tmp_path, "style", "source"))["b.png"] == ["c.png", "a.png", "d.png"]


def test_pictures_in_lists_need_no_row_of_their_own_without_the_flag_either(tmp_path):
    write_pictures(tmp_path, "a.png", "b.png", "c.png")
    write_jsonl(tmp_path, {"file_name": "a.png", "source_file_names": ["b.png", 7, "c.png"], "text": "x"})
    assert len(read_pictures(instance_data_dir=str(tmp_path), caption_column=["text"])) == 1
    write_jsonl(tmp_path, {"file_name": "a.png", "source": ["b.png"], "text": "x"})
    assert_names(error_of(read_folder, tmp_path, "source"), "c.png: has no row in metadata.jsonl (1 of 3 pictures")


def test_columns_of_sources_and_groups_are_not_proposed_for_captions(tmp_path):
    write_pictures(tmp_path, "a.png")
    (tmp_path / "b").write_bytes((tmp_path / "a.png").read_bytes())
    write_jsonl(tmp_path, {"file_name": "a.png", "source": "b", "who": "rex", "text": "x"})
    message = error_of(read_folder, tmp_path, "source", caption_column=None, group_column="who")
    assert_names(message, "--caption_column with one or more of 'text', or")


def test_links_to_sources_outside_the_folder_are_counted(tmp_path, caplog):
    write_pictures(tmp_path, "outside.png", "folder/a.png", "folder/b.png")
    (tmp_path / "folder/c.png").symlink_to(tmp_path / "outside.png")
    write_jsonl(
        tmp_path / "folder",
        *({"file_name": name, "source": "c.png", "text": "x"} for name in ("a.png", "b.png")),
    )
    read_folder(tmp_path / "folder", "source")
    (warning,) = warnings_in(caplog)
    assert_names(warning, "c.png: is a link to", "1 of 4 files")


def test_hidden_sources_are_found_and_counted(tmp_path, caplog):
    write_pictures(tmp_path, "outside.png", "folder/a.png")
    (tmp_path / "folder/.c.png").symlink_to(tmp_path / "outside.png")
    write_jsonl(tmp_path / "folder", {"file_name": "a.png", "source": ".c.png", "text": "x"})
    assert sources_of(read_folder(tmp_path / "folder", "source")) == {"a.png": [".c.png"]}
    assert_names(warnings_in(caplog)[0], "1 of 3 files")


GOOD = {"file_name": "a.png", "source": "b.png", "text": "x"}
ROW = "metadata.jsonl line 2, column 'source'"
EXPECTED = "expected the path of a picture, got"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": "d.png"}, f"{ROW}: there is no file 'd.png'; correct the path or delete the row"),
        ({"source": ["b.png", "d.png"]}, f"{ROW}, item 2 of 2: there is no file 'd.png'; correct the path or"),
        ({"source": "../b.png"}, f"{ROW}: '../b.png' is outside --instance_data_dir; give a path inside that folder"),
        ({"source": ["/b.png"]}, f"{ROW}, item 1 of 1: '/b.png' is outside --instance_data_dir; give a path"),
        ({"source": ""}, f"{ROW}: {EXPECTED} ''; write the path there"),
        ({"source": " "}, f"{ROW}: {EXPECTED} ' '; write the path there"),
        ({"source": None}, f"{ROW}: {EXPECTED} None; write the path there"),
        ({"source": 7}, f"{ROW}: {EXPECTED} 7; write the path there"),
        ({"source": {"path": "b.png"}}, f"{ROW}: {EXPECTED} {{'path': 'b.png'}}; write the path there"),
        ({"source": []}, f"{ROW}: is an empty list; write the path of a picture to edit into it"),
        ({"source": ["b.png", None]}, f"{ROW}, item 2 of 2: {EXPECTED} None; write the path there"),
        ({"source": [["b.png"]]}, f"{ROW}, item 1 of 1: {EXPECTED} ['b.png']; write the path there"),
        ({}, f"{ROW}: {EXPECTED} None; write the path there"),
        (
            {"file_name": "a.png", "source": "b.png"},
            "metadata.jsonl line 2: a.png is already listed in line 1; give each row",
        ),
    ],
)
def test_bad_rows(tmp_path, row, message):
    write_pictures(tmp_path / "folder", "a.png", "b.png", "c.png")
    write_pictures(tmp_path, "b.png")
    write_jsonl(tmp_path / "folder", GOOD, {"file_name": "c.png", "text": "x"} | row)
    assert error_of(read_folder, tmp_path / "folder", "source").startswith(message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["before"], "--cond_image_column before: metadata.jsonl has no such column; choose one of 'source', 'text'"),
        (["source", ""], "--cond_image_column : metadata.jsonl has no such column; choose one of 'source', 'text'"),
        (["image"], "--cond_image_column image: is also the column of --image_column; name the column with the"),
        (["file_name"], "--cond_image_column file_name: is also the column of --image_column; name the column with"),
        (["source", "source_file_name"], "--cond_image_column source_file_name: names the column 'source' again; nam"),
    ],
)
def test_bad_columns(tmp_path, flags, message):
    write_pictures(tmp_path, "a.png", "b.png")
    write_jsonl(tmp_path, GOOD)
    assert error_of(read_folder, tmp_path, *flags).startswith(message)


def test_the_columns_of_both_flags_may_be_the_same_under_two_names(tmp_path):
    write_pictures(tmp_path, "a.png", "b.png")
    write_jsonl(tmp_path, {"target_file_name": "a.png", "source_file_name": "b.png", "text": "x"})
    assert sources_of(read_folder(tmp_path, "source", image_column="target")) == {"a.png": ["b.png"]}
    message = error_of(read_folder, tmp_path, "target", image_column="target")
    assert_names(message, "--cond_image_column target: is also the column of --image_column")
    message = error_of(read_folder, tmp_path, "source")
    assert_names(message, "metadata.jsonl: --image_column image needs the column 'file_name'")


@pytest.mark.parametrize("has_sidecar", [False, True])
def test_pairs_need_metadata(tmp_path, has_sidecar):
    write_pictures(tmp_path, "a.png", "b.png")
    if has_sidecar:
        (tmp_path / "a.txt").write_text("x")
    message = error_of(read_folder, tmp_path, "source", caption_column=None, instance_prompt="x")
    assert_names(message, "--cond_image_column: needs a metadata.jsonl or metadata.csv in --instance_data_dir; add")


@pytest.mark.parametrize(
    ("content", "problem"), [(b"not a picture", "unknown format"), (None, "No such file"), (b"", "unknown format")]
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, content, problem):
    write_pictures(tmp_path, "a.png")
    if content is None:
        (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    else:
        (tmp_path / "b.png").write_bytes(content)
    write_jsonl(tmp_path, GOOD)
    ((source,),) = [picture.cond_images for picture in read_folder(tmp_path, "source")]
    message = error_of(check_pictures, [source], resolution=64, disable_progress=True)
    assert_names(message, "b.png: cannot be read as a picture (", problem)


# The teacher's captions, which need no target


TEACHER = {"teacher_caption_column": "long"}


def test_teacher_captions_of_sources_without_targets(tmp_path):
    write_colors(tmp_path / "data", b=GREEN, c=BLUE)
    row = {"source_file_name": "b.png", "text": "paint it", "long": "paint it red, all of it"}
    write_jsonl(tmp_path / "data", row, row | {"source_file_name": "c.png"})
    expected = [(None, ("paint it",), "paint it red, all of it")] * 2
    for pictures in (
        read_folder(tmp_path / "data", "source", **TEACHER),
        read_dataset(tmp_path / "data", "source", **TEACHER),
    ):
        assert [(one.source, one.captions, one.teacher_caption) for one in pictures] == expected
        assert [read_image(one.cond_images[0]).getpixel((0, 0)) for one in pictures] == [GREEN, BLUE]
    message = error_of(read_folder, tmp_path / "data", "source", image_column="target", **TEACHER)
    assert_names(message, "--image_column target needs the column 'target_file_name'")
    write_jsonl(tmp_path / "data", row)
    message = error_of(read_folder, tmp_path / "data", "source", **TEACHER)
    assert_names(message, "c.png: has no row in metadata.jsonl")
    (tmp_path / "data/c.png").unlink()
    write_jsonl(tmp_path / "data", row | {"source_file_name": "c.png"})
    message = error_of(read_folder, tmp_path / "data", "source", **TEACHER)
    assert_names(message, "metadata.jsonl line 1, column 'source_file_name': there is no file 'c.png'")


# A data set


@pytest.mark.parametrize("column", ["source", "source_file_name"])
def test_imagefolder_of_pairs(tmp_path, column):
    write_colors(tmp_path / "data", a=RED, b=BLUE, c=GREEN)
    rows = [{"file_name": f"{name}.png", "source_file_name": "c.png", "text": "x"} for name in "ab"]
    write_jsonl(tmp_path / "data", *rows)
    pictures = read_dataset(tmp_path / "data", column)
    assert colors_of(pictures) == [(RED, GREEN), (BLUE, GREEN)]
    assert sources_of(pictures)[f"row 1 of {tmp_path / 'data'}"] == [f"row 1 of {tmp_path / 'data'}, column 'source'"]


def test_imagefolder_of_lists(tmp_path, caplog):
    write_colors(tmp_path / "data", a=RED, b=BLUE, c=GREEN)
    Image.new("RGB", (8, 8), YELLOW).save(tmp_path / "yellow.png")
    (tmp_path / "data/d.png").symlink_to(tmp_path / "yellow.png")
    write_jsonl(
        tmp_path / "data",
        {"file_name": "a.png", "source_file_names": ["d.png", "c.png"], "style_file_name": "c.png", "text": "x"},
        {"file_name": "b.png", "source_file_names": ["c.png"], "style_file_name": "d.png", "text": "x"},
    )
    pictures = read_dataset(tmp_path / "data", "source", "style")
    assert colors_of(pictures) == [(RED, YELLOW, GREEN, GREEN), (BLUE, GREEN, YELLOW)]
    (warning,) = warnings_in(caplog)
    assert_names(warning, "row 0 of", "column 'source', item 1 of 2: is a link to", "2 of 7 files")


def test_imagefolder_that_leaves_out_a_picture_is_an_error_with_pairs_too(tmp_path):
    write_pictures(tmp_path / "data", "a.png", "b.png", "c.png")
    write_jsonl(tmp_path / "data", {"file_name": "a.png", "source_file_name": "b.png", "text": "x"})
    message = error_of(read_dataset, tmp_path / "data", "source")
    assert_names(message, "does not read c.png (1 of 3 pictures are left out")


def encoded(tmp_path, color):
    write_colors(tmp_path, encoded=color)
    return {"bytes": (tmp_path / "encoded.png").read_bytes(), "path": None}


def write_table(tmp_path, rows, features):
    """A Parquet file that is not written by `datasets`, which would decode pictures."""
    (tmp_path / "data").mkdir()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")} | features)
    pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), tmp_path / "data/train.parquet")
    return tmp_path / "data"


def test_parquet_with_columns_of_pictures_and_of_lists(tmp_path):
    red, green, blue, yellow = (encoded(tmp_path, color) for color in (RED, GREEN, BLUE, YELLOW))
    folder = write_table(
        tmp_path,
        [
            {"image": red, "text": "x", "source": green, "styles": [blue, yellow], "masks": [blue]},
            {"image": blue, "text": "x", "source": red, "styles": [green], "masks": [blue]},
        ],
        {
            "source": datasets.Image(),
            "styles": datasets.List(datasets.Image()),
            "masks": datasets.LargeList(datasets.Image()),
        },
    )
    pictures = read_dataset(folder, "styles", "source", "masks")
    assert colors_of(pictures) == [(RED, BLUE, YELLOW, GREEN, BLUE), (BLUE, GREEN, RED, BLUE)]
    assert [file.name for file in pictures[0].cond_images] == [
        f"row 0 of {folder}, column 'styles', item 1 of 2",
        f"row 0 of {folder}, column 'styles', item 2 of 2",
        f"row 0 of {folder}, column 'source'",
        f"row 0 of {folder}, column 'masks', item 1 of 1",
    ]


def test_lists_of_paths_in_a_data_set(tmp_path):
    write_colors(tmp_path / "data/.pictures", a=RED, b=GREEN)
    rows = [{"image": ".pictures/a.png", "source": [".pictures/b.png", ".pictures/a.png"], "text": "x"}]
    write_jsonl(tmp_path / "data", *rows, name="train.jsonl")
    assert colors_of(read_dataset(tmp_path / "data", "source")) == [(RED, GREEN, RED)]


LIST = {"source": datasets.List(datasets.Image())}
ONE = {"source": datasets.Image()}


@pytest.mark.parametrize(
    ("features", "cell", "parts"),
    [
        (ONE, None, ["row 1 of", ", column 'source': cannot be read as a picture (column 'source' is empty); add"]),
        (ONE, {"bytes": b"x"}, ["row 1 of", ", column 'source': cannot be read as a picture (unknown format); conv"]),
        (ONE, {"path": "/etc/x.png"}, ["row 1 of", "column 'source': '/etc/x.png' is not a file of the data set; p"]),
        (
            LIST,
            None,
            ["row 1 of", ", column 'source': is an empty list; put a picture to edit into it, or remove the"],
        ),
        (LIST, [], ["row 1 of", ", column 'source': is an empty list; put a picture to edit into it, or remove the"]),
        (LIST, [None], ["row 1 of", "'source', item 1 of 1: cannot be read as a picture (column 'source' is empty)"]),
        (LIST, [{"bytes": b"x"}], ["row 1 of", "'source', item 1 of 1: cannot be read as a picture (unknown format)"]),
        (
            LIST,
            [{"path": "../x.png"}],
            ["row 1 of", "'source', item 1 of 1: '../x.png' is not a file of the data set"],
        ),
    ],
)
def test_bad_cells(tmp_path, features, cell, parts):
    good = encoded(tmp_path, RED)
    rows = [{"image": good, "text": "x", "source": good if features is ONE else [good, good]}]
    folder = write_table(tmp_path, [*rows, {"image": good, "text": "x", "source": cell}], features)

    def read_and_check():
        sources = [file for picture in read_dataset(folder, "source") for file in picture.cond_images]
        check_pictures(sources, resolution=64, disable_progress=True)

    assert_names(error_of(read_and_check), *parts)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("before", 1, "--cond_image_column before: {} has no such column; choose one of 'text', 'source'"),
        ("image", 1, "--cond_image_column image: is also the column of --image_column; name the column with the"),
        ("file_name", 1, "--cond_image_column file_name: is also the column of --image_column; name the column with"),
        ("source", 1, "--cond_image_column source: this column of {} contains no pictures ("),
        ("source", [1], "--cond_image_column source: this column of {} contains no pictures ("),
        ("source", [["a.png"]], "--cond_image_column source: this column of {} contains no pictures ("),
        ("source", [], "row 0 of {}, column 'source': is an empty list; put a picture to edit into it, or remove"),
        ("source", "a.png", "row 0 of {}, column 'source': 'a.png' is not a file of the data set; put the pictures"),
        ("source", ["a.png"], "row 0 of {}, column 'source', item 1 of 1: 'a.png' is not a file of the data set; p"),
    ],
)
def test_bad_columns_of_a_data_set(tmp_path, column, value, message):
    write_colors(tmp_path / "data", **{".b": RED})
    write_jsonl(tmp_path / "data", {"image": ".b.png", "text": "x", "source": value}, name="train.jsonl")
    error = error_of(read_dataset, tmp_path / "data", column)
    assert error.startswith(message.format(tmp_path / "data"))
