"""Good input, undisturbed runs on it, and copies of both that a case may damage."""

import json
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from command_line import Forkserver
from models import TinyModel, make_model
from short_runs import as_arguments, short_run
from tiny_klein import make_tiny_klein
from tiny_zimage import make_tiny_zimage

from .cases import Case
from .running import MAX_FILE_BYTES, Run, run_confined, wait_for


# Both scripts and all of their teacher contexts.
SUBJECTS = ("flux2", "flux2-vlm", "zimage", "zimage-caption")
CAPTIONS = ("a ball", "a red ball", "a ball on grass")
NUM_STEPS, NUM_RESUMED_STEPS = 4, 6

# Starts the run of a case, if wanted with `max_file_bytes`: returns the process and its log.
Start = Callable[..., tuple[BaseProcess, Path]]


def draw_photos(folder: Path) -> None:
    """Three pictures of different shapes."""
    folder.mkdir(parents=True)
    for number, size in enumerate([(64, 64), (128, 72), (70, 110)]):
        gray = Image.radial_gradient("L").resize(size)
        colour = [(255, 40, 0), (0, 90, 255), (250, 240, 60)][number]
        ImageOps.colorize(gray, "black", colour).save(folder / f"{number}.png")


def write_metadata(photos: Path) -> None:
    rows = [
        {"file_name": f"{number}.png", "text": text, "long": f"{text}, seen from above"}
        for number, text in enumerate(CAPTIONS)
    ]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fix_measurements(history: Path) -> None:
    """Sets what differs from run to run, so that cases damage the same bytes each time."""
    lines = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    lines = [line | {"seconds_per_step": 0.5, "peak_memory_gb": 0.5} for line in lines]
    history.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@dataclass(frozen=True)
class Reference:
    """Undisturbed runs of one subject.

    Attributes:
        run: output folder of a run of `NUM_STEPS`, with checkpoints 2 and 4, its encodings and its history.
        resumed: output folder of a run of `NUM_RESUMED_STEPS` that was never interrupted.
        after_two: folder with the LoRA after two steps.
    """

    run: Path
    resumed: Path

    @property
    def after_two(self) -> Path:
        return self.run / "checkpoint-2"


class Lab:
    """The good input of all cases, made when it is first needed.

    Args:
        folder: an empty folder for all of it.
        forkserver: starts the runs.
        timeout: seconds after which a run hangs.
    """

    def __init__(self, folder: Path, forkserver: Forkserver, timeout: float = 60):
        self.folder, self.forkserver, self.timeout = folder, forkserver, timeout
        self._lock = threading.RLock()
        self._references: dict[str, Reference] = {}

    @cached_property
    def _checkpoints(self) -> tuple[Path, Path]:
        return make_tiny_klein(self.folder / "klein"), make_tiny_zimage(self.folder / "zimage")

    def model(self, subject: str) -> TinyModel:
        with self._lock:
            model = make_model(subject.removesuffix("-caption"), *self._checkpoints, self._made("vlm"))
        if subject.endswith("-caption"):
            captions = {"teacher_context": "caption", "teacher_caption_column": "long", "caption_column": ["text"]}
            flags = {name: value for name, value in model.flags.items() if not name.startswith("vlm_")}
            model = replace(model, flags=flags | captions | {"instance_prompt": None})
        return model

    def _made(self, name: str) -> Path:
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def photos(self, *, with_metadata: bool) -> Path:
        with self._lock:
            folder = self.folder / ("photos-metadata" if with_metadata else "photos")
            if not folder.exists():
                draw_photos(folder)
                if with_metadata:
                    write_metadata(folder)
        return folder

    def flags(self, subject: str, output_dir: Path, **changed) -> dict[str, Any]:
        """Flags of a run of two steps."""
        photos = self.photos(with_metadata=subject.endswith("-caption"))
        flags = short_run(self.model(subject), photos, output_dir)
        # One state, the default, goes with any --num_rollout_steps that a case gives.
        return flags | {"lora_dropout": 0.1, "num_trained_states": None} | changed

    def reference(self, subject: str) -> Reference:
        with self._lock:
            if subject not in self._references:
                runs = self._made(f"reference-{subject}")
                made = Reference(runs / "run", runs / "resumed")
                for folder, steps in ((made.run, NUM_STEPS), (made.resumed, NUM_RESUMED_STEPS)):
                    case = Case("nothing", subject, {"max_train_steps": steps, "checkpointing_steps": 2})
                    run = self.run(case, runs, folder)
                    assert run.code == 0, run.log
                    fix_measurements(folder / "metrics.jsonl")
                self._references[subject] = made
            return self._references[subject]

    def command_line(self, case: Case, output_dir: Path) -> tuple[Path, list[str]]:
        """The script, and its arguments. A run's output folder is `output_dir` unless the case has another."""
        flags = self.flags(case.model, output_dir, **case.flags)
        return self.model(case.model).script_path, [*as_arguments(flags), *case.arguments]

    def start(
        self, case: Case, folder: Path, output_dir: Path, *, max_file_bytes: int = MAX_FILE_BYTES
    ) -> tuple[BaseProcess, Path]:
        """The running process, and its log. What it writes without being told where is in `folder`."""
        script, arguments = self.command_line(case, output_dir)
        number = len(list(folder.glob("*.log")))
        log = folder / f"{number}.log"
        with self._lock:
            process = self.forkserver.start(
                run_confined, str(script), arguments, str(log), str(folder), max_file_bytes
            )
        return process, log

    def run(self, case: Case, folder: Path, output_dir: Path) -> Run:
        return wait_for(*self.start(case, folder, output_dir), timeout=self.timeout)


@dataclass(frozen=True)
class Scene:
    """What one case is made of: chance, a folder, and copies of good input in it."""

    rng: random.Random
    folder: Path
    lab: Lab

    @property
    def output_dir(self) -> Path:
        return self.folder / "run"

    def subject(self, *, with_captions: bool = True) -> str:
        """A subject; half of the time the quickest one."""
        others = [name for name in SUBJECTS[1:] if with_captions or not name.endswith("-caption")]
        return self.rng.choice([*[SUBJECTS[0]] * len(others), *others])

    def photos(self, *, with_metadata: bool = False) -> Path:
        """A copy of the pictures."""
        return self.copy(self.lab.photos(with_metadata=with_metadata), "photos")

    def checkpoint(self, subject: str) -> Path:
        """A copy of the subject's pretrained model."""
        return self.copy(self.lab.model(subject).path, "model")

    def vlm(self, subject: str) -> Path:
        """A copy of the subject's vision-language model."""
        return self.copy(self.lab.model(subject).vlm_path, "vlm")

    def run(self, subject: str) -> Path:
        """A copy of an undisturbed run, in the case's output folder."""
        return self.copy(self.lab.reference(subject).run, "run")

    def resumed(self, what: str, subject: str, **case) -> Case:
        """The copied run is resumed, and must end as if it had not been interrupted."""
        flags = {
            "max_train_steps": NUM_RESUMED_STEPS,
            "checkpointing_steps": 2,
            "resume_from_checkpoint": "latest",
            **case.pop("flags", {}),
        }
        return Case(what, subject, flags, weights=self.lab.reference(subject).resumed, **case)

    def copy(self, source: Path, name: str) -> Path:
        return Path(shutil.copytree(source, self.folder / name, symlinks=True))
