import math
from functools import partial

import pytest
import torch

from dopsd.checkpoints import Checkpoints
from dopsd.data.order import Sample, noise_seed, place_seed, trained_states
from dopsd.errors import TrainingDiverged
from dopsd.prefetch import MicroBatch
from dopsd.prior import PriorPrompts
from dopsd.rollout import rollout, seeded_noise
from dopsd.step import MAX_SKIPPED_STEPS, TrainingStep, count_skipped, mean_figures
from toy_training import SIZE, ToyContexts, ToyTraining, make_step, sample


def states_of(training: ToyTraining, one: Sample, loss_space: str) -> list:
    """The rollout of one sample by itself."""
    pipeline = training.pipeline
    student, teacher = ToyContexts([]).load([one])
    noise = seeded_noise(pipeline.latent_shape(*SIZE), [noise_seed(0, one)])
    return list(
        rollout(
            lambda latents, timestep: pipeline.predict_velocity(latents, timestep, student),
            training.roles.as_teacher(lambda latents, time: pipeline.predict_velocity(latents, time, teacher)),
            noise,
            pipeline.schedule(*SIZE, 3),
            loss_space=loss_space,
        )
    )


@pytest.mark.parametrize("loss_space", ["x0", "velocity"])
def test_a_step_descends_the_mean_loss_over_samples_and_visited_states(loss_space):
    batches = [[sample(0)], [sample(1), sample(2)]]
    training, reference = ToyTraining(), ToyTraining()
    training.use_optimizer(torch.optim.SGD, lr=0.1)
    metrics = make_step(
        training, batches, 2, num_rollout_steps=3, loss_space=loss_space, max_grad_norm=1e9, ema_decay=0.75
    )(0)

    rollouts = [states_of(reference, one, loss_space) for one in (sample(0), sample(1), sample(2))]
    losses = torch.stack([torch.stack([state.loss for state in states]) for states in rollouts]).mean(dim=0)
    losses.mean().backward()
    gradients = [parameter.grad for parameter in reference.roles.student_parameters]
    assert all(gradient.abs().sum() > 0 for gradient in gradients[1::2])  # lora_B; lora_A's is zero at the start
    pairs = zip(training.roles.student_parameters, reference.roles.student_parameters, strict=True)
    for (trained, start), gradient in zip(pairs, gradients, strict=True):
        torch.testing.assert_close(trained.detach(), start.detach() - 0.1 * gradient)
    pairs = zip(training.roles.teacher_parameters, training.roles.student_parameters, strict=True)
    for (average, student), start in zip(pairs, reference.roles.student_parameters, strict=True):
        torch.testing.assert_close(average.detach(), 0.75 * start.detach() + 0.25 * student.detach())

    assert metrics["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    for number in (1, 2, 3):
        assert metrics[f"loss/state_{number}"] == pytest.approx(losses[number - 1].item(), rel=1e-5)
        agreement = torch.stack([states[number - 1].agreement for states in rollouts]).mean(dim=0)
        assert metrics[f"cosine/state_{number}"] == pytest.approx(agreement[0].item(), rel=1e-5)
        assert metrics[f"norm_ratio/state_{number}"] == pytest.approx(agreement[1].item(), rel=1e-5)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert metrics["peak_memory_gb"] > 0 and metrics["seconds_per_step"] > 0


# Sampled states


def gradient_of(num_trained: int, place: int) -> list[torch.Tensor]:
    """The gradient of one micro-batch, at one place of the run, with K = 3 states."""
    training = ToyTraining()
    step = make_step(training, [[sample(0)]], 1, num_rollout_steps=3, num_trained_states=num_trained)
    batch = MicroBatch(place, [sample(0)], weight=1.0)
    step.backpropagate(batch, *step.inputs.read(batch))
    return [parameter.grad.clone() for parameter in training.roles.student_parameters]


@pytest.mark.parametrize("num_trained", [1, 2])
def test_the_gradient_of_sampled_states_is_on_average_that_of_all_states(num_trained):
    draws = {}
    for place in range(40):
        draws.setdefault(
            tuple(trained_states(0, "states", place, num_states=3, num_trained=num_trained)),
            gradient_of(num_trained, place),
        )
    assert len(draws) == 3  # each choice of 1 or of 2 of 3 states, all equally likely
    for drawn, full in zip(zip(*draws.values(), strict=True), gradient_of(3, place=0), strict=True):
        torch.testing.assert_close(torch.stack(drawn).mean(dim=0), full)


def states_on_the_walk(step: TrainingStep, trained: list[int]) -> list:
    (inputs,) = step.inputs.read(MicroBatch(0, [sample(0)], weight=1.0))
    velocity = step.roles.as_teacher(
        lambda latents, time: step.pipeline.predict_velocity(latents, time, inputs.teacher)
    )
    return list(step.visited_states(inputs, velocity, trained, exchanges=True))


def test_the_walk_ends_after_the_last_trained_state_and_needs_no_gradient_before_it():
    training = ToyTraining()
    step = make_step(training, [[sample(0)]], 1, num_rollout_steps=4, num_trained_states=1)
    calls = []
    step.student.register_forward_hook(lambda module, inputs, output: calls.append(output.requires_grad))
    (state,) = states_on_the_walk(step, [2])
    assert calls == [False, False, True] and state.index == 2
    (_, _, whole, _) = states_on_the_walk(make_step(ToyTraining(), [[sample(0)]], 1), [0, 1, 2, 3])
    assert torch.equal(state.latents, whole.latents) and torch.equal(state.loss, whole.loss)


def test_figures_per_state_average_what_was_seen():
    # Two micro-batches of weight 1: the first trained on states 1 and 2, the second on 2 and 4. Halved: their mean.
    measured = torch.tensor([[1.0, 0.5, 2.0, 1.0], [6.0, 1.0, 2.0, 2.0], [0.0] * 4, [4.0, 0.25, 1.0, 1.0]]) / 2
    loss, figures = mean_figures(measured, num_trained=2)
    assert loss == pytest.approx((1 + 6 + 4) / 2 / 2)
    assert figures == pytest.approx(
        {"loss/state_1": 1.0, "loss/state_2": 3.0, "loss/state_4": 4.0}
        | {"cosine/state_1": 0.5, "cosine/state_2": 0.5, "cosine/state_4": 0.25}
        | {"norm_ratio/state_1": 2.0, "norm_ratio/state_2": 1.0, "norm_ratio/state_4": 1.0}
    )


# Prior preservation


PRIOR = PriorPrompts(unrelated=("a house", "a tree"), without_word=("a dog",), other_words=("a kebi dog",))


def backpropagate_prior(step: TrainingStep, place: int, samples: list[Sample]) -> torch.Tensor:
    batch = MicroBatch(place, samples, weight=1.0, has_prior=True)
    _, inputs = step.inputs.read(batch)
    return step.backpropagate_prior(batch, inputs)


def test_the_loss_of_prior_preservation_and_its_gradient_are_zero_at_the_start():
    training = ToyTraining()
    step = make_step(training, [[sample(0)]], 1, prior=PRIOR)
    measured = backpropagate_prior(step, 0, [sample(0), sample(1)])
    assert torch.equal(measured[:, 0], torch.zeros(4)) and torch.equal(measured[:, 3], torch.ones(4))
    assert all(not parameter.grad.any() for parameter in training.roles.student_parameters)


def test_prior_preservation_pulls_the_student_towards_the_base_where_it_walks():
    training = ToyTraining()
    training.step()  # the student is no longer the base
    training.optimizer.zero_grad()
    step = make_step(training, [[sample(0)]], 1, prior=PRIOR, num_rollout_steps=3, prior_loss_weight=2.0)
    measured = backpropagate_prior(step, 5, [sample(0)])
    gradients = [parameter.grad.clone() for parameter in training.roles.student_parameters]

    training.optimizer.zero_grad()
    pipeline, context = training.pipeline, ToyContexts([]).student(PRIOR.draw(0, 5, 1))
    predict = lambda latents, time: pipeline.predict_velocity(latents, time, context)  # noqa: E731
    noise = seeded_noise(pipeline.latent_shape(*SIZE), [place_seed(0, "prior noise", "5/0")])
    states = list(rollout(predict, training.roles.as_base(predict), noise, pipeline.schedule(*SIZE, 3)))
    (2.0 * sum(state.loss for state in states) / 3).backward()
    assert measured[:, 0].tolist() == pytest.approx([state.loss.item() for state in states]) and measured[0, 0] > 0
    for gradient, parameter in zip(gradients, training.roles.student_parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_prior_preservation_is_logged_in_the_steps_that_have_it_and_adds_to_the_gradient():
    training, without = ToyTraining(), ToyTraining()
    for one in (training, without):
        one.step()
        one.optimizer.zero_grad()
        one.use_optimizer(torch.optim.SGD, lr=0.0)
    step = make_step(training, [[sample(0)]], 1, prior=PRIOR, prior_every=2)
    plain = make_step(without, [[sample(0)]], 1)
    first, second, third = step(0), step(1), step(2)
    assert first["prior_loss"] > 0 and third["prior_loss"] > 0 and "prior_loss" not in second
    assert {f"prior_loss/state_{number}" for number in (1, 2, 3, 4)} < first.keys()
    assert first["loss"] == plain(0)["loss"] and second["grad_norm"] == pytest.approx(plain(1)["grad_norm"])
    assert first["grad_norm"] != pytest.approx(plain(0)["grad_norm"])


def test_a_prior_loss_that_is_not_finite_is_named():
    training = ToyTraining()
    step = make_step(training, [[sample(0)]], 1, prior=PRIOR)
    step.backpropagate_prior = lambda batch, inputs: torch.full((4, 4), float("nan"))
    with pytest.raises(TrainingDiverged, match="^at step 1 the loss of prior preservation .*is nan"):
        step(0)
    # If the distillation loss is not finite either, prior preservation is not to blame.
    with pytest.raises(TrainingDiverged, match="^at step 1 the loss is nan"):
        step.check_finite(0, float("nan"), 1.0, float("nan"))


def test_training_on_all_states_is_what_it_was():
    """Bit for bit: the loop of the version before states were drawn."""
    training, reference = ToyTraining(), ToyTraining()
    batches = [[sample(0)], [sample(1), sample(2)]]
    make_step(training, batches, 2)(0)
    step = make_step(reference, batches, 2)
    predict, noise_shape = reference.pipeline.predict_velocity, reference.pipeline.latent_shape(*SIZE)
    for batch in step.own_micro_batches(0):
        student, teacher = ToyContexts([]).load(batch.samples)
        states = rollout(
            partial(predict, context=student),
            reference.roles.as_teacher(partial(predict, context=teacher)),
            seeded_noise(noise_shape, [noise_seed(0, one) for one in batch.samples]),
            reference.pipeline.schedule(*SIZE, 4),
        )
        for state in states:
            (state.loss * batch.weight / 4 / 2).backward()
    torch.nn.utils.clip_grad_norm_(reference.roles.student_parameters, 1.0)
    reference.optimizer.step()
    for one, other in zip(training.roles.student_parameters, reference.roles.student_parameters, strict=True):
        assert torch.equal(one, other)


def test_gradients_are_clipped():
    training, reference = ToyTraining(), ToyTraining()
    training.use_optimizer(torch.optim.SGD, lr=1.0)
    metrics = make_step(training, [[sample(0)]], 1, max_grad_norm=1e-3)(0)
    assert metrics["grad_norm"] > 1e-2
    pairs = zip(training.roles.student_parameters, reference.roles.student_parameters, strict=True)
    change = torch.stack([(trained - start).norm() for trained, start in pairs]).norm()
    assert change.item() == pytest.approx(1e-3, rel=1e-2)


def test_the_learning_rate_is_logged_and_then_scheduled():
    training = ToyTraining()
    train_step = make_step(training, [[sample(0)]], 1)
    assert [train_step(step)["lr"] for step in range(3)] == [0.1, 0.05, 0.025]


def test_processes_exchange_gradients_in_the_last_visited_state_of_a_step_only():
    training = ToyTraining()
    train_step = make_step(training, [[sample(0)], [sample(1)], [sample(2)]], 3, num_rollout_steps=4)
    for step in range(2):
        train_step(step)
    assert training.accelerator.num_without_sync == 2 * (3 * 4 - 1)


def test_dropout_depends_on_the_place_in_the_run_alone():
    first, second, later = (make_step(ToyTraining(dropout=0.5), [[sample(0)]], 1, lora_dropout=0.5) for _ in range(3))
    without = make_step(ToyTraining(), [[sample(0)]], 1)
    for train_step in (first, second, later, without):  # lora_B is zero before the first step: dropout has no effect
        train_step(0)
        torch.rand(1)
    losses = first(1)["loss"], second(1)["loss"], later(2)["loss"], without(1)["loss"]
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_each_micro_batch_has_its_own_dropout(monkeypatch):
    train_step = make_step(ToyTraining(dropout=0.5), [[sample(0)], [sample(0)]], 2, lora_dropout=0.5)
    seeds = []
    monkeypatch.setattr("dopsd.step.torch.manual_seed", seeds.append)
    for step in range(2):
        train_step(step)
    assert seeds == [place_seed(0, "dropout", str(place)) for place in range(4)]


# Steps that fail


def test_fewer_than_twenty_skipped_steps_in_a_row_are_no_error():
    num_skipped = 0
    for _ in range(19):
        num_skipped = count_skipped(num_skipped, True)
    assert count_skipped(num_skipped, False) == 0
    with pytest.raises(TrainingDiverged, match="--mixed_precision fp16: gradients overflowed in 20 steps in a row"):
        count_skipped(num_skipped, True)


def test_a_skipped_step_leaves_schedule_and_teacher():
    training = ToyTraining()
    train_step = make_step(training, [[sample(0)]], 1, ema_decay=0.5)
    train_step.optimizer.step_was_skipped = True
    before = [weight.clone() for weight in training.roles.teacher_parameters]
    assert [train_step(step)["lr"] for step in range(2)] == [0.1, 0.1]
    assert all(map(torch.equal, training.roles.teacher_parameters, before))
    train_step.optimizer.step_was_skipped = False
    assert [train_step(step)["lr"] for step in range(2)] == [0.1, 0.05]
    assert not all(map(torch.equal, training.roles.teacher_parameters, before))


def test_a_loss_that_is_not_finite_ends_the_step_before_the_optimizer():
    training = ToyTraining()
    train_step = make_step(training, [[sample(0)]], 1)
    train_step(0)
    before = [weight.clone() for weight in training.roles.student_parameters]
    with torch.no_grad():
        training.pipeline.transformer.linear_in.base_layer.weight.fill_(math.nan)
    with pytest.raises(TrainingDiverged, match="^at step 2 the loss is nan and the gradient norm nan$"):
        train_step(1)
    assert all(map(torch.equal, training.roles.student_parameters, before))


@pytest.mark.parametrize(
    ("loss", "grad_norm", "scaler", "diverged"),
    [
        (1.0, 1.0, None, False),
        (math.nan, 1.0, None, True),
        (1.0, math.inf, None, True),
        (1.0, math.inf, object(), False),  # the gradient scaler skips such a step
        (math.inf, 1.0, object(), True),
    ],
)
def test_what_counts_as_diverged(loss, grad_norm, scaler, diverged):
    train_step = make_step(ToyTraining(scaler=scaler), [], 1)
    if not diverged:
        train_step.check_finite(0, loss, grad_norm)
        return
    with pytest.raises(TrainingDiverged, match=f"at step 1 the loss is {loss:g} and the gradient norm {grad_norm:g}"):
        train_step.check_finite(0, loss, grad_norm)


def test_an_fp16_run_that_finds_no_scale_saves_the_weights_before(tmp_path):
    training = ToyTraining(scaler=torch.amp.GradScaler("cpu"))
    train_step = make_step(training, [[sample(0)]], 1)
    checkpoints: Checkpoints = training.checkpoints(tmp_path)
    train_step.optimizer.step_was_skipped = True
    with pytest.raises(TrainingDiverged) as caught:
        for step in range(100):
            with checkpoints.saved_on_divergence(step, first_step=0):
                train_step(step)
    assert step == MAX_SKIPPED_STEPS - 1 == 19
    message = str(caught.value)
    assert message.startswith("--mixed_precision fp16: gradients overflowed in 20 steps in a row; the")
    assert "; the weights before it are in checkpoint-19; " in message and "\n" not in message
    assert (
        ToyTraining(seed=1, scaler=torch.amp.GradScaler("cpu")).checkpoints(tmp_path).load(tmp_path / "checkpoint-19")
    )


# Roles whose weights come from elsewhere


@pytest.mark.parametrize("elsewhere", [("teacher_is_off_device",), ("teacher_is_off_device", "base_is_off_device")])
def test_a_role_that_comes_from_elsewhere_comes_once_for_all_trained_states(monkeypatch, elsewhere):
    results = []
    for names in ((), elsewhere):
        training = ToyTraining()
        training.step()  # so that student, teacher and base differ
        for name in names:
            setattr(training.roles, name, True)
        entered = {"teacher_role": 0, "base_role": 0}
        for name in entered:
            role = getattr(training.roles, name)

            def counted(name=name, role=role, entered=entered):
                entered[name] += 1
                return role()

            monkeypatch.setattr(training.roles, name, counted)
        batches = [[sample(0), sample(1)]]
        options = {"num_rollout_steps": 3, "num_trained_states": 2, "max_grad_norm": 1e9}
        step = make_step(training, batches, 1, PRIOR, **options)
        batch = MicroBatch(0, batches[0], weight=1.0, has_prior=True)
        inputs, prior = step.inputs.read(batch)
        step.backpropagate(batch, inputs)
        step.backpropagate_prior(batch, prior)
        gradients = [parameter.grad.clone() for parameter in training.roles.student_parameters]
        results.append((gradients, entered))
    (plain, often), (other, once) = results
    assert often == {"teacher_role": 2, "base_role": 2}
    assert once == {"teacher_role": 1, "base_role": 1 if len(elsewhere) == 2 else 2}
    for first, second in zip(plain, other, strict=True):
        torch.testing.assert_close(first, second)
        assert first.abs().sum() > 0
