"""Losses and gradients against values computed by hand, and the states that the rollout visits."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dopsd.rollout import Schedule, distillation_loss, euler_step, rollout, seeded_noise


SCHEDULE = Schedule(sigmas=torch.tensor([1.0, 0.5, 0.0]), timesteps=torch.tensor([1000.0, 500.0]))


def linear_student(weight):
    return lambda latents, timestep: weight * latents


def constant_teacher(value):
    return lambda latents, timestep: torch.full_like(latents, value)


@pytest.mark.parametrize(
    ("loss_space", "first", "second"),
    # State 1: x = 2, sigma 1, student 3 * 2 = 6, teacher 1: difference 5.
    # State 2: x = 2 - 0.5 * 6 = -1, sigma 0.5, student -3, teacher 1: difference -4.
    [("velocity", 25.0, 16.0), ("x0", 25.0, 0.25 * 16.0)],
)
def test_losses_and_states_equal_values_computed_by_hand(loss_space, first, second):
    weight = torch.tensor(3.0, requires_grad=True)
    steps = list(
        rollout(
            linear_student(weight), constant_teacher(1.0), torch.full((1, 1), 2.0), SCHEDULE, loss_space=loss_space
        )
    )
    assert [step.latents.item() for step in steps] == [2.0, -1.0]
    assert [step.loss.item() for step in steps] == [first, second]
    assert steps[-1].next_latents.item() == -1.0 - 0.5 * -3.0
    assert [step.index for step in steps] == [0, 1]


def test_gradient_equals_value_computed_by_hand():
    # d/dw (w x - 1)^2 = 2 (w x - 1) x at the detached states x = 2 and x = -1. x0 space multiplies it by sigma^2.
    weight = torch.tensor(3.0, requires_grad=True)
    for step in rollout(linear_student(weight), constant_teacher(1.0), torch.full((1, 1), 2.0), SCHEDULE):
        (step.loss / len(SCHEDULE)).backward()
    assert weight.grad.item() == pytest.approx((2 * 5 * 2 + 0.25 * 2 * -4 * -1) / 2)


def test_x0_loss_compares_the_predicted_clean_latents():
    generator = torch.Generator().manual_seed(0)
    latents, student, teacher = torch.randn(3, 2, 4, 5, 6, generator=generator)
    sigma = torch.tensor(0.7)
    by_definition = ((latents - sigma * student) - (latents - sigma * teacher)).square().mean()
    torch.testing.assert_close(distillation_loss(student, teacher, sigma, loss_space="x0"), by_definition)


def test_loss_is_float32_for_bfloat16_velocities():
    student = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    teacher = torch.tensor([1.0078125, 2.0], dtype=torch.bfloat16)
    loss = distillation_loss(student, teacher, torch.tensor(1.0), loss_space="velocity")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.0078125**2 / 2)


def test_one_backward_pass_per_step_gives_the_gradients_of_a_single_backward_pass():
    def student_and_noise():
        torch.manual_seed(0)
        return torch.nn.Linear(6, 6), torch.randn(3, 6)

    model, noise = student_and_noise()
    losses = [step.loss for step in rollout(lambda x, t: model(x), constant_teacher(0.3), noise, SCHEDULE)]
    (sum(losses) / len(SCHEDULE)).backward()
    once = [parameter.grad.clone() for parameter in model.parameters()]

    model, noise = student_and_noise()
    for step in rollout(lambda x, t: model(x), constant_teacher(0.3), noise, SCHEDULE):
        (step.loss / len(SCHEDULE)).backward()
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_states_are_detached():
    model = torch.nn.Linear(4, 4)
    for step in rollout(lambda x, t: model(x), constant_teacher(0.0), torch.randn(2, 4), SCHEDULE):
        assert not step.latents.requires_grad
        assert not step.next_latents.requires_grad


def test_teacher_is_evaluated_at_the_students_states_and_before_the_student():
    calls = []

    def student(latents, timestep):
        calls.append(("student", latents, timestep))
        return 2 * latents

    def teacher(latents, timestep):
        calls.append(("teacher", latents, timestep))
        return 100 + latents  # so different that a trajectory of the teacher itself would be noticed

    list(rollout(student, teacher, torch.ones(1, 3), SCHEDULE))
    assert [role for role, *_ in calls] == ["teacher", "student"] * 2
    for (_, at_teacher, time_teacher), (_, at_student, time_student) in zip(calls[::2], calls[1::2], strict=True):
        assert torch.equal(at_teacher, at_student)
        assert torch.equal(time_teacher, time_student)
    assert torch.equal(calls[2][1], torch.ones(1, 3) - 0.5 * 2)


def test_a_teacher_velocity_with_a_gradient_is_refused():
    weight = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(AssertionError, match="must not require a gradient"):
        next(rollout(linear_student(weight), linear_student(weight), torch.ones(1, 2), SCHEDULE))


def test_equal_student_and_teacher_give_zero_loss():
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        steps = list(rollout(lambda x, t: model(x), lambda x, t: model(x), torch.randn(2, 4), SCHEDULE))
    assert [step.loss.item() for step in steps] == [0.0, 0.0]


def test_euler_step_rounds_like_the_scheduler():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(4)
        latents = torch.randn(1, 8, 4, 4, generator=generator).to(dtype)
        for index, timestep in enumerate(scheduler.timesteps):
            velocity = torch.randn(1, 8, 4, 4, generator=generator).to(dtype)
            expected = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            latents = euler_step(latents, velocity, scheduler.sigmas[index], scheduler.sigmas[index + 1])
            assert torch.equal(latents, expected)


def test_noise_depends_on_its_seed_only():
    together = seeded_noise((2, 3, 3), [7, 8])
    assert together.shape == (2, 2, 3, 3)
    assert torch.equal(together[1:], seeded_noise((2, 3, 3), [8]))
    assert not torch.equal(together[0], together[1])
    assert abs(seeded_noise((64, 64), [0]).std().item() - 1) < 0.05


def test_predicted_clean_latents_and_agreement_equal_values_computed_by_hand():
    latents = torch.tensor([[1.0, 2.0]])
    schedule = Schedule(sigmas=torch.tensor([0.5, 0.0]), timesteps=torch.tensor([500.0]))
    (step,) = rollout(
        lambda x, t: torch.tensor([[3.0, 4.0]]), lambda x, t: torch.tensor([[0.0, 10.0]]), latents, schedule
    )
    assert step.student_x0.tolist() == [[-0.5, 0.0]]
    assert step.teacher_x0.tolist() == [[1.0, -3.0]]
    torch.testing.assert_close(step.agreement, torch.tensor([0.8, 0.5]))


@pytest.mark.parametrize(("trained", "visits_all", "walked"), [([0, 2], False, 2), ([0, 2], True, 4), ([1], False, 1)])
def test_asking_once_gives_the_states_of_asking_at_each(trained, visits_all, walked):
    schedule = Schedule(torch.tensor([1.0, 0.8, 0.6, 0.3, 0.0]), torch.tensor([1000.0, 800.0, 600.0, 300.0]))
    noise, weight = seeded_noise((3,), [0, 1]), torch.tensor(0.7, requires_grad=True)
    calls, walks = [], []

    def student(latents, timestep):
        walks.append(torch.is_grad_enabled())
        return weight * latents * timestep / 1000

    def teacher(latents, timestep):
        calls.append(timestep)
        return latents.sin() + timestep.reshape(-1, 1) / 1000

    plain = list(rollout(student, teacher, noise, schedule, trained=trained))
    calls.clear()
    walks.clear()
    once = list(
        rollout(student, teacher, noise, schedule, trained=trained, batches_teacher=True, visits_all=visits_all)
    )
    (timesteps,) = calls
    assert torch.equal(timesteps, schedule.timesteps[trained].repeat_interleave(2))
    assert walks == [False] * walked + [True] * len(trained)
    for one, other in zip(once, plain, strict=True):
        assert one.index == other.index
        for name in ("sigma", "latents", "student_velocity", "teacher_velocity", "loss", "next_latents"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))
    gradients = [torch.autograd.grad(sum(step.loss for step in steps), weight)[0] for steps in (plain, once)]
    torch.testing.assert_close(*gradients)
