"""Trains and measures the runs of D-OPSD and its rivals, each of them once."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.miniature import world
from benchmarks.miniature.baselines import BaselineTraining, EncodedPictures, deployed_shift
from benchmarks.miniature.concepts import MAX_EVAL_COUNT, Concept, old_task, training_pictures
from benchmarks.miniature.costs import NUM_PRIOR_PICTURES, NUM_ROLLOUT_STEPS
from benchmarks.miniature.evaluate import Evaluator, decode, measure
from benchmarks.miniature.once import REPAIR, Once, OnceSettings, adapted, deployed_schedule
from benchmarks.miniature.rival_methods import (
    DELTA_PRIOR,
    GRID_CONCEPT,
    NUM_TAUGHT_TRAJECTORIES,
    OFF_POLICY_ONE_PRIOR,
    OFF_POLICY_PRIOR,
    REPORTED_CONCEPTS,
    Rival,
    RivalRun,
)
from benchmarks.miniature.rival_training import (
    DeltaTraining,
    ManyStepChange,
    OffPolicyPriorTraining,
    Trajectories,
    record,
)
from benchmarks.miniature.runs import Experiment, make_roles, save_baseline
from benchmarks.miniature.tasks import Task
from dopsd.data.order import place_seed
from dopsd.rollout import Schedule, few_step_sample, seeded_noise


STRENGTHS = (0.5, 1.5)  # of the LoRA, besides 1
GRID_COUNT = 48  # at most; pictures of each task where only "new" and "old" are measured
NUM_MANY_STEPS = 16  # of a many-step model where its LoRA is chosen


@dataclass(frozen=True)
class FaultyLesson(Concept):
    """A concept with worse training pictures.

    Attributes:
        num_pictures: how many of the four there are; they are repeated to four.
        wrong: what the last picture shows instead; None for nothing wrong.
    """

    num_pictures: int = 4
    wrong: world.Appearance | None = None

    def pictures(self, seed: int) -> tuple[list[Image.Image], list[str]]:
        images, captions = training_pictures(self, seed)
        if self.wrong is not None:
            wrong, _ = training_pictures(replace(self, appearance=self.wrong), seed)
            images[-1] = wrong[-1]
        kept = [index % self.num_pictures for index in range(len(images))]
        return [images[index] for index in kept], [captions[index] for index in kept]


class GridEvaluator(Evaluator):
    """Measures what is chosen by: other prompts for known objects, and other noise, than what is reported.

    Args:
        num_reported: pictures of a task that reports show; the grid's come after these.
    """

    def __init__(self, model: Path, count: int, num_reported: int):
        super().__init__(model, count)
        self.num_reported = num_reported
        every = old_task(MAX_EVAL_COUNT)
        reported = {*every.prompts[:num_reported]}
        others = [index for index, prompt in enumerate(every.prompts) if prompt not in reported]
        self.old = every.select(others[:count], first_seed=num_reported)

    def task_of(self, concept: Concept) -> Task:
        indices = range(self.num_reported, self.num_reported + self.count)
        return concept.task(indices.stop).select(indices, first_seed=indices.start)


@dataclass(frozen=True)
class RivalExperiment(Experiment):
    """Runs of rivals; see `Experiment`.

    Attributes:
        once_settings: of what is trained once, in the subfolder once.
    """

    once_settings: OnceSettings = OnceSettings()
    stacked_concepts: ClassVar[tuple[Concept, ...]] = REPORTED_CONCEPTS

    @property
    def once(self) -> Once:
        return Once(self.architecture, self.model, self.folder / "once", self.once_settings, self.short_count)

    @property
    def settings(self) -> dict:
        return super().settings | {
            "once": vars(self.once_settings),
            "grid_concept": GRID_CONCEPT.name,
            "grid_pictures": [self.eval_count, self.short_count],  # the first one, and how many
            "flow_matching": {"shift": round(self.shift, 4), "draws": Rival.num_draws},
            "prior_pictures": NUM_PRIOR_PICTURES,
            "taught_trajectories": NUM_TAUGHT_TRAJECTORIES,
            "rollout_steps": NUM_ROLLOUT_STEPS,
            "many_steps": NUM_MANY_STEPS,
            "strengths": [*STRENGTHS],
        }

    @cached_property
    def shift(self) -> float:
        """Of the sigmas of flow matching: the deployed sampler's."""
        return deployed_shift(deployed_schedule(self.architecture, self.evaluator.load()))

    @property
    def short_count(self) -> int:
        """Pictures of each task in grids, in the study and of what is trained once."""
        return min(GRID_COUNT, self.eval_count)

    @cached_property
    def grid_evaluator(self) -> GridEvaluator:
        return GridEvaluator(self.model, self.short_count, self.eval_count)

    def short_result(self, run: RivalRun) -> dict:
        """Metrics "new" and "old" from the grid's pictures, the number of "steps" and their cost, "forwards"."""
        result = self._once(run, "short_result.json", self._measure_briefly)
        return self._with_cost(run, result) if run.method.is_trained else result

    def many_step_result(self, run: RivalRun) -> dict:
        """The same of the many-step model on which the run's LoRA was trained, sampled in `NUM_MANY_STEPS` steps."""
        return self._with_cost(run, self._once(run, "many_step_result.json", self._measure_many_steps))

    def _with_cost(self, run: RivalRun, result: dict) -> dict:
        return result | {"forwards": round(run.method.cost(result["steps"], self.architecture))}

    def result(self, run: RivalRun) -> dict:
        """Of delta transfer also "followed"; and metrics at each of `STRENGTHS`, if they were measured."""
        result = super().result(run)
        if (path := self.folder / run.folder / "strengths.json").exists():
            result |= json.loads(path.read_text())
        return result

    def strengths(self, run: RivalRun) -> dict[str, dict]:
        """Metrics "new" and "old" with the run's LoRA at each of `STRENGTHS`."""
        return self._once(run, "strengths.json", self._measure_strengths)

    def load(self, run: RivalRun, *others: RivalRun, strength: float = 1.0) -> DiffusionPipeline:
        """The pipeline of a run that has been trained, with the LoRAs of others, or of the base model.

        Args:
            strength: of the runs' LoRAs. A repair LoRA has its method's scale.
        """
        if not run.method.is_trained:
            return self.evaluator.load()
        is_repaired = run.method.kind == REPAIR
        loras = [self.folder / (one.source if is_repaired else one).folder for one in (run, *others)]
        strengths = [strength] * len(loras)
        if is_repaired:
            loras, strengths = [*loras, self.once.folder / REPAIR], [*strengths, run.method.scale]
        pipeline = self.evaluator.load(*loras)
        if {*strengths} != {1.0}:
            pipeline.set_adapters([f"lora_{index}" for index in range(len(loras))], strengths)
        return pipeline

    def _measure(self, run: RivalRun) -> dict:
        return super()._measure(run) | ({"followed": self._measure_followed(run)} if run.method.is_delta else {})

    def _measure_strengths(self, run: RivalRun) -> dict[str, dict]:
        return {
            f"at_{strength}": self.evaluator.evaluate(self.load(run, strength=strength), run.concept)
            for strength in STRENGTHS
        }

    def _measure_briefly(self, run: RivalRun) -> dict:
        trained = self.trained(run) if run.method.is_trained else {}
        return self.grid_evaluator.evaluate(self.load(run), run.concept) | trained

    def _measure_many_steps(self, run: RivalRun) -> dict:
        trained = self.trained(run)
        model = adapted(self.once.load_many_step(run.method.trained_on), self.folder / run.folder)
        return self.grid_evaluator.evaluate(model, run.concept, NUM_MANY_STEPS) | trained

    @torch.no_grad()
    def _measure_followed(self, run: RivalRun) -> dict[str, dict]:
        """Metrics "new" and "old" of few steps along the velocity that delta transfer teaches, without a student."""
        base, change = self.evaluator.load(), self._change(run)
        schedule = deployed_schedule(self.architecture, base)
        metrics = {}
        for name, task in (("new", self.evaluator.task_of(run.concept)), ("old", self.evaluator.old)):
            context = self.architecture.text_context(base, task.prompts)
            velocity = change.target(partial(base.predict_velocity, context=context), context)
            latents = base.image_latents(few_step_sample(velocity, self._noise(base, task.seeds), schedule))
            metrics[name] = measure(decode(base, latents), task, self.evaluator.reader)
        return metrics

    def _change(self, run: RivalRun) -> ManyStepChange:
        before, after = (self.once.load_many_step(run.method.source.trained_on) for _ in range(2))
        return ManyStepChange(before, adapted(after, self.folder / run.source.folder), run.method.scale)

    def _train(self, run: RivalRun) -> dict:
        if run.method.kind == "dopsd":
            return self.train_dopsd(run)
        if run.method.source is not None:
            trained = self.trained(run.source)
            if run.method.kind == REPAIR:
                return trained
        return self.train_rival(run)

    def train_rival(self, run: RivalRun) -> dict:
        """Trains and saves a LoRA in the run's folder. Returns the number of "steps"."""
        base = self.evaluator.load()
        schedule = base.schedule(world.SIDE, world.SIDE, NUM_ROLLOUT_STEPS)
        pictures = self._encoded_pictures(run, base)
        make_training = self._training_of(run, base, pictures, schedule)
        pipeline = self.once.load_many_step(run.method.trained_on) if run.method.trained_on else base
        torch.manual_seed(run.seed)
        roles = make_roles(run.method, pipeline)
        training = make_training(pipeline, roles, pictures, schedule, run.method.settings, seed=run.seed)
        num_steps = training.train(run.method.num_steps(self.num_train_steps))
        save_baseline(roles, pipeline, self.folder / run.folder)
        return {"steps": num_steps}

    def _training_of(
        self, run: RivalRun, base: DiffusionPipeline, pictures: EncodedPictures, schedule: Schedule
    ) -> Callable[..., BaselineTraining]:
        """The training, but for the arguments that all of them have. Calls the base while it has no LoRA."""
        kind = run.method.kind
        if kind in (OFF_POLICY_PRIOR, OFF_POLICY_ONE_PRIOR):
            taught = self._taught_trajectories(run, base, pictures, schedule)
            held = self._held_trajectories(run, base, schedule)
            has_one_state = kind == OFF_POLICY_ONE_PRIOR
            return partial(OffPolicyPriorTraining, self.architecture, taught, held, has_one_state=has_one_state)
        if run.method.is_delta:
            prompts = self._held_prompts(run) if kind == DELTA_PRIOR else []
            held = self.architecture.text_context(base, prompts) if prompts else None
            return partial(DeltaTraining, self.architecture, self._change(run), held, num_held=len(prompts))
        prior = self._prior_pictures(run, base) if kind == "sft_prior" else None
        return partial(BaselineTraining, kind, prior=prior, num_draws=run.method.num_draws, shift=self.shift)

    def _held_trajectories(self, run: RivalRun, base: DiffusionPipeline, schedule: Schedule) -> Trajectories:
        prompts = self._held_prompts(run)
        context = self.architecture.text_context(base, prompts)
        seeds = [place_seed(run.seed, "prior pictures", str(index)) for index in range(len(prompts))]

        def velocity_of(indices: torch.Tensor) -> Callable:
            return partial(base.predict_velocity, context=self.architecture.select(context, indices))

        return record(velocity_of, self._noise(base, seeds), schedule, context, torch.arange(len(prompts)))

    def _taught_trajectories(
        self, run: RivalRun, base: DiffusionPipeline, pictures: EncodedPictures, schedule: Schedule
    ) -> Trajectories:
        """Of the base with the pictures as the teacher: its average with the student is not known beforehand."""
        count = run.method.num_trajectories(run.method.num_steps(self.num_train_steps))
        places = torch.arange(count) % len(pictures.x0)
        seeds = [place_seed(run.seed, "taught", str(index)) for index in range(count)]

        def velocity_of(indices: torch.Tensor) -> Callable:
            context = self.architecture.select(pictures.teacher, places[indices])
            return partial(base.predict_velocity, context=context)

        return record(velocity_of, self._noise(base, seeds), schedule, pictures.student, places)

    def _noise(self, pipeline: DiffusionPipeline, seeds: list[int]) -> torch.Tensor:
        return seeded_noise(pipeline.latent_shape(world.SIDE, world.SIDE), seeds)
