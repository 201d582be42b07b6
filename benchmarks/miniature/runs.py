"""Trains and measures the experiment's runs, each of them once."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline

from benchmarks.miniature import world
from benchmarks.miniature.architecture import Architecture
from benchmarks.miniature.architectures import architecture_in, architecture_of
from benchmarks.miniature.baselines import (
    BaselineTraining,
    EncodedPictures,
    PriorPictures,
    draw_prior_pictures,
    encode_pictures,
)
from benchmarks.miniature.concepts import (
    CONCEPTS,
    Concept,
    Renaming,
    concept_task,
    prior_prompts,
    training_pictures,
)
from benchmarks.miniature.costs import NUM_ROLLOUT_STEPS
from benchmarks.miniature.evaluate import Evaluator
from benchmarks.miniature.files import replacing, write_pipeline
from benchmarks.miniature.methods import DOPSD, SHARED_FLAGS, TRAIN_MODE, Method, Run
from dopsd.context_cache import files_fingerprint
from dopsd.errors import DOPSDError
from dopsd.history import last_retention, read_history
from dopsd.lora_roles import StudentTeacherLoRA, lora_target_modules
from dopsd.prior import TriggerWord, word_prompts
from dopsd.roles import Roles
from dopsd.weight_roles import StudentTeacherWeights, freeze_others, trained_weights


NUM_TIMED_STEPS = 17


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
        stacked_concepts: each is measured together with the next one.
    """

    model: Path
    folder: Path
    num_train_steps: int
    steps_per_evaluation: int
    eval_count: int
    stacked_concepts: ClassVar[tuple[Concept, ...]] = CONCEPTS

    @cached_property
    def architecture(self) -> Architecture:
        return architecture_in(self.model)

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
        """The run's metrics: "new" (on the concept), "old" (on known objects), "neighbours", "wrong_words" and
        "retention"; training "steps" and their cost, "forwards". Also "stack" and "seconds", if they were measured.
        """
        result = self._once(run, "result.json", self._measure)
        if run.method.is_trained and isinstance(run.concept, Concept):  # a renaming's teacher has no picture
            result["forwards"] = round(run.method.cost(result["steps"], self.architecture))
            if (path := self.folder / timed_run(run).folder / "step_seconds.json").exists():
                result["seconds"] = round(json.loads(path.read_text()) * result["steps"], 1)
        if (path := self.folder / run.folder / "stack.json").exists():
            result["stack"] = json.loads(path.read_text())
        return result

    def trained(self, run: Run) -> dict:
        """What the run's training gave, "steps" among it; trains first if that is missing."""
        return self._once(run, "trained.json", self._train)

    def stack(self, run: Run) -> dict:
        """Metrics with the run's LoRA and that of the same method for the next concept, for runs that are trained."""
        return self._once(run, "stack.json", self._measure_stack)

    def step_seconds(self, run: Run) -> float:
        """Seconds per training step, measured by a short training on an otherwise idle machine."""
        return self._once(timed_run(run), "step_seconds.json", self._time)

    def results_by_step_count(self, run: Run, step_counts: tuple[int, ...]) -> dict[str, dict]:
        """Metrics "new" and "old" at each number of sampling steps, for a run that has been trained."""
        return self._once(run, "step_counts.json", partial(self._measure_by_step_count, step_counts=step_counts))

    def load(self, run: Run, *others: Run) -> DiffusionPipeline:
        """The pipeline of a run that has been trained, with the LoRAs of others, or of the base model."""
        if run.method.is_full:
            return self.architecture.load(self.folder / run.folder)
        return self.evaluator.load(*(self.folder / one.folder for one in (run, *others) if one.method.is_trained))

    def _once(self, run: Run, name: str, compute: Callable[[Run], dict | float]) -> dict | float:
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
            pipeline = self.architecture.load(self.model, **run.method.flags)
            return {"new": self.evaluator.measure(pipeline, task)}
        trained = self.trained(run) if run.method.is_trained else {}
        pipeline = self.load(run)
        metrics = self.evaluator.evaluate(pipeline, run.concept) | self.evaluator.evaluate_leaks(pipeline, run.concept)
        return metrics | {"retention": self.evaluator.retention(pipeline)} | trained

    def _measure_stack(self, run: Run) -> dict[str, float]:
        every = self.stacked_concepts
        concepts = [run.concept, every[(every.index(run.concept) + 1) % len(every)]]
        pipeline = self.load(*(replace(run, concept=concept) for concept in concepts))
        return self.evaluator.evaluate_stack(pipeline, concepts)

    def _time(self, run: Run) -> float:
        with TemporaryDirectory() as folder:
            timed = replace(self, folder=Path(folder), num_train_steps=NUM_TIMED_STEPS)
            if run.method.kind != "dopsd":
                clock = [time.perf_counter()]
                timed.train_baseline(run, should_stop=lambda step: clock.append(time.perf_counter()))
                seconds = np.diff(clock)
            else:
                timed.train_dopsd(run, validation_steps=0)
                seconds = [line["seconds_per_step"] for line in read_history(Path(folder, run.folder))]
        return round(float(np.mean(seconds[1:])), 4)  # the first one includes warming up

    def _measure_by_step_count(self, run: Run, step_counts: tuple[int, ...]) -> dict[str, dict]:
        pipeline, result = self.load(run), self.result(run)
        return {
            str(count): {name: result[name] for name in ("new", "old")}
            if count == self.architecture.num_steps
            else self.evaluator.evaluate(pipeline, run.concept, count)
            for count in step_counts
        }

    def _train(self, run: Run) -> dict:
        return self.train_dopsd(run) if run.method.kind == "dopsd" else self.train_baseline(run)

    def train_dopsd(self, run: Run, **changed: object) -> dict:
        """Trains with the training script. Returns the number of steps and the last retention that it logged.

        Args:
            changed: flags of the training script.

        Raises:
            TrainingFailed: the script ended with an error or logged no retention.
        """
        folder = self.folder / run.folder
        run.concept.write_training_data(folder / "pictures", run.seed)
        num_steps = run.method.num_steps(self.num_train_steps)
        flags = dopsd_flags(
            self.model,
            folder / "pictures",
            folder,
            seed=run.seed,
            num_steps=num_steps,
            retention_prompts=self.evaluator.retention_prompts,
            num_validation_images=1,  # the experiment draws and measures its own
            **run.concept.training_flags,
            **self._prior_flags(run, folder),
            **run.method.flags | changed,
        )
        log_path = folder / "training.log"
        with open(log_path, "a") as log:
            command = [sys.executable, str(self.architecture.script), *sum(flags, [])]
            finished = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if finished.returncode:
            raise TrainingFailed(f"{log_path}: the training script ended with exit status {finished.returncode}")
        retention = last_retention(folder)
        if retention is None and "validation_steps" not in changed:
            raise TrainingFailed(f"{log_path}: the training script logged no retention")
        return {"steps": num_steps, "retention_logged": retention}

    def _prior_flags(self, run: Run, folder: Path) -> dict[str, object]:
        return prior_flags(run.method, run.concept, folder)

    def train_baseline(self, run: Run, should_stop: Callable[[int], bool] | None = None) -> dict:
        """Trains a baseline and saves its LoRA, or the whole pipeline, in the run's folder.

        Args:
            should_stop: see `BaselineTraining.train`.

        Returns:
            "steps", the number of training steps; and if the run stops at an accuracy, "reached": whether it did.
        """
        pipeline = self.evaluator.load()
        torch.manual_seed(run.seed)
        schedule = pipeline.schedule(world.SIDE, world.SIDE, NUM_ROLLOUT_STEPS)
        prior = self._prior_pictures(run, pipeline) if run.method.kind == "sft_prior" else None
        settings = run.method.settings
        roles = make_roles(run.method, pipeline)
        stop = self._accuracy_stop(run, pipeline, roles) if run.method.stops_at_dopsd else should_stop
        pictures = self._encoded_pictures(run, pipeline)
        training = BaselineTraining(
            run.method.kind, pipeline, roles, pictures, schedule, settings, seed=run.seed, prior=prior
        )
        num_steps = training.train(run.method.num_steps(self.num_train_steps), stop)
        save_baseline(roles, pipeline, self.folder / run.folder)
        return ({"reached": stop.reached} if run.method.stops_at_dopsd else {}) | {"steps": num_steps}

    def _encoded_pictures(self, run: Run, pipeline: DiffusionPipeline) -> EncodedPictures:
        return encode_pictures(
            pipeline,
            *run.concept.pictures(run.seed),
            prompt_suffix=world.REFERENCE_SUFFIX,
        )

    def _prior_pictures(self, run: Run, pipeline: DiffusionPipeline) -> PriorPictures:
        schedule = pipeline.schedule(world.SIDE, world.SIDE, self.architecture.num_steps)
        return draw_prior_pictures(pipeline, self._held_prompts(run), schedule, seed=run.seed)

    def _held_prompts(self, run: Run) -> list[str]:
        """As many draws from the prompts of D-OPSD's prior preservation as prior pictures are needed."""
        _, captions = run.concept.pictures(run.seed)
        made = word_prompts([TriggerWord(run.concept.word, "")], captions, run.seed)
        prompts = replace(made, unrelated=tuple(prior_prompts(run.method.prior_avoids)))
        count = run.method.num_prior_pictures(run.method.num_steps(self.num_train_steps))
        return [prompts.draw(run.seed, place, 1)[0] for place in range(count)]

    def _accuracy_stop(self, run: Run, pipeline: DiffusionPipeline, roles: Roles) -> "AccuracyStop":
        task = run.concept.task(self.eval_count)

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


def make_roles(method: Method, pipeline: DiffusionPipeline) -> Roles:
    """What a baseline trains."""
    transformer = pipeline.transformer
    if method.is_full:
        freeze_others(transformer, trained_weights(transformer, None))
        cpu = torch.device("cpu")
        return StudentTeacherWeights(transformer, ema_device=cpu, base_device=cpu)
    targets = lora_target_modules(transformer, architecture_of(pipeline).lora_layers)
    return StudentTeacherLoRA(transformer, targets, rank=method.settings.rank, alpha=method.settings.lora_alpha)


def save_baseline(roles: Roles, pipeline: DiffusionPipeline, folder: Path) -> None:
    """Writes what `Experiment.load` reads: a LoRA, or the whole pipeline, whose other files are those it came from."""
    if isinstance(roles, StudentTeacherLoRA):
        weights, metadata = roles.export(torch.float32)
        pipeline.save_lora_weights(folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata)
    else:
        write_pipeline(Path(pipeline.name_or_path), folder, pipeline.transformer.state_dict())


def timed_run(run: Run) -> Run:
    """The run whose training is timed for all runs of a method, whatever their number of steps."""
    return Run(CONCEPTS[0], 0, replace(run.method, relative_steps=1.0, stops_at_dopsd=False))


def prior_flags(method: Method, concept: Concept | Renaming, folder: Path) -> dict[str, object]:
    """Flags of prior preservation, if the method has it; writes its prompts into the folder."""
    if not method.flags.get("with_prior_preservation"):
        return {}
    path = folder / "prior_prompts.txt"
    path.write_text("\n".join(prior_prompts(method.prior_avoids)) + "\n")
    return {"prior_prompts": path} | ({"trigger_word": concept.word} if method.names_word else {})


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
        changed: flags whose values differ from `SHARED_FLAGS` or are not among them. A list is a flag's values.
    """
    settings = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": pictures_dir,
        "output_dir": output_dir,
        "resolution": world.SIDE,
        **architecture_in(model).script_flags(model),
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
    if settings.get(TRAIN_MODE) == "full":
        del settings["rank"]
    values = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    flags = [[f"--{name}", *map(str, some)] for name, some in values.items()]
    return [*flags, ["--retention_prompts", *retention_prompts]]
