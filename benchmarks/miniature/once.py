"""What rivals of D-OPSD need of a model once, whatever is taught later: trained on pictures that the base draws.

- `samples`: the base's few-step pictures of known objects that no task and no concept asks for, and of made-up words.
- `adapter`: a LoRA that undoes distillation, trained by flow matching on the samples.
- `undistilled`: the whole transformer, trained on from the distilled weights by flow matching on the samples.
- `repair`: a LoRA that gives the base with the adapter its few steps back. Both are active while it is trained, at the
  states of their few-step trajectories, towards the base's velocities there.

Flow matching draws sigmas with the shift of the deployed sampler. Each part is made once and kept, with its cost, what
it draws, and its flow-matching loss by sigma.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from benchmarks.miniature import world
from benchmarks.miniature.architecture import Architecture, Context
from benchmarks.miniature.baselines import build_optimizer, deployed_shift, flow_matching_loss, one_state_loss
from benchmarks.miniature.concepts import CONCEPTS, unasked_appearances
from benchmarks.miniature.costs import sampled_cost
from benchmarks.miniature.evaluate import Evaluator
from benchmarks.miniature.files import replacing
from benchmarks.miniature.methods import Method, SharedSettings
from benchmarks.miniature.runs import make_roles, save_baseline
from dopsd.data.order import place_seed
from dopsd.rollout import Schedule, VelocityFunction, few_step_sample, seeded_noise


SAMPLES, ADAPTER, UNDISTILLED, REPAIR = "samples", "adapter", "undistilled", "repair"
WAVES = ((SAMPLES,), (ADAPTER, UNDISTILLED), (REPAIR,))
NEEDED = {SAMPLES: (), ADAPTER: (SAMPLES,), UNDISTILLED: (SAMPLES,), REPAIR: (SAMPLES, ADAPTER)}  # made before
MANY_STEPS = 32
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)  # at which losses are measured
LORA = Method("", "sft")  # adapter and repair LoRA are as large as a concept's
DRAWN_AT_ONCE = 64


@dataclass(frozen=True)
class OnceSettings:
    """How long and how fast each part is trained.

    Attributes:
        num_pictures: that the base draws; one in 16 is withheld from training.
        *_steps, *_rate: training steps, and the learning rate that falls to 0 by a cosine.
    """

    num_pictures: int = 1024
    batch_size: int = 16
    adapter_steps: int = 400
    adapter_rate: float = 2e-3
    undistilled_steps: int = 400
    undistilled_rate: float = 3e-4
    repair_steps: int = 600
    repair_rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True)
class Samples:
    """N pictures that the base drew.

    Attributes:
        prompts: N.
        contexts: of the distinct prompts, encoded.
        places: (N,), the index of each picture's context.
        x0: (N, C, h, w), latents.
    """

    prompts: list[str]
    contexts: Context
    places: torch.Tensor
    x0: torch.Tensor


@dataclass(frozen=True)
class Once:
    """The parts in a folder; a part that has its JSON file is complete.

    Attributes:
        model: the miniature's folder.
        eval_count: pictures of known objects that show what a part does.
    """

    architecture: Architecture
    model: Path
    folder: Path
    settings: OnceSettings
    eval_count: int

    def figures(self, part: str) -> dict:
        """The part's cost ("forwards") and what `_measured` gives; makes it first if it is missing."""
        path = self.folder / f"{part}.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(self.settings.seed)
            make = {
                SAMPLES: self._make_samples,
                ADAPTER: self._make_adapter,
                UNDISTILLED: self._make_undistilled,
                REPAIR: self._make_repair,
            }[part]
            text = json.dumps(make(), indent=2) + "\n"
            with replacing(path) as partial_path:
                partial_path.write_text(text)
        return json.loads(path.read_text()) | {"forwards": round(self.cost(part))}

    def cost(self, part: str) -> float:
        """In forward passes of a model with an adapter, without the parts that it needs; see `costs`.

        Gradients of all weights cost about another forward pass.
        """
        settings, costs = self.settings, self.architecture.costs
        if part == SAMPLES:
            return settings.num_pictures * self.architecture.num_steps * costs.base
        if part == REPAIR:
            each = sampled_cost(1, self.architecture.num_steps, costs.base, costs.forward_and_backward)
            return settings.repair_steps * settings.batch_size * each
        if part == ADAPTER:
            return settings.adapter_steps * settings.batch_size * costs.forward_and_backward
        return settings.undistilled_steps * settings.batch_size * 3 * costs.base

    def whole_cost(self, part: str) -> float:
        """In forwards, with the parts that it needs."""
        return sum(self.cost(needed) for needed in (*NEEDED[part], part))

    def load_many_step(self, part: str) -> DiffusionPipeline:
        """The model that `ADAPTER` or `UNDISTILLED` makes of the base, in weights of its own."""
        pipeline = self.architecture.load(self.model)
        if part == ADAPTER:
            return adapted(pipeline, self.folder / ADAPTER)
        pipeline.transformer.load_state_dict(load_file(self._undistilled_path))
        return pipeline

    @property
    def _undistilled_path(self) -> Path:
        return self.folder / f"{UNDISTILLED}.safetensors"

    @property
    def prompts(self) -> list[str]:
        """Of the samples: known objects that nothing asks for, in turn, on random backgrounds.

        Every fourth has a made-up word instead, but none of the concepts'.
        """
        known, rng = unasked_appearances(), np.random.default_rng([30, self.settings.seed])
        taught = {concept.word for concept in CONCEPTS}
        count = self.settings.num_pictures
        made_up = [word for word in (world.nonsense_word(rng) for _ in range(count)) if word not in taught]
        chosen = [known[index].words for index in rng.permutation(len(known))]
        words = [made_up[index // 4] if index % 4 == 3 else chosen[index % len(chosen)] for index in range(count)]
        return [world.caption(word, world.random_background(rng)) for word in words]

    @property
    def num_withheld(self) -> int:
        """The last samples, on which nothing is trained, and losses are measured."""
        return self.settings.num_pictures // 16

    def samples(self, pipeline: DiffusionPipeline) -> Samples:
        """The samples, with contexts from this pipeline."""
        distinct = list(dict.fromkeys(self.prompts))
        index_of = {prompt: index for index, prompt in enumerate(distinct)}
        return Samples(
            self.prompts,
            self.architecture.text_context(pipeline, distinct),
            torch.tensor([index_of[prompt] for prompt in self.prompts]),
            load_file(self.folder / f"{SAMPLES}.safetensors")["x0"],
        )

    def _make_samples(self) -> dict:
        pipeline = self.architecture.load(self.model)
        schedule = deployed_schedule(self.architecture, pipeline)
        parts = []
        for start in tqdm(range(0, len(self.prompts), DRAWN_AT_ONCE), desc=SAMPLES, leave=False):
            prompts = self.prompts[start : start + DRAWN_AT_ONCE]
            seeds = [place_seed(self.settings.seed, "samples", str(start + index)) for index in range(len(prompts))]
            noise = seeded_noise(pipeline.latent_shape(world.SIDE, world.SIDE), seeds)
            context = self.architecture.text_context(pipeline, prompts)
            parts.append(few_step_sample(partial(pipeline.predict_velocity, context=context), noise, schedule))
        with replacing(self.folder / f"{SAMPLES}.safetensors") as path:
            save_file({"x0": torch.cat(parts)}, path)
        return self._measured(pipeline)

    def _make_adapter(self) -> dict:
        pipeline = self.architecture.load(self.model)
        roles = make_roles(LORA, pipeline)
        settings = self.settings
        self._train(
            roles.student_parameters,
            self._flow_matching(pipeline),
            settings.adapter_steps,
            settings.adapter_rate,
            ADAPTER,
        )
        save_baseline(roles, pipeline, self.folder / ADAPTER)
        return self._measured(self.load_many_step(ADAPTER))

    def _make_undistilled(self) -> dict:
        pipeline = self.architecture.load(self.model)
        parameters = [*pipeline.transformer.requires_grad_(True).parameters()]
        settings = self.settings
        losses = self._flow_matching(pipeline)
        self._train(parameters, losses, settings.undistilled_steps, settings.undistilled_rate, UNDISTILLED)
        with replacing(self._undistilled_path) as path:
            save_file(pipeline.transformer.state_dict(), path)
        return self._measured(pipeline)

    def _make_repair(self) -> dict:
        base, pipeline = self.architecture.load(self.model), self.load_many_step(ADAPTER)
        roles = make_roles(LORA, pipeline)
        settings = self.settings
        losses = self._restoring(base, pipeline)
        self._train(roles.student_parameters, losses, settings.repair_steps, settings.repair_rate, REPAIR)
        save_baseline(roles, pipeline, self.folder / REPAIR)
        with roles.shipped_role(torch.float32):
            return self._measured(pipeline)

    def _flow_matching(self, pipeline: DiffusionPipeline) -> Iterator[torch.Tensor]:
        """Endless losses on batches of the samples."""
        samples, generator = self.samples(pipeline), torch.Generator().manual_seed(self.settings.seed)
        shift = deployed_shift(deployed_schedule(self.architecture, pipeline))
        while True:
            indices = self._drawn_indices(generator)
            student = self._velocity(pipeline, samples, indices)
            yield flow_matching_loss(student, samples.x0[indices], generator, shift=shift)

    def _restoring(self, base: DiffusionPipeline, pipeline: DiffusionPipeline) -> Iterator[torch.Tensor]:
        """Endless losses, each at one state of the trajectories of a batch of the samples' prompts."""
        samples, generator = self.samples(base), torch.Generator().manual_seed(self.settings.seed)
        schedule = deployed_schedule(self.architecture, base)
        while True:
            indices = self._drawn_indices(generator)
            noise = torch.randn(samples.x0[indices].shape, generator=generator)
            state = int(torch.randint(len(schedule), (), generator=generator))
            student = self._velocity(pipeline, samples, indices)
            teacher = torch.no_grad()(self._velocity(base, samples, indices))
            yield one_state_loss(student, teacher, noise, schedule, state)

    def _drawn_indices(self, generator: torch.Generator) -> torch.Tensor:
        """Of a batch of the samples."""
        count = self.settings.num_pictures - self.num_withheld
        return torch.randint(count, (self.settings.batch_size,), generator=generator)

    def _velocity(self, pipeline: DiffusionPipeline, samples: Samples, indices: torch.Tensor) -> VelocityFunction:
        context = self.architecture.select(samples.contexts, samples.places[indices])
        return partial(pipeline.predict_velocity, context=context)

    def _train(
        self,
        parameters: list[torch.nn.Parameter],
        losses: Iterator[torch.Tensor],
        num_steps: int,
        learning_rate: float,
        name: str,
    ) -> None:
        optimizer, scheduler = build_optimizer(parameters, SharedSettings(learning_rate=learning_rate), num_steps)
        for _ in tqdm(range(num_steps), desc=name, leave=False, mininterval=5):
            next(losses).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    def _measured(self, pipeline: DiffusionPipeline) -> dict[str, dict]:
        """Figures for known objects at the deployed number of steps and at many ("drawn"), and "loss" by sigma."""
        pipeline.transformer.eval()
        evaluator = Evaluator(self.model, self.eval_count)
        counts = (self.architecture.num_steps, MANY_STEPS)
        drawn = {str(count): evaluator.measure(pipeline, evaluator.old, count) for count in counts}
        return {"drawn": drawn, "loss": self._loss_by_sigma(pipeline)}

    @torch.no_grad()
    def _loss_by_sigma(self, pipeline: DiffusionPipeline) -> dict[str, float]:
        """The flow-matching loss on the withheld samples, with the same noise at each sigma."""
        samples = self.samples(pipeline)
        indices = torch.arange(self.settings.num_pictures)[-self.num_withheld :]
        velocity = self._velocity(pipeline, samples, indices)
        losses = {}
        for sigma in SIGMAS:
            generator, sigmas = torch.Generator().manual_seed(self.settings.seed), torch.tensor([sigma])
            loss = flow_matching_loss(velocity, samples.x0[indices], generator, sigmas=sigmas)
            losses[f"{sigma:g}"] = round(float(loss), 4)
        return losses


def deployed_schedule(architecture: Architecture, pipeline: DiffusionPipeline) -> Schedule:
    return pipeline.schedule(world.SIDE, world.SIDE, architecture.num_steps)


def adapted(pipeline: DiffusionPipeline, lora: Path) -> DiffusionPipeline:
    """The pipeline, with a LoRA merged into its transformer's weights."""
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    return pipeline


def waves_of(once: Once, make: Callable[[str], None]) -> list[tuple[Callable[[str], None], tuple[str, ...]]]:
    """Waves for `run_in_waves` that make what is missing."""
    missing = (tuple(part for part in wave if not (once.folder / f"{part}.json").exists()) for wave in WAVES)
    return [(make, wave) for wave in missing if wave]
