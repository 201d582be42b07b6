"""Groups of pictures that show the same subject."""

import datasets
import pytest

from data_helpers import assert_names, error_of, read_folder, read_pictures, write_jsonl, write_pictures


NAMES = ("a.png", "rex/b.png", "rex/c.png", "rex/beach/d.png")


def groups_of(pictures):
    return {picture.name: picture.group for picture in pictures}


def write_metadata(folder, **values):
    """A column per keyword, with one value per picture."""
    write_pictures(folder, *NAMES)
    rows = [{"file_name": name, "text": "x"} for name in NAMES]
    for column, of_rows in values.items():
        for row, value in zip(rows, of_rows, strict=True):
            row[column] = value
    write_jsonl(folder, *rows)


@pytest.mark.parametrize("captions", ["prompt", "sidecars", "metadata"])
def test_each_folder_is_a_group(tmp_path, captions):
    write_pictures(tmp_path, *NAMES)
    flags = {"instance_prompt": "x"}
    if captions == "metadata":
        write_metadata(tmp_path)
        flags = {"caption_column": ["text"]}
    if captions == "sidecars":
        for name in NAMES:
            (tmp_path / name).with_suffix(".txt").write_text("x")
        flags = {}
    expected = {"a.png": "", "rex/b.png": "rex", "rex/c.png": "rex", "rex/beach/d.png": "rex/beach"}
    assert groups_of(read_folder(tmp_path, **flags)) == expected


def test_a_column_of_metadata_names_the_groups(tmp_path):
    write_metadata(tmp_path, who=["rex", " rex ", 7, 0.5])
    groups = groups_of(read_folder(tmp_path, caption_column=["text"], group_column="who"))
    assert groups == dict(zip(NAMES, ["rex", "rex", "7", "0.5"], strict=True))


@pytest.mark.parametrize("value", [None, "", " ", True, float("nan"), [], ["rex"], {"name": "rex"}])
def test_a_bad_group_is_one_line(tmp_path, value):
    write_metadata(tmp_path, who=["rex", "rex", value, "rex"])
    message = error_of(read_folder, tmp_path, caption_column=["text"], group_column="who")
    assert_names(
        message,
        f"metadata.jsonl line 3, column 'who': expected a subject's name or number, got {value!r}; write it there",
    )


def test_the_name_of_a_group_is_text(tmp_path):
    write_metadata(tmp_path, who=["rex", "\ud83d", "rex", "rex"])
    message = error_of(read_folder, tmp_path, caption_column=["text"], group_column="who")
    assert_names(message, "metadata.jsonl line 2, column 'who'", "half of a character")


def test_a_column_that_does_not_exist(tmp_path):
    write_metadata(tmp_path)
    message = error_of(read_folder, tmp_path, caption_column=["text"], group_column="who")
    assert message == "--group_column who: metadata.jsonl has no such column; choose one of 'file_name', 'text'"


@pytest.mark.parametrize("has_sidecar", [False, True])
def test_groups_need_metadata(tmp_path, has_sidecar):
    write_pictures(tmp_path, "a.png")
    if has_sidecar:
        (tmp_path / "a.txt").write_text("x")
    message = error_of(read_folder, tmp_path, instance_prompt="x", group_column="who")
    assert_names(message, "--group_column: needs a metadata.jsonl or metadata.csv in --instance_data_dir")


def test_groups_of_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    write_pictures(tmp_path / "data", "cat/a.png", "rex/b.png")

    def read(**flags):
        flags = {"instance_prompt": "x"} | flags
        return read_pictures(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), **flags)

    assert [picture.group for picture in read()] == ["", ""]
    assert [picture.group for picture in read(group_column="label")] == ["0", "1"]  # the number of the class
    message = error_of(read, group_column="who")
    assert_names(
        message, f"--group_column who: {tmp_path / 'data'} has no such column; choose one of 'image', 'label'"
    )
    message = error_of(read, group_column="image")
    assert_names(message, "row 0 of", "column 'image': expected a subject's name or number, got <PIL")
    rows = [{"file_name": name, "who": who} for name, who in (("cat/a.png", "cat"), ("rex/b.png", None))]
    write_jsonl(tmp_path / "data", *rows)
    assert_names(error_of(read, group_column="who"), "row 1 of", "column 'who': expected a subject's name", "None")
