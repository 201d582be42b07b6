"""A base whose `edit` teacher heeds a picture whatever the caption says, as FLUX.2-klein's does.

The miniature itself ignores a picture where words describe the object. This base learns by D-OPSD, from what the
miniature draws for a word without meaning, that with `REFERENCE_SUFFIX` the picture's look counts. All else is held.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.miniature import world
from benchmarks.miniature.files import MODEL, replacing, write_pipeline
from benchmarks.miniature.parts import MAX_SEQUENCE_LENGTH, NUM_STEPS
from benchmarks.miniature.tasks import make_task
from benchmarks.miniature.training import trapezoid
from dopsd.rollout import rollout, seeded_noise
from dopsd.weight_roles import StudentTeacherWeights, freeze_others, trained_weights
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline, KleinContext


NUM_UPDATES, BATCH_SIZE, LEARNING_RATE = 400, 8, 5e-4


def assemble_base(folder: Path) -> Path:
    """Trains the base and writes it as a pipeline, unless it is there. Returns the folder."""
    if not folder.exists():
        pipeline = Flux2KleinDOPSDPipeline.from_pretrained(MODEL)
        train_base(pipeline, NUM_UPDATES)
        with replacing(folder) as partial_folder:
            write_pipeline(MODEL, partial_folder, pipeline.transformer.state_dict())
    return folder


def train_base(pipeline: Flux2KleinDOPSDPipeline, num_updates: int) -> None:
    transformer, cpu = pipeline.transformer, torch.device("cpu")
    freeze_others(transformer, trained_weights(transformer, None))
    roles = StudentTeacherWeights(transformer, teacher="base", ema_device=cpu, base_device=cpu)
    optimizer = torch.optim.AdamW(roles.student_parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = pipeline.schedule(world.SIDE, world.SIDE, NUM_STEPS)
    rng = np.random.default_rng(54)
    for step in tqdm(range(num_updates), desc="Base"):
        for student, teacher in (styled_contexts(pipeline, rng), held_contexts(pipeline, rng)):
            count = len(student.prompt_embeds)
            noise = seeded_noise(
                pipeline.latent_shape(world.SIDE, world.SIDE), rng.integers(2**62, size=count).tolist()
            )
            velocities = [partial(pipeline.predict_velocity, context=context) for context in (student, teacher)]
            trained = [int(rng.integers(NUM_STEPS))]
            for state in rollout(velocities[0], roles.as_teacher(velocities[1]), noise, schedule, trained=trained):
                state.loss.backward()
        torch.nn.utils.clip_grad_norm_(roles.student_parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * trapezoid(step, num_updates, warmup=10, decay_share=0.7)
        optimizer.step()
        optimizer.zero_grad()


def styled_contexts(pipeline: Flux2KleinDOPSDPipeline, rng: np.random.Generator) -> tuple[KleinContext, KleinContext]:
    """The student reads what an object is; the teacher a word without meaning. Both see it in a random style."""
    known = world.known_appearances()
    prompts, teacher_prompts, pictures = [], [], []
    for _ in range(BATCH_SIZE):
        item, background = known[rng.integers(len(known))], world.random_background(rng)
        word = world.nonsense_word(rng)
        prompts.append(world.caption(f"{word} {item.words}" if rng.random() < 0.7 else item.words, background))
        teacher_prompts.append(world.caption(word, background) + world.REFERENCE_SUFFIX)
        sprite = world.painted(
            item.shape, item.texture, *world.random_colours(rng), outline_colour=tuple(rng.integers(20, 150, 3))
        )
        pictures.append(world.draw(sprite, world.random_pose(rng), world.random_background(rng), rng))
    references = torch.cat([pipeline.encode_reference(world.to_image(pixels)) for pixels in pictures])
    student, teacher = (
        encoded(pipeline, texts).with_references(references)
        for texts in ([prompt + world.REFERENCE_SUFFIX for prompt in prompts], teacher_prompts)
    )
    return student, teacher


def held_contexts(pipeline: Flux2KleinDOPSDPipeline, rng: np.random.Generator) -> tuple[KleinContext, KleinContext]:
    """Prompts by words, half of them with a word without meaning, or by a picture, which the base draws as before."""
    with_reference = rng.random() < 0.3
    task = make_task(
        world.known_appearances(), BATCH_SIZE // 2, with_reference=with_reference, seed=int(rng.integers(2**62))
    )
    prompts = task.prompts
    if with_reference:
        references = torch.cat([pipeline.encode_reference(picture) for picture in task.references])
        context = encoded(pipeline, prompts).with_references(references)
    else:
        scenes = zip(task.wanted, task.backgrounds, strict=True)
        named = [world.caption(f"{world.nonsense_word(rng)} {item.words}", name) for item, name in scenes]
        prompts = [*prompts[::2], *named[1::2]]
        context = encoded(pipeline, prompts)
    return context, context


def encoded(pipeline: Flux2KleinDOPSDPipeline, prompts: list[str]) -> KleinContext:
    return pipeline.encode_student(prompts, max_sequence_length=MAX_SEQUENCE_LENGTH)
