"""Data sets that `datasets` reads: --dataset_name with a folder."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

from .captions import LONG_TEXT, write_lines
from .cases import Case, kind
from .damage import ODD_TEXTS, ODD_VALUES, block, damage_file, files_in, odd_json
from .lab import CAPTIONS, Scene


def case(scene: Scene, what: str, folder: Path, flags: dict | None = None, **rest) -> Case:
    flags = {
        "instance_data_dir": None,
        "instance_prompt": None,
        "dataset_name": folder,
        "caption_column": ["text"],
        "cache_dir": scene.folder / "cache",
        **(flags or {}),
    }
    return Case(what, scene.subject(with_captions=False), flags, **rest)


def cells(scene: Scene) -> list[dict]:
    """Rows with encoded pictures."""
    photos = scene.lab.photos(with_metadata=False)
    return [
        {"image": {"bytes": (photos / f"{number}.png").read_bytes(), "path": None}, "text": text}
        for number, text in enumerate(CAPTIONS)
    ]


def write_parquet(scene: Scene, table: pyarrow.Table) -> Path:
    folder = scene.folder / "set"
    (folder / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(table, folder / "data/train-00000-of-00001.parquet")
    return folder


@kind
def parquet_bytes(scene: Scene) -> Case:
    folder = write_parquet(scene, pyarrow.Table.from_pylist(cells(scene)))
    return case(scene, damage_file(scene.rng, *files_in(folder)), folder)


@kind
def paths_outside(scene: Scene) -> Case:
    """Cells that name a file outside the data set, which sheets would publish."""
    rng, rows = scene.rng, cells(scene)
    secret = scene.photos() / "0.png"
    path = rng.choice([str(secret), f"file://{secret}", "http://localhost:9/x.png", "../photos/0.png", "/etc/passwd"])
    path = rng.choice(
        [path, f"../../photos/{secret.name}", f"zip://0.png::{secret}", "/dev/zero", "data:,x", "", "~/x"]
    )
    if rng.random() < 0.5:
        rows[1]["image"] = {"bytes": None, "path": path}
    else:
        rows = [{"image": path, "text": row["text"]} for row in rows]
    folder = write_parquet(scene, pyarrow.Table.from_pylist(rows))
    return case(scene, f"a cell with the path {path}", folder, must="refuse")


@kind
def odd_cells(scene: Scene) -> Case:
    rng, rows = scene.rng, cells(scene)
    column = rng.choice(["image", "text"])
    value = rng.choice([*ODD_VALUES, *ODD_TEXTS, LONG_TEXT, b"", b"\xff\xfe", b"x" * 1000])
    everywhere = rng.random() < 0.5
    for row in rows if everywhere else rows[1:2]:
        row[column] = value
    try:
        table = pyarrow.Table.from_pylist(rows)
    except (pyarrow.ArrowException, OverflowError, UnicodeError):  # mixed types: text, then
        table = pyarrow.Table.from_pylist([row | {column: ascii(row[column])} for row in rows])
    try:
        folder = write_parquet(scene, table)
    except pyarrow.ArrowException:  # Parquet has no type for an empty struct
        table = pyarrow.Table.from_pylist([row | {column: ascii(row[column])} for row in rows])
        pyarrow.parquet.write_table(table, scene.folder / "set/data/train-00000-of-00001.parquet")
        folder = scene.folder / "set"
    return case(scene, f"{column} = {value!r:.60} in {'all rows' if everywhere else 'one row'}", folder)


@kind
def odd_tables(scene: Scene) -> Case:
    rng, rows = scene.rng, cells(scene)
    tables = {
        "no rows": lambda: pyarrow.Table.from_pylist(rows).slice(0, 0),
        "no columns": lambda: pyarrow.table({}),
        "no image column": lambda: pyarrow.Table.from_pylist(rows).select(["text"]),
        "no text column": lambda: pyarrow.Table.from_pylist(rows).select(["image"]),
        "two text columns": lambda: pyarrow.Table.from_arrays(
            [pyarrow.array(["a"])] * 3, names=["image", "text", "text"]
        ),
        "lists of captions": lambda: pyarrow.Table.from_pylist([row | {"text": ["a", "b"]} for row in rows]),
        "nested captions": lambda: pyarrow.Table.from_pylist([row | {"text": {"en": "a"}} for row in rows]),
        "a broken feature description": lambda: pyarrow.Table.from_pylist(rows).replace_schema_metadata(
            {"huggingface": '{"info": {"features": {"image": {"_type": "Nothing"}}}}'}
        ),
        "a feature description of another type": lambda: pyarrow.Table.from_pylist(rows).replace_schema_metadata(
            {"huggingface": "[]"}
        ),
        "a column named like code": lambda: pyarrow.Table.from_pylist([row | {"__class__": "x"} for row in rows]),
        "captions in bytes": lambda: pyarrow.Table.from_pylist([row | {"text": b"\xff"} for row in rows]),
    }
    what = rng.choice(list(tables))
    column = rng.choice([["text"], ["text"], None, ["image"], ["missing"], ["text", "text"]])
    prompt = None if column else "a ball"
    folder = write_parquet(scene, tables[what]())
    return case(scene, f"{what}, column {column}", folder, {"caption_column": column, "instance_prompt": prompt})


@kind
def picture_folder(scene: Scene) -> Case:
    """A folder of pictures, as `imagefolder` reads it."""
    rng, photos = scene.rng, scene.photos(with_metadata=True)
    path = photos / "metadata.jsonl"
    lines = path.read_text().splitlines()
    what = rng.choice(["bytes", "value", "odd line", "picture", "blocked"])
    if what == "bytes":
        what = damage_file(rng, path)
    elif what == "picture":
        what = damage_file(rng, photos / "1.png")
    elif what == "blocked":
        what = block(rng, rng.choice([path, photos / "1.png", photos / "extra.png", photos / "x.txt"]))
    elif what == "odd line":
        lines[1], what = odd_json(rng, lines[1])
        write_lines(photos, lines)
    else:
        row = json.loads(lines[1])
        name, value = rng.choice(["text", "file_name", "x"]), rng.choice([*ODD_VALUES, "../1.png", "/etc/passwd"])
        row[name], what = value, f"{name} = {value!r}"
        write_lines(photos, [lines[0], json.dumps(row), lines[2]])
    return case(scene, f"a folder of pictures: {what}", photos)


@kind
def text_tables(scene: Scene) -> Case:
    """Captions alone, in JSON lines or CSV."""
    rng = scene.rng
    folder = scene.folder / "set"
    folder.mkdir()
    name = rng.choice(["train.jsonl", "train.json", "train.csv"])
    rows = [{"text": text, "long": f"{text}, seen from above"} for text in CAPTIONS]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name == "train.json":
        text = json.dumps(rows)
    if name == "train.csv":
        text = "text,long\n" + "".join(f'"{row["text"]}","{row["long"]}"\n' for row in rows)
    (folder / name).write_text(text)
    what = damage_file(rng, folder / name)
    flags = {"instance_data_dir": None, "dataset_name": folder, "cache_dir": scene.folder / "cache"}
    return Case(f"captions alone: {what}", "zimage-caption", flags)


@kind
def odd_folder(scene: Scene) -> Case:
    rng = scene.rng
    folder = write_parquet(scene, pyarrow.Table.from_pylist(cells(scene)))
    payload = scene.folder / "executed"
    script = f"open({str(payload)!r}, 'w')\n"
    kinds = {
        "a loading script": lambda: (folder / "set.py").write_text(script),
        "a broken card": lambda: (folder / "README.md").write_text("---\nconfigs: [{\n---\n"),
        "a card with other files": lambda: (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files: /etc/passwd\n---\n"
        ),
        "a card of another type": lambda: (folder / "README.md").write_text("---\n- 1\n---\n"),
        "a card with tags": lambda: (folder / "README.md").write_text(
            f"---\nx: !!python/object/apply:os.system ['touch {payload}']\n---\n"
        ),
        "only a test split": lambda: (folder / "data/train-00000-of-00001.parquet").rename(
            folder / "data/test.parquet"
        ),
        "a second, empty file": lambda: (folder / "data/train-00001-of-00002.parquet").write_bytes(b""),
        "no files": lambda: (folder / "data/train-00000-of-00001.parquet").unlink(),
        "a file of another type": lambda: (folder / "data/train.arrow").write_bytes(b"x"),
        "saved with save_to_disk": lambda: datasets.Dataset.from_list(cells(scene)).save_to_disk(str(folder)),
    }
    what = rng.choice([*kinds, "blocked", "config name"])
    flags = {}
    if what == "blocked":
        what = block(
            rng, folder / rng.choice(["data/train-00000-of-00001.parquet", "README.md", "dataset_infos.json"])
        )
    elif what == "config name":
        flags["dataset_config_name"] = rng.choice(["", "x", "é", "../x", "a" * 5000, "a\nb"])
        what = f"--dataset_config_name {flags['dataset_config_name']!r:.40}"
    else:
        kinds[what]()
    return case(scene, f"a data set with {what}", folder, flags, payload=payload)
