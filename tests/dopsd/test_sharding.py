"""The transformer's weights in host memory or in pieces, in one process; for two, see test_sharded_runs.py."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dopsd.execution import prepare_transformer
from dopsd.lora_roles import StudentTeacherLoRA, lora_target_modules
from dopsd.rollout import rollout, seeded_noise
from dopsd.sharding import average_gradients, missing_calls, repeated_blocks
from models import both_models
from short_runs import default_settings, one_process


@pytest.fixture
def process_group():
    """Ends the group that sharding starts."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def prepared(model, dtype: torch.dtype, **flags) -> tuple:
    """A pipeline and its roles, whose adapters are random, prepared with these flags."""
    kind = model.script.MODEL
    pipeline = kind.pipeline_class.from_pretrained(model.path, dtype=dtype)
    targets = lora_target_modules(pipeline.transformer, kind.default_settings["lora_layers"])
    roles = StudentTeacherLoRA(pipeline.transformer, targets, rank=4, alpha=8)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in roles.parameters:
            parameter.normal_(std=0.05)
    accelerator = one_process(gather=lambda tensor: tensor)
    prepare_transformer(pipeline.transformer, roles.parameters, default_settings(**flags).performance, accelerator)
    return pipeline, roles


def losses_and_gradients(pipeline, roles) -> list[torch.Tensor]:
    """Of two trained states of four."""
    prompts = "a ball", "a ball, and more words than that"
    student, teacher = (pipeline.encode_student([prompt], max_sequence_length=64) for prompt in prompts)
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0]).to(pipeline.latents_dtype)
    states = rollout(
        partial(pipeline.predict_velocity, context=student),
        roles.as_teacher(partial(pipeline.predict_velocity, context=teacher)),
        noise,
        pipeline.schedule(64, 64, 4),
        trained=[1, 3],
    )
    losses = []
    for state in states:
        state.loss.backward()
        losses.append(state.loss.detach())
    gradients = [parameter.grad for parameter in roles.student_parameters]
    for parameter in roles.student_parameters:
        parameter.grad = None
    return [*losses, *gradients]


def frozen(roles, module: torch.nn.Module) -> list[torch.nn.Parameter]:
    adapters = {*roles.parameters}
    return [parameter for parameter in module.parameters() if parameter not in adapters]


SWITCHES = [
    ("offload_transformer",),
    ("offload_transformer", "gradient_checkpointing"),
    ("fsdp", "gradient_checkpointing", "offload_activations"),
    ("gradient_checkpointing", "offload_activations"),
]


@both_models(quick="flux2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switches", SWITCHES, ids="+".join)
def test_losses_and_gradients_are_those_of_resident_weights(process_group, model, dtype, switches):
    expected = losses_and_gradients(*prepared(model, dtype))
    pipeline, roles = prepared(model, dtype, **dict.fromkeys(switches, True))
    for _ in range(2):
        found = losses_and_gradients(pipeline, roles)
        assert all(map(torch.equal, found, expected))
        sharded = {"fsdp", "offload_transformer"} & {*switches}
        blocks = repeated_blocks(pipeline.transformer)
        assert len(blocks) > 2
        for block in blocks:
            assert all(isinstance(weight, DTensor) == bool(sharded) for weight in frozen(roles, block))
    assert not any(isinstance(parameter, DTensor) for parameter in roles.parameters)


@both_models(quick="zimage")
def test_few_blocks_have_their_weights_at_a_time(process_group, model):
    pipeline, roles = prepared(model, torch.float32, offload_transformer=True)
    blocks = repeated_blocks(pipeline.transformer)
    weights = {block: frozen(roles, block)[0] for block in blocks}  # registered only while the block has no weights
    counts = []

    def count(*_) -> None:
        registered = ({*map(id, frozen(roles, block))} for block in blocks)
        counts.append(sum(id(weights[block]) not in ids for block, ids in zip(blocks, registered, strict=True)))

    for block in blocks:
        next(module for module in block.modules() if isinstance(module, torch.nn.Linear)).register_forward_hook(count)
    losses_and_gradients(pipeline, roles)
    assert len(counts) > len(blocks) and {*counts} == {1}


def test_stored_activations_go_to_host_memory(monkeypatch, model):
    saved = []

    class Recorded(torch.autograd.graph.save_on_cpu):
        def __init__(self, **options):
            super().__init__(**options)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: saved.append(tensor.shape) or pack(tensor)

    monkeypatch.setattr("torch.autograd.graph.save_on_cpu", Recorded)
    pipeline, roles = prepared(model, torch.float32, gradient_checkpointing=True, offload_activations=True)
    losses_and_gradients(pipeline, roles)
    num_blocks = len(repeated_blocks(pipeline.transformer))
    assert len(saved) >= 2 * num_blocks  # two states


# Processes that share weights


def test_processes_make_the_calls_that_they_lack_in_the_order_of_the_others():
    assert missing_calls([0], [[0], [3]]) == [3]
    assert missing_calls([3], [[0], [3]]) == [0]
    assert missing_calls([0, 1], [[0, 1], [1, 3], [0, 2]]) == [1, 1]
    for trained in ([0, 1], [1, 3], [0, 2]):
        extra = missing_calls(trained, [[0, 1], [1, 3], [0, 2]])
        before = [-1, *trained]
        calls = [state - before[index] - 1 + extra[index] for index, state in enumerate(trained)]
        assert calls == [1, 1]


def test_gradients_are_averaged(process_group):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for parameter in parameters[:2]:
        parameter.grad = torch.tensor([2.0, 4.0])
    average_gradients(parameters, 2)
    assert [parameter.grad if parameter.grad is None else parameter.grad.tolist() for parameter in parameters] == [
        [1.0, 2.0],
        [1.0, 2.0],
        None,
    ]
