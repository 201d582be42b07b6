"""Whole weights as roles: compared with plain models of their own, on tiny real transformers."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from diffusers import Flux2Transformer2DModel
from torch import nn

from dopsd.errors import InputError
from dopsd.execution import prepare_transformer
from dopsd.optimizers import build_optimizer
from dopsd.pretrained import transformer_skeleton
from dopsd.rollout import rollout, seeded_noise
from dopsd.weight_copies import WeightCopy
from dopsd.weight_roles import StudentTeacherWeights, freeze_others, trained_weights
from models import ONE_MODEL, both_models
from short_runs import default_settings, one_process


CPU = torch.device("cpu")
STEPS, RATE, DECAY = 3, 1e-3, 0.5


@pytest.fixture
def process_group():
    """Ends the group that sharding starts."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def load(model, dtype: torch.dtype):
    return model.script.MODEL.pipeline_class.from_pretrained(model.path, dtype=dtype)


def make_roles(transformer: nn.Module, trainable_modules: str | None = None, **options) -> StudentTeacherWeights:
    freeze_others(transformer, trained_weights(transformer, trainable_modules))
    return StudentTeacherWeights(transformer, **{"ema_device": CPU, "base_device": CPU} | options)


def states_of(pipeline, student, teacher):
    """A rollout of four states, of which the second and the last are trained."""
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0]).to(pipeline.latents_dtype)
    return rollout(student, teacher, noise, pipeline.schedule(64, 64, 4), trained=[1, 3])


def contexts_of(pipeline):
    prompts = "a ball", "a ball, and more words than that"
    return [pipeline.encode_student([prompt], max_sequence_length=64) for prompt in prompts]


class TwoModels:
    """The reference: a student, a teacher and the base as three models, and a plain optimizer on float32 weights."""

    def __init__(self, model, dtype: torch.dtype):
        self.student, self.teacher, self.base = (load(model, dtype) for _ in range(3))
        self.weights = list(self.student.transformer.parameters())
        self.masters = [nn.Parameter(weight.detach().float().clone()) for weight in self.weights]
        self.average = [master.detach().clone() for master in self.masters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=RATE, weight_decay=0.0)

    def step(self) -> list[torch.Tensor]:
        student, teacher = contexts_of(self.student)
        frozen = torch.no_grad()(partial(self.teacher.predict_velocity, context=teacher))
        losses = []
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        states = states_of(self.student, partial(self.student.predict_velocity, context=student), frozen)
        for state in states:
            state.loss.backward()
            losses.append(state.loss.detach())
            for weight, master in zip(self.weights, self.masters, strict=True):
                if weight.grad is not None:
                    master.grad += weight.grad.float()
                weight.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for weight, master, average, other in zip(
                self.weights, self.masters, self.average, self.teacher.transformer.parameters(), strict=True
            ):
                weight.copy_(master)
                average.lerp_(master, 1 - DECAY)
                other.copy_(average)
        return losses


def step_of(pipeline, roles, optimizer) -> list[torch.Tensor]:
    student, teacher = contexts_of(pipeline)
    losses = []
    states = states_of(
        pipeline,
        partial(pipeline.predict_velocity, context=student),
        roles.as_teacher(partial(pipeline.predict_velocity, context=teacher)),
    )
    for state in states:
        state.loss.backward()
        losses.append(state.loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    roles.after_optimizer_step(DECAY)
    return losses


@both_models(quick="flux2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switch", [None, "gradient_checkpointing", "offload_transformer"])
def test_steps_equal_those_of_separate_models(process_group, model, dtype, switch):
    """float32 swaps pointers, bfloat16 streams the float32 average block by block, a sharded model copies."""
    reference, pipeline = TwoModels(model, dtype), load(model, dtype)
    settings = default_settings(**({switch: True} if switch else {}))
    freeze_others(pipeline.transformer, trained_weights(pipeline.transformer, None))
    prepare_transformer(pipeline.transformer, None, settings.performance, one_process(gather=lambda tensor: tensor))
    roles = StudentTeacherWeights(pipeline.transformer, ema_device=CPU, base_device=CPU)
    optimizer = torch.optim.AdamW(roles.student_parameters, lr=RATE, weight_decay=0.0)
    for _ in range(STEPS):
        for own, expected in zip(step_of(pipeline, roles, optimizer), reference.step(), strict=True):
            torch.testing.assert_close(own, expected, rtol=0, atol=0)
    student, teacher = contexts_of(pipeline)
    noise = seeded_noise(pipeline.latent_shape(64, 64), [1]).to(pipeline.latents_dtype)
    time = pipeline.schedule(64, 64, 4).timesteps[2]
    for role, expected in (
        (roles.teacher_role, reference.teacher),
        (roles.base_role, reference.base),
        (lambda: roles.shipped_role(dtype), reference.student),
    ):
        with role():
            own = pipeline.predict_velocity(noise, time, student)
        with torch.no_grad():
            assert torch.equal(own, expected.predict_velocity(noise, time, student))
    for own, expected in zip(roles.ema.values(), reference.average, strict=True):
        whole = own.full_tensor() if hasattr(own, "full_tensor") else own
        assert whole.dtype == torch.float32 and torch.equal(whole, expected)


def test_the_average_moves_in_bfloat16_training_as_it_does_in_float64():
    """Kept in bfloat16, it would not: steps of 1e-4 of a difference are below its precision."""
    layer = nn.Linear(8, 8, bias=False).bfloat16()
    roles = make_roles(layer)
    expected = layer.weight.detach().double()
    with torch.no_grad():
        roles.trained["weight"].add_(0.5)
    for _ in range(1000):
        roles.after_optimizer_step(0.9999)
        expected.lerp_(roles.trained["weight"].detach().double(), 1e-4)
    moved = (expected - layer.weight.double() + 0.5).abs().mean()
    assert moved > 0.04
    torch.testing.assert_close(roles.ema["weight"].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rounding", ["master_weights", "stochastic_rounding"])
def test_small_steps_are_not_lost_in_bfloat16(rounding):
    """1,000 steps of 1e-4 on weights of 1, whose next bfloat16 neighbours are 4e-3 and 8e-3 away."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.ones_(layer.weight)
    roles = make_roles(layer, has_master_weights=rounding == "master_weights")
    settings = default_settings(learning_rate=1e-4, bf16_update=rounding, train_mode="full")
    optimizer = build_optimizer(settings.optimizer, roles.student_parameters, 1, is_full=True)
    for _ in range(1000):
        layer(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        roles.after_optimizer_step(0.9999)
    assert layer.weight.dtype == torch.bfloat16
    assert abs(layer.weight.float().mean().item() - 0.9) < 0.01


@ONE_MODEL
def test_only_what_is_selected_is_trained_and_copied(model):
    pipeline = load(model, torch.bfloat16)
    roles = make_roles(pipeline.transformer, "attn.to_q,norm_out")
    names = set(roles.trained)
    assert names and all(".attn.to_q." in name or name.startswith("norm_out.") for name in names)
    assert set(roles.ema) == names and {name.split(".", 1)[1] for name in roles.state_dict()} == names
    student, _ = contexts_of(pipeline)
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0]).to(torch.bfloat16)
    pipeline.predict_velocity(noise, torch.tensor(500.0), student).float().square().mean().backward()
    assert all(master.grad is not None and master.grad.dtype == torch.float32 for master in roles.trained.values())
    assert all(weight.grad is None for weight in pipeline.transformer.parameters())
    others = [weight for name, weight in pipeline.transformer.named_parameters() if name not in names]
    assert others and not any(weight.requires_grad for weight in others)


@pytest.mark.parametrize(
    ("selection", "problem"),
    [("to_nothing", "matches no module"), ("(", "not a valid regular expression"), ("none.*", "matches no module")],
)
def test_a_selection_without_weights_is_refused(klein_path, selection, problem):
    skeleton = transformer_skeleton(Flux2Transformer2DModel, klein_path)
    with pytest.raises(InputError, match=problem) as caught:
        trained_weights(skeleton, selection)
    assert str(caught.value).startswith(f"--trainable_modules {selection}")


@ONE_MODEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_in_a_role_leaves_the_student(model, dtype):
    pipeline = load(model, dtype)
    transformer = pipeline.transformer
    roles = make_roles(transformer)
    before = copy.deepcopy(transformer.state_dict())
    with torch.no_grad():
        for average in roles.ema.values():
            average.normal_()
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0]).to(dtype)
    student, _ = contexts_of(pipeline)

    def fail(*_):
        raise ArithmeticError

    handle = transformer.single_transformer_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError), roles.teacher_role():
        pipeline.predict_velocity(noise, torch.tensor(500.0), student)
    handle.remove()
    assert all(torch.equal(before[name], weight) for name, weight in transformer.state_dict().items())


@ONE_MODEL
def test_streaming_brings_one_block_at_a_time(model):
    """Elsewhere in the transformer, the block's weights are the student's."""
    pipeline = load(model, torch.bfloat16)
    transformer = pipeline.transformer
    weights = dict(transformer.named_parameters())
    other = WeightCopy(transformer, weights, device=CPU, dtype=torch.float32)
    own = {name: weight.data_ptr() for name, weight in weights.items()}
    in_blocks = [
        [name for name, weight in weights.items() if any(weight is one for one, _ in swaps)]
        for _, swaps in other.blocks
    ]
    seen = []
    for block, _ in other.blocks:
        block.register_forward_hook(
            lambda *_: seen.append(
                [any(weights[name].data_ptr() != own[name] for name in names) for names in in_blocks]
            )
        )
    student, _ = contexts_of(pipeline)
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0]).to(torch.bfloat16)
    with torch.no_grad(), other.in_place():
        pipeline.predict_velocity(noise, torch.tensor(500.0), student)
    assert len(seen) == len(in_blocks) > 2
    assert all(changed == [index == place for place in range(len(in_blocks))] for index, changed in enumerate(seen))
    assert all(weights[name].data_ptr() == pointer for name, pointer in own.items())
