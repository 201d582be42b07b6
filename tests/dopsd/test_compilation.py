from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import train_dopsd_flux2
import train_dopsd_zimage
from dopsd import compilation
from dopsd.compilation import CompiledBlocks
from dopsd.errors import InputError
from dopsd.execution import prepare_transformer
from dopsd.lora_roles import StudentTeacherLoRA, lora_target_modules
from dopsd.settings import PerformanceSettings
from models import NEEDS_COMPILER
from pipelines.flux2_klein import KleinContext
from pipelines.z_image import ZImageContext
from short_runs import one_process


class Gate(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x + scale * self.linear(x).tanh()


class Mixer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return x + torch.softmax(self.linear(x) @ context.mT, dim=-1) @ context


class Stack(nn.Module):
    """A transformer as far as compiling goes: two blocks of each of two classes, x (B, S, 8), context (B, L, 8)."""

    _repeated_blocks = ["Gate", "Mixer"]

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gates = nn.ModuleList(Gate(8) for _ in range(2))
        self.mixers = nn.ModuleList(Mixer(8) for _ in range(2))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for gate in self.gates:
            x = gate(x, context.mean())
        for mixer in self.mixers:
            x = mixer(x, context)
        return x


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def inputs(batch: int = 1, tokens: int = 5, text: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(batch, tokens, 8, generator=generator), torch.randn(batch, text, 8, generator=generator)


def gradients(model: nn.Module, *arguments: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradient of every weight, which is left at zero."""
    output = model(*arguments)
    output.square().sum().backward()
    found = [output.detach(), *(parameter.grad for parameter in model.parameters())]
    model.zero_grad(set_to_none=True)
    return found


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dopsd.compilation"]


def test_a_class_of_blocks_has_one_graph_whatever_the_sizes():
    model = Stack()
    blocks = CompiledBlocks(model, backend="eager")
    assert blocks.num_classes == 2 and blocks.num_graphs == 0
    # The first sizes are equal: they must not become one symbol.
    for tokens, text in [(7, 7), (5, 3), (4, 6), (9, 8), (6, 6)]:
        with torch.no_grad():
            assert_equal([model(*inputs(tokens=tokens, text=text))], [Stack()(*inputs(tokens=tokens, text=text))])
    assert blocks.num_graphs == 2
    for tokens in (5, 6):
        assert_equal(gradients(model, *inputs(tokens=tokens)), gradients(Stack(), *inputs(tokens=tokens)))
    # An input without a gradient comes to the first block only.
    assert blocks.num_graphs == 5
    for batch in (2, 3):
        with torch.no_grad():
            model(*inputs(batch))
    assert blocks.num_graphs == 7 and blocks.seconds > 0


def test_the_number_of_graphs_is_logged_after_a_step_without_a_new_one(caplog):
    caplog.set_level("INFO")
    model = Stack().requires_grad_(False)
    blocks = CompiledBlocks(model, backend="eager")
    for batch, lines in ((1, 0), (1, 1), (1, 1), (2, 1), (2, 2), (1, 2)):
        model(*inputs(batch))
        blocks.report()
        assert len(messages(caplog)) == lines
    assert messages(caplog)[1].startswith("[RANK 0] Compiled 4 graphs for 2 block classes in ")


def fail(graph, example_inputs):
    raise RuntimeError("no compiler\nat all")


def fails_on(operator: str, compile_graph):
    """Compiles only graphs without this operator."""

    def compile_or_fail(graph, example_inputs):
        names = [str(node.target) for node in graph.graph.nodes]
        return (fail if any(operator in name for name in names) else compile_graph)(graph, example_inputs)

    return compile_or_fail


FAILURES = {
    "first": fail,
    "second class": fails_on("softmax", lambda graph, example_inputs: graph.forward),
    "backward": aot_autograd(fw_compiler=lambda graph, example_inputs: graph.forward, bw_compiler=fail),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_compiler_that_fails_is_one_line_and_changes_nothing(name, caplog):
    model = Stack()
    blocks = CompiledBlocks(model, backend=FAILURES[name])
    expected = gradients(Stack(), *inputs())
    assert_equal(gradients(model, *inputs()), expected)
    (message,) = messages(caplog)
    assert message.startswith("[RANK 0] --compile: the compiler failed (") and "no compiler at all" in message
    assert message.endswith("); the run goes on without it")
    num_graphs = blocks.num_graphs
    assert blocks.is_stopped and not any("forward" in vars(block) for block in blocks.blocks)
    assert_equal(gradients(model, *inputs()), expected)
    assert blocks.num_graphs == num_graphs and len(messages(caplog)) == 1


def test_too_many_graphs_are_no_silent_fallback(monkeypatch, caplog):
    monkeypatch.setattr(compilation, "MAX_GRAPHS_PER_CLASS", 1)
    model = Stack().requires_grad_(False)
    blocks = CompiledBlocks(model, backend="eager")
    model(*inputs(1))
    assert not blocks.is_stopped
    assert_equal([model(*inputs(2))], [Stack()(*inputs(2)).detach()])
    assert blocks.is_stopped and len(messages(caplog)) == 1


def test_a_model_without_repeated_blocks_is_one_line():
    model = Stack()
    model._repeated_blocks = []
    with pytest.raises(InputError, match="--compile: Stack has no repeated blocks; drop the flag"):
        CompiledBlocks(model)


# The real transformers


def random_contexts(model, pipeline, size: tuple[int, int], batch: int, generator: torch.Generator) -> list:
    """Contexts of student and teacher; the teacher's is longer."""
    draw = partial(torch.randn, generator=generator)
    if model.script is train_dopsd_zimage:
        # Prompts of different lengths, so that a batch has a mask.
        return [ZImageContext(tuple(draw(length + 40 * n, 32) for n in range(batch))) for length in (20, 60)]
    reference = draw(batch, *pipeline.latent_shape(*size))
    return [KleinContext(draw(batch, 20, 96)), KleinContext(draw(batch, 20, 96), (reference,))]


def predict(model, pipeline, roles, size: tuple[int, int], batch: int, seed: int) -> list[torch.Tensor]:
    """Velocities of teacher, base and student, and the student's gradients."""
    generator = torch.Generator().manual_seed(seed)
    latents, timestep = torch.randn(batch, *pipeline.latent_shape(*size), generator=generator), torch.tensor(700.0)
    student, teacher = random_contexts(model, pipeline, size, batch, generator)
    found = [
        roles.as_teacher(pipeline.predict_velocity)(latents, timestep, teacher),
        roles.as_base(pipeline.predict_velocity)(latents, timestep, student),
        pipeline.predict_velocity(latents, timestep, student),
    ]
    (found[0] - found[2]).square().mean().backward()
    found += [parameter.grad for parameter in roles.student_parameters]
    for parameter in roles.student_parameters:
        parameter.grad = None
    return [tensor.detach() for tensor in found]


# Fewer adapted layers are traced faster.
LORA_LAYERS = {
    train_dopsd_flux2: r"transformer_blocks\.\d+\.attn\.to_q|single_transformer_blocks\.\d+\.attn\.to_out",
    train_dopsd_zimage: "to_q,w2",
}


def make_roles(model, **settings):
    """The tiny pipeline, its roles with random adapters, and its compiled blocks if there are any."""
    pipeline = model.script.MODEL.pipeline_class.from_pretrained(model.path, dtype=torch.float32)
    targets = lora_target_modules(pipeline.transformer, LORA_LAYERS[model.script])
    roles = StudentTeacherLoRA(pipeline.transformer, targets, rank=4, alpha=8)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [*roles.student_parameters, *roles.teacher_parameters]:
            parameter.normal_(std=0.1, generator=generator)
    compiled = prepare_transformer(
        pipeline.transformer, roles.parameters, PerformanceSettings(**settings), one_process()
    )
    return pipeline, roles, compiled


# (height, width), batch size
SIZES = [((64, 64), 1), ((64, 128), 1), ((112, 64), 1), ((64, 64), 2), ((96, 64), 2)]


@pytest.mark.exhaustive
@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("model", "gradient_checkpointing"),
    [
        ("flux2", True),
        ("flux2", False),
        ("zimage", True),
        ("zimage", False),
    ],
    indirect=["model"],
)
def test_velocities_and_gradients_are_those_without_the_compiler(model, gradient_checkpointing):
    pipeline, roles, compiled = make_roles(model, compile=True, gradient_checkpointing=gradient_checkpointing)
    other_pipeline, other_roles, _ = make_roles(model, gradient_checkpointing=gradient_checkpointing)
    # Batches double the time. Only Z-Image masks them.
    sizes = SIZES if model.script is train_dopsd_zimage else SIZES[:3]
    counts = []
    for seed in range(2):
        for size, batch in sizes:
            found = predict(model, pipeline, roles, size, batch, seed)
            expected = predict(model, other_pipeline, other_roles, size, batch, seed)
            for one, other in zip(found, expected, strict=True):
                assert other.abs().sum() > 0
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            counts.append((batch, compiled.num_graphs))
    assert not compiled.is_stopped
    # The first sample and the first batch compile; no other size and no second epoch does.
    first = counts[0][1]
    assert set(counts[: len(sizes)]) == {(batch, batch * first) for _, batch in sizes} and first <= 10
    assert {count for _, count in counts[len(sizes) :]} == {counts[-1][1]} == {max(count for _, count in counts)}
