"""Trains and measures the experiment's runs, each of them once."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline

from benchmarks.miniature import world
from benchmarks.miniature.baselines import encode_pictures, train_baseline
from benchmarks.miniature.concepts import concept_task, training_pictures, write_pictures
from benchmarks.miniature.evaluate import Evaluator
from benchmarks.miniature.files import REPOSITORY, replacing
from benchmarks.miniature.methods import DOPSD, SHARED_FLAGS, Run
from benchmarks.miniature.parts import MAX_SEQUENCE_LENGTH, NUM_STEPS
from dopsd.context_cache import files_fingerprint
from dopsd.errors import DOPSDError
from dopsd.history import last_retention
from dopsd.roles import StudentTeacherLoRA, lora_target_modules
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline
from pipelines.published import KLEIN_LORA_LAYERS


TRAINING_SCRIPT = REPOSITORY / "train_dopsd_flux2.py"
STEP_COUNTS = (1, 2, 4, 8)  # numbers of sampling steps that models are compared at


class TrainingFailed(DOPSDError):
    """The training script failed. The message names its log."""


@dataclass(frozen=True)
class Experiment:
    """Runs in subfolders of a folder. Each is trained once (trained.json) and measured once (result.json).

    Attributes:
        model: the miniature's folder.
        num_train_steps: training steps per run; a run that stops at an accuracy can take fewer.
        steps_per_evaluation: training steps between evaluations of a run that stops at an accuracy.
        eval_count: pictures per task.
    """

    model: Path
    folder: Path
    num_train_steps: int
    steps_per_evaluation: int
    eval_count: int

    @cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.model, self.eval_count)

    @property
    def settings(self) -> dict:
        """Everything that the results depend on, besides the code."""
        weights = {str(path.relative_to(self.model)): path for path in self.model.rglob("*.safetensors")}
        return {
            "model": files_fingerprint(weights),
            "num_train_steps": self.num_train_steps,
            "steps_per_evaluation": self.steps_per_evaluation,
            "eval_count": self.eval_count,
            **SHARED_FLAGS,
        }

    def result(self, run: Run) -> dict:
        """The run's metrics: "new" (on the concept), "old" (on known objects), "retention", and training "steps"."""
        return self._once(run, "result.json", self._measure)

    def results_by_step_count(self, run: Run) -> dict[str, dict]:
        """Metrics "new" and "old" at each of `STEP_COUNTS`, for a run that has been trained."""
        return self._once(run, "step_counts.json", self._measure_by_step_count)

    def load(self, run: Run) -> Flux2KleinDOPSDPipeline:
        """The pipeline of a run that has been trained, or of the base model."""
        return self.evaluator.load(None if run.method.kind == "base" else self.folder / run.folder)

    def _once(self, run: Run, name: str, compute: Callable[[Run], dict]) -> dict:
        """Reads a JSON file in the run's folder, which is computed and written first if it is missing."""
        path = self.folder / run.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(compute(run), indent=2)
            with replacing(path) as partial:
                partial.write_text(text)
        return json.loads(path.read_text())

    def _measure(self, run: Run) -> dict:
        if run.method.kind == "teacher":
            images, _ = training_pictures(run.concept, run.seed)
            task = concept_task(run.concept, self.eval_count, references=images)
            return {"new": self.evaluator.measure(self.evaluator.load(), task)}
        trained = {} if run.method.kind == "base" else self._once(run, "trained.json", self._train)
        pipeline = self.load(run)
        retention = {"retention": self.evaluator.retention(pipeline)}
        return self.evaluator.evaluate(pipeline, run.concept) | retention | trained

    def _measure_by_step_count(self, run: Run) -> dict[str, dict]:
        pipeline = self.load(run)
        return {str(count): self.evaluator.evaluate(pipeline, run.concept, count) for count in STEP_COUNTS}

    def _train(self, run: Run) -> dict:
        return self.train_dopsd(run) if run.method.kind == "dopsd" else self.train_baseline(run)

    def train_dopsd(self, run: Run) -> dict:
        """Trains with the training script. Returns the number of steps and the last retention that it logged.

        Raises:
            TrainingFailed: the script ended with an error or logged no retention.
        """
        folder = self.folder / run.folder
        write_pictures(folder / "pictures", *training_pictures(run.concept, run.seed))
        flags = dopsd_flags(
            self.model,
            folder / "pictures",
            folder,
            seed=run.seed,
            num_steps=self.num_train_steps,
            retention_prompts=self.evaluator.retention_prompts,
            **run.method.flags,
        )
        log_path = folder / "training.log"
        with open(log_path, "a") as log:
            command = [sys.executable, str(TRAINING_SCRIPT), *sum(flags, [])]
            finished = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if finished.returncode:
            raise TrainingFailed(f"{log_path}: the training script ended with exit status {finished.returncode}")
        retention = last_retention(folder)
        if retention is None:
            raise TrainingFailed(f"{log_path}: the training script logged no retention")
        return {"steps": self.num_train_steps, "retention_logged": retention}

    def train_baseline(self, run: Run) -> dict:
        """Trains a baseline and saves its LoRA in the run's folder.

        Returns:
            "steps", the number of training steps; and if the run stops at an accuracy, "reached": whether it did.
        """
        pipeline = self.evaluator.load()
        torch.manual_seed(run.seed)
        settings = run.method.settings
        targets = lora_target_modules(pipeline.transformer, KLEIN_LORA_LAYERS)
        roles = StudentTeacherLoRA(pipeline.transformer, targets, rank=settings.rank, alpha=settings.lora_alpha)
        stop = self._accuracy_stop(run, pipeline, roles) if run.method.stops_at_dopsd else None
        num_steps = train_baseline(
            run.method.kind,
            pipeline,
            roles,
            encode_pictures(
                pipeline,
                *training_pictures(run.concept, run.seed),
                prompt_suffix=world.REFERENCE_SUFFIX,
                max_sequence_length=MAX_SEQUENCE_LENGTH,
            ),
            pipeline.schedule(world.SIDE, world.SIDE, NUM_STEPS),
            settings,
            num_steps=self.num_train_steps,
            seed=run.seed,
            should_stop=stop,
        )
        weights, metadata = roles.export(torch.float32)
        Flux2KleinPipeline.save_lora_weights(
            self.folder / run.folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata
        )
        return ({"reached": stop.reached} if stop else {}) | {"steps": num_steps}

    def _accuracy_stop(self, run: Run, pipeline: Flux2KleinDOPSDPipeline, roles: StudentTeacherLoRA) -> "AccuracyStop":
        task = concept_task(run.concept, self.eval_count)

        def accuracy() -> float:
            with roles.shipped_role(torch.float32):
                return self.evaluator.measure(pipeline, task)["exact"]

        wanted = self.result(replace(run, method=DOPSD))["new"]["exact"]
        return AccuracyStop(accuracy, wanted, self.steps_per_evaluation)


@dataclass
class AccuracyStop:
    """Tells a training to stop when an accuracy, measured every `interval` steps, is at least `wanted`."""

    accuracy: Callable[[], float]
    wanted: float
    interval: int
    reached: bool = False

    def __call__(self, step: int) -> bool:
        if step % self.interval == 0:
            self.reached = self.accuracy() >= self.wanted
        return self.reached


def dopsd_flags(
    model: Path,
    pictures_dir: Path,
    output_dir: Path,
    *,
    seed: int,
    num_steps: int,
    retention_prompts: list[str],
    **changed: object,
) -> list[list[str]]:
    """Flags of the training script, each with its values. After the preview it validates once, at the end.

    Args:
        changed: flags whose values differ from `SHARED_FLAGS` or are not among them.
    """
    settings = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": pictures_dir,
        "output_dir": output_dir,
        "teacher_prompt_suffix": world.REFERENCE_SUFFIX,
        "resolution": world.SIDE,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        **SHARED_FLAGS,
        "max_train_steps": num_steps,
        "checkpointing_steps": min(100, num_steps),
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "mixed_precision": "no",
        "validation_steps": num_steps,
        "seed": seed,
        **changed,
    }
    flags = [[f"--{name}", str(value)] for name, value in settings.items()]
    return [*flags, ["--retention_prompts", *retention_prompts]]
