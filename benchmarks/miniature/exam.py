"""How well the miniature follows text and references, measured on its pictures at the deployed steps.

python benchmarks/miniature/exam.py            # a table of the shipped model, in about three minutes
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image

import world
from dopsd.rollout import seeded_noise
from metrics import PictureReader, detail, effective_poses, frechet_distance, object_residual
from parts import MAX_SEQUENCE_LENGTH, NUM_STEPS
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline
from vae import to_tensor


MODEL = Path(__file__).parent / "model"  # the shipped one


@dataclass(frozen=True)
class Task:
    """What is asked for, N times, and what pictures would answer it.

    Attributes:
        prompts: with the reference suffix where there are references.
        references: pictures, or none.
        wanted: the objects that should be seen.
        backgrounds: their names.
        real: (N, 3, 64, 64), pictures as the world draws them.
    """

    prompts: list[str]
    references: list[Image.Image]
    wanted: list[world.Appearance]
    backgrounds: list[str]
    real: torch.Tensor


def make_task(appearances: list[world.Appearance], count: int, *, with_reference: bool, seed: int) -> Task:
    """Objects on random backgrounds, by their words or by a word without meaning and a reference.

    A larger task begins with the same rows.
    """
    random = np.random.default_rng(seed)
    names = list(world.BACKGROUNDS)
    wanted, backgrounds, prompts, references, real = [], [], [], [], []
    for _ in range(count):
        appearance = appearances[random.integers(len(appearances))]
        background = names[random.integers(len(names))]
        wanted.append(appearance)
        backgrounds.append(background)
        real.append(random_picture(appearance, background, random))
        if with_reference:
            other = random.choice([name for name in names if name != background])
            references.append(world.to_image(random_picture(appearance, other, random)))
            prompts.append(world.caption(world.nonsense_word(random), background) + world.REFERENCE_SUFFIX)
        else:
            prompts.append(world.caption(appearance.words, background))
    return Task(prompts, references, wanted, backgrounds, to_tensor(np.stack(real)))


def random_picture(appearance: world.Appearance, background: str, random: np.random.Generator) -> np.ndarray:
    """(64, 64, 3): the object at a random place, with grain."""
    return world.draw(world.sprite(appearance), world.POSES[random.integers(len(world.POSES))], background, random)


def standard_tasks(count: int) -> dict[str, Task]:
    """Text and references, each with objects seen in training and others."""
    seen = [appearance for appearance in world.all_appearances() if not appearance.is_held_out]
    unseen = [appearance for appearance in world.all_appearances() if appearance.is_held_out]
    known_words = [
        appearance
        for appearance in unseen
        if appearance.shape != world.HELD_OUT_SHAPE and appearance.texture != world.HELD_OUT_TEXTURE
    ]
    return {
        "text_seen": make_task(seen, count, with_reference=False, seed=1),
        "text_unseen": make_task(known_words, count, with_reference=False, seed=2),
        "reference_seen": make_task(seen, count, with_reference=True, seed=3),
        "reference_unseen": make_task(unseen, count, with_reference=True, seed=4),
    }


@torch.no_grad()
def final_latents(
    pipeline: Flux2KleinDOPSDPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    references: list[Image.Image] = (),
    num_steps: int = NUM_STEPS,
) -> torch.Tensor:
    """(N, C, h, w): what the pipeline's steps lead to, from the seeds' noise, with a reference each or none."""
    context = pipeline.encode_student(prompts, max_sequence_length=MAX_SEQUENCE_LENGTH)
    if references:
        context = context.with_references(torch.cat([pipeline.encode_reference(image) for image in references]))
    noise = seeded_noise(pipeline.latent_shape(world.SIDE, world.SIDE), seeds)
    return pipeline.sample(context, noise, num_steps)


@torch.no_grad()
def sample(pipeline: Flux2KleinDOPSDPipeline, task: Task, *, num_steps: int = NUM_STEPS) -> torch.Tensor:
    """(N, 3, 64, 64), what the pipeline draws, with noise of seeds 0 to N - 1."""
    seeds = list(range(len(task.prompts)))
    latents = final_latents(pipeline, task.prompts, seeds, references=task.references, num_steps=num_steps)
    return pipeline.vae.decode(latents).sample.clamp(-1, 1)


def measure(pictures: torch.Tensor, task: Task, reader: PictureReader) -> dict[str, float]:
    """Accuracy by attribute, detail, residual at the object, places and Frechet distance of a task's pictures."""
    reading = reader.read(pictures)
    figures = reader.accuracy(reading, task.wanted, task.backgrounds)
    figures |= {"detail": detail(pictures, reading), "residual": object_residual(pictures, reading)}
    figures["poses"] = effective_poses(reading)
    figures["fd"] = frechet_distance(pictures, task.real)
    return {name: round(value, 3) for name, value in figures.items()}


def draw_sheet(tasks: dict[str, Task], pictures: dict[str, torch.Tensor], path: Path, *, columns: int = 16) -> None:
    """One row of samples a task, under it the references if it has any, enlarged twice."""
    rows = []
    for name, task in tasks.items():
        rows.append(_strip(pictures[name][:columns].permute(0, 2, 3, 1).numpy()))
        if task.references:
            rows.append(_strip(np.stack([np.asarray(image) for image in task.references[:columns]]) / 127.5 - 1))
    sheet = world.to_image(np.concatenate(rows))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path)


def _strip(pictures: np.ndarray) -> np.ndarray:
    """(N, 64, 64, 3) side by side with white lines between: (66, 66 N, 3)."""
    return np.concatenate(np.pad(pictures, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="The miniature's folder.")
    parser.add_argument("--count", type=int, default=192, help="Pictures of each kind.")
    args = parser.parse_args()
    if not (args.model / "model_index.json").exists():
        sys.exit(f"--model {args.model}: holds no pipeline; see make.py")
    pipeline = Flux2KleinDOPSDPipeline.from_pretrained(args.model)
    reader = PictureReader(world.all_appearances())
    print(f"| {args.count} pictures of each, {NUM_STEPS} steps | exact | residual | detail | places |")
    print("|---" * 5 + "|")
    for name, task in standard_tasks(args.count).items():
        figures = measure(sample(pipeline, task), task, reader)
        print(f"| {name} | {figures['exact']} | {figures['residual']} | {figures['detail']} | {figures['poses']} |")


if __name__ == "__main__":
    main()
