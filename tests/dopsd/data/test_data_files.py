"""Files that are named in other ways than on disk, links, and files that are not regular."""

import os
import socket
import unicodedata

import pytest

from data_helpers import (
    as_picture,
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
from dopsd.data.files import relative_name
from dopsd.data.images import read_image


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))


# Names in metadata


@pytest.mark.parametrize(
    ("on_disk", "written"),
    [
        (DECOMPOSED, COMPOSED),
        (COMPOSED, DECOMPOSED),
        ("sub/1.png", r"sub\1.png"),
        ("sub/1.png", r".\sub\1.png"),
        ("IMG_1.JPG", "img_1.jpg"),
        (f"Bilder/{DECOMPOSED}", "bilder\\" + COMPOSED),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_metadata_may_write_names_in_other_ways(tmp_path, caplog, on_disk, written, suffix):
    write_pictures(tmp_path, on_disk)
    if suffix == "csv":
        (tmp_path / "metadata.csv").write_text(f"file_name,text\n{written},a dog\n", encoding="utf-8")
    else:
        write_jsonl(tmp_path, {"file_name": written, "text": "a dog"})
    (picture,) = read_folder(tmp_path, caption_column=["text"])
    assert picture.name == on_disk
    assert read_image(picture).size == (8, 8)
    assert not warnings_in(caplog)


def test_the_literal_name_wins(tmp_path):
    names = [r"a\b.png", "a/b.png", "x.png", "X.png"]
    write_pictures(tmp_path, *names)
    write_jsonl(tmp_path, *({"file_name": name, "text": name} for name in names))
    assert captions_of(read_folder(tmp_path, caption_column=["text"])) == {name: (name,) for name in names}


def test_a_name_that_fits_two_files_is_an_error(tmp_path):
    write_pictures(tmp_path, "a.png", "A.png")
    write_jsonl(tmp_path, {"file_name": "a.PNG", "text": "x"})
    message = error_of(read_folder, tmp_path, caption_column=["text"])
    assert_names(message, "metadata.jsonl line 1", "'a.PNG'", "'a.png'", "'A.png'")


def test_two_rows_for_one_picture_in_two_spellings_are_an_error(tmp_path):
    write_pictures(tmp_path, "sub/a.png")
    write_jsonl(tmp_path, *({"file_name": name, "text": "x"} for name in ("sub/a.png", r"sub\a.png")))
    message = error_of(read_folder, tmp_path, caption_column=["text"])
    assert_names(message, "metadata.jsonl line 2", "already listed in line 1")


@pytest.mark.parametrize("name", ["..\\b.png", "sub\\..\\..\\b.png", "\\b.png"])
def test_backslashes_do_not_lead_out_of_the_folder(tmp_path, name):
    write_pictures(tmp_path, "b.png", "folder/a.png")
    write_jsonl(tmp_path / "folder", {"file_name": name, "text": "x"})
    message = error_of(read_folder, tmp_path / "folder", caption_column=["text"])
    assert_names(message, "metadata.jsonl line 1", repr(name), "is outside")


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "a/" * 3000 + "b.png", "a\0b.png", "\ud83d.png", "\udce9.png"])
def test_names_that_no_file_can_have(tmp_path, name):
    write_pictures(tmp_path, "a.png")
    write_jsonl(tmp_path, {"file_name": name, "text": "x"})
    message = error_of(read_folder, tmp_path, caption_column=["text"])
    assert_names(message, "metadata.jsonl line 1", "there is no file", "delete the row")
    assert len(message) < 400 and message.isprintable()


def test_columns_of_paths_are_not_proposed_for_captions(tmp_path):
    write_pictures(tmp_path, "a.png", "b.png")
    write_jsonl(tmp_path, {"file_name": "a.png", "mask_file_name": "b.png", "thumb": "b.png", "text": "x", "size": 8})
    assert_names(error_of(read_folder, tmp_path), "--caption_column with one or more of 'text', or")
    assert_names(error_of(read_folder, tmp_path, caption_column=["caption"]), "choose one of 'text'")


def test_many_columns_are_not_all_listed(tmp_path):
    write_pictures(tmp_path, "a.png")
    write_jsonl(tmp_path, {"file_name": "a.png"} | {f"text {number}": "x" for number in range(100)})
    message = error_of(read_folder, tmp_path)
    assert_names(message, "'text 7', 92 more")
    assert len(message) < 400


def test_a_name_that_is_not_utf8_is_read(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_pictures(tmp_path, f"{name}.png")
    (tmp_path / f"{name}.txt").write_text("a dog")
    (picture,) = read_folder(tmp_path)
    assert picture.captions == ("a dog",)
    assert read_image(picture).size == (8, 8)
    (tmp_path / f"{name}.png").write_bytes(b"")
    assert_names(error_of(read_image, picture), r"caf\udce9.png")


def test_names_are_the_same_in_every_locale(tmp_path, monkeypatch):
    in_ascii_locale = COMPOSED.encode().decode("ascii", "surrogateescape")
    assert relative_name(tmp_path / COMPOSED, tmp_path) == COMPOSED
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("ascii", "surrogateescape"))
    assert relative_name(tmp_path / in_ascii_locale, tmp_path) == COMPOSED


def test_messages_show_no_control_characters(tmp_path):
    write_pictures(tmp_path, "a\n\x1b[2J.png", "b.png")
    (tmp_path / "b.txt").write_text("x")
    assert_names(error_of(read_folder, tmp_path), r"a\n\x1b[2J.png: has no caption")


# Links


def test_links_out_of_the_folder_give_one_warning_with_their_number(tmp_path, caplog):
    write_pictures(tmp_path, "outside/a.png", "outside/sub/b.png", "folder/c.png", "folder/inside/d.png")
    (tmp_path / "folder/a.png").symlink_to(tmp_path / "outside/a.png")
    (tmp_path / "folder/link").symlink_to(tmp_path / "outside/sub")
    (tmp_path / "folder/e.png").symlink_to(tmp_path / "folder/c.png")
    (tmp_path / "alias").symlink_to(tmp_path / "folder")
    assert len(read_folder(tmp_path / "alias", instance_prompt="x")) == 5
    (warning,) = warnings_in(caplog)
    assert_names(warning, "a.png", str(tmp_path / "outside/a.png"), "2 of 5 files")


def test_links_inside_the_folder_give_no_warning(tmp_path, caplog):
    write_pictures(tmp_path, "folder/a.png", "folder-2/b.png")
    (tmp_path / "folder/c.png").symlink_to(tmp_path / "folder/a.png")
    assert len(read_folder(tmp_path / "folder", instance_prompt="x")) == 2
    assert not warnings_in(caplog)
    (tmp_path / "folder/d.png").symlink_to(tmp_path / "folder-2/b.png")  # its path starts with the folder's
    read_folder(tmp_path / "folder", instance_prompt="x")
    assert len(warnings_in(caplog)) == 1


def test_captions_that_are_links_out_of_the_folder_count(tmp_path, caplog):
    write_pictures(tmp_path, "folder/a.png")
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "folder/a.txt").symlink_to(tmp_path / "a.txt")
    read_folder(tmp_path / "folder")
    (warning,) = warnings_in(caplog)
    assert_names(warning, "a.txt", "1 of 2 files")


# Files that have no end, or no content


def make_fifo(path):
    os.mkfifo(path)


def make_device(path):
    path.symlink_to("/dev/zero")


def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is limited to 108 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def make_dangling_link(path):
    path.symlink_to(path.with_name("gone"))


def make_loop(path):
    path.symlink_to(path)


UNREADABLE = [make_fifo, make_device, make_socket, make_dangling_link, make_loop]


@pytest.mark.parametrize("make", UNREADABLE)
@pytest.mark.parametrize("name", ["a.png", "a.txt", "metadata.jsonl", "metadata.csv"])
def test_files_that_cannot_be_read_are_one_line(tmp_path, make, name):
    if name != "a.png":
        write_pictures(tmp_path, "a.png")
    make(tmp_path / name)
    if name == "a.png":
        pictures = read_folder(tmp_path, instance_prompt="x")
        message = error_of(check_pictures, pictures, resolution=64, disable_progress=True)
    else:
        message = error_of(read_folder, tmp_path, caption_column=["text"] if "metadata" in name else None)
    assert_names(message, name, "cannot be read", "correct that, or remove it")


@pytest.mark.parametrize("make", UNREADABLE)
def test_other_files_that_cannot_be_read_are_ignored(tmp_path, make):
    write_pictures(tmp_path, "a.png")
    make(tmp_path / "notes")
    assert len(read_folder(tmp_path, instance_prompt="x")) == 1


@pytest.mark.parametrize("make", [make_fifo, make_device, make_socket])
def test_a_data_set_with_a_file_that_has_no_end(tmp_path, make):
    write_pictures(tmp_path / "data", "sub/a.png")
    make(tmp_path / "data/sub/train.jsonl")
    message = error_of(
        read_pictures, dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), instance_prompt="x"
    )
    assert_names(message, "--dataset_name", "train.jsonl", "not a regular file")


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    write_pictures(tmp_path, "a.png", "sub/b.png")
    listed = type(tmp_path).iterdir

    def refuse_sub(path):
        if path.name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse_sub)
    assert_names(error_of(read_folder, tmp_path, instance_prompt="x"), "sub", "Permission denied")


def test_a_folder_name_that_is_too_long(tmp_path):
    message = error_of(read_folder, tmp_path / ("a" * 5000), instance_prompt="x")
    assert_names(message, "--instance_data_dir", "File name too long")
    assert len(message) < 400


def test_a_picture_that_is_a_folder_is_no_picture(tmp_path):
    write_pictures(tmp_path, "a.png/b.png")
    assert list(captions_of(read_folder(tmp_path, instance_prompt="x"))) == ["a.png/b.png"]
    assert_names(error_of(read_image, as_picture(tmp_path / "a.png")), "a.png", "not a regular file")
