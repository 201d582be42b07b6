"""metrics.jsonl, when a run is resumed. It is no reason to lose a checkpoint."""

import json
from pathlib import Path

from .cases import Case, kind
from .damage import ODD_VALUES, block, damage_file, odd_json
from .lab import Scene


def history_of(scene: Scene, subject: str) -> Path:
    return scene.run(subject) / "metrics.jsonl"


def case(scene: Scene, subject: str, what: str, **rest) -> Case:
    return scene.resumed(
        f"metrics.jsonl: {what.removeprefix('metrics.jsonl: ')}", subject, **({"must": "train"} | rest)
    )


@kind
def history_bytes(scene: Scene) -> Case:
    subject = scene.subject()
    return case(scene, subject, damage_file(scene.rng, history_of(scene, subject)))


@kind
def history_lines(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    path = history_of(scene, subject)
    lines = path.read_text().splitlines()
    odd = {
        "a blank line": "",
        "blanks": "  \t",
        "garbage": "x",
        "zero bytes": "\0" * 100,
        "half a line": lines[0][: len(lines[0]) // 2],
        "a list": "[1]",
        "null": "null",
        "a number": "7",
        "a number of 5,000 digits": "9" * 5000,
        "no step": '{"loss": 1}',
        "a step of text": '{"step": "x"}',
        "a step of null": '{"step": null}',
        "a step of a list": '{"step": [1]}',
        "NaN": '{"step": 2, "loss": NaN}',
        "a step that is not finite": '{"step": Infinity}',
        "a half emoji": '{"step": 2, "x": "\\ud83d"}',
        "odd JSON": odd_json(rng, lines[0])[0].replace("\ud800", "x"),
        "200,000 brackets": "[" * 200_000,
        "1 MB": json.dumps({"step": 1, "x": "y" * 10**6}),
        "a retention of text": '{"step": 1, "retention": "x"}',
        "a loss of text": '{"step": 1, "loss": "x"}',
        "a line separator": '{"step": 1, "x": "a\u2028b"}',
    }
    what = rng.choice(list(odd))
    place = rng.choice([0, 2, len(lines)])
    lines.insert(place, odd[what])
    path.write_text("\n".join(lines) + rng.choice(["\n", "", "\n\n"]), encoding="utf-8")
    return case(scene, subject, f"{what} before line {place}")


@kind
def history_values(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    path = history_of(scene, subject)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    name, value = rng.choice([*lines[0], "retention"]), rng.choice(ODD_VALUES)
    lines[1][name] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawing = {"validation_steps": 2, "num_validation_images": 1} if rng.random() < 0.3 else {}
    return case(scene, subject, f"{name} = {value!r}, drawing {bool(drawing)}", flags=drawing)


@kind
def history_end(scene: Scene) -> Case:
    """What a power cut leaves."""
    rng, subject = scene.rng, scene.subject()
    path = history_of(scene, subject)
    data = path.read_bytes()
    cut = rng.randrange(len(data))
    end = rng.choice([b"", bytes(1), bytes(100), bytes(4096), b"\n", b"\n\n\n", b"\xff\xfe", b'{"step": 5'])
    path.write_bytes(data[:cut] + end if rng.random() < 0.5 else data + end)
    return case(scene, subject, f"{end[:12]!r} ({len(end)} bytes) at its end, or at byte {cut}")


@kind
def history_blocked(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    path = history_of(scene, subject)
    return case(scene, subject, block(rng, rng.choice([path, path.with_name(".metrics.jsonl.tmp")])), must=None)


@kind
def history_missing(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    path = history_of(scene, subject)
    kinds = {
        "missing": lambda: path.unlink(),
        "empty": lambda: path.write_bytes(b""),
        "5 MB": lambda: path.write_bytes(path.read_bytes() * 2_000),
        "of later steps": lambda: path.write_text(path.read_text().replace('"step": ', '"step": 9')),
        "in reverse": lambda: path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n"),
        "UTF-16": lambda: path.write_bytes(path.read_text().encode("utf-16")),
        "a byte order mark": lambda: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
        "with Windows line endings": lambda: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
    }
    what = rng.choice(list(kinds))
    kinds[what]()
    return case(scene, subject, what)
