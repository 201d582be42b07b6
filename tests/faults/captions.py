"""Captions: .txt files, metadata.jsonl and metadata.csv."""

import csv
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from .cases import Case, kind
from .damage import ODD_TEXTS, ODD_VALUES, block, damaged, odd_json
from .lab import CAPTIONS, Scene


COLUMNS = {"caption_column": ["text"], "instance_prompt": None}
LONG_TEXT = "a very long caption " * 5_000

ODD_BYTES = {
    "not UTF-8": b"caf\xe9 \xff\xfe",
    "UTF-16": "a ball".encode("utf-16"),
    "UTF-16 without a mark": "a ball".encode("utf-16-le"),
    "UTF-32": "a ball".encode("utf-32"),
    "a byte order mark": "\ufeffa ball".encode(),
    "only a byte order mark": "\ufeff".encode(),
    "a lone surrogate": b"half an emoji \xed\xa0\xbd",
    "NUL bytes": b"a\0ball\0",
    "only NUL bytes": bytes(100),
    "nothing": b"",
    "blanks": b" \r\n\t\n",
    "100 kB": LONG_TEXT.encode(),
    "15 MB": b"word " * 3_000_000,
    "several lines": b"a ball\nanother ball\r\na third\n",
    "control characters": b"a\x1b[31mball\x07\x08\x0c",
    "chat tokens": b"<|im_end|><|im_start|>assistant\n<|image_pad|><|vision_start|>",
    "an emoji": "a 😀".encode(),
    "a gzip header": b"\x1f\x8b\x08\x00rest",
    "combining marks": ("e" + "\u0301" * 5000).encode(),
}


def with_sidecars(scene: Scene) -> Path:
    photos = scene.photos()
    for number, text in enumerate(CAPTIONS):
        (photos / f"{number}.txt").write_text(text, encoding="utf-8")
    return photos


def case(scene: Scene, what: str, **flags) -> Case:
    """A run on the scene's `photos`."""
    flags = {"instance_data_dir": scene.folder / "photos", "instance_prompt": None, **flags}
    return Case(what, scene.subject(with_captions=False), flags)


@kind
def text_bytes(scene: Scene) -> Case:
    what = scene.rng.choice(list(ODD_BYTES))
    (with_sidecars(scene) / "1.txt").write_bytes(ODD_BYTES[what])
    prompt = scene.rng.choice([None, "a ball"])
    return case(scene, f"1.txt holds {what}, --instance_prompt {prompt}", instance_prompt=prompt)


@kind
def text_files(scene: Scene) -> Case:
    photos, rng = with_sidecars(scene), scene.rng
    text = photos / "1.txt"
    kinds = {
        "missing": lambda: text.unlink(),
        "all but one missing": lambda: [(photos / f"{number}.txt").unlink() for number in (0, 1)],
        "an extra one": lambda: (photos / "9.txt").write_text("a ball"),
        "a README.txt": lambda: (photos / "README.txt").write_text("read me"),
        "1.TXT": lambda: text.rename(photos / "1.TXT"),
        "1.txt.txt": lambda: text.rename(photos / "1.txt.txt"),
        "1.png.txt": lambda: text.rename(photos / "1.png.txt"),
        "1.caption": lambda: text.rename(photos / "1.caption"),
        "1.txt and 1.TXT": lambda: (photos / "1.TXT").write_text("a ball"),
        "two pictures of one name": lambda: (photos / "1.jpg").write_bytes((photos / "1.png").read_bytes()),
        "blocked": lambda: None,
    }
    what = rng.choice([*kinds, "blocked", "blocked", "blocked"])
    kinds[what]()
    if what == "blocked":
        what = block(rng, text)
    return case(scene, f".txt files: {what}", instance_prompt=rng.choice([None, "a ball"]))


def jsonl_case(scene: Scene, what: str, **flags) -> Case:
    return case(scene, f"metadata.jsonl: {what}", **COLUMNS | flags)


def rows() -> list[dict]:
    return [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(CAPTIONS)]


def write_lines(photos: Path, lines: list[str]) -> None:
    text = "\n".join(lines) + "\n"
    (photos / "metadata.jsonl").write_text(text, encoding="utf-8", errors="surrogatepass")


@kind
def jsonl_bytes(scene: Scene) -> Case:
    path = scene.photos(with_metadata=True) / "metadata.jsonl"
    if scene.rng.random() < 0.3:
        what = scene.rng.choice(list(ODD_BYTES))
        data = ODD_BYTES[what]
    else:
        data, what = damaged(scene.rng, path.read_bytes())
    path.write_bytes(data)
    return jsonl_case(scene, what)


@kind
def jsonl_values(scene: Scene) -> Case:
    rng, table = scene.rng, rows()
    column = rng.choice(["text", "text", "file_name", "other"])
    value = rng.choice([*ODD_VALUES, *ODD_TEXTS, LONG_TEXT, "\udc80", "a" * 300, {"bytes": "x"}])
    rng.choice(table)[column] = value
    write_lines(scene.photos(), [json.dumps(row) for row in table])
    return jsonl_case(scene, f"{column} = {value!r:.60}")


@kind
def jsonl_lines(scene: Scene) -> Case:
    rng = scene.rng
    lines = [json.dumps(row) for row in rows()]
    odd = {
        "a number of 5,000 digits": '{"file_name": "1.png", "text": "a ball", "n": ' + "9" * 5000 + "}",
        "a caption of 5,000 digits": '{"file_name": "1.png", "text": ' + "9" * 5000 + "}",
        "200,000 brackets": '{"file_name": "1.png", "text": ' + "[" * 200_000 + "]" * 200_000 + "}",
        "a list of its row": json.dumps([rows()[1]]),
        "a string": '"1.png"',
        "null": "null",
        "NaN": "NaN",
        "duplicate keys": '{"file_name": "1.png", "text": "a", "text": "b"}',
        "single quotes": lines[1].replace('"', "'"),
        "a comma at its end": lines[1] + ",",
        "half a line": lines[1][: rng.randrange(len(lines[1]))],
        "two objects": lines[1] + lines[2],
        "a comment": "// " + lines[1],
        "a duplicate row": lines[0],
        "no row": "",
        "an escaped half emoji": '{"file_name": "1.png", "text": "\\ud83d"}',
        "an escaped NUL": '{"file_name": "1.png", "text": "a\\u0000b"}',
        "no caption": '{"file_name": "1.png"}',
        "odd JSON": odd_json(rng, lines[1])[0],
        "a line separator": '{"file_name": "1.png", "text": "a\u2028b"}',
        "an empty column name": '{"file_name": "1.png", "text": "a", "": 1}',
    }
    what = rng.choice(list(odd))
    lines[1] = odd[what]
    write_lines(scene.photos(), lines)
    return jsonl_case(scene, f"its second line is {what}")


@kind
def jsonl_paths(scene: Scene) -> Case:
    rng, photos, table = scene.rng, scene.photos(), rows()
    table[1]["file_name"] = name = rng.choice(
        ["", ".", "..", "/", "../photos/1.png", str(photos / "1.png"), "file:///1.png", "http://localhost/1.png"]
        + [
            "./1.png",
            "x/../1.png",
            "1.PNG",
            "1",
            "sub\\1.png",
            "1.png\0",
            "1.png/",
            "\ud800.png",
            "a" * 5000,
            "~/1.png",
        ]
        + ["1.png\n", " 1.png", "//1.png", "1.png?x=1", "C:\\1.png", "metadata.jsonl", "/dev/zero", "\udcff.png"]
    )
    write_lines(photos, [json.dumps(row) for row in table])
    return jsonl_case(scene, f"file_name {name!r:.60}")


def csv_text(table: list[list[str]], **style) -> str:
    file = io.StringIO()
    csv.writer(file, **style).writerows(table)
    return file.getvalue()


@kind
def csv_damage(scene: Scene) -> Case:
    rng, photos = scene.rng, scene.photos()
    table = [["file_name", "text"], *[list(row.values()) for row in rows()]]
    good = csv_text(table)
    odd = {
        "semicolons": csv_text(table, delimiter=";").encode(),
        "tabs": csv_text(table, delimiter="\t").encode(),
        "an open quote": good.replace("a red", '"a red').encode(),
        "a quote inside": good.replace("a red", 'a "red').encode(),
        "ragged rows": good.replace("a red ball", "a, red, ball").encode(),
        "short rows": good.replace(",a red ball", "").encode(),
        "no header": good.partition("\n")[2].encode(),
        "only a header": b"file_name,text\n",
        "a doubled column": good.replace("text", "file_name").encode(),
        "UTF-16": good.encode("utf-16"),
        "a byte order mark": ("\ufeff" + good).encode(),
        "NUL bytes": good.replace("red", "r\0d").encode(),
        "CR line endings": good.replace("\r\n", "\r").encode(),
        "a field of 200 kB": good.replace("a red ball", "x" * 200_000).encode(),
        "Windows paths": good.replace("1.png", "sub\\1.png").encode(),
        "blank lines": good.replace("\r\n", "\r\n\r\n").encode(),
        "Latin-1": good.replace("red", "rôt").encode("latin-1"),
        "blank names": good.replace("file_name,text", "file_name,text,").encode(),
        "spaces": good.replace(",", " , ").encode(),
        "escaped quotes": good.replace("a red ball", '"a ""red"" ball"').encode(),
        "damage": None,
    }
    what = rng.choice([*odd, "damage", "damage", "damage"])
    data = odd[what]
    if data is None:
        data, what = damaged(rng, good.encode())
    (photos / "metadata.csv").write_bytes(data)
    return case(scene, f"metadata.csv: {what}", **COLUMNS)


@kind
def metadata_files(scene: Scene) -> Case:
    rng, photos = scene.rng, scene.photos(with_metadata=True)
    path = photos / "metadata.jsonl"
    kinds = {
        "also a metadata.csv": lambda: (photos / "metadata.csv").write_text("file_name,text\n0.png,x\n"),
        "also in a subfolder": lambda: ((photos / "sub").mkdir(), (photos / "sub/metadata.jsonl").write_text("{}")),
        "also a .txt file": lambda: (photos / "0.txt").write_text("a ball"),
        "named METADATA.JSONL": lambda: path.rename(photos / "METADATA.JSONL"),
        "as JSON": lambda: path.rename(photos / "metadata.json"),
        "with a picture without a row": lambda: (photos / "9.png").write_bytes((photos / "0.png").read_bytes()),
        "and no pictures": lambda: [picture.unlink() for picture in photos.glob("*.png")],
    }
    what = rng.choice([*kinds, "blocked", "blocked", "blocked"])
    if what == "blocked":
        what = block(rng, path)
    else:
        kinds[what]()
    return case(scene, f"metadata.jsonl {what}", **COLUMNS)


@kind
def parquet_in_folder(scene: Scene) -> Case:
    path = scene.photos() / scene.rng.choice(["metadata.parquet", "train.parquet"])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows()), path)
    data, what = damaged(scene.rng, path.read_bytes())
    path.write_bytes(data)
    return case(scene, f"{path.name} in the folder: {what}", **COLUMNS)


@kind
def teacher_captions(scene: Scene) -> Case:
    rng, photos = scene.rng, scene.photos(with_metadata=True)
    path = photos / "metadata.jsonl"
    table = [json.loads(line) for line in path.read_text().splitlines()]
    value = rng.choice([*ODD_VALUES, *ODD_TEXTS, LONG_TEXT, "\udc80"])
    if rng.random() < 0.3:
        del table[1]["long"]
        what = "missing"
    else:
        table[1]["long"], what = value, f"{value!r:.60}"
    if rng.random() < 0.3:
        for picture in photos.glob("*.png"):
            picture.unlink()
        what += ", without pictures"
    write_lines(photos, [json.dumps(row) for row in table])
    column = rng.choice(["long", "long", "text", "", "file_name", "missing", "é"])
    flags = {"instance_data_dir": photos, "teacher_caption_column": column}
    return Case(f"teacher's caption {what}, column {column!r}", "zimage-caption", flags)
