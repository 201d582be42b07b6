"""Editing pairs on disk."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


Size = tuple[int, int]  # (height, width)


def write_pairs(
    folder: Path, make_picture: Callable[..., Image.Image], *pairs: tuple[Size, Sequence[Size]], prompt: str = "edit"
) -> dict[str, Any]:
    """Pairs of a result and the pictures that it is edited from, all of them different.

    Args:
        pairs: sizes of the result N.png and of its sources N-0.png, N-1.png, ...
        prompt: the instruction of result N is this text and N.

    Returns:
        Flags of a run on them.
    """
    folder.mkdir()
    rows = []
    for number, (size, cond_sizes) in enumerate(pairs):
        names = [f"{number}-{index}.png" for index in range(len(cond_sizes))]
        for index, (name, (height, width)) in enumerate(
            zip([f"{number}.png", *names], [size, *cond_sizes], strict=True)
        ):
            make_picture(5 * number + index, width, height).save(folder / name)
        rows.append({"file_name": f"{number}.png", "source": names, "text": f"{prompt} {number}"})
    write_rows(folder, rows)
    flags = {"instance_data_dir": folder, "instance_prompt": None, "caption_column": "text"}
    return flags | {"cond_image_column": "source"}


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
