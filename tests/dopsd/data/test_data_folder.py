import pytest

from data_helpers import (
    assert_names,
    captions_of,
    error_of,
    read_folder,
    read_pictures,
    warnings_in,
    write_jsonl,
    write_pictures,
)
from dopsd.data.images import read_image


def test_folder_that_is_missing_a_file_or_without_pictures(tmp_path):
    write_pictures(tmp_path, "a.png", ".hidden/b.png", "empty/__pycache__/c.png", "empty/.d.png")
    assert_names(error_of(read_folder, tmp_path / "gone"), "--instance_data_dir", "gone", "does not exist")
    assert_names(error_of(read_folder, tmp_path / "a.png"), "--instance_data_dir", "a.png", "is a file")
    message = error_of(read_folder, tmp_path / "empty", instance_prompt="x")
    assert_names(message, "--instance_data_dir", "empty", "no picture")


@pytest.mark.parametrize("name", ["", "  "])
def test_blank_folder_name(name):
    assert_names(error_of(read_pictures, instance_data_dir=name), f"--instance_data_dir {name!r}", "blank")


def test_a_dangling_link_is_an_error_and_not_skipped(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert_names(error_of(read_image, read_folder(tmp_path, instance_prompt="x")[0]), "a.png")


def test_heic_is_a_picture_and_its_error_says_convert(tmp_path):
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    pictures = read_folder(tmp_path, instance_prompt="x")
    assert [picture.name for picture in pictures] == ["a.HEIC"]
    message = error_of(read_image, pictures[0])
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


def test_five_ignored_files_are_all_named(tmp_path, caplog):
    write_pictures(tmp_path, "a.png")
    for name in "bcdef":
        (tmp_path / name).write_bytes(b"x")
    read_folder(tmp_path, instance_prompt="x")
    (warning,) = warnings_in(caplog)
    assert warning.endswith("b, c, d, e, f")


def test_no_warning_if_every_file_is_used(tmp_path, caplog):
    write_pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a dog")
    read_folder(tmp_path)
    assert not warnings_in(caplog)


@pytest.mark.parametrize("prompt", [None, "", "  \n"])
def test_no_caption_at_all_names_the_three_ways(tmp_path, prompt):
    write_pictures(tmp_path, "a.png")
    message = error_of(read_folder, tmp_path, instance_prompt=prompt)
    assert_names(message, "--instance_data_dir", "--instance_prompt", ".txt", "metadata.jsonl", "metadata.csv")


@pytest.mark.parametrize("with_sidecar", [False, True])
@pytest.mark.parametrize(
    ("flag", "value"),
    [("caption_column", ["text"]), ("image_column", "target"), ("teacher_caption_column", "long")],
    ids=lambda value: str(value),
)
def test_column_flags_need_metadata(tmp_path, flag, value, with_sidecar):
    write_pictures(tmp_path, "a.png")
    if with_sidecar:
        (tmp_path / "a.txt").write_text("a dog")
    message = error_of(read_folder, tmp_path, instance_prompt="x", **{flag: value})
    assert_names(message, f"--{flag}", "metadata.jsonl")


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


# The teacher's captions


CAPTIONS = {"caption_column": ["short"], "teacher_caption_column": "long"}


def test_teacher_captions(tmp_path):
    write_pictures(tmp_path, "a.png", "b.png")
    write_jsonl(
        tmp_path,
        {"file_name": "b.png", "short": "a cat", "long": "a fat cat"},
        {"file_name": "a.png", "short": "a dog", "long": "a big dog"},
    )
    first, second = read_folder(tmp_path, **CAPTIONS)
    assert (first.name, first.captions, first.teacher_caption) == ("a.png", ("a dog",), "a big dog")
    assert (second.name, second.captions, second.teacher_caption) == ("b.png", ("a cat",), "a fat cat")
    assert second.source == tmp_path / "b.png"
    assert read_folder(tmp_path, caption_column=["short"])[0].teacher_caption is None


def test_teacher_captions_need_no_pictures(tmp_path):
    rows = [{"short": f"dog {number}", "long": f"a big dog {number}"} for number in range(11)]
    write_jsonl(tmp_path, *rows)
    pictures = read_folder(tmp_path, **CAPTIONS)
    assert [picture.name for picture in pictures] == [f"metadata.jsonl line {number}" for number in range(1, 12)]
    assert [picture.captions for picture in pictures] == [(row["short"],) for row in rows]
    assert [picture.teacher_caption for picture in pictures] == [row["long"] for row in rows]
    assert {picture.source for picture in pictures} == {None}
    message = error_of(read_folder, tmp_path, caption_column=["short"])
    assert_names(message, "--instance_data_dir", str(tmp_path), "no picture")


def test_teacher_captions_need_metadata(tmp_path):
    assert_names(error_of(read_folder, tmp_path, **CAPTIONS), "--caption_column", "metadata.jsonl")
    message = error_of(read_folder, tmp_path, instance_prompt="x", teacher_caption_column="long")
    assert_names(message, "--teacher_caption_column", "metadata.jsonl")


def test_teacher_captions_with_pictures_need_the_column_of_paths(tmp_path):
    write_pictures(tmp_path, "a.png")
    write_jsonl(tmp_path, {"short": "a dog", "long": "a big dog"})
    assert_names(error_of(read_folder, tmp_path, **CAPTIONS), "metadata.jsonl", "'file_name'", "'short', 'long'")


def test_paths_of_missing_pictures_are_an_error_with_teacher_captions_too(tmp_path):
    write_jsonl(tmp_path, {"file_name": "a.png", "short": "a dog", "long": "a big dog"})
    assert_names(error_of(read_folder, tmp_path, **CAPTIONS), "metadata.jsonl line 1", "there is no file 'a.png'")


@pytest.mark.parametrize("value", [None, " ", 7])
def test_missing_teacher_captions(tmp_path, value):
    write_jsonl(tmp_path, {"short": "a dog", "long": "a big dog"}, {"short": "a cat", "long": value})
    assert_names(error_of(read_folder, tmp_path, **CAPTIONS), "metadata.jsonl line 2", "'long'", repr(value))
    message = error_of(read_folder, tmp_path, **CAPTIONS | {"teacher_caption_column": "detailed"})
    assert_names(message, "--teacher_caption_column detailed", "metadata.jsonl", "'short', 'long'")


def test_one_prompt_for_the_student_and_captions_for_the_teacher(tmp_path):
    write_jsonl(tmp_path, {"long": "a big dog"})
    pictures = read_folder(tmp_path, instance_prompt="a dog", teacher_caption_column="long")
    assert captions_of(pictures) == {"metadata.jsonl line 1": ("a dog",)}
    assert pictures[0].teacher_caption == "a big dog"
