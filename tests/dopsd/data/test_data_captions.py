import pytest

from data_helpers import assert_names, captions_of, error_of, read_folder, warnings_in, write_jsonl, write_pictures


# .txt files


def test_sidecars(tmp_path, caplog):
    write_pictures(tmp_path, "a.png", "sub/b.c.jpg", "sub/d.webp", "e.png", "e.jpg")
    (tmp_path / "a.txt").write_bytes("\ufeff  ein Hündchen\r\n".encode())
    (tmp_path / "sub/b.c.txt").write_text("one line\n", encoding="utf-8")
    (tmp_path / "sub/d.TXT").write_text("007", encoding="utf-8")
    (tmp_path / "e.txt").write_text("both", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("not a caption", encoding="utf-8")
    assert captions_of(read_folder(tmp_path)) == {
        "a.png": ("ein Hündchen",),
        "e.jpg": ("both",),
        "e.png": ("both",),
        "sub/b.c.jpg": ("one line",),
        "sub/d.webp": ("007",),
    }
    assert not warnings_in(caplog)


def test_sidecars_win_over_the_prompt_with_a_warning(tmp_path, caplog):
    write_pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a dog")
    assert captions_of(read_folder(tmp_path, instance_prompt="a cat")) == {"a.png": ("a dog",)}
    (warning,) = warnings_in(caplog)
    assert_names(warning, "--instance_prompt is not used", ".txt")


def test_a_hidden_sidecar_is_skipped(tmp_path):
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
    assert_names(error_of(read_folder, tmp_path, instance_prompt="is not used"), *parts)


# Columns


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
    assert_names(warning, "--instance_prompt is not used", "--caption_column")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({}, ["metadata.jsonl", "--caption_column", "--instance_prompt", "'text'"]),
        ({"instance_prompt": "  "}, ["metadata.jsonl", "--caption_column", "--instance_prompt", "'text'"]),
        (
            {"caption_column": ["text", "prompt"]},
            ["--caption_column prompt", "metadata.jsonl", "choose one of 'text'"],
        ),
        ({"image_column": "x", "caption_column": ["text"]}, ["--image_column x", "'x_file_name'", "'file_name'"]),
    ],
)
def test_column_flag_errors(tmp_path, flags, parts):
    write_pictures(tmp_path, "a.png")
    write_jsonl(tmp_path, {"file_name": "a.png", "text": "a dog"})
    assert_names(error_of(read_folder, tmp_path, **flags), *parts)
