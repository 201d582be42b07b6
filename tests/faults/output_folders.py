"""Things in the way in the output folder."""

import os
from pathlib import Path

from command_line import LORA_FILE

from .cases import Case, kind
from .damage import block
from .lab import Scene


FILES = ("README.md", LORA_FILE, "metrics.jsonl")
SHEETS = (
    "preview.png",
    "validation-1.png",
    "validation-2.png",
    "rollout-1.png",
    "retention-2.png",
    "story.png",
    "curves.png",
    "report.html",
)
FOLDERS = (
    "logs",
    "images",
    "images/validation_0.png",
    "context_cache",
    "checkpoint-1",
    "checkpoint-2",
    ".checkpoint-1.tmp",
)
DRAWING = {"validation_steps": 1, "num_validation_images": 1}


def case(scene: Scene, subject: str, what: str, **flags) -> Case:
    """A run that draws, saves checkpoints and logs."""
    drawing = {**DRAWING, "checkpointing_steps": 1, "report_to": scene.rng.choice(["none", "tensorboard"])}
    return Case(what, subject, drawing | flags, weights=scene.lab.reference(subject).after_two)


@kind
def file_blocked(scene: Scene) -> Case:
    scene.output_dir.mkdir()
    name = scene.rng.choice(FILES)
    return case(scene, scene.subject(), block(scene.rng, scene.output_dir / name))


@kind
def sheet_blocked(scene: Scene) -> Case:
    scene.output_dir.mkdir()
    name = scene.rng.choice(SHEETS)
    return case(scene, scene.subject(), block(scene.rng, scene.output_dir / name))


@kind
def temporary_blocked(scene: Scene) -> Case:
    """Something in the place of a file that is being written."""
    scene.output_dir.mkdir()
    name = scene.rng.choice([*FILES, *SHEETS])
    return case(scene, scene.subject(), block(scene.rng, scene.output_dir / f".{name}.tmp"))


@kind
def folder_blocked(scene: Scene) -> Case:
    rng = scene.rng
    scene.output_dir.mkdir()
    place = scene.output_dir / rng.choice(FOLDERS)
    what = block(rng, place)
    if rng.random() < 0.4:
        if not place.is_dir():
            place.unlink()
            place.write_text("a file")
            what = f"{place.name}: a file in its place"
    return case(scene, scene.subject(), what)


@kind
def output_dir_blocked(scene: Scene) -> Case:
    rng = scene.rng
    subject = scene.subject()
    kinds = {
        "a file": lambda: scene.output_dir.write_text("x"),
        "blocked": lambda: None,
        "a link to another folder": lambda: (
            (scene.folder / "elsewhere").mkdir(),
            scene.output_dir.symlink_to("elsewhere"),
        ),
        "a link to a folder that is not there": lambda: scene.output_dir.symlink_to("elsewhere"),
    }
    what = rng.choice(list(kinds))
    kinds[what]()
    if what == "blocked":
        what = block(rng, scene.output_dir)
    return case(scene, subject, f"--output_dir is {what}")


@kind
def odd_output_dir(scene: Scene) -> Case:
    """Names that a file system takes, or not."""
    rng, subject = scene.rng, scene.subject()
    name = rng.choice(
        [
            "é",
            "e\u0301",
            "😀",
            "a b",
            " ",
            "a\nb",
            "\x1b[31m",
            "%s",
            "{0}",
            "-x",
            "a'b\"c",
            "*",
            "[a]",
            "a#b?c",
            "\udcff",
            "~",
        ]
        + [
            "x" * 255,
            "x" * 256,
            "x/" * 2000,
            "a/b/c",
            "a\\b",
            "$HOME",
            "checkpoint-2",
            ".hidden",
            "a.safetensors",
            "\u202e",
        ]
    )
    path = os.path.join(scene.folder, "runs", name)
    made = case(scene, subject, f"--output_dir {name!a:.40}")
    return Case(made.what, subject, made.flags, (f"--output_dir={path}",), saves_lora=False)


@kind
def others_files(scene: Scene) -> Case:
    """The folder holds what another program or an earlier run left."""
    rng, subject = scene.rng, scene.subject()
    out = scene.output_dir
    out.mkdir()
    reference = scene.lab.reference(subject).run
    kinds = {
        "an empty LoRA": lambda: (out / LORA_FILE).write_bytes(b""),
        "an earlier LoRA": lambda: (out / LORA_FILE).write_bytes((reference / LORA_FILE).read_bytes()),
        "a foreign card": lambda: (out / "README.md").write_text("# mine\n"),
        "an empty card": lambda: (out / "README.md").write_bytes(b""),
        "a card that is not UTF-8": lambda: (out / "README.md").write_bytes(b"\xff\xfe"),
        "an earlier history": lambda: (out / "metrics.jsonl").write_bytes((reference / "metrics.jsonl").read_bytes()),
        "a damaged history": lambda: (out / "metrics.jsonl").write_bytes(bytes(50)),
        "a sheet that is no picture": lambda: (out / "preview.png").write_text("x"),
        "odd names": lambda: [(out / name).write_text("x") for name in ("é", "\udcff", "a\nb", ".x", "checkpoint-x")],
        "an unfinished checkpoint": lambda: unfinished(out / ".checkpoint-1.tmp"),
        "half a checkpoint": lambda: unfinished(out / "checkpoint-1"),
        "a lock": lambda: [(out / name).write_text("x") for name in (".lock", "lock", ".run.lock")],
    }
    what = rng.choice(list(kinds))
    kinds[what]()
    return case(scene, subject, f"the folder holds {what}")


def unfinished(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapters.safetensors").write_bytes(bytes(100))
