import pytest

from data_helpers import assert_names, captions_of, error_of, read_folder, warnings_in, write_jsonl, write_pictures


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


def test_editing_pairs_need_the_flag_for_their_picture_column(tmp_path):
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
        ([GOOD, "{'file_name': 1}"], ["metadata.jsonl line 2", "not valid JSON"]),
        ([GOOD, '["b.png", "a cat"]'], ["metadata.jsonl line 2", "not a JSON object"]),
        ([], ["metadata.jsonl", "no rows"]),
        (
            [{"file": "a.png", "text": "x"}],
            ["metadata.jsonl", "'file_name'", "'file', 'text'", "--image_column image"],
        ),
        ([GOOD, "", {"text": "a cat"}], ["metadata.jsonl line 3", "'file_name'", "None"]),
        ([GOOD, {"file_name": None, "text": "x"}], ["metadata.jsonl line 2", "'file_name'", "None"]),
        ([GOOD, {"file_name": " ", "text": "x"}], ["metadata.jsonl line 2", "'file_name'", "' '"]),
        ([GOOD, {"file_name": 7, "text": "x"}], ["metadata.jsonl line 2", "'file_name'", "7"]),
        ([GOOD, {"file_name": ["b.png"], "text": "x"}], ["metadata.jsonl line 2", "'file_name'", "b.png"]),
        ([GOOD, {"file_name": "/etc/b.png", "text": "x"}], ["metadata.jsonl line 2", "/etc/b.png", "is outside"]),
        ([GOOD, {"file_name": "../b.png", "text": "x"}], ["metadata.jsonl line 2", "../b.png", "is outside"]),
        ([GOOD, {"file_name": "s/../../b.png", "text": "x"}], ["metadata.jsonl line 2", "is outside"]),
        ([GOOD, {"file_name": "c.png", "text": "x"}], ["metadata.jsonl line 2", "there is no file 'c.png'"]),
        ([GOOD, {"file_name": ".", "text": "x"}], ["metadata.jsonl line 2", "there is no file"]),
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
    write_pictures(tmp_path, "b.png")  # what ../b.png names
    write_jsonl(tmp_path / "folder", *rows)
    message = error_of(read_folder, tmp_path / "folder", caption_column=["text"])
    assert_names(message, *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"", ["metadata.csv", "no rows"]),
        (b"file_name,text\n\n", ["metadata.csv", "no rows"]),
        (b"file_name;text\na.png;a dog\n", ["metadata.csv", "'file_name;text'"]),
        (b'file_name,text\na.png,"two\nlines"\nb.png\n', ["metadata.csv line 4", "expected 2 values, got 1"]),
        (b"file_name,text\na.png,a dog, a cat\nb.png,x\n", ["metadata.csv line 2", "expected 2 values, got 3"]),
        (b'file_name,text\na.png,"a dog\nb.png,x\n', ["metadata.csv line 2", "not valid CSV"]),
        (b"file_name,text,text\na.png,a,b\nb.png,a,b\n", ["metadata.csv", "twice", "'text', 'text'"]),
        (b"file_name,text\na.png,\nb.png,x\n", ["metadata.csv line 2", "'text'", "''"]),
        (b"file_name,text\na.png,d\xf6g\nb.png,x\n", ["metadata.csv", "UTF-8"]),
        (b"file_name,text\na.png,x\n\nb.jpg,x\n", ["metadata.csv line 4", "there is no file 'b.jpg'"]),
    ],
)
def test_metadata_csv_errors(tmp_path, text, parts):
    write_pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_bytes(text)
    assert_names(error_of(read_folder, tmp_path, caption_column=["text"]), *parts)
