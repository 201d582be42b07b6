"""Measures how well a miniature follows text and references at the deployed number of sampling steps.

python -m benchmarks.miniature.evaluate      # a table for the shipped model, in about three minutes
"""

import argparse
from functools import cached_property
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from benchmarks.miniature import world
from benchmarks.miniature.architectures import ARCHITECTURES, architecture_in, architecture_of
from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.concepts import Concept, Renaming, neighbour_task, old_task, wrong_word_task
from benchmarks.miniature.files import MODEL, check_model
from benchmarks.miniature.metrics import PictureReader, detail, effective_poses, frechet_distance, object_residual
from benchmarks.miniature.tasks import References, Task, standard_tasks
from dopsd.errors import InputError
from dopsd.retention import relative_drift
from dopsd.rollout import seeded_noise


NUM_RETENTION_PROMPTS = 16  # each sampled once


@torch.no_grad()
def final_latents(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    references: References = (),
    num_steps: int | None = None,
) -> torch.Tensor:
    """Samples N prompts, without decoding.

    Args:
        seeds: one noise seed per prompt.
        references: one picture per prompt, or equally many for each in a tuple, or none at all.
        num_steps: default: the number that the miniature is distilled for.

    Returns:
        (N, C, h, w), latents for `pipeline.decode`.
    """
    architecture = architecture_of(pipeline)
    if references:
        context = architecture.reference_context(pipeline, prompts, references)
    else:
        context = architecture.text_context(pipeline, prompts)
    noise = seeded_noise(pipeline.latent_shape(world.SIDE, world.SIDE), seeds)
    return pipeline.sample(context, noise, num_steps or architecture.num_steps)


@torch.no_grad()
def sample(pipeline: DiffusionPipeline, task: Task, *, num_steps: int | None = None) -> torch.Tensor:
    """(N, 3, 64, 64): the pipeline's pictures for a task."""
    seeds = task.seeds
    latents = final_latents(pipeline, task.prompts, seeds, references=task.references, num_steps=num_steps)
    return decode(pipeline, latents)


@torch.no_grad()
def decode(pipeline: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """(N, 3, 64, 64) from the latents that the pipeline samples."""
    latents = pipeline.vae_latents(latents)
    return torch.cat([pipeline.vae.decode(part).sample for part in latents.split(64)]).clamp(-1, 1)


def measure(pictures: torch.Tensor, task: Task, reader: PictureReader) -> dict[str, float]:
    """Accuracies, detail, residual, effective number of poses and Frechet distance of pictures for a task."""
    reading = reader.read(pictures)
    figures = reader.accuracy(reading, task.wanted, task.backgrounds)
    figures |= {"detail": detail(pictures, reading), "residual": object_residual(pictures, reading)}
    figures["poses"] = effective_poses(reading)
    figures["fd"] = frechet_distance(pictures, task.real)
    return {name: round(value, 3) for name, value in figures.items()}


class Evaluator:
    """Measures pipelines on a new concept and on objects that the base model knows.

    Args:
        model: the miniature's folder.
        count: pictures per task.
    """

    def __init__(self, model: Path, count: int):
        self.model, self.count, self.architecture = model, count, architecture_in(model)
        self.reader = PictureReader(world.all_appearances())
        self.old = old_task(count)

    def task_of(self, concept: Concept | Renaming) -> Task:
        return concept.task(self.count)

    def load(self, *loras: Path) -> DiffusionPipeline:
        """The base model with LoRAs, each at its full strength."""
        pipeline = self.architecture.load(self.model)
        names = [f"lora_{index}" for index in range(len(loras))]
        for name, lora in zip(names, loras, strict=True):
            pipeline.load_lora_weights(lora, adapter_name=name)
        if loras:
            pipeline.set_adapters(names)
        return pipeline

    @property
    def retention_prompts(self) -> list[str]:
        return self.old.prompts[:NUM_RETENTION_PROMPTS]

    @cached_property
    def _base_latents(self) -> torch.Tensor:
        return self._retention_latents(self.load())

    def _retention_latents(self, pipeline: DiffusionPipeline) -> torch.Tensor:
        """Sampled with the seeds 0, 1, 2..., like in the training script."""
        return final_latents(pipeline, self.retention_prompts, list(range(NUM_RETENTION_PROMPTS)))

    def retention(self, pipeline: DiffusionPipeline) -> float:
        """Drift from the base model on `retention_prompts`, as the training script logs it. 0: unchanged."""
        return relative_drift(self._base_latents, self._retention_latents(pipeline))

    def measure(self, pipeline: DiffusionPipeline, task: Task, num_steps: int | None = None) -> dict[str, float]:
        return measure(sample(pipeline, task, num_steps=num_steps), task, self.reader)

    def evaluate(
        self, pipeline: DiffusionPipeline, concept: Concept | Renaming, num_steps: int | None = None
    ) -> dict[str, dict[str, float]]:
        """Metrics on the concept ("new") and on known objects ("old")."""
        return {
            "new": self.measure(pipeline, self.task_of(concept), num_steps),
            "old": self.measure(pipeline, self.old, num_steps),
        }

    def evaluate_leaks(self, pipeline: DiffusionPipeline, concept: Concept | Renaming) -> dict[str, dict[str, float]]:
        """Metrics on known objects that are like the concept ("neighbours"), and with other new words ("wrong_words").

        With the latter, "exact" is the share of pictures that show the concept.
        """
        metrics = {"neighbours": self.measure(pipeline, neighbour_task(concept, self.count))}
        if isinstance(concept, Concept):
            metrics["wrong_words"] = self.measure(pipeline, wrong_word_task(concept, self.count))
        return metrics

    def evaluate_stack(self, pipeline: DiffusionPipeline, concepts: list[Concept]) -> dict[str, float]:
        """Shares of right pictures with the LoRAs of several concepts: the concepts' mean ("exact") and "old"."""
        new = [self.measure(pipeline, self.task_of(concept))["exact"] for concept in concepts]
        return {"exact": sum(new) / len(new), "old": self.measure(pipeline, self.old)["exact"]}


def add_model_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=model_folder,
        default=MODEL,
        help=f"Folder of the miniature, or one that is shipped: {', '.join(ARCHITECTURES)}. Default: klein.",
    )


def check_evaluation(model: Path, eval_count: int, most: int) -> None:
    """Raises `InputError` unless the folder holds a pipeline and `--eval_count` is possible."""
    check_model(model)
    if not NUM_RETENTION_PROMPTS <= eval_count <= most:
        raise InputError(f"--eval_count {eval_count}: give {NUM_RETENTION_PROMPTS} to {most}")


def model_folder(text: str) -> Path:
    """An argparse type: the name of a shipped miniature, or a folder."""
    return ARCHITECTURES[text].folder if text in ARCHITECTURES else Path(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_flag(parser)
    parser.add_argument("--count", type=positive_int, default=192, help="Number of pictures per task.")
    parser.add_argument(
        "--num_inference_steps",
        type=positive_int,
        help="Sampling steps. Default: as many as the miniature is distilled for.",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_model(args.model)
    pipeline = architecture_in(args.model).load(args.model)
    num_steps = args.num_inference_steps or architecture_of(pipeline).num_steps
    reader = PictureReader(world.all_appearances())
    print(f"| {args.count} pictures of each, {num_steps} steps | exact | residual | detail | places |")
    print("|---" * 5 + "|")
    for name, task in standard_tasks(args.count).items():
        figures = measure(sample(pipeline, task, num_steps=num_steps), task, reader)
        print(f"| {name} | {figures['exact']} | {figures['residual']} | {figures['detail']} | {figures['poses']} |")


if __name__ == "__main__":
    run(main)
