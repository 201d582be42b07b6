"""Damage that fits any file: bytes, JSON values, and things that are not files."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save


# Values that no flag, caption or configuration expects everywhere.
ODD_VALUES = (
    None,
    True,
    False,
    -1,
    0,
    0.5,
    10**30,
    1e308,
    float("nan"),
    float("-inf"),
    "",
    " ",
    "x",
    "1",
    "\ud83d",
    "\0",
    [],
    [[]],
    [None],
    ["x", 1],
    {},
    {"x": {}},
)
ODD_TEXTS = (
    "",
    " ",
    "\n",
    "x",
    "é",
    "\u202e",
    "😀",
    "<|im_end|>",
    "<|image_pad|>",
    "{{ 7 * 7 }}",
    "%s%n",
    "a\nb",
    "'\"`",
)


def damaged(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """The data with one kind of damage, and what it is."""
    place = rng.randrange(len(data)) if data else 0
    length = min(len(data) - place, rng.choice([1, 8, 512, 4096]))

    def flipped(num_bits: int) -> bytes:
        changed = bytearray(data)
        for _ in range(num_bits if data else 0):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)

    num_bits = rng.choice([2, 20, 200])
    early = rng.randrange(min(len(data), 200)) if data else 0
    return rng.choice(
        [
            lambda: (flipped(1), "one bit flipped"),
            lambda: (flipped(num_bits), f"{num_bits} bits flipped"),
            lambda: (data[:place], f"truncated to {place} of {len(data)} bytes"),
            lambda: (data[:early], f"truncated to {early} of {len(data)} bytes"),
            lambda: (b"", "emptied"),
            lambda: (data[:place] + bytes(length) + data[place + length :], f"{length} zero bytes at {place}"),
            lambda: (data[:place] + bytes(len(data) - place), f"zero bytes from {place} to the end"),
            lambda: (bytes(len(data)), "all bytes zero"),
            lambda: (data + bytes(rng.choice([1, 4096])), "zero bytes at the end"),
            lambda: (data + data, "written twice"),
            lambda: (data[:place] + data[place + length :], f"{length} bytes missing at {place}"),
            lambda: (data[:place] + rng.randbytes(length) + data[place:], f"{length} random bytes at {place}"),
            lambda: (rng.randbytes(len(data)), "random bytes"),
            lambda: (b"<html><body>404 Not Found</body></html>\n", "an HTML page"),
            lambda: (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        ]
    )()


def damage_file(rng: random.Random, path: Path) -> str:
    """Damages the bytes of a file; returns what was done."""
    data, what = damaged(rng, path.read_bytes())
    path.write_bytes(data)
    return f"{path.name}: {what}"


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            remove(child)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def block(rng: random.Random, path: Path, *, with_devices: bool = True) -> str:
    """Puts something in a path's place that is no file, or no file of its own; returns what it is.

    Args:
        with_devices: also links to a device or a pipe, which block their reader or give it bytes without end.
    """
    remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {
        "a folder": lambda: path.mkdir(),
        "a folder with a file": lambda: (path.mkdir(), (path / "x").write_text("x")),
        "a dangling link": lambda: path.symlink_to("nowhere"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to its folder": lambda: path.symlink_to("."),
    }
    if with_devices:
        kinds |= {
            "a FIFO": lambda: os.mkfifo(path),
            "a link to /dev/zero": lambda: path.symlink_to("/dev/zero"),
            "a link to /dev/full": lambda: path.symlink_to("/dev/full"),
            "a link to /dev/null": lambda: path.symlink_to("/dev/null"),
        }
    what = rng.choice(list(kinds))
    kinds[what]()
    return f"{path.name}: {what} in its place"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, in memory, so that the file may be written again."""
    return load(path.read_bytes())


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.write_bytes(save(tensors, {"format": "pt"}))


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def damage_json(rng: random.Random, path: Path) -> str:
    """Damages a JSON file: one of its values, or its text; returns what was done."""
    text = path.read_text(encoding="utf-8")
    value = json.loads(text)
    place = rng.choice(list(places(value)))
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    name = "/".join(map(str, place))
    if rng.random() < 0.2:
        text, what = odd_json(rng, text)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        return f"{path.name}: {what}"
    if rng.random() < 0.3:
        del parent[place[-1]]
        what = f"{name} deleted"
    else:
        old = parent[place[-1]]
        new = rng.choice(ODD_VALUES)
        if isinstance(old, int | float) and not isinstance(old, bool) and rng.random() < 0.5:
            new = rng.choice([-old, old + 1, old * 2, old / 2, 10**6, 10**12])
        parent[place[-1]] = new
        what = f"{name} = {new!r}"
    path.write_text(json.dumps(value), encoding="utf-8")
    return f"{path.name}: {what}"


def odd_json(rng: random.Random, text: str) -> tuple[str, str]:
    return rng.choice(
        [
            ("[" * 100_000, "100,000 brackets"),
            ('{"a":' * 100_000 + "1" + "}" * 100_000, "100,000 nested objects"),
            ("\ufeff" + text, "a byte order mark"),
            (text.replace("\n", "\r\n"), "Windows line endings"),
            ("null", "null"),
            ("[]", "a list"),
            ('"x"', "a string"),
            ("9" * 5000, "a number of 5,000 digits"),
            ("{}", "an empty object"),
            (text + ",", "a trailing comma"),
            (text.replace('"', "'"), "single quotes"),
            (text + text, "two objects"),
            (text.replace("{", '{"\ud800": 1,', 1), "a lone surrogate"),
            (text.replace("{", '{"x": NaN,', 1), "NaN"),
        ]
    )
