"""The miniature's parts: the world, its metrics, the closed-form teacher, and the baselines' losses."""

import numpy as np
import pytest
import torch

import world
from baselines import encode_lesson, flow_matching_loss, off_policy_losses, train_baseline
from exam import standard_tasks
from experiment import CONCEPTS, NUM_PICTURES, Method, dopsd_command, figure, pictures_of, table
from metrics import PictureReader, detail, effective_poses, frechet_distance
from parts import MAX_SEQUENCE_LENGTH, make_scheduler, make_tokenizer
from pipelines.adapters import StudentTeacherLoRA, lora_target_modules
from pipelines.flux2_klein import DEFAULT_LORA_LAYERS
from pipelines.rollout import distillation_loss, few_step_sample, rollout, seeded_noise
from train_dopsd_flux2 import parse_args
from vae import to_tensor


@pytest.fixture(scope="module")
def reader():
    return PictureReader(world.all_appearances())


def test_the_concepts_are_not_in_training_and_are_named_by_unknown_words():
    assert len({concept.word for concept in CONCEPTS}) == 3
    known = {word for appearance in world.all_appearances() for word in appearance.words.split()}
    for concept in CONCEPTS:
        assert concept.appearance.is_held_out and concept.appearance in world.all_appearances()
        assert concept.word not in known
        assert len(concept.other_backgrounds) == 3


def test_what_is_drawn_is_read(reader):
    task = standard_tasks(48)["text_seen"]
    reading = reader.read(task.real)
    figures = reader.accuracy(reading, task.wanted, task.backgrounds)
    assert set(figures.values()) == {1.0}
    assert detail(task.real, reading) == pytest.approx(1, abs=0.05)
    assert effective_poses(reading) > 10
    other = [task.wanted[-1], *task.wanted[:-1]]
    assert reader.accuracy(reading, other, task.backgrounds)["exact"] < 0.2


def test_blur_and_one_place_show_in_the_figures(reader):
    random = np.random.default_rng(0)
    sprite = world.sprite(world.all_appearances()[0])
    same = to_tensor(np.stack([world.draw(sprite, (1, 2), "sky", random) for _ in range(24)]))
    blurred = torch.nn.functional.avg_pool2d(same, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert effective_poses(reader.read(same)) == pytest.approx(1)
    assert detail(blurred, reader.read(same)) < 0.7
    assert frechet_distance(blurred, same) > 10 * frechet_distance(same[:12], same[12:])


def test_the_longest_prompt_fits():
    tokenizer = make_tokenizer()
    longest = max(
        len(
            tokenizer(
                tokenizer.apply_chat_template(
                    [
                        {
                            "role": "user",
                            "content": world.caption(appearance.words, background) + world.REFERENCE_SUFFIX,
                        }
                    ],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=False,
                )
            ).input_ids
        )
        for appearance in world.all_appearances()[::7]
        for background in world.BACKGROUNDS
    )
    assert longest <= MAX_SEQUENCE_LENGTH


def test_the_schedule_is_kleins():
    scheduler = make_scheduler()
    assert scheduler.config.use_dynamic_shifting and scheduler.config.shift == 3.0


def test_a_lessons_pictures_show_the_concept_at_different_places(reader):
    for concept in CONCEPTS:
        for seed in range(3):
            images, captions = pictures_of(concept, seed)
            pixels = torch.stack(
                [torch.from_numpy(np.asarray(image) / 127.5 - 1).permute(2, 0, 1) for image in images]
            )
            reading = reader.read(pixels.float())
            assert [reader.appearances[index] for index in reading.objects] == [concept.appearance] * NUM_PICTURES
            assert len({*reading.poses.tolist()}) == NUM_PICTURES
            assert {caption.split(" on ")[1] for caption in captions} == {*concept.backgrounds}


# Baselines


def test_flow_matching_has_no_loss_at_the_true_velocity():
    x0 = torch.randn(3, 4, 2, 2)

    def true_velocity(latents, timestep):
        sigma = (timestep / 1000).view(-1, 1, 1, 1)
        return (latents - x0) / sigma  # x_sigma = (1 - sigma) x0 + sigma noise

    assert flow_matching_loss(true_velocity, x0, torch.Generator().manual_seed(0)) < 1e-6
    assert flow_matching_loss(lambda x, t: torch.zeros_like(x), x0, torch.Generator().manual_seed(0)) > 1


def test_off_policy_visits_the_teachers_states_and_on_policy_the_students(pipeline):
    schedule = pipeline.schedule(64, 64, 4)
    noise = seeded_noise((4, 2, 2), [0, 1])
    seen = []

    def teacher(latents, timestep):
        return 0.3 * latents

    def student(latents, timestep):
        seen.append(latents)
        return 0.5 * latents

    losses = list(off_policy_losses(student, teacher, noise, schedule))
    off_policy = list(seen)
    assert torch.equal(off_policy[0], noise)
    state = noise
    for index in range(4):
        assert torch.allclose(off_policy[index], state)
        expected = distillation_loss(0.5 * state, 0.3 * state, schedule.sigmas[index], loss_space="x0")
        assert losses[index] == pytest.approx(expected.item())
        state = state + (schedule.sigmas[index + 1] - schedule.sigmas[index]) * 0.3 * state
    assert torch.allclose(few_step_sample(teacher, noise, schedule), state)
    on_policy = [step.latents for step in rollout(student, teacher, noise, schedule)]
    assert not torch.allclose(on_policy[-1], off_policy[-1])


@pytest.mark.parametrize("method", ["sft", "sft_teacher", "off_policy"])
def test_every_baseline_trains_and_can_be_stopped(pipeline, make_picture, method):
    pictures, captions = [make_picture(1), make_picture(2)], ["a ball", "a box"]
    lesson = encode_lesson(pipeline, pictures, captions, prompt_suffix=" so", max_sequence_length=48)
    assert lesson.student.references == () and torch.equal(lesson.x0, lesson.teacher.references[0])
    targets = lora_target_modules(pipeline.transformer, DEFAULT_LORA_LAYERS)
    roles = StudentTeacherLoRA(pipeline.transformer, targets, rank=2, alpha=4)
    before = {name: weight.clone() for name, weight in roles.state_dict().items()}
    settings = {"size": (64, 64), "num_rollout_steps": 2, "learning_rate": 1e-2, "ema_decay": 0.5, "seed": 0}
    done = []
    train_baseline(
        method,
        pipeline,
        roles,
        lesson,
        num_steps=5,
        after_step=lambda step: done.append(step) or step == 2,
        **settings,
    )
    assert done == [1, 2]
    changed = {name for name, weight in roles.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[0] for name in changed} == {"student", "teacher"}


# The experiment


def test_the_scripts_command_can_be_parsed(tmp_path):
    command = dopsd_command(tmp_path / "model", tmp_path, 1, 50, {"teacher": "base"})
    args = parse_args(command[2:])
    assert (args.teacher, args.seed, args.max_train_steps, args.rank) == ("base", 1, 50, 16)


def test_a_table_has_means_and_spreads():
    results = [
        {"new": {"exact": value, "background": 1, "detail": 1, "fd": 0.1, "poses": 12}, "steps": 400}
        for value in (0.5, 0.7)
    ]
    assert figure(results[0], "concept") == 0.5 and figure(results[0], "retention") is None
    row = table({Method("D-OPSD").name: results}).splitlines()[-1]
    assert row.startswith("| D-OPSD | 400 | 0.60 ± 0.14 | 1.00 ± 0.00 |") and row.endswith("| - |")
