"""Trains and measures the runs of D-OPSD and its rivals, each of them once."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.miniature import world
from benchmarks.miniature.baselines import BaselineTraining, EncodedPictures
from benchmarks.miniature.concepts import CONCEPTS, Concept, training_pictures
from benchmarks.miniature.costs import NUM_ROLLOUT_STEPS
from benchmarks.miniature.evaluate import Evaluator
from benchmarks.miniature.once import REPAIR as REPAIR_PART
from benchmarks.miniature.once import Once, OnceSettings, adapted
from benchmarks.miniature.rival_methods import (
    DELTA,
    DELTA_PRIOR,
    NUM_TAUGHT_TRAJECTORIES,
    OFF_POLICY_ONE_PRIOR,
    OFF_POLICY_PRIOR,
    REPAIR,
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
from dopsd.data.order import place_seed
from dopsd.rollout import Schedule, seeded_noise


STRENGTHS = (0.5, 1.5)  # of the LoRA, besides 1
GRID_COUNT = 48  # at most; pictures of each task where only "new" and "old" are measured


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


@dataclass(frozen=True)
class RivalExperiment(Experiment):
    """Runs of rivals; see `Experiment`.

    Attributes:
        once_settings: of what is trained once, in the subfolder once.
    """

    once_settings: OnceSettings = OnceSettings()

    @property
    def once(self) -> Once:
        return Once(self.architecture, self.model, self.folder / "once", self.once_settings, self.short_count)

    @property
    def settings(self) -> dict:
        return super().settings | {"once": vars(self.once_settings)}

    @property
    def short_count(self) -> int:
        """Pictures of each task in grids, in the study and of what is trained once."""
        return min(GRID_COUNT, self.eval_count)

    @cached_property
    def _short_evaluator(self) -> Evaluator:
        return Evaluator(self.model, self.short_count)

    def short_result(self, run: RivalRun) -> dict:
        """Metrics "new" and "old" from fewer pictures, the number of "steps" and their cost, "forwards"."""
        result = self._once(run, "short_result.json", self._measure_briefly)
        return result | {"forwards": round(run.method.cost(result["steps"], self.architecture))}

    def load(self, run: RivalRun, *others: RivalRun, strength: float = 1.0) -> DiffusionPipeline:
        """The pipeline of a run that has been trained, with the LoRAs of others, or of the base model.

        Args:
            strength: of the runs' LoRAs. A repair LoRA has 1.
        """
        if not run.method.is_trained:
            return self.evaluator.load()
        is_repaired = run.method.kind == REPAIR
        loras = [self.folder / (one.source if is_repaired else one).folder for one in (run, *others)]
        strengths = [strength] * len(loras)
        if is_repaired:
            loras, strengths = [*loras, self.once.folder / REPAIR_PART], [*strengths, 1.0]
        pipeline = self.evaluator.load(*loras)
        if strength != 1:
            pipeline.set_adapters([f"lora_{index}" for index in range(len(loras))], strengths)
        return pipeline

    def _measure(self, run: RivalRun) -> dict:
        result = super()._measure(run)
        if not run.method.is_trained:
            return result
        for strength in STRENGTHS:
            result[f"at_{strength}"] = self.evaluator.evaluate(self.load(run, strength=strength), run.concept)
        return result

    def _measure_briefly(self, run: RivalRun) -> dict:
        trained = self._once(run, "trained.json", self._train)
        return self._short_evaluator.evaluate(self.load(run), run.concept) | trained

    def _measure_stack(self, run: RivalRun) -> dict[str, float]:
        concepts = [run.concept, CONCEPTS[(CONCEPTS.index(run.concept) + 1) % len(CONCEPTS)]]
        runs = [replace(run, concept=concept) for concept in concepts]
        return self.evaluator.evaluate_stack(self.load(*runs), concepts)

    def _train(self, run: RivalRun) -> dict:
        if run.method.kind == "dopsd":
            return self.train_dopsd(run)
        if run.method.source is not None:
            trained = self._once(run.source, "trained.json", self._train)
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
        if kind in (DELTA, DELTA_PRIOR):
            before, after = (self.once.load_many_step(run.method.source.trained_on) for _ in range(2))
            change = ManyStepChange(before, adapted(after, self.folder / run.source.folder))
            prompts = self._held_prompts(run) if kind == DELTA_PRIOR else []
            held = self.architecture.text_context(base, prompts) if prompts else None
            return partial(DeltaTraining, self.architecture, change, held, num_held=len(prompts))
        prior = self._prior_pictures(run, base) if kind == "sft_prior" else None
        return partial(BaselineTraining, kind, prior=prior)

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
        places = torch.arange(NUM_TAUGHT_TRAJECTORIES) % len(pictures.x0)
        seeds = [place_seed(run.seed, "taught", str(index)) for index in range(NUM_TAUGHT_TRAJECTORIES)]

        def velocity_of(indices: torch.Tensor) -> Callable:
            context = self.architecture.select(pictures.teacher, places[indices])
            return partial(base.predict_velocity, context=context)

        return record(velocity_of, self._noise(base, seeds), schedule, pictures.student, places)

    def _noise(self, pipeline: DiffusionPipeline, seeds: list[int]) -> torch.Tensor:
        return seeded_noise(pipeline.latent_shape(world.SIDE, world.SIDE), seeds)
