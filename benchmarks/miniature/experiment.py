"""Teaches the miniature new concepts by D-OPSD and by what it is compared with, and measures what came of it.

    python benchmarks/miniature/experiment.py --output_dir miniature-results

A stopped experiment goes on where it was when the command is given again: every run leaves a `result.json`. `--quick`
is one concept, one seed, and the methods of the first table, measured on fewer pictures. D-OPSD runs are
`train_dopsd_flux2.py` itself.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before a library reads it: nothing here is on a hub

import argparse
import json
import re
import subprocess
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import diffusers
import torch
import transformers
from diffusers import Flux2KleinPipeline
from tqdm.auto import tqdm

import report
import world
from baselines import encode_lesson, train_baseline
from concepts import CONCEPTS, Concept, concept_task, old_task, pictures_of, write_pictures
from dopsd.context_cache import files_fingerprint
from dopsd.roles import StudentTeacherLoRA, lora_target_modules
from exam import MODEL, Task, final_latents, measure, sample
from metrics import PictureReader
from parts import MAX_SEQUENCE_LENGTH, NUM_STEPS, check_settings
from pipelines.flux2_klein import DEFAULT_LORA_LAYERS, Flux2KleinDOPSDPipeline
from train_dopsd_flux2 import positive_int, read_history, relative_drift


REPOSITORY = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)
RANK = 16
NUM_TRAIN_STEPS = 120
BATCH_SIZE = 2  # of the four pictures
LEARNING_RATE = 4e-2
# With its usual 1e-8, AdamW moves every weight by about the learning rate, also those that hardly matter for the new
# concept, and old prompts pay for it (see the ablations). D-OPSD's gradients here have a root mean square of at most
# 5e-3 an element: with this, steps follow their size.
ADAM_EPSILON = 1e-2
LR_SCHEDULER, LR_WARMUP_STEPS = "cosine", 10
EMA_DECAY = 0.9999
EVAL_COUNT, QUICK_EVAL_COUNT = 64, 48  # pictures of each kind
RETENTION_COUNT = 16  # prompts, each with one noise
STEPS_PER_EXAM, QUICK_STEPS_PER_EXAM = 20, 30  # between looks at an SFT run that is to stop at an accuracy
STEP_COUNTS = (1, 2, 4, 8)  # of the sampler, for the table of other numbers of sampling steps


@dataclass(frozen=True)
class Method:
    """One way to get a model.

    Attributes:
        kind: "base"; "teacher", the base with a picture; "dopsd", the training script; or a baseline's name.
        flags: of the training script, where they differ from `SETTINGS`. Baselines heed its names but `rank`.
        stops_at_dopsd: whether training ends where the concept accuracy of D-OPSD is reached.
    """

    name: str
    kind: str = "dopsd"
    flags: dict = field(default_factory=dict)
    stops_at_dopsd: bool = False


# What every training shares, as flags of the training script.
SETTINGS = {
    "rank": RANK,
    "train_batch_size": BATCH_SIZE,
    "learning_rate": LEARNING_RATE,
    "adam_epsilon": ADAM_EPSILON,
    "lr_scheduler": LR_SCHEDULER,
    "lr_warmup_steps": LR_WARMUP_STEPS,
    "ema_decay": EMA_DECAY,
}
# AdamW's own epsilon, at a learning rate that teaches as much in as many steps.
USUAL_EPSILON = {"adam_epsilon": 1e-8, "learning_rate": 1e-3}

BASE, TEACHER = Method("base", "base"), Method("teacher (base with a picture)", "teacher")
SFT, DOPSD = Method("SFT", "sft"), Method("D-OPSD")
SFT_STOPPED = Method("SFT, stopped at D-OPSD's accuracy", "sft", stops_at_dopsd=True)
LIVE = Method("teacher: live", flags={"teacher": "student"})
FIRST_TABLE = (BASE, TEACHER, SFT, SFT_STOPPED, DOPSD)
ABLATIONS = (
    SFT,
    Method("SFT at the deployed sigmas", "sft_deployed"),
    Method("SFT on teacher's samples", "sft_teacher"),
    Method("off-policy", "off_policy"),
    replace(DOPSD, name="on-policy (D-OPSD: EMA 0.9999, x0)"),
    LIVE,
    Method("teacher: EMA 0.9", flags={"ema_decay": 0.9}),
    Method("teacher: EMA 0.99", flags={"ema_decay": 0.99}),
    Method("teacher: base", flags={"teacher": "base"}),
    Method("velocity loss", flags={"loss_space": "velocity"}),
    Method("D-OPSD, AdamW's own epsilon", flags=USUAL_EPSILON),
    Method("SFT, AdamW's own epsilon", "sft", flags=USUAL_EPSILON),
)


class Examiner:
    """Measures pipelines on a concept and on what they knew before.

    Args:
        model: the miniature's folder.
        count: pictures of each kind.
    """

    def __init__(self, model: Path, count: int):
        self.model, self.count = model, count
        self.reader = PictureReader(world.all_appearances())
        self.old = old_task(count)

    def load(self, lora: Path | None = None) -> Flux2KleinDOPSDPipeline:
        pipeline = Flux2KleinDOPSDPipeline.from_pretrained(self.model)
        if lora is not None:
            pipeline.load_lora_weights(lora)
        return pipeline

    @property
    def retention_prompts(self) -> list[str]:
        return self.old.prompts[:RETENTION_COUNT]

    @cached_property
    def base_latents(self) -> torch.Tensor:
        return self.retention_latents(self.load())

    def retention_latents(self, pipeline: Flux2KleinDOPSDPipeline) -> torch.Tensor:
        """As the training script draws them: the prompts with noise of seeds 0, 1, 2..."""
        return final_latents(pipeline, self.retention_prompts, list(range(RETENTION_COUNT)))

    def measure(self, pipeline: Flux2KleinDOPSDPipeline, task: Task, num_steps: int = NUM_STEPS) -> dict:
        return measure(sample(pipeline, task, num_steps=num_steps), task, self.reader)

    def examine(self, pipeline: Flux2KleinDOPSDPipeline, concept: Concept, num_steps: int = NUM_STEPS) -> dict:
        """The figures of one model: of the concept and of old prompts."""
        return {
            "new": self.measure(pipeline, concept_task(concept, self.count), num_steps),
            "old": self.measure(pipeline, self.old, num_steps),
        }

    def retention(self, pipeline: Flux2KleinDOPSDPipeline) -> float:
        """As training measures it."""
        return relative_drift(self.base_latents, self.retention_latents(pipeline))


# Runs


@dataclass(frozen=True)
class Run:
    """One method on one concept with one seed."""

    concept: Concept
    seed: int
    method: Method

    @property
    def folder(self) -> Path:
        """Below the experiment's. Equal settings share a folder, whatever the tables call them."""
        method = self.method
        words = [method.kind, *(f"{name}={value}" for name, value in sorted(method.flags.items()))]
        if method.stops_at_dopsd:
            words.append("stopped")
        name = "-".join(words)
        if not re.fullmatch(r"[\w=.-]{1,60}", name):
            name = f"{method.kind}-{zlib.crc32(name.encode()):08x}"
        return Path("runs", self.concept.name, str(self.seed), name)


@dataclass(frozen=True)
class Experiment:
    """Runs below a folder; each is trained once (`trained.json`) and measured once (`result.json`).

    Attributes:
        model: the miniature's folder.
        num_train_steps: of every run; one that stops at an accuracy may take fewer.
        steps_per_exam: between looks at a run that stops at an accuracy.
    """

    model: Path
    folder: Path
    num_train_steps: int
    steps_per_exam: int
    examiner: Examiner

    @classmethod
    def open(
        cls, model: Path, folder: Path, num_train_steps: int, steps_per_exam: int, eval_count: int
    ) -> "Experiment":
        return cls(model.resolve(), folder.resolve(), num_train_steps, steps_per_exam, Examiner(model, eval_count))

    def result(self, run: Run) -> dict:
        """The run's figures."""
        return self._kept(run, "result.json", self._result)

    def results_by_step_count(self, run: Run) -> dict[str, dict]:
        """The figures at each of `STEP_COUNTS`; the run must have its result."""
        return self._kept(run, "step_counts.json", self._results_by_step_count)

    def load(self, run: Run) -> Flux2KleinDOPSDPipeline:
        """The pipeline; unless it is the base, the run must have been trained."""
        return self.examiner.load(None if run.method.kind == "base" else self.folder / run.folder)

    def _kept(self, run: Run, name: str, compute) -> dict:
        path = self.folder / run.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(compute(run), indent=2)
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(text)
            unfinished.replace(path)
        return json.loads(path.read_text())

    def _result(self, run: Run) -> dict:
        if run.method.kind == "teacher":
            images, _ = pictures_of(run.concept, run.seed)
            task = concept_task(run.concept, self.examiner.count, references=images)
            return {"new": self.examiner.measure(self.examiner.load(), task)}
        trained = {} if run.method.kind == "base" else self._kept(run, "trained.json", self._train)
        pipeline = self.load(run)
        return (
            self.examiner.examine(pipeline, run.concept) | {"retention": self.examiner.retention(pipeline)} | trained
        )

    def _train(self, run: Run) -> dict:
        return self.train_dopsd(run) if run.method.kind == "dopsd" else self.train_baseline(run)

    def _results_by_step_count(self, run: Run) -> dict[str, dict]:
        pipeline = self.load(run)
        return {str(count): self.examiner.examine(pipeline, run.concept, count) for count in STEP_COUNTS}

    def train_dopsd(self, run: Run) -> dict:
        """Runs the training script; returns the number of steps, and the retention that it logged at the end."""
        folder = self.folder / run.folder
        write_pictures(folder / "pictures", *pictures_of(run.concept, run.seed))
        flags = dopsd_flags(
            self.model,
            folder / "pictures",
            folder,
            run.seed,
            self.num_train_steps,
            self.examiner.retention_prompts,
            run.method.flags,
        )
        command = [sys.executable, str(REPOSITORY / "train_dopsd_flux2.py"), *sum(flags, [])]
        with open(folder / "training.log", "a") as log:
            finished = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if finished.returncode:
            raise RuntimeError(f"{folder / 'training.log'}: the training script ended with {finished.returncode}")
        logged = [line["retention"] for line in read_history(folder) if "retention" in line]
        if not logged:
            raise RuntimeError(f"{folder / 'training.log'}: the training script logged no retention")
        return {"steps": self.num_train_steps, "retention_logged": logged[-1]}

    def train_baseline(self, run: Run) -> dict:
        """Trains a baseline, leaves its LoRA in the run's folder; returns the number of steps, and if it was to
        stop at an accuracy, whether it got there."""
        stop_at = self.result(replace(run, method=DOPSD))["new"]["exact"] if run.method.stops_at_dopsd else None
        pipeline = self.examiner.load()
        lesson = encode_lesson(
            pipeline,
            *pictures_of(run.concept, run.seed),
            prompt_suffix=world.REFERENCE_SUFFIX,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
        )
        torch.manual_seed(run.seed)
        settings = SETTINGS | run.method.flags
        targets = lora_target_modules(pipeline.transformer, DEFAULT_LORA_LAYERS)
        roles = StudentTeacherLoRA(pipeline.transformer, targets, rank=RANK, alpha=2 * RANK)
        task = concept_task(run.concept, self.examiner.count)
        trained = {} if stop_at is None else {"reached": False}

        def after_step(step: int) -> bool:
            trained["steps"] = step
            if stop_at is None or step % self.steps_per_exam:
                return False
            with roles.shipped_role(torch.float32):
                trained["reached"] = self.examiner.measure(pipeline, task)["exact"] >= stop_at
            return trained["reached"]

        train_baseline(
            run.method.kind,
            pipeline,
            roles,
            lesson,
            size=(world.SIDE, world.SIDE),
            num_steps=self.num_train_steps,
            batch_size=settings["train_batch_size"],
            num_rollout_steps=NUM_STEPS,
            learning_rate=settings["learning_rate"],
            adam_epsilon=settings["adam_epsilon"],
            lr_scheduler=settings["lr_scheduler"],
            lr_warmup_steps=settings["lr_warmup_steps"],
            ema_decay=settings["ema_decay"],
            seed=run.seed,
            after_step=after_step,
        )
        weights, metadata = roles.export(torch.float32)
        Flux2KleinPipeline.save_lora_weights(
            self.folder / run.folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata
        )
        return trained


def dopsd_flags(
    model: Path,
    pictures_dir: Path,
    output_dir: Path,
    seed: int,
    num_steps: int,
    retention_prompts: list[str],
    changed: dict | None = None,
) -> list[list[str]]:
    """Of the training script, each with its values: the settings that the baselines share.

    After the preview it draws, and measures retention, once: at the end.
    """
    settings = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": pictures_dir,
        "output_dir": output_dir,
        "teacher_prompt_suffix": world.REFERENCE_SUFFIX,
        "resolution": world.SIDE,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        **SETTINGS,
        "max_train_steps": num_steps,
        "checkpointing_steps": min(100, num_steps),
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "mixed_precision": "no",
        "validation_steps": num_steps,
        "seed": seed,
        **(changed or {}),
    }
    flags = [[f"--{name}", str(value)] for name, value in settings.items()]
    return [*flags, ["--retention_prompts", *retention_prompts]]


# All runs, side by side


def open_in_worker(*settings) -> None:
    """What each worker process keeps between its runs; takes the arguments of `Experiment.open`."""
    global worker_experiment
    Thread(target=end_with_parent, daemon=True).start()
    quiet()
    worker_experiment = Experiment.open(*settings)


def end_with_parent() -> None:
    """A killed experiment leaves no worker behind, which would train what the next call trains again."""
    parent_process().join()
    os._exit(1)


def quiet() -> None:
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def result_in_worker(run: Run) -> None:
    worker_experiment.result(run)


def step_counts_in_worker(run: Run) -> None:
    worker_experiment.results_by_step_count(run)


def run_side_by_side(experiment: Experiment, runs: list[Run], step_runs: list[Run], num_workers: int) -> None:
    """Has every run's result made, then `step_runs`' by step count; a worker process does one run at a time.

    Raises:
        RuntimeError: a training failed. Runs that have not begun are left out then.
    """
    # The long ones first, so that no core is left alone with one; those that stop at D-OPSD's accuracy wait for it.
    runs = sorted({run.folder: run for run in runs}.values(), key=lambda run: run.method.kind != "dopsd")
    waves = [
        (result_in_worker, [run for run in runs if not run.method.stops_at_dopsd]),
        (result_in_worker, [run for run in runs if run.method.stops_at_dopsd]),
        (step_counts_in_worker, step_runs),
    ]
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=get_context("spawn"),
        initializer=open_in_worker,
        initargs=(
            experiment.model,
            experiment.folder,
            experiment.num_train_steps,
            experiment.steps_per_exam,
            experiment.examiner.count,
        ),
    )
    try:
        with tqdm(total=sum(len(jobs) for _, jobs in waves), desc="Runs") as bar:
            for work, jobs in waves:
                for future in as_completed([pool.submit(work, job) for job in jobs]):
                    future.result()
                    bar.update()
    finally:
        pool.shutdown(cancel_futures=True)


def settings_of(experiment: Experiment) -> dict:
    """What the folder's results depend on."""
    weights = {str(path.relative_to(experiment.model)): path for path in experiment.model.rglob("*.safetensors")}
    return {
        "model": files_fingerprint(weights),
        "num_train_steps": experiment.num_train_steps,
        "steps_per_exam": experiment.steps_per_exam,
        "eval_count": experiment.examiner.count,
        **SETTINGS,
    }


def runs_of(method: Method, concepts: tuple[Concept, ...], seeds: tuple[int, ...]) -> list[Run]:
    """One run a concept and seed; the base, which has seen no pictures, has one a concept."""
    return [
        Run(concept, seed, method) for concept in concepts for seed in (seeds[:1] if method.kind == "base" else seeds)
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="The miniature's folder.")
    parser.add_argument(
        "--output_dir", type=Path, help="Runs, tables and sheets (miniature-results; with --quick miniature-quick)."
    )
    parser.add_argument("--num_train_steps", type=positive_int, default=NUM_TRAIN_STEPS, help="Of a run.")
    parser.add_argument(
        "--eval_count",
        type=positive_int,
        help=f"Pictures of each kind that are measured ({EVAL_COUNT}; with --quick {QUICK_EVAL_COUNT}).",
    )
    parser.add_argument(
        "--num_workers", type=positive_int, help="Runs side by side (one a core; with --quick one on all cores)."
    )
    parser.add_argument("--quick", action="store_true", help="One concept, one seed, the first table.")
    args = parser.parse_args()
    if args.output_dir is None:
        args.output_dir = Path("miniature-quick" if args.quick else "miniature-results")
    args.steps_per_exam = QUICK_STEPS_PER_EXAM if args.quick else STEPS_PER_EXAM
    if args.eval_count is None:
        args.eval_count = QUICK_EVAL_COUNT if args.quick else EVAL_COUNT
    if args.num_workers is None:
        args.num_workers = 1 if args.quick else os.cpu_count()
    return args


def main() -> None:
    args = parse_args()
    quiet()
    if not (args.model / "model_index.json").exists():
        sys.exit(f"--model {args.model}: holds no pipeline; see make.py")
    if args.eval_count < RETENTION_COUNT:
        sys.exit(f"--eval_count {args.eval_count}: give {RETENTION_COUNT} or more")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--output_dir {args.output_dir}: {error.strerror}; choose another folder")
    # The workers and the training script read it when they start.
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.num_workers))
    experiment = Experiment.open(
        args.model, args.output_dir, args.num_train_steps, args.steps_per_exam, args.eval_count
    )
    try:
        check_settings(
            args.output_dir / "settings.json", settings_of(experiment), origin=f"--output_dir {args.output_dir}"
        )
    except ValueError as error:
        sys.exit(str(error))
    concepts, seeds = (CONCEPTS[:1], SEEDS[:1]) if args.quick else (CONCEPTS, SEEDS)
    first = {method.name: runs_of(method, concepts, seeds) for method in FIRST_TABLE}
    ablations = {} if args.quick else {method.name: runs_of(method, concepts[:1], seeds) for method in ABLATIONS}
    by_step_count = {method.name: runs_of(method, concepts[:1], seeds[:1]) for method in (BASE, SFT, DOPSD)}
    try:
        run_side_by_side(
            experiment,
            [run for runs in (*first.values(), *ablations.values()) for run in runs],
            [run for runs in by_step_count.values() for run in runs],
            args.num_workers,
        )
    except RuntimeError as error:
        sys.exit(str(error))
    report.write(experiment, first, ablations, by_step_count)


if __name__ == "__main__":
    main()
