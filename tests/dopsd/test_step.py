import math
from types import SimpleNamespace

import pytest
import torch

from dopsd.checkpoints import Checkpoints
from dopsd.data.order import Sample, noise_seed, place_seed
from dopsd.errors import TrainingDiverged
from dopsd.rollout import rollout, seeded_noise
from dopsd.settings import (
    DataSettings,
    DistillationSettings,
    LoRASettings,
    ModelSettings,
    OptimizerSettings,
    PublishingSettings,
    Settings,
    TeacherSettings,
    TrainingSettings,
    ValidationSettings,
)
from dopsd.step import MAX_SKIPPED_STEPS, StudentVelocity, TrainingStep, count_skipped
from toy_pipeline import ToyContext
from toy_training import AccumulatingOptimizer, ToyTraining, accumulating_accelerator


SIZE = (64, 32)  # height, width in pixels


class ToyContexts:
    """Contexts of captions 0, 1, ...; the teacher also sees a picture. Each batch of the order is one micro-batch."""

    def __init__(self, batches: list[list[Sample]]):
        self.data = SimpleNamespace(
            bucket=lambda sample: SIZE, order=SimpleNamespace(batch=lambda place: batches[place % len(batches)])
        )

    def load(self, samples: list[Sample]) -> tuple[ToyContext, ToyContext]:
        prompts = seeded_noise((16,), [sample.example for sample in samples])
        pictures = seeded_noise((3, SIZE[0] // 16, SIZE[1] // 16), [100 + sample.example for sample in samples])
        return ToyContext(prompts), ToyContext(prompts, pictures)


def make_settings(**flags) -> Settings:
    groups = [ModelSettings(), DataSettings(), TeacherSettings(), DistillationSettings(), ValidationSettings()]
    groups += [LoRASettings(), TrainingSettings(), PublishingSettings(), OptimizerSettings()]
    return Settings(*groups).replace(seed=0, **flags)


def make_step(training: ToyTraining, batches: list[list[Sample]], accumulation_steps: int, **flags) -> TrainingStep:
    training.accelerator = accumulating_accelerator(accumulation_steps, training.accelerator.scaler)
    return TrainingStep(
        make_settings(gradient_accumulation_steps=accumulation_steps, **flags),
        training.accelerator,
        pipeline=training.pipeline,
        roles=training.roles,
        contexts=ToyContexts(batches),
        student=StudentVelocity(training.pipeline),
        optimizer=AccumulatingOptimizer(training.optimizer, training.accelerator),
        lr_scheduler=training.lr_scheduler,
    )


def sample(example: int) -> Sample:
    return Sample(example, epoch=0, caption=0, flip=False)


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
