"""The miniature's parts: the world, its metrics, the closed-form teacher, and the baselines' losses."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

import distill as distill_module
import world
from baselines import Lesson, encode_lesson, flow_matching_loss, off_policy_losses, picture_batches, train_baseline
from concepts import CONCEPTS, NUM_PICTURES, old_task, pictures_of
from distill import RowSource, Settings, distill
from dopsd.roles import StudentTeacherLoRA, lora_target_modules
from dopsd.rollout import distillation_loss, few_step_sample, rollout, seeded_noise
from exam import standard_tasks
from experiment import ABLATIONS, DOPSD, FIRST_TABLE, SEEDS, SETTINGS, SFT, Method, Run, dopsd_flags, runs_of
from metrics import PictureReader, detail, effective_poses, frechet_distance
from parts import MAX_SEQUENCE_LENGTH, make_pipeline, make_tokenizer, make_transformer, make_vae
from pipelines.flux2_klein import DEFAULT_LORA_LAYERS
from report import figure, retention_text, step_table, table
from teacher import PosteriorTeacher, encode_world
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
    assert effective_poses(reading) > 0.8 * len(world.POSES)
    other = [task.wanted[-1], *task.wanted[:-1]]
    assert reader.accuracy(reading, other, task.backgrounds)["exact"] < 0.2


def test_blur_and_one_place_show_in_the_figures(reader):
    random = np.random.default_rng(0)
    sprite = world.sprite(world.all_appearances()[0])
    same = to_tensor(np.stack([world.draw(sprite, (1, 3), "sky", random) for _ in range(24)]))
    blurred = torch.nn.functional.avg_pool2d(same, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert effective_poses(reader.read(same)) == pytest.approx(1)
    assert detail(blurred, reader.read(same)) < 0.7
    ghost = torch.from_numpy(world.draw(sprite, (3, 1), "sky")).permute(2, 0, 1)
    ghosted = same + 0.3 * (ghost - torch.from_numpy(world.draw(0 * sprite, (3, 1), "sky")).permute(2, 0, 1))
    assert detail(ghosted, reader.read(same)) == pytest.approx(1, abs=0.15)  # a shadow is no grain
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


def test_the_schedule_is_kleins(small_world):
    sigmas = small_world[0].schedule(64, 64, 4).sigmas
    assert sigmas.tolist() == pytest.approx([1, 0.955, 0.875, 0.701, 0], abs=1e-3)


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


# The closed-form teacher and its distillation


@pytest.fixture(scope="module")
def small_world():
    """(pipeline, sprites, latent world, appearances): six plain objects and two without a name, an untrained VAE."""
    torch.manual_seed(0)
    pipeline = make_pipeline(make_vae().eval(), make_transformer())
    appearances = [a for a in world.all_appearances() if a.texture == "plain" and a.colours == ("red",)][:6]
    random = np.random.default_rng(0)
    sprites = np.stack([*(world.sprite(a) for a in appearances), *(world.random_sprite(random) for _ in range(2))])
    count = len(world.BACKGROUNDS)
    scenes = [(index, background) for index in range(6) for background in range(count)] + [(6, 0), (7, 1)]
    return pipeline, sprites, encode_world(pipeline.vae, sprites, scenes, log=print), appearances


def test_the_teacher_follows_the_exact_flow_of_one_gaussian(small_world):
    pipeline, _, latent_world, _ = small_world
    sigmas = pipeline.schedule(64, 64, 4).sigmas
    teacher = PosteriorTeacher(latent_world, sigmas, num_directions=64, num_substeps=2)
    mean = latent_world.means[:2, 0].float()
    covariance = latent_world.covariance.double()
    state = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    for segment in range(4):
        arrived = teacher.advance(state, torch.full((2,), segment), mean[:, None])
        # dx/dsigma = (x - E[x0 | x]) / sigma in 2000 Euler steps, with the Gaussian's own E[x0 | x].
        x, m = state.double(), mean.double()
        path = torch.linspace(float(sigmas[segment]), float(sigmas[segment + 1]), 2001).double()
        for sigma, following in zip(path[:-1], path[1:], strict=True):
            gain = (
                (1 - sigma)
                * covariance
                @ torch.linalg.inv((1 - sigma) ** 2 * covariance + sigma**2 * torch.eye(64).double())
            )
            x0 = m + (x - (1 - sigma) * m) @ gain.T
            x = x + (following - sigma) / sigma * (x - x0)
        assert torch.allclose(arrived.double(), x, atol=2e-2 * x.std().item())
        state = arrived


def test_the_teacher_ends_at_one_of_the_allowed_pictures(small_world):
    pipeline, _, latent_world, _ = small_world
    sigmas = pipeline.schedule(64, 64, 4).sigmas
    means = latent_world.means[:1].float()  # one scene at every place
    states = torch.randn(16, *means.shape[2:], generator=torch.Generator().manual_seed(0))
    teacher = PosteriorTeacher(latent_world, sigmas, num_directions=64)
    for segment in range(4):
        states = teacher.advance(states, torch.full((16,), segment), means.expand(16, -1, -1, -1, -1))
    distances = (states[:, None] - means).square().mean((2, 3, 4))
    nearest = distances.sort(1).values
    assert (nearest[:, 0] < 0.5 * nearest[:, 1]).all()
    assert len(distances.argmin(1).unique()) > 2


def test_captions_say_what_is_drawn_and_a_contradicting_picture_does_not_count(small_world):
    pipeline, sprites, latent_world, appearances = small_world
    source = RowSource(pipeline, sprites, latent_world, appearances)
    captions, shown = [], []
    encode, references = pipeline.encode_student, source._references
    pipeline.encode_student = lambda texts, **settings: captions.extend(texts) or encode(texts, **settings)
    source._references = lambda objects, random: shown.extend(objects) or references(objects, random)
    try:
        rows = source.draw("reference", 64, np.random.default_rng(0))
    finally:
        pipeline.encode_student = encode
    distances = [(latent_world.means.float() - row).flatten(1).norm(dim=1).argmin() for row in rows.means]
    drawn = latent_world.objects[torch.stack(distances)].tolist()
    described = [
        [a.words in caption for a in appearances].index(True) if "plain" in caption else None for caption in captions
    ]
    conflicts = 0
    for words, target, picture, text in zip(described, drawn, shown, captions, strict=True):
        if words is None:
            assert target == picture
        else:
            assert target == words
            conflicts += target != picture
            assert target == picture or not text.endswith(world.REFERENCE_SUFFIX)
    assert conflicts > 8


def test_a_stopped_distillation_goes_on(small_world, tmp_path, monkeypatch):
    pipeline, sprites, latent_world, appearances = small_world
    sigmas = pipeline.schedule(64, 64, 4).sigmas
    teacher = PosteriorTeacher(latent_world, sigmas, num_directions=2)
    source = RowSource(pipeline, sprites, latent_world, appearances)
    lines, measured = [], []

    def settings(num_steps: int) -> Settings:
        rows = {"text": 1, "word": 1, "reference": 1}
        return Settings(rows, muon_lr=1e-2, adamw_lr=1e-3, num_steps=num_steps, minutes_per_evaluation=60, seed=0)

    def evaluate(transformer) -> dict:
        measured.append({name: weight.clone() for name, weight in transformer.named_parameters()})
        return {}

    state_path = tmp_path / "distill.pt"
    steps = []
    train = distill_module.train_together
    monkeypatch.setattr(
        distill_module, "train_together", lambda *args, **named: steps.append(len(steps)) or train(*args, **named)
    )
    backend = _AttentionBackendRegistry.get_active_backend()[0]
    for num_steps in (2, 3):
        distill(source, teacher, sigmas, state_path, settings(num_steps), log=lines.append, evaluate=evaluate)
    # Every pipeline of the process would draw with another backend, other pictures bit for bit.
    assert _AttentionBackendRegistry.get_active_backend()[0] == backend
    assert torch.load(state_path, weights_only=True)["step"] == 3
    assert [line["step"] for line in lines] == [2, 3]
    assert len(steps) == 2 * 3  # two groups of rows an update; the second call did the third update alone
    assert any(not torch.equal(measured[0][name], measured[1][name]) for name in measured[0])


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


def test_flow_matching_at_given_sigmas_visits_no_others():
    seen = set()

    def student(latents, timestep):
        seen.update((timestep / 1000).tolist())
        return latents

    sigmas = torch.tensor([1.0, 0.5])
    flow_matching_loss(student, torch.randn(32, 4, 2, 2), torch.Generator().manual_seed(0), sigmas=sigmas)
    assert seen == {1.0, 0.5}


def test_an_epoch_of_batches_sees_every_picture_once():
    batches = picture_batches(5, 2, seed=0)
    epochs = [[next(batches).tolist() for _ in range(3)] for _ in range(4)]
    for epoch in epochs:
        assert [len(indices) for indices in epoch] == [2, 2, 1]
        assert sorted(sum(epoch, [])) == [0, 1, 2, 3, 4]
        assert all(indices == sorted(indices) for indices in epoch)
    assert len({str(epoch) for epoch in epochs}) > 1


def test_a_selected_picture_has_its_own_caption_reference_and_latents(pipeline, make_picture):
    pictures, captions = [make_picture(1), make_picture(2)], ["a ball", "a box"]
    lesson = encode_lesson(pipeline, pictures, captions, prompt_suffix=" so", max_sequence_length=48)
    second = encode_lesson(pipeline, pictures[1:], captions[1:], prompt_suffix=" so", max_sequence_length=48)
    selected = lesson.select(torch.tensor([1]))
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(selected.x0, second.x0)
    close(selected.student.prompt_embeds, second.student.prompt_embeds)
    close(selected.teacher.prompt_embeds, second.teacher.prompt_embeds)
    close(selected.teacher.references[0], second.teacher.references[0])


@pytest.mark.parametrize("method", ["sft", "sft_deployed", "sft_teacher", "off_policy"])
def test_every_baseline_trains_and_can_be_stopped(pipeline, make_picture, monkeypatch, method):
    pictures, captions = [make_picture(1), make_picture(2)], ["a ball", "a box"]
    lesson = encode_lesson(pipeline, pictures, captions, prompt_suffix=" so", max_sequence_length=48)
    assert lesson.student.references == () and torch.equal(lesson.x0, lesson.teacher.references[0])
    targets = lora_target_modules(pipeline.transformer, DEFAULT_LORA_LAYERS)
    roles = StudentTeacherLoRA(pipeline.transformer, targets, rank=2, alpha=4)
    before = {name: weight.clone() for name, weight in roles.state_dict().items()}
    settings = {"size": (64, 64), "num_rollout_steps": 2, "learning_rate": 1e-2, "ema_decay": 0.5, "seed": 0}
    settings |= {"batch_size": 1, "adam_epsilon": 1e-8, "lr_scheduler": "constant", "lr_warmup_steps": 0}
    batches = []
    select = lesson.select
    monkeypatch.setattr(Lesson, "select", lambda self, indices: batches.append(indices.tolist()) or select(indices))
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
    assert sorted(batches) == [[0], [1]]
    changed = {name for name, weight in roles.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[0] for name in changed} == {"student", "teacher"}


# The experiment


def test_the_scripts_flags_can_be_parsed(tmp_path):
    flags = dopsd_flags(
        tmp_path / "model", tmp_path, tmp_path / "out", 1, 50, ["a ball", "a box"], {"teacher": "base"}
    )
    args = parse_args(sum(flags, []))
    assert (args.teacher, args.seed, args.max_train_steps, args.rank) == ("base", 1, 50, 16)
    for name, value in SETTINGS.items():
        assert getattr(args, name) == value
    # What the baselines have written down: AdamW, its betas, no decay, clipping at 1, no dropout, all layers.
    assert (args.optimizer, args.adam_beta1, args.adam_beta2, args.adam_weight_decay) == ("adamw", 0.9, 0.999, 0)
    assert (args.max_grad_norm, args.lora_alpha or 2 * args.rank, args.lora_dropout) == (1.0, 32, 0)
    assert args.lora_layers == DEFAULT_LORA_LAYERS
    assert args.retention_prompts == ["a ball", "a box"]


def test_equal_settings_are_one_run_and_others_are_not():
    runs = [Run(CONCEPTS[0], 0, method) for method in (*FIRST_TABLE, *ABLATIONS)]
    folders = [run.folder for run in runs]
    repeated = {folder for folder in folders if folders.count(folder) > 1}
    prefix = "transformer_blocks." * 10
    layers = [Run(CONCEPTS[0], 0, Method("x", flags={"lora_layers": prefix + end})).folder for end in ("a", "b")]
    assert layers[0] != layers[1]
    assert repeated == {Run(CONCEPTS[0], 0, method).folder for method in (SFT, DOPSD)}
    assert len({run.folder for concept in CONCEPTS for run in runs_of(DOPSD, (concept,), (0, 1, 2))}) == 9


def test_a_table_has_means_and_spreads():
    results = [
        {"new": {"exact": value, "background": 1, "detail": 1, "fd": 0.1, "poses": 12}, "steps": 400}
        for value in (0.5, 0.7)
    ]
    assert figure(results[0], "concept") == 0.5 and figure(results[0], "retention") is None
    row = table({Method("D-OPSD").name: results}).splitlines()[-1]
    assert row.startswith("| D-OPSD | 400 | 0.60 ± 0.14 | 1.00 ± 0.00 |") and row.endswith("| - |")


def test_a_larger_task_begins_with_the_same_rows():
    small, large = old_task(3), old_task(5)
    assert large.prompts[:3] == small.prompts and torch.equal(large.real[:3], small.real)


def test_an_experiment_that_is_killed_leaves_no_worker_behind():
    program = (
        "import multiprocessing, time; from experiment import end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=end_with_parent)\n"
        "    worker.start(); print(worker.pid, flush=True); time.sleep(600)"
    )
    path = os.pathsep.join(sys.path)
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    worker.wait(timeout=120)


class KnownResults:
    """An experiment whose figures are given."""

    def __init__(self, results: dict[str, dict]):
        self.results = results

    def result(self, run: Run) -> dict:
        return self.results[run.method.name]


def test_retention_is_ranked_beside_what_it_should_tell():
    runs = [Run(CONCEPTS[0], 0, method) for method in (FIRST_TABLE[0], DOPSD, SFT)]
    results = {
        "base": {"old": {"exact": 1.0, "fd": 0.1}, "retention": 0.0},
        "D-OPSD": {"old": {"exact": 0.8, "fd": 0.2}, "retention": 0.3, "retention_logged": 0.29},
        "SFT": {"old": {"exact": 0.1, "fd": 0.15}, "retention": 0.8},
    }
    text = retention_text(KnownResults(results), runs)
    assert "retention: base 0.000, D-OPSD 0.300, SFT 0.800" in text
    assert "old: exact: base 1.000, D-OPSD 0.800, SFT 0.100" in text
    assert "old: FD: base 0.100, SFT 0.150, D-OPSD 0.200" in text
    assert "at most 1e-02, in 1 runs" in text


def test_the_readmes_show_the_committed_figures():
    repository = Path(__file__).resolve().parents[1]
    folder = repository / "benchmarks" / "miniature" / "results"
    results = json.loads((folder / "results.json").read_text())
    report, readme = (folder / "results.md").read_text(), (folder.parent / "README.md").read_text()

    def rows(methods, concepts, seeds=SEEDS, part=lambda result: result):
        return {
            method.name: [part(results[str(run.folder)]) for run in runs_of(method, concepts, seeds)]
            for method in methods
        }

    first = table(rows(FIRST_TABLE, CONCEPTS))
    ablations = table(rows(ABLATIONS, CONCEPTS[:1]))
    steps = step_table(
        rows((FIRST_TABLE[0], SFT, DOPSD), CONCEPTS[:1], SEEDS[:1], lambda result: result["step_counts"])
    )
    assert first in report and first in readme and first in (repository / "README.md").read_text()
    assert ablations in report and ablations in readme
    assert steps in report and steps in readme
    runs = [run for method in (*FIRST_TABLE, *ABLATIONS) for run in runs_of(method, CONCEPTS[:1], SEEDS)]
    ranking = retention_text(FoundResults(results), runs)
    lines = [line for line in ranking.splitlines() if line.startswith("- ")]
    assert len(lines) == 3
    for line in lines:
        assert line in report and line in readme


class FoundResults:
    """The committed experiment's figures."""

    def __init__(self, results: dict[str, dict]):
        self.results = results

    def result(self, run: Run) -> dict:
        return self.results[str(run.folder)]
