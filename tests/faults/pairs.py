"""Editing pairs, and groups of pictures of one subject."""

import json
from pathlib import Path

import pyarrow
from PIL import Image

from .captions import COLUMNS, ODD_BYTES, rows, write_lines
from .cases import Case, kind
from .damage import ODD_TEXTS, ODD_VALUES, block, damage_file
from .data_sets import cells, write_parquet
from .lab import SUBJECTS, Scene


EDITORS = [name for name in SUBJECTS if name.startswith("flux2")]


def write_pairs(scene: Scene) -> tuple[Path, list[dict]]:
    """Pictures and sources of other shapes, and the rows of their metadata, which are not written."""
    photos, table = scene.photos(), rows()
    for number, row in enumerate(table):
        row["source"] = f"source-{number}.png"
        (photos / row["source"]).write_bytes((photos / f"{(number + 1) % len(table)}.png").read_bytes())
    return photos, table


def write_rows(photos: Path, table: list[dict]) -> None:
    write_lines(photos, [json.dumps(row) for row in table])


def case(scene: Scene, what: str, columns: tuple[str, ...] = ("source",), flags: dict | None = None, **rest) -> Case:
    """A run on the scene's `photos`."""
    flags = {
        "instance_data_dir": scene.folder / "photos",
        **COLUMNS,
        "cond_image_column": list(columns),
        **(flags or {}),
    }
    return Case(what, scene.rng.choice(EDITORS), flags, **rest)


@kind
def good_pairs(scene: Scene) -> Case:
    """Pairs as people write them."""
    rng, (photos, table) = scene.rng, write_pairs(scene)
    kinds = {
        "one source for all": lambda: [row.update(source="source-0.png") for row in table],
        "a list of one": lambda: table[1].update(source=["source-1.png"]),
        "lists of different length": lambda: table[1].update(source=["source-1.png", "source-0.png", "source-2.png"]),
        "another row's target": lambda: table[1].update(source="0.png"),
        "its own target": lambda: table[1].update(source="1.png"),
        "the same source twice": lambda: table[1].update(source=["source-0.png", "source-0.png"]),
        "Windows paths": lambda: table[1].update(source=".\\Source-1.PNG"),
        "two columns": lambda: [row.update(style="0.png") for row in table],
        "X_file_name": lambda: [row.update(source_file_name=row.pop("source")) for row in table],
    }
    what = rng.choice(list(kinds))
    kinds[what]()
    table[0]["mask_file_names"] = [f"source-{number}.png" for number in range(3)]  # each picture must be in a row
    write_rows(photos, table)
    columns = ("style", "source") if what == "two columns" else ("source",)
    return case(scene, f"pairs: {what}", columns, must="train")


@kind
def sources_in_metadata(scene: Scene) -> Case:
    rng, (photos, table) = scene.rng, write_pairs(scene)
    missing = ["gone.png", ["source-1.png", "gone.png"], "../photos/1.png", str(photos / "1.png"), "", " ", [], None]
    lists = [[7], [None], [["source-1.png"]], {"path": "1.png"}, [""], "source-0.png,source-1.png", ["x"] * 1000]
    value = rng.choice([*missing, *lists, *lists, *ODD_VALUES, *ODD_TEXTS, "/dev/zero", "metadata.jsonl", "\udc80"])
    table[1]["source"] = value
    table[2]["mask_file_name"] = "source-1.png"
    if rng.random() < 0.2:
        del table[1]["source"]
        value = "no such key"
    write_rows(photos, table)
    return case(scene, f"source = {value!r:.60}", must="refuse")


@kind
def damaged_source(scene: Scene) -> Case:
    rng, (photos, table) = scene.rng, write_pairs(scene)
    write_rows(photos, table)
    path = photos / "source-1.png"
    must = "refuse"
    what = rng.choice(["damage", "damage", "block", *ODD_BYTES])
    if what == "damage":
        what, must = damage_file(rng, path), None  # a bit of a picture may change without harm
    elif what == "block":
        what = block(rng, path)
    else:
        path.write_bytes(ODD_BYTES[what])
    return case(scene, f"a source: {what}", must=must)


@kind
def source_sizes(scene: Scene) -> Case:
    """Pictures to edit that are too small or too long, or have another shape than the result."""
    rng, (photos, table) = scene.rng, write_pairs(scene)
    write_rows(photos, table)
    is_good = rng.random() < 0.4
    good, bad = [(64, 64), (65, 127), (64, 512), (1000, 1100)], [(1, 1), (63, 64), (64, 63), (64, 513), (4000, 64)]
    height, width = rng.choice(good if is_good else bad)
    Image.new("RGB", (width, height), "teal").save(photos / "source-1.png")
    return case(scene, f"a source of {height}x{width} pixels", must="train" if is_good else "refuse")


@kind
def source_columns(scene: Scene) -> Case:
    rng, (photos, table) = scene.rng, write_pairs(scene)
    write_rows(photos, table)
    columns = rng.choice(
        [("gone",), ("image",), ("file_name",), ("text",), ("source", "source"), ("source", "source_file_name")]
        + [("source", "gone"), ("",), (" ",), ("source",) * 50, ("é",), ("source,text",), ("a" * 5000,), ("Source",)]
    )
    flags = {}
    if rng.random() < 0.3:
        columns, flags = ("source",), {"image_column": rng.choice(["source", "text", "gone"])}
    elif rng.random() < 0.2:
        (photos / "metadata.jsonl").unlink()
        columns, flags = ("source",), {"caption_column": None, "instance_prompt": "a ball"}
    return case(scene, f"--cond_image_column {columns!r:.60}, {flags}", columns, flags, must="refuse")


@kind
def sources_in_tables(scene: Scene) -> Case:
    """Lists of pictures in the cells of a data set."""
    rng, table = scene.rng, cells(scene)
    pictures = [row["image"] for row in table]
    odd = {
        "lists": [[pictures[1]], pictures[:2], pictures],
        "pictures": pictures,
        "an empty list": [[pictures[1]], [], pictures],
        "no list": [[pictures[1]], None, pictures],
        "an item of nothing": [[pictures[1]], [None], pictures],
        "an item of no picture": [[pictures[1]], [{"bytes": b"x", "path": None}], pictures],
        "a path outside": [[pictures[1]], [{"bytes": None, "path": "../photos/0.png"}], pictures],
        "numbers": [[1], [2], [3, 4]],
        "lists of lists": [[[one]] for one in pictures],
        "lists of bytes": [[one["bytes"]] for one in pictures],
        "lists of nothing": [[], [], []],
        "texts": ["x", "y", "z"],
        "nothing": [None, None, None],
    }
    what = rng.choice(list(odd))
    table = [row | {"source": value} for row, value in zip(table, odd[what], strict=True)]
    folder = write_parquet(scene, pyarrow.Table.from_pylist(table))
    flags = {"instance_data_dir": None, "dataset_name": folder, "cache_dir": scene.folder / "cache"}
    must = "train" if what in ("lists", "pictures", "lists of bytes") else "refuse"
    return case(scene, f"sources in a table: {what}", flags=flags, must=must)


@kind
def groups(scene: Scene) -> Case:
    """--teacher_picture other, which needs another picture of each group."""
    rng, photos, table = scene.rng, scene.photos(), rows()
    good = ["rex", "rex", "rex"]
    odd = {
        "one group": good,
        "numbers": [7, 7, 7],
        "a group of one": ["rex", "rex", "tom"],
        "three groups of one": [1, 2, 3],
        "an odd value": ["rex", "rex", rng.choice([*ODD_VALUES, " ", {"a": 1}])],
        "no such column": None,
        "no metadata": None,
        "subfolders": None,
    }
    what = rng.choice(list(odd))
    flags = {"instance_data_dir": photos, **COLUMNS, "teacher_picture": "other", "group_column": "who"}
    for row, who in zip(table, odd[what] or good, strict=True):
        row["who"] = who
    if what == "no such column":
        flags["group_column"] = rng.choice(["whom", "", "é", "a" * 5000])
    if what == "subfolders":
        (photos / "sub").mkdir()
        (photos / "2.png").rename(photos / "sub/2.png")
        table[2]["file_name"], flags["group_column"] = "sub/2.png", None
    if what == "no metadata":
        flags |= {"caption_column": None, "instance_prompt": "a ball"}
    else:
        write_rows(photos, table)
    must = "train" if what in ("one group", "numbers") else "refuse"
    subject = scene.subject(with_captions=False)
    return Case(f"groups: {what} {table[2]['who']!r:.40}", subject, flags, must=must)


@kind
def validation_images(scene: Scene) -> Case:
    rng, (photos, table) = scene.rng, write_pairs(scene)
    write_rows(photos, table)
    picture, bad = str(photos / "0.png"), scene.folder / "bad.png"
    bad.write_bytes(rng.choice([b"", b"x", (photos / "0.png").read_bytes()[:60]]))
    good = rng.choice([(picture,), (picture, picture), (f"{picture},{photos / '1.png'}",)])
    values = rng.choice(
        [(str(bad),), (f"{picture},{bad}",), ("gone.png",), (picture, "gone.png"), (str(photos),), ("",), (",",)]
        + [
            ("~/0.png",),
            (picture,) * 7,
            ("/dev/zero",),
            ("http://localhost:9/x.png",),
            ("a" * 5000,),
            ("é\udcff",),
        ]
    )
    is_good = rng.random() < 0.3
    flags = {"validation_steps": 2, "num_validation_images": 1, "validation_image": list(good if is_good else values)}
    if len(flags["validation_image"]) == 7:  # without prompts, each picture is edited as a pair is
        flags["validation_prompt"] = ["make it red", "erase it"]
    must = "train" if is_good else "refuse"
    return case(scene, f"--validation_image {flags['validation_image']!r:.80}", flags=flags, must=must)
