"""The frozen base in fewer bits: what is quantized, that training is exact on it, and how far encodings move."""

import sys

import diffusers
import psutil
import pytest
import torch
import transformers
from torch import nn

from dopsd.command_line import hide_torchao, parse_settings
from dopsd.context_cache import checkpoint_fingerprint
from dopsd.errors import InputError
from dopsd.lora_roles import StudentTeacherLoRA, adapter_options
from dopsd.pretrained import check_pretrained, encoder_fingerprints, load_skeleton, load_transformer
from dopsd.quantization import (
    QuantizedLinear,
    check_quantization,
    read_quantization_settings,
    text_encoder_quantization,
    transformer_quantization,
    unquantized_modules,
)
from dopsd.rollout import seeded_noise
from models import ONE_MODEL
from short_runs import as_arguments


@pytest.fixture
def settings(model):
    """Settings of the model with its checkpoint and other flags."""

    def make(**flags):
        flags = {"pretrained_model_name_or_path": model.path, "report_to": "none"} | flags
        return parse_settings(model.script.MODEL, "", as_arguments(flags))

    return make


@pytest.fixture
def load(model, settings):
    """Loads the transformer as a run does: (kind, dtype) -> transformer."""

    def call(kind, dtype=torch.float32):
        return load_transformer(model.script.MODEL, settings(quantize=kind).model, dtype)

    return call


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def dequantize(transformer: nn.Module) -> nn.Module:
    """Puts the dequantized weights into ordinary linear layers, in place."""
    for module in transformer.modules():
        if isinstance(module, QuantizedLinear):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
            module.__class__ = nn.Linear
    return transformer


class Trained:
    """One forward and backward pass of a student on a transformer, from fixed noise."""

    def __init__(self, model, settings, transformer, dtype=torch.float32, checkpointing=False):
        kind = model.script.MODEL
        self.pipeline = kind.pipeline_class.from_pretrained(model.path, transformer=transformer, dtype=dtype)
        options = adapter_options(settings(rank=4).lora, load_skeleton(kind, settings().model))
        torch.manual_seed(0)
        self.roles = StudentTeacherLoRA(transformer, **options)
        with torch.no_grad():
            for parameter in self.roles.student_parameters:
                parameter.add_(0.05 * torch.randn(parameter.shape))
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        self.context = self.pipeline.encode_student(["a ball"], max_sequence_length=64)
        noise = seeded_noise(self.pipeline.latent_shape(64, 64), [0]).to(self.pipeline.latents_dtype)
        timestep = self.pipeline.schedule(64, 64, 4).timesteps[1]
        self.kept = {}

        def keep(tensor):
            self.kept[id(tensor)] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.velocity = self.pipeline.predict_velocity(noise, timestep, self.context)
        self.velocity.square().mean().backward()
        self.gradients = [parameter.grad for parameter in self.roles.student_parameters]


# Which layers


def test_the_layers_of_the_blocks_are_quantized_and_sensitive_ones_are_not(model, settings, load):
    transformer = load("int8")
    kept = unquantized_modules(load_skeleton(model.script.MODEL, settings().model))
    quantized = {name for name, module in linear_modules(transformer).items() if isinstance(module, QuantizedLinear)}
    assert quantized == linear_modules(transformer).keys() - {*kept}
    assert {name.split(".")[0] for name in quantized} == (
        {"layers", "noise_refiner", "context_refiner"}
        if "zimage" in model.script.__name__
        else {"transformer_blocks", "single_transformer_blocks"}
    )
    small = ("embed", "norm", "modulation", "proj_out", "final_layer")
    assert kept and all(any(part in name for part in small) for name in kept)
    assert not [name for name in quantized if any(part in name for part in small)]


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_a_quantized_layer_takes_a_byte_per_weight(model, load, kind):
    for module in linear_modules(load(kind)).values():
        if isinstance(module, QuantizedLinear):
            assert module.weight.qdata.element_size() == 1 and not module.weight.requires_grad
            assert module.weight.dequantize().dtype == torch.float32


@ONE_MODEL
def test_nf4_is_double_quantized_and_computes_in_the_models_precision(model, settings):
    flags = settings().replace(quantize="nf4", quantize_text_encoder="nf4").model
    skeleton = load_skeleton(model.script.MODEL, flags)
    ours = transformer_quantization(flags, skeleton, torch.bfloat16)
    theirs = text_encoder_quantization(flags, torch.bfloat16)
    assert isinstance(ours, diffusers.BitsAndBytesConfig) and isinstance(theirs, transformers.BitsAndBytesConfig)
    for config in (ours, theirs):
        assert config.load_in_4bit and config.bnb_4bit_use_double_quant and config.bnb_4bit_quant_type == "nf4"
        assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert ours.llm_int8_skip_modules == unquantized_modules(skeleton) and theirs.llm_int8_skip_modules is None


# Training on them


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velocity_and_gradients_are_those_of_the_dequantized_base(model, settings, load, kind, dtype):
    quantized = Trained(model, settings, load(kind, dtype), dtype)
    dequantized = Trained(model, settings, dequantize(load(kind, dtype)), dtype)
    assert torch.equal(quantized.velocity, dequantized.velocity)
    exact = {"rtol": 1e-5, "atol": 1e-8} if dtype == torch.float32 else {"rtol": 0.05, "atol": 1e-3}
    for ours, theirs in zip(quantized.gradients, dequantized.gradients, strict=True):
        assert ours.dtype == torch.float32 and theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, **exact)
    unquantized = Trained(model, settings, load(None, dtype), dtype)
    assert not torch.equal(quantized.velocity, unquantized.velocity)


@ONE_MODEL
def test_gradient_checkpointing_changes_no_gradient(model, settings, load):
    whole, checkpointed = (Trained(model, settings, load("int8"), checkpointing=on) for on in (False, True))
    assert all(map(torch.equal, whole.gradients, checkpointed.gradients))
    assert len(checkpointed.kept) < len(whole.kept) / 2


@ONE_MODEL
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_no_dequantized_weight_waits_for_the_backward_pass(model, settings, load, kind):
    trained = Trained(model, settings, load(kind))
    layers = [module for module in trained.pipeline.transformer.modules() if isinstance(module, QuantizedLinear)]
    # The first layers' inputs need no gradient.
    assert len({id(layer.weight) for layer in layers} & trained.kept.keys()) > len(layers) / 2
    whole = [layer.weight.dequantize() for layer in layers]
    matrices = [tensor for tensor in trained.kept.values() if type(tensor) is torch.Tensor and tensor.dim() == 2]
    assert matrices  # the adapters'
    assert not [a for a in matrices for b in whole if torch.equal(a, b) or torch.equal(a.T, b)]


@ONE_MODEL
def test_a_quantized_transformer_moves_between_devices(load):
    transformer = load("int8").requires_grad_(False)
    layers = [module for module in transformer.modules() if isinstance(module, QuantizedLinear)]
    before = [layer.weight.dequantize() for layer in layers]
    transformer.to(torch.device("cpu"))
    assert all(torch.equal(layer.weight.dequantize(), weight) for layer, weight in zip(layers, before, strict=True))
    assert {parameter.device.type for parameter in transformer.to("meta").parameters()} == {"meta"}


# The text encoder


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_a_quantized_text_encoder_gives_nearly_the_same_encodings(prepare, kind):
    plain = prepare().encode_without_cache().all_contexts()
    quantized = prepare(quantize_text_encoder=kind).encode_without_cache().all_contexts()
    moved = [float((a - b).norm() / a.norm()) for a, b in zip(plain, quantized, strict=True)]
    assert 0 < max(moved) < {"int8": 0.1, "float8": 0.4}[kind]  # the tiny encoders' random weights are large


def test_quantized_and_other_encodings_have_entries_of_their_own(prepare, tmp_path):
    def keys(**flags):
        run = prepare(**flags)
        run.contexts.fingerprints = encoder_fingerprints(run.folder, run.settings.model)
        encodings = run.contexts.all_encodings([])
        return {run.contexts.key(encoding): encoding.encoder.component for encoding in encodings}

    plain, int8, float8 = keys(), keys(quantize_text_encoder="int8"), keys(quantize_text_encoder="float8")
    assert plain == keys(quantize="int8")
    shared = plain.keys() & int8.keys()
    assert {plain[key] for key in shared} <= {"vae"}
    assert "text_encoder" not in {plain[key] for key in shared}
    assert int8.keys() & float8.keys() == shared == {key for key, component in plain.items() if component == "vae"}


@ONE_MODEL
def test_entries_of_an_encoder_in_full_precision_keep_their_keys(model, settings):
    whole = checkpoint_fingerprint(model.path, ("text_encoder", "tokenizer", "vae"))
    assert encoder_fingerprints(model.path, settings().model) == {"text_encoder": whole, "vae": whole}


# What cannot work


@ONE_MODEL
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "maximum recursion depth"),
        ("[]", "has no attribute 'get'"),
        ("{}", "neither or both of load_in_4bit and load_in_8bit"),
        ('{"load_in_4bit": true, "load_in_8bit": true}', "neither or both of load_in_4bit and load_in_8bit"),
        ('{"load_in_4bit": true, "bnb_4bit_quant_type": 4}', "bnb_4bit_quant_type"),
    ],
)
def test_quantization_settings_that_cannot_be_used_are_one_line(settings, tmp_path, text, reason):
    path = tmp_path / "bnb.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=f"^--bnb_quantization_config_path {path}: cannot be used .*{reason}"):
        read_quantization_settings(settings(bnb_quantization_config_path=path).model)


@ONE_MODEL
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_quantization_needs_a_gpu(settings, tmp_path):
    path = tmp_path / "bnb.json"
    path.write_text('{"load_in_4bit": true}')
    with pytest.raises(InputError, match=f"^--bnb_quantization_config_path {path}: quantized weights need a GPU"):
        read_quantization_settings(settings(bnb_quantization_config_path=path).model)
    assert read_quantization_settings(settings().model) is None


@ONE_MODEL
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("flag", ["quantize", "quantize_text_encoder"])
def test_nf4_needs_a_gpu(model, settings, flag):
    with pytest.raises(InputError, match=f"^--{flag} nf4: needs a GPU that bitsandbytes supports; pass int8"):
        check_pretrained(model.script.MODEL, settings(**{flag: "nf4"}).model)


@ONE_MODEL
def test_float8_needs_a_device_that_has_it(settings, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    check_quantization(settings(quantize="int8").model)
    with pytest.raises(
        InputError, match="^--quantize float8: Apple's GPUs have no 8-bit floating-point .*; pass int8"
    ):
        check_quantization(settings(quantize="float8").model)


@ONE_MODEL
def test_a_run_that_quantizes_nothing_does_not_import_torchao(settings, monkeypatch):
    modules = {"torchao": None}
    monkeypatch.setattr(sys, "modules", modules)
    del modules["torchao"]
    hide_torchao(settings(quantize_text_encoder="int8"))
    hide_torchao(settings(quantize="float8"))
    hide_torchao(settings(train_mode="full", use_8bit_adam=True))
    hide_torchao(settings(train_mode="full", bf16_update="stochastic_rounding"))
    assert "torchao" not in modules
    for flags in ({"quantize": "nf4"}, {"train_mode": "full"}, {"use_8bit_adam": True}):
        modules.pop("torchao", None)
        hide_torchao(settings(**flags))
        assert modules == {"torchao": None}
    modules["torchao"] = psutil
    hide_torchao(settings())
    assert modules["torchao"] is psutil
