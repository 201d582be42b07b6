"""The .txt files beside pictures: which picture they belong to, and files of several lines."""

import unicodedata

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


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def write_texts(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())


# Documentation beside the pictures


@pytest.mark.parametrize("name", ["README", "LICENSE", "notes", "readme"])
def test_a_text_file_without_a_picture_leaves_the_prompt(tmp_path, caplog, name):
    write_pictures(tmp_path, "a.png", "b.png")
    write_texts(tmp_path, **{name: "About these pictures"})
    assert set(captions_of(read_folder(tmp_path, instance_prompt="a dog")).values()) == {("a dog",)}
    (warning,) = warnings_in(caplog)
    assert_names(warning, f"{name}.txt", "--instance_prompt is the caption of every picture", "ignoring")


def test_a_text_file_without_a_picture_and_without_a_prompt_says_what_is_wrong(tmp_path):
    write_pictures(tmp_path, "a.png")
    write_texts(tmp_path, README="About these pictures")
    message = error_of(read_folder, tmp_path)
    assert_names(message, "README.txt", "no picture beside it has this name", "--instance_prompt")
    assert "other pictures have" not in message


def test_a_readme_beside_captions_is_ignored(tmp_path, caplog):
    write_pictures(tmp_path, "a.png")
    write_texts(tmp_path, README="About these pictures", a="a dog")
    assert captions_of(read_folder(tmp_path)) == {"a.png": ("a dog",)}
    (warning,) = warnings_in(caplog)
    assert_names(warning, "Ignoring", "README.txt")


def test_a_readme_beside_metadata_is_ignored(tmp_path):
    write_pictures(tmp_path, "a.png")
    write_texts(tmp_path, README="About these pictures", list="a.png")
    write_jsonl(tmp_path, {"file_name": "a.png", "text": "a dog"})
    assert captions_of(read_folder(tmp_path, caption_column=["text"])) == {"a.png": ("a dog",)}


def test_a_picture_named_readme_has_a_caption(tmp_path):
    write_pictures(tmp_path, "readme.png")
    write_texts(tmp_path, readme="a page")
    assert captions_of(read_folder(tmp_path)) == {"readme.png": ("a page",)}


# Names


@pytest.mark.parametrize(
    ("picture", "text"),
    [("IMG_1.JPG", "img_1"), ("img_1.jpg", "IMG_1"), (f"{COMPOSED}.png", DECOMPOSED), (f"{DECOMPOSED}.png", COMPOSED)],
)
def test_names_may_differ_in_case_and_in_the_form_of_accents(tmp_path, caplog, picture, text):
    write_pictures(tmp_path, picture)
    write_texts(tmp_path, **{text: "a dog"})
    assert captions_of(read_folder(tmp_path)) == {picture: ("a dog",)}
    assert not warnings_in(caplog)


def test_the_exact_name_wins(tmp_path):
    write_pictures(tmp_path, "a.png", "A.png")
    write_texts(tmp_path, a="small", A="large")
    assert captions_of(read_folder(tmp_path)) == {"a.png": ("small",), "A.png": ("large",)}


def test_a_caption_is_not_taken_from_another_picture(tmp_path):
    write_pictures(tmp_path, "a.png", "A.png")
    write_texts(tmp_path, a="small")
    assert_names(error_of(read_folder, tmp_path), "A.png", "has no caption", "A.txt")


def test_two_files_that_fit_one_picture_are_an_error(tmp_path):
    write_pictures(tmp_path, "Ab.png")
    write_texts(tmp_path, ab="x", AB="y")
    assert_names(error_of(read_folder, tmp_path), "Ab.png", "AB.txt", "ab.txt")


def test_one_file_that_fits_two_pictures_is_an_error(tmp_path):
    write_pictures(tmp_path, "Ab.png", "aB.png")
    write_texts(tmp_path, ab="x")
    assert_names(error_of(read_folder, tmp_path), "ab.txt", "Ab.png", "aB.png")


# Several lines


def test_several_lines_are_one_caption_with_a_warning(tmp_path, caplog):
    write_pictures(tmp_path, "a.png", "b.png", "c.png")
    write_texts(tmp_path, a="a dog\r\nit sits\r\n", b="\n\na cat\n", c="one\ntwo")
    captions = captions_of(read_folder(tmp_path))
    assert captions == {"a.png": ("a dog\r\nit sits",), "b.png": ("a cat",), "c.png": ("one\ntwo",)}
    (warning,) = warnings_in(caplog)
    assert_names(warning, "a.txt", "2 of 3", "--multiline_captions caption_per_line")


def test_the_choice_of_one_caption_gives_no_warning(tmp_path, caplog):
    write_pictures(tmp_path, "a.png")
    write_texts(tmp_path, a="a dog\nit sits\n")
    assert captions_of(read_folder(tmp_path, multiline_captions="one_caption")) == {"a.png": ("a dog\nit sits",)}
    assert not warnings_in(caplog)


def test_one_caption_per_line(tmp_path, caplog):
    write_pictures(tmp_path, "a.png", "b.png")
    write_texts(tmp_path, a=" a dog \r\n\n\rit sits\u2028here\n", b="a cat")
    captions = captions_of(read_folder(tmp_path, multiline_captions="caption_per_line"))
    assert captions == {"a.png": ("a dog", "it sits\u2028here"), "b.png": ("a cat",)}
    assert not warnings_in(caplog)


def test_a_bad_line_is_named(tmp_path):
    write_pictures(tmp_path, "a.png")
    write_texts(tmp_path, a="a dog\n\nbad \0")
    message = error_of(read_folder, tmp_path, multiline_captions="caption_per_line")
    assert_names(message, "a.txt line 3", "zero byte")


def test_the_choice_needs_text_files(tmp_path):
    write_pictures(tmp_path, "a.png")
    flags = {"instance_prompt": "x", "multiline_captions": "caption_per_line"}
    assert_names(error_of(read_folder, tmp_path, **flags), "--multiline_captions", ".txt")
    message = error_of(read_pictures, dataset_name=str(tmp_path), **flags)
    assert_names(message, "--multiline_captions", "--instance_data_dir")


def test_two_text_files_for_one_picture_are_named(tmp_path):
    write_pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.TXT").write_text("two")
    assert_names(error_of(read_folder, tmp_path), "a.TXT", "a.txt", "keep one of them")
