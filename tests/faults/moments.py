"""A run that is killed, stopped or joined by another at a random moment."""

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from .cases import Case, Verdict, kind
from .lab import NUM_RESUMED_STEPS, Scene, Start
from .running import is_running, message_problem, wait_for


WAIT_SECONDS = 60
RESUMED = {"max_train_steps": NUM_RESUMED_STEPS, "checkpointing_steps": 2, "resume_from_checkpoint": "latest"}
DRAWING = {"validation_steps": 3, "num_validation_images": 1}

Failure = tuple[Verdict, str]


def reach(process: BaseProcess, log: Path, history: Path, num_logged: int, delay: float) -> None:
    """Waits until a run has logged so many steps, and `delay` seconds longer; returns early if it ends."""
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end and is_running(process):
        if num_logged == 0 or (history.exists() and history.read_bytes().count(b"\n") >= num_logged):
            break
        time.sleep(0.002)
    time.sleep(delay)


def moment(rng: random.Random) -> tuple[int, float]:
    """Steps that the run has logged, and seconds after that: while it starts, trains or saves."""
    num_logged = rng.choice([0, 1, 2, 3, 4, 5])
    return num_logged, rng.uniform(0, 0.05 if num_logged else 0.5)


def interrupted(scene: Scene, subject: str, numbers: list[signal.Signals]) -> Case:
    """A run is started and gets these signals, each time it is started; it is resumed to its end at last."""
    moments = [moment(scene.rng) for _ in numbers]
    flags = RESUMED | (DRAWING if scene.rng.random() < 0.3 else {})

    def before(start: Start) -> Failure | None:
        for number, (num_logged, delay) in zip(numbers, moments, strict=True):
            process, log = start()
            reach(process, log, scene.output_dir / "metrics.jsonl", num_logged, delay)
            if is_running(process):
                os.kill(process.pid, number)
            run = wait_for(process, log, WAIT_SECONDS)
            if run.code is None:
                return Verdict.HANG, f"hangs after {number.name}; last line: {run.lines[-1]}"
            if "Traceback" in run.log:
                return Verdict.TRACEBACK, f"traceback after {number.name}: {run.lines[-1]}"
        return None

    return Case(
        ", ".join(
            f"{number.name} {delay:.2f} s after step {n}" for number, (n, delay) in zip(numbers, moments, strict=True)
        ),
        subject,
        flags,
        must="train",
        weights=scene.lab.reference(subject).resumed,
        before=before,
    )


@kind
def killed(scene: Scene) -> Case:
    return interrupted(scene, scene.subject(), [signal.SIGKILL])


@kind
def killed_three_times(scene: Scene) -> Case:
    return interrupted(scene, scene.subject(), [signal.SIGKILL] * 3)


@kind
def terminated(scene: Scene) -> Case:
    return interrupted(scene, scene.subject(), [signal.SIGTERM])


@kind
def signalled(scene: Scene) -> Case:
    number = scene.rng.choice([signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM])
    return interrupted(scene, scene.subject(), [number])


@kind
def joined(scene: Scene) -> Case:
    """A second run in the same output folder refuses, and changes nothing in the first one."""
    subject = scene.subject()
    num_logged, delay = moment(scene.rng)
    reference = scene.lab.reference(subject).resumed
    resume = scene.rng.choice([None, "latest"])
    second = Case("", subject, RESUMED | {"resume_from_checkpoint": resume})

    def before(start: Start) -> Failure | None:
        process, log = start()
        reach(process, log, scene.output_dir / "metrics.jsonl", max(1, min(num_logged, 3)), delay)
        joining = scene.lab.run(second, scene.folder, scene.output_dir)
        first = wait_for(process, log, WAIT_SECONDS)
        if first.code != 0:
            return Verdict.DIFFERENT, f"the first run is disturbed: {first.lines[-1]}"
        if joining.code == 0 and "Training" in joining.log and resume is None:
            return Verdict.DIFFERENT, "the second run trained in the same folder"
        if "Traceback" in joining.log:
            return Verdict.TRACEBACK, f"the second run has a traceback: {joining.lines[-1]}"
        return None

    return Case(f"a second run after step {num_logged}", subject, RESUMED, weights=reference, before=before)


@kind
def full_disk(scene: Scene) -> Case:
    """Files cannot be longer than so many bytes; then there is room, and the run is resumed to its end."""
    subject = scene.subject()
    num_bytes = scene.rng.randrange(16 * 1024, 160 * 1024)
    flags = RESUMED | (DRAWING if scene.rng.random() < 0.3 else {})
    script = scene.lab.model(subject).script_path.name

    def before(start: Start) -> Failure | None:
        run = wait_for(*start(max_file_bytes=num_bytes), WAIT_SECONDS)
        if run.code is None:
            return Verdict.HANG, f"hangs on a full disk; last line: {run.lines[-1]}"
        if "Traceback" in run.log:
            return Verdict.TRACEBACK, f"traceback on a full disk: {run.lines[-1]}"
        if run.code != 0 and (problem := message_problem(run, script, scene.folder)):
            return Verdict.TRACEBACK, problem
        return None

    what = f"files of at most {num_bytes} bytes, drawing {flags != RESUMED}"
    reference = scene.lab.reference(subject).resumed
    return Case(what, subject, flags, must="train", weights=reference, before=before)
