"""LoRA arithmetic in place against peft's own: values, gradients, memory, bases that are not plain linear layers."""

from collections import Counter, defaultdict

import bitsandbytes
import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dopsd.adapted_linear import AdaptedLinear
from dopsd.lora_roles import StudentTeacherLoRA, adapter_options
from dopsd.rollout import rollout, seeded_noise
from dopsd.settings import LoRASettings


def randomise(parameters, std):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


# The models


class Training:
    """A tiny model whose layers compute in place or as peft does."""

    def __init__(self, model, picture, dtype=torch.float32, **lora):
        torch.manual_seed(0)
        self.pipeline = model.script.MODEL.pipeline_class.from_pretrained(model.path)
        self.student_context = self.pipeline.encode_student(["a ball"], max_sequence_length=64)
        self.teacher_context = model.teacher_context(picture)
        self.transformer = self.pipeline.to(dtype).transformer
        layers = LoRASettings(lora_layers=model.script.MODEL.default_settings["lora_layers"], **lora)
        self.roles = StudentTeacherLoRA(self.transformer, **adapter_options(layers, self.transformer))
        randomise(self.roles.student_parameters + self.roles.teacher_parameters, std=0.1)
        self.dtype = dtype

    def velocities(self, *, peft: bool) -> dict[str, torch.Tensor]:
        """What each role predicts, and the gradients of the distillation loss at two states."""
        for layer in self.layers:
            layer.peft_arithmetic = peft
        for parameter in self.roles.student_parameters:
            parameter.grad = None
        roles, predict = self.roles, self.pipeline.predict_velocity
        student_context, teacher_context = (c.to(self.dtype) for c in (self.student_context, self.teacher_context))
        noise = seeded_noise(self.pipeline.latent_shape(64, 64), [0]).to(self.pipeline.latents_dtype)
        schedule = self.pipeline.schedule(64, 64, 2)
        results = {}
        with roles.base_role():
            results["base"] = predict(noise, schedule.timesteps[0], student_context)
        torch.manual_seed(0)
        states = rollout(
            lambda x, t: predict(x, t, student_context),
            roles.as_teacher(lambda x, t: predict(x, t, teacher_context)),
            noise,
            schedule,
        )
        for state in states:
            state.loss.backward()
            results[f"student {state.index}"] = state.student_velocity.detach()
            results[f"teacher {state.index}"] = state.teacher_velocity
        return results | {f"gradient of {n}": p.grad for n, p in roles.named_parameters("default").items()}

    @property
    def layers(self) -> list[AdaptedLinear]:
        return [module for module in self.transformer.modules() if isinstance(module, AdaptedLinear)]


@pytest.fixture
def training(model, make_picture):
    def make(**settings) -> Training:
        return Training(model, make_picture(1), **settings)

    return make


# Rank and alpha need not be powers of two, only their ratio.
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize(
    "lora",
    [{"lora_alpha": 6.0}, {"lora_alpha": 24.0}, {"lora_alpha": 3.0, "lora_dropout": 0.3}],
    ids=["scale 1", "scale 4", "dropout"],
)
def test_float32_velocities_and_gradients_are_pefts_bit_for_bit(training, lora, checkpointing):
    training = training(rank=6, **lora)
    if checkpointing:
        training.transformer.enable_gradient_checkpointing()
    expected, results = training.velocities(peft=True), training.velocities(peft=False)
    assert [name for name in results if not torch.equal(results[name], expected[name])] == []
    assert all(grad.abs().max() > 0 for name, grad in results.items() if "lora_B" in name)
    assert not torch.equal(results["student 0"], results["base"])


def test_float32_differs_by_the_rounding_of_the_scaled_update_if_the_scale_is_no_power_of_two(training):
    training = training(rank=3, lora_alpha=5.0)
    expected, results = training.velocities(peft=True), training.velocities(peft=False)
    assert torch.equal(results["base"], expected["base"])
    for name, result in results.items():
        assert (result - expected[name]).norm() <= 2e-6 * expected[name].norm(), name


def test_bfloat16_velocities_differ_from_pefts_by_rounding(training):
    training = training(rank=3, lora_alpha=5.0, dtype=torch.bfloat16)
    expected, results = training.velocities(peft=True), training.velocities(peft=False)
    assert torch.equal(results["base"], expected["base"])
    for name in ("student 0", "teacher 0"):
        assert 0 < (results[name] - expected[name]).norm() < 0.01 * expected[name].norm(), name


# One layer


TOKENS, WIDTH, OUT = (2, 40), 64, 96


def make_layer(base: nn.Module | None = None, *, dropout: float = 0.0, rank: int = 6, alpha: float = 10.0):
    """A layer whose adapter "default" is random and "teacher" zero."""
    torch.manual_seed(0)
    base = (base or nn.Linear(WIDTH, OUT, bias=False)).requires_grad_(False)
    options = {
        "r": rank,
        "lora_alpha": alpha,
        "config": LoraConfig(lora_dropout=dropout, init_lora_weights="gaussian"),
    }
    layer = AdaptedLinear(base, "default", **options)
    layer.update_layer("teacher", **options)
    layer.store_in_float32()
    nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    layer.set_adapter("default")
    return layer


def forward_and_backward(layer, x: torch.Tensor, grad: torch.Tensor, *, peft: bool) -> dict[str, torch.Tensor]:
    layer.peft_arithmetic = peft
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    output = layer(x)
    weights = {f"lora_{letter}": getattr(layer, f"lora_{letter}")["default"].weight for letter in "AB"}
    gradients = torch.autograd.grad(output, [x, *weights.values()], grad)
    return {"output": output.detach()} | dict(zip(["x", *weights], gradients, strict=True))


def inputs(*shape: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(*(shape or TOKENS), width, generator=generator).to(dtype) for width in (WIDTH, OUT)]


def test_bfloat16_output_and_gradients_are_as_close_to_the_float32_ones_as_pefts():
    layer = make_layer(rank=48, alpha=80.0)
    layer.base_layer.bfloat16()
    x, grad = inputs(2, 600, dtype=torch.bfloat16)
    ours, pefts = (forward_and_backward(layer, x, grad, peft=peft) for peft in (False, True))
    layer.base_layer.float()
    exact = forward_and_backward(layer, x.float(), grad.float(), peft=True)

    def error(result: torch.Tensor, name: str) -> float:
        return ((result.float() - exact[name]).norm() / exact[name].norm()).item()

    assert {name: result.dtype for name, result in ours.items()} == {name: r.dtype for name, r in pefts.items()}
    for name in exact:
        assert error(ours[name], name) < 1.05 * error(pefts[name], name) < 0.004, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "part of a sequence", "one token each", "channels first"])
def test_inputs_of_any_layout_and_biases(layout, bias, dropout):
    layer = make_layer(nn.Linear(WIDTH, OUT, bias=bias), dropout=dropout, alpha=12.0)
    x, grad = inputs()
    if layout == "part of a sequence":
        x = torch.cat([x, x], 1)[:, 20:60]
    elif layout == "one token each":
        x, grad = x[:, 0], grad[:, 0]
    elif layout == "channels first":
        x, grad = (tensor.reshape(2, 8, 5, -1) for tensor in (x, grad))
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    ours, pefts = (forward_and_backward(layer, x, grad, peft=peft) for peft in (False, True))
    torch.testing.assert_close(ours, pefts, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer.set_adapter("teacher")
        assert torch.equal(layer(x), layer.base_layer(x))


class Allocations(TorchDispatchMode):
    """Counts new storages by their number of elements."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata: tensor for tensor in known}
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self.known[tensor.untyped_storage()._cdata] = tensor  # alive, so that no storage takes its place
                self.counts[tensor.untyped_storage().nbytes() // tensor.element_size()] += 1
        return result


def test_the_adapter_makes_no_tensor_of_the_outputs_size():
    layer = make_layer()
    x, grad = inputs()
    x.requires_grad_()
    counts = {}
    for name in ("base", "ours", "pefts"):
        layer.enable_adapters(name != "base")
        layer.peft_arithmetic = name == "pefts"
        with Allocations(x, grad, *layer.parameters()) as forward:
            output = layer(x)
        with Allocations(output, grad, *layer.parameters(), *forward.known.values()) as backward:
            output.backward(grad)
        counts[name] = forward.counts[output.numel()], backward.counts[output.numel()]
    assert counts == {"base": (1, 0), "ours": (1, 0), "pefts": (4, 1)}


def test_flops_are_counted():
    layer = make_layer()
    x, _ = inputs()
    counts = []
    for layer.peft_arithmetic in (False, True):
        with FlopCounterMode(display=False) as counter:
            layer(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 80 * (WIDTH * OUT + 6 * (WIDTH + OUT))


def test_layers_that_read_one_tensor_keep_it_once(model, make_picture):
    """In bfloat16 and with two samples, where a layer might cast or copy its input."""
    training = Training(model, make_picture(1), rank=4, lora_alpha=5.0, dtype=torch.bfloat16)
    readers = defaultdict(list)  # names and kept tensors of the layers, by their input

    def record(name: str, layer: AdaptedLinear) -> None:
        forward = layer.forward

        def recorded(x):
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
                output = forward(x)
            weights = {parameter.data_ptr() for parameter in layer.parameters()}
            kept = {tensor.data_ptr() for tensor in saved if tensor.numel() == x.numel()} - weights
            readers[x].append((name.rpartition(".")[2], kept))
            return output

        layer.forward = recorded

    for name, layer in training.transformer.named_modules():
        if isinstance(layer, AdaptedLinear):
            record(name, layer)
    pipeline = training.pipeline
    context = pipeline.encode_student(["a ball", "a box"], max_sequence_length=64)
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0, 1]).to(pipeline.latents_dtype)
    pipeline.predict_velocity(noise, pipeline.schedule(64, 64, 2).timesteps[0], context)
    groups = {tuple(name for name, _ in layers) for layers in readers.values()}
    assert ("to_q", "to_k", "to_v") in groups
    for x, layers in readers.items():
        if len(layers) > 1:
            assert all(kept == {x.data_ptr()} for _, kept in layers), layers


# Bases that are not plain linear layers


class ViewOfLinear(torch.autograd.Function):
    """Returns a view, as bitsandbytes' 8-bit product does for some shapes. Autograd forbids changing it in place."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return (x @ weight.T)[:]

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None


class QuantizedLinear(nn.Linear):
    def forward(self, x):
        return ViewOfLinear.apply(x, self.weight)


def bitsandbytes_linear(kind: type[nn.Module], weight: type[nn.Parameter], **options) -> nn.Module:
    layer = kind(WIDTH, OUT, bias=False, **options)
    data = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(3)) * WIDTH**-0.5
    layer.weight = weight(data, requires_grad=False, **({"has_fp16_weights": False} if "threshold" in options else {}))
    return layer.to("cpu")


BASES = {
    "view": lambda: QuantizedLinear(WIDTH, OUT, bias=False),
    "4 bits": lambda: bitsandbytes_linear(bitsandbytes.nn.LinearNF4, bitsandbytes.nn.Params4bit),
    "8 bits": lambda: bitsandbytes_linear(
        bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Int8Params, threshold=6.0, has_fp16_weights=False
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_the_update_of_a_base_that_may_return_a_view_is_added_out_of_place(base, dtype):
    base = BASES[base]()
    if type(base) is QuantizedLinear:
        base.to(dtype)
    layer = make_layer(base, alpha=12.0)
    x, grad = inputs(dtype=dtype)
    expected = forward_and_backward(layer, x, grad, peft=True)
    for name, result in forward_and_backward(layer, x, grad, peft=False).items():
        difference = (result - expected[name]).norm() / expected[name].norm()
        assert difference <= (1e-6 if dtype == torch.float32 else 0.01), name


# Compilation


def test_each_role_is_one_graph_that_switching_does_not_compile_again():
    layer = make_layer()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x, grad = inputs()

    def roles(call) -> list[torch.Tensor]:
        layer.set_adapter("teacher", inference_mode=True)
        with torch.no_grad():
            teacher = call(x)
            layer.enable_adapters(False)
            base = call(x)
            layer.enable_adapters(True)
        layer.set_adapter("default")
        student = call(x)
        return [
            teacher,
            base,
            student,
            *torch.autograd.grad(student, list(layer.lora_A["default"].parameters()), grad),
        ]

    expected = roles(layer)
    for _ in range(3):
        for result, value in zip(roles(compiled), expected, strict=True):
            torch.testing.assert_close(result, value)
    assert counter.frame_count == 3
