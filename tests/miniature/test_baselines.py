from functools import partial

import pytest
import torch

from benchmarks.miniature import baselines as baselines_module
from benchmarks.miniature.baselines import (
    BaselineTraining,
    EncodedPictures,
    StateSampler,
    batch_indices,
    deployed_shift,
    draw_prior_pictures,
    encode_pictures,
    flow_matching_loss,
    loaded_shift,
    off_policy_losses,
    shifted,
    step_losses,
)
from benchmarks.miniature.concepts import CONCEPTS, training_pictures
from benchmarks.miniature.methods import SharedSettings
from dopsd.lora_roles import StudentTeacherLoRA, lora_target_modules
from dopsd.rollout import Schedule, distillation_loss, few_step_sample, rollout, seeded_noise
from pipelines.published import KLEIN_LORA_LAYERS


SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.0])
SCHEDULE = Schedule(sigmas=SIGMAS, timesteps=1000 * SIGMAS[:-1])


def encode(pipeline, count: int) -> EncodedPictures:
    images, captions = training_pictures(CONCEPTS[0], 0)
    return encode_pictures(pipeline, images[:count], captions[:count], prompt_suffix=" so")


def test_flow_matching_has_no_loss_at_the_true_velocity():
    x0 = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))

    def true_velocity(latents, timestep):
        sigma = (timestep / 1000).view(-1, 1, 1, 1)
        return (latents - x0) / sigma  # x_sigma = (1 - sigma) x0 + sigma noise

    assert flow_matching_loss(true_velocity, x0, torch.Generator().manual_seed(0)) < 1e-6
    assert flow_matching_loss(lambda x, t: torch.zeros_like(x), x0, torch.Generator().manual_seed(0)) > 1


def test_flow_matching_draws_sigmas_as_a_shifted_scheduler_spaces_them(miniature, zimage):
    seen = []

    def velocity(latents, timestep):
        seen.append(timestep / 1000)
        return latents

    for pipeline, loaded, num_steps, deployed in ((miniature, 1, 4, 7.02), (zimage, 3, 8, 3)):
        assert loaded_shift(pipeline) == loaded
        schedule = pipeline.schedule(64, 64, num_steps)
        assert deployed_shift(schedule) == pytest.approx(deployed, abs=0.01)
        u = torch.linspace(1, 1 / num_steps, num_steps)
        torch.testing.assert_close(shifted(u, deployed_shift(schedule)), schedule.sigmas[:-1], rtol=1e-4, atol=0)
    flow_matching_loss(velocity, torch.zeros(4000, 1, 1, 1), torch.Generator().manual_seed(0), shift=7)
    # Half of the draws lie above 7 * .5 / (1 + 6 * .5).
    assert seen[0].median() == pytest.approx(3.5 / 4, abs=0.01) and seen[0].min() < 0.1


def test_a_step_of_flow_matching_draws_as_often_as_asked(miniature, monkeypatch):
    calls = []
    monkeypatch.setattr(
        baselines_module,
        "flow_matching_loss",
        lambda student, x0, generator, **options: calls.append(options) or torch.zeros((), requires_grad=True),
    )
    pictures, roles = encode(miniature, 1), make_roles(miniature)
    arguments = (miniature, roles, pictures, miniature.schedule(64, 64, 4), SharedSettings())
    BaselineTraining("sft", *arguments, seed=0).backpropagate(pictures)
    assert [call["shift"] for call in calls] == [1.0] * 4
    calls.clear()
    BaselineTraining("sft", *arguments, seed=0, num_draws=1, shift=7.0).backpropagate(pictures)
    assert [call["shift"] for call in calls] == [7.0]


def test_off_policy_visits_the_teachers_states_and_on_policy_the_students():
    noise = seeded_noise((4, 2, 2), [0, 1])
    visited = []

    def teacher(latents, timestep):
        return 0.3 * latents

    def student(latents, timestep):
        visited.append(latents)
        return 0.5 * latents

    losses = list(off_policy_losses(student, teacher, noise, SCHEDULE))
    state = noise
    for index, sigma in enumerate(SIGMAS[:-1]):
        assert torch.allclose(visited[index], state)
        expected = distillation_loss(0.5 * state, 0.3 * state, sigma, loss_space="x0")
        assert losses[index] == pytest.approx(expected.item())
        state = state + (SIGMAS[index + 1] - sigma) * 0.3 * state
    assert torch.allclose(few_step_sample(teacher, noise, SCHEDULE), state)
    on_policy = [step.latents for step in rollout(student, teacher, noise, SCHEDULE)]
    assert not torch.allclose(on_policy[-1], visited[len(losses) - 1])


@pytest.mark.parametrize("method", ["sft", "sft_deployed", "sft_teacher", "off_policy"])
def test_each_method_trains_at_its_own_states(method):
    x0 = torch.full((32, 4, 2, 2), 5.0)
    visited = {"student": [], "teacher": []}

    def velocity(role: str):
        def predict(latents, timestep):
            visited[role].append((latents, timestep / 1000))
            return latents  # the teacher's samples end at 0

        return predict

    generator = torch.Generator().manual_seed(0)
    losses = list(step_losses(method, velocity("student"), velocity("teacher"), x0, SCHEDULE, generator))
    assert len(losses) == len(visited["student"]) == 3
    assert len(visited["teacher"]) == (0 if method in ("sft", "sft_deployed") else 3)
    sigmas = {round(sigma, 6) for _, all_sigmas in visited["student"] for sigma in all_sigmas.flatten().tolist()}
    latents = torch.stack([latents for latents, _ in visited["student"]])
    if method == "off_policy":
        assert sigmas == {1.0, 0.8, 0.5}
        assert all(torch.equal(a[0], b[0]) for a, b in zip(visited["student"], visited["teacher"], strict=True))
    elif method == "sft_deployed":
        assert sigmas == {1.0, 0.8, 0.5} and latents.mean() > 0.3
    else:
        assert len(sigmas) > 30
        assert latents.mean() > 2 if method == "sft" else latents.mean().abs() < 0.3


def test_an_epoch_of_batches_has_every_picture_once():
    batches = batch_indices(5, 2, seed=0)
    epochs = [[next(batches).tolist() for _ in range(3)] for _ in range(4)]
    for epoch in epochs:
        assert [len(indices) for indices in epoch] == [2, 2, 1]
        assert sorted(sum(epoch, [])) == [0, 1, 2, 3, 4]
        assert all(indices == sorted(indices) for indices in epoch)
    assert len({str(epoch) for epoch in epochs}) > 1


def test_a_selected_picture_has_its_own_caption_reference_and_latents(miniature):
    both = encode(miniature, 2)
    assert both.student.references == () and torch.equal(both.x0, both.teacher.references[0])
    selected = both.select(torch.tensor([0]))
    alone = encode(miniature, 1)
    for first, second in (
        (selected.x0, alone.x0),
        (selected.student.prompt_embeds, alone.student.prompt_embeds),
        (selected.teacher.prompt_embeds, alone.teacher.prompt_embeds),
        (selected.teacher.references[0], alone.teacher.references[0]),
    ):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(selected.student.prompt_embeds, selected.teacher.prompt_embeds)


def make_roles(pipeline) -> StudentTeacherLoRA:
    targets = lora_target_modules(pipeline.transformer, KLEIN_LORA_LAYERS)
    return StudentTeacherLoRA(pipeline.transformer, targets, rank=2, alpha=4)


def test_a_baseline_trains_student_and_teacher_until_it_is_stopped(miniature, monkeypatch):
    pictures, roles = encode(miniature, 2), make_roles(miniature)
    before = {name: weight.clone() for name, weight in roles.state_dict().items()}
    batches, steps = [], []
    select = pictures.select
    monkeypatch.setattr(
        EncodedPictures, "select", lambda self, indices: batches.append(indices.tolist()) or select(indices)
    )
    settings = SharedSettings(train_batch_size=1, ema_decay=0.5, lr_warmup_steps=0)
    training = BaselineTraining(
        "off_policy", miniature, roles, pictures, miniature.schedule(64, 64, 2), settings, seed=0
    )
    assert training.train(5, lambda step: steps.append(step) or step == 2) == 2 and steps == [1, 2]
    assert sorted(batches) == [[0], [1]]
    changed = {name for name, weight in roles.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[0] for name in changed} == {"student", "teacher"}


def gradient(roles: StudentTeacherLoRA) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in roles.student_parameters])


def test_prior_pictures_are_the_bases_and_are_learned_beside_the_own_ones(miniature):
    schedule = miniature.schedule(64, 64, 2)
    prompts = ["a plain red disc on sand"] * 3
    prior = draw_prior_pictures(miniature, prompts, schedule, seed=0)
    assert len({picture.sum().item() for picture in prior.x0}) == 3  # each from its own noise
    pictures, roles, schedule = encode(miniature, 2), make_roles(miniature), miniature.schedule(64, 64, 1)

    def trained_gradient(method: str, prior=None) -> torch.Tensor:
        training = BaselineTraining(
            method, miniature, roles, pictures, schedule, SharedSettings(), seed=0, prior=prior
        )
        training.backpropagate(pictures)
        found = gradient(roles)
        for parameter in roles.student_parameters:
            parameter.grad = None
        return found

    plain, with_prior = trained_gradient("sft"), trained_gradient("sft_prior", prior)
    generator = torch.Generator().manual_seed(0)
    velocity = partial(partial, miniature.predict_velocity)
    flow_matching_loss(velocity(context=pictures.student), pictures.x0, generator)
    beside = prior.draw(2, generator)
    flow_matching_loss(velocity(context=beside.context), beside.x0, generator).backward()
    torch.testing.assert_close(with_prior, plain + gradient(roles), rtol=1e-3, atol=1e-6)
    drawn = prior.draw(50, torch.Generator().manual_seed(0))
    assert {picture.sum().item() for picture in drawn.x0} == {picture.sum().item() for picture in prior.x0}


def test_one_state_weighted_by_its_probability_has_the_mean_gradient(miniature):
    """Exactly, by going through all states, with probabilities that are not uniform."""
    schedule, pictures, roles = miniature.schedule(64, 64, 3), encode(miniature, 2), make_roles(miniature)
    with torch.no_grad():
        for parameter in roles.student_parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    training = BaselineTraining("one_state_by_norm", miniature, roles, pictures, schedule, SharedSettings(), seed=0)
    for index, norm in enumerate((3.0, 2.0, 1.0)):
        training.sampler.observe(index, norm)
    probabilities = training.sampler.probabilities
    assert probabilities.tolist() == pytest.approx([0.25 / 3 + 0.75 * share for share in (1 / 2, 1 / 3, 1 / 6)])
    training.sampler.observe = lambda index, norm: norms.__setitem__(index, norm)
    noise = seeded_noise(pictures.x0.shape[1:], [0, 1])
    norms, mean = {}, 0
    for index, probability in enumerate(probabilities.tolist()):
        training.sampler.draw = lambda generator, i=index, p=probability: (i, 1 / (3 * p))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("benchmarks.miniature.baselines.drawn_noise", lambda *args: noise)
            training.backpropagate(pictures)
        mean = mean + probability * gradient(roles)
        roles_grads = [parameter.grad for parameter in roles.student_parameters]
        assert norms[index] == pytest.approx(
            float(torch.stack([grad.norm() for grad in roles_grads]).norm()) * 3 * probability, rel=1e-4
        )
        for parameter in roles.student_parameters:
            parameter.grad = None
    student, teacher = training.velocity(pictures.student), roles.as_teacher(training.velocity(pictures.teacher))
    for state in rollout(student, teacher, noise, schedule):
        (state.loss / 3).backward()
    torch.testing.assert_close(mean, gradient(roles), rtol=1e-3, atol=1e-6)


def test_states_are_drawn_uniformly_until_all_were_seen():
    sampler, generator = StateSampler(4, by_norm=True), torch.Generator().manual_seed(0)
    sampler.observe(0, 100.0)
    assert sampler.probabilities.tolist() == [0.25] * 4 and sampler.draw(generator)[1] == pytest.approx(1.0)
    for index in (1, 2, 3):
        sampler.observe(index, 1.0)
    draws = [sampler.draw(generator) for _ in range(400)]
    assert sum(index == 0 for index, _ in draws) > 250
    assert sum(weight for _, weight in draws) / 400 == pytest.approx(1.0, abs=0.25)
    for _ in range(60):
        sampler.observe(0, 1.0)  # a running mean
    assert sampler.probabilities[0] < 0.3
