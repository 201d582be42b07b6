"""Incomplete, damaged and hostile checkpoints are one line; what loads correctly still loads."""

import gc
import json
import pickle
import shutil
import weakref

import pytest
import torch
import transformers
from diffusers.models import model_loading_utils, modeling_utils
from safetensors.torch import load_file, save_file

from dopsd.command_line import parse_settings
from dopsd.errors import InputError
from dopsd.loading import LOAD_ERRORS, check_config, limited_size, reporting_load_errors
from dopsd.pretrained import check_pretrained, load_skeleton, load_text_encoder, load_transformer, open_pipeline
from models import ONE_MODEL, both_models
from short_runs import as_arguments


PARTS = ("transformer", "text_encoder", "vae")


@pytest.fixture(autouse=True)
def logging_of_a_run():
    """transformers logs what it loads, but not in a run (`set_up_logging`)."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)


@pytest.fixture
def folder(model, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    return shutil.copytree(model.path, tmp_path / "model")


@pytest.fixture
def settings(model, folder):
    flags = {"pretrained_model_name_or_path": folder, "report_to": "none"}
    return parse_settings(model.script.MODEL, "", as_arguments(flags)).model


@pytest.fixture
def load(model, settings):
    """Loads every component as a run does, and returns the pipeline."""

    def call():
        kind = model.script.MODEL
        check_pretrained(kind, settings)
        load_skeleton(kind, settings)
        pipeline, folder, _ = open_pipeline(kind, settings, torch.float32)
        pipeline.text_encoder = load_text_encoder(kind, settings, folder, torch.float32)
        pipeline.transformer = load_transformer(kind, settings, torch.float32)
        return pipeline

    return call


@pytest.fixture
def refused(load, folder, capfd):
    """Expects one line with these words, and nothing else on the terminal but progress bars."""

    def check(*words):
        capfd.readouterr()
        with pytest.raises(InputError) as caught:
            load()
        message = str(caught.value)
        assert message.startswith(f"--pretrained_model_name_or_path {folder}: ")
        assert "\n" not in message and len(message) < 400
        for word in words:
            assert word in message, message
        written = [line for line in capfd.readouterr().err.splitlines() if line and "%|" not in line]
        assert not written

    return check


def weight_file(folder, part):
    (path,) = (folder / part).glob("*.safetensors")
    return path


def change_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def change_json(path, **values):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


# Weights that do not fit


@both_models(quick="zimage")
@pytest.mark.parametrize("part", PARTS)
def test_a_missing_tensor_is_named(folder, refused, part):
    path = weight_file(folder, part)
    name = sorted(name for name in load_file(path) if "weight" in name and "embed" not in name)[0]
    change_weights(path, lambda weights: weights.pop(name))
    refused(f"{part} lacks 1 of the tensors that its configuration asks for, such as ", name.split(".", 2)[-1])


@both_models(quick="flux2")
@pytest.mark.parametrize("part", PARTS)
def test_an_unexpected_tensor_is_named(folder, refused, part):
    change_weights(weight_file(folder, part), lambda weights: weights.update({"model.more.weight": torch.zeros(2)}))
    refused(f"{part} has 1 tensors that do not belong to its configuration, such as ", "more.weight")


@both_models(quick="zimage")
@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_of_another_shape_is_named(folder, refused, part):
    path = weight_file(folder, part)
    name = sorted(name for name in load_file(path) if "weight" in name and "embed" not in name)[0]
    change_weights(path, lambda weights: weights.update({name: torch.zeros(7, 3)}))
    refused(name.split(".", 2)[-1], "7, 3]")


def test_heads_and_old_buffers_of_text_encoders_are_no_fault(folder, load):
    path = weight_file(folder, "text_encoder")
    more = {
        "lm_head.weight": torch.zeros(265, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    change_weights(path, lambda weights: weights.update(more))
    load()


@ONE_MODEL
def test_a_head_that_is_not_tied_and_not_there_is_no_fault(folder, load):
    change_json(folder / "text_encoder/config.json", tie_word_embeddings=False)
    load()


@ONE_MODEL
def test_a_sharded_checkpoint_names_its_missing_shard(model, folder, load, refused):
    transformer = load().transformer
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="200KB")
    load()
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    shards[1].rename(folder / "elsewhere.safetensors")
    refused(f"index.json names {shards[1].name}, which is not there")
    shards[1].write_bytes(shards[0].read_bytes()[:-1])
    refused(f"transformer/{shards[1].name} is damaged")
    change_json(folder / "transformer/diffusion_pytorch_model.safetensors.index.json", weight_map=[1])
    refused("has no weight_map with file names")


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "long header": lambda content: b"\xff" * 8 + content[8:],
    "header beyond the end": lambda content: (10**7).to_bytes(8, "little") + content[8:],
    "text": lambda content: b"version https://git-lfs",
}


@both_models(quick="flux2")
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_weight_file_is_named(folder, refused, part, damage):
    path = weight_file(folder, part)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    refused(f"{part}/{path.name} is damaged: ", "; download it again")


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("the pickled file was loaded",))


@ONE_MODEL
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ],
)
def test_pickled_weights_are_not_loaded(folder, refused, part, name):
    weight_file(folder, part).unlink()
    (folder / part / name).write_bytes(pickle.dumps(Payload()))
    refused(f"{part} has only {name}, a pickled file, which could run code; convert it to safetensors")


# Configurations


@both_models(quick="zimage")
@pytest.mark.parametrize("value", ["x", -1, 10**9, 10**400, None, True, [], 1.5])
def test_an_absurd_number_of_layers_is_refused_before_anything_is_built(folder, refused, model, value):
    name = "num_layers" if model.script.MODEL.name.startswith("FLUX") else "n_layers"
    change_json(folder / "transformer/config.json", **{name: value})
    refused()


@ONE_MODEL
@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("transformer/config.json", {"num_layers": "x"}, "transformer's configuration sets num_layers to 'x'"),
        ("transformer/config.json", {"axes_dims_rope": 3}, "sets axes_dims_rope to 3"),
        ("transformer/config.json", {"num_layers": 9000}, "describes a model of more than 5,000 tensors"),
        ("transformer/config.json", {"num_layers": 1}, "transformer has 16 tensors that do not belong"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "sets num_hidden_layers to 1000000000"),
        (
            "text_encoder/config.json",
            {"num_hidden_layers": 27, "layer_types": None},
            "text_encoder has 11 tensors that do not belong",
        ),
        ("text_encoder/config.json", {"hidden_size": 0}, "sets hidden_size to 0"),
        ("text_encoder/config.json", {"hidden_size": "x"}, ""),
        ("text_encoder/config.json", {"head_dim": 0}, ""),
        ("vae/config.json", {"batch_norm_eps": None}, "vae's configuration sets batch_norm_eps to None"),
        ("vae/config.json", {"norm_num_groups": 10**15}, "sets norm_num_groups to 1000000000000000"),
        ("vae/config.json", {"block_out_channels": [8]}, ""),
        ("scheduler/scheduler_config.json", {"shift": "x"}, "sets shift to 'x'"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "sets num_train_timesteps to 1000000000"),
        ("scheduler/scheduler_config.json", {"shift_terminal": 1.5}, "noise levels do not fall"),
        ("model_index.json", {"_class_name": "A" * 10**6}, "this is a AAAAAA"),
        ("model_index.json", {"tokenizer": ["os", "system"]}, "its tokenizer is a system of os, not one of transf"),
        ("model_index.json", {"tokenizer": None}, ""),
        ("model_index.json", {"tokenizer": ["transformers", "nothing"]}, ""),
        ("model_index.json", {"tokenizer": ["transformers", "Qwen3Model"]}, ""),
    ],
)
def test_valid_json_with_wrong_values_is_one_line(folder, refused, file, values, words):
    change_json(folder / file, **values)
    refused(words)


@ONE_MODEL
@pytest.mark.parametrize(
    "file",
    ["model_index.json", *(f"{part}/config.json" for part in PARTS), "scheduler/scheduler_config.json"],
)
@pytest.mark.parametrize("text", ["", "[]", '"x"', "[" * 100_000, '{"a": ' + "1" * 5000 + "}", "\udcff"])
def test_damaged_json_is_one_line(folder, refused, file, text):
    (folder / file).write_bytes(text.encode(errors="surrogateescape"))
    refused()


def test_the_limit_on_tensors_is_gone_after_an_error():
    with pytest.raises(ValueError, match="more than 5,000 tensors"), limited_size(), torch.device("meta"):
        torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(10**9))
    torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2_501))


def test_configurations_of_published_checkpoints_are_accepted(model):
    for part, kind in (("transformer", model.script.MODEL.transformer_class), ("vae", model.script.MODEL.vae_class)):
        content = json.loads((model.path / part / "config.json").read_text())
        check_config(content, part, kind)
        check_config(content | {"_name_or_path": "x", "unknown": None}, part, kind)
    check_config({"rope_theta": 5000000, "pad_token_id": -1, "rope_scaling": None}, "text_encoder")


# Code in a checkpoint


@pytest.fixture
def no_question(monkeypatch):
    """Transformers must not ask whether to run code."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to run the checkpoint's code"))


@ONE_MODEL
@pytest.mark.parametrize("kind", ["unknown_model", "qwen3"])
def test_code_that_a_configuration_names_is_not_run(folder, load, refused, no_question, kind):
    place = folder / "text_encoder"
    (place / "code.py").write_text("raise SystemExit('the code ran')")
    auto_map = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model"}
    change_json(place / "config.json", model_type=kind, auto_map=auto_map, architectures=["Model"])
    if kind == "qwen3":
        load()
    else:
        refused("its text encoder's model_type is 'unknown_model', not 'qwen3'")


@ONE_MODEL
def test_code_of_a_tokenizer_is_not_run(folder, refused, no_question):
    place = folder / "tokenizer"
    (place / "code.py").write_text("raise SystemExit('the code ran')")
    change_json(folder / "model_index.json", tokenizer=["transformers", "AutoTokenizer"])
    auto_map = {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}
    change_json(place / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=auto_map)
    refused("contains custom code")


@ONE_MODEL
@pytest.mark.parametrize("part", ["vae", "tokenizer", "scheduler"])
def test_code_that_the_index_names_is_not_run(folder, load, no_question, part):
    (folder / part / "code.py").write_text("raise SystemExit('the code ran')")
    change_json(folder / "model_index.json", **{part: ["code", "Thing"]})
    try:
        load()
    except InputError as error:
        assert "\n" not in str(error)


# Tokenizers


@ONE_MODEL
def test_a_tokenizer_without_its_files_is_one_line(folder, refused):
    (folder / "tokenizer/tokenizer.json").unlink()
    refused("tokenizer lacks its vocabulary (tokenizer.json, vocab.json, merges.txt)")
    (folder / "tokenizer/vocab.json").write_text("{}")
    refused("tokenizer lacks its vocabulary (tokenizer.json, merges.txt)")


@ONE_MODEL
@pytest.mark.parametrize("key", ["added_tokens", "model", "version"])
def test_a_tokenizer_with_values_of_another_kind_is_one_line(folder, refused, key):
    path = folder / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    content[key] = {"a": 1}
    path.write_text(json.dumps(content))
    refused("tokenizer cannot be used: ")


@ONE_MODEL
def test_a_tokenizer_that_loses_text_is_one_line(folder, refused):
    path = folder / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    del content["model"]["vocab"]["p"]
    path.write_text(json.dumps(content))
    refused("tokenizer cannot represent a simple text")


@ONE_MODEL
def test_a_tokenizer_of_another_text_encoder_is_one_line(folder, refused):
    change_json(folder / "text_encoder/config.json", vocab_size=200)
    refused("tokenizer has 265 tokens, but text_encoder's vocabulary only 200")


@ONE_MODEL
@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "the tokenizer's chat template cannot be applied"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{{ messages[0].content", "cannot be applied"),
        ("always the same", "drops the message"),
    ],
)
def test_a_chat_template_that_cannot_be_applied_is_one_line(folder, refused, template, words):
    path = folder / "tokenizer/chat_template.jinja"
    path.unlink()
    if template:
        path.write_text(template)
    refused(words, "; use the tokenizer of the published checkpoint")


# Other errors


@ONE_MODEL
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: device-side assert triggered")],
)
def test_errors_of_a_device_are_not_reported_as_damage(settings, error):
    with pytest.raises(type(error), match=str(error)) as caught, reporting_load_errors(settings):
        raise error
    assert caught.value is error


@ONE_MODEL
def test_an_input_error_keeps_its_message(settings):
    with pytest.raises(InputError, match="^--flag: mine$"), reporting_load_errors(settings):
        raise InputError("--flag: mine")


@ONE_MODEL
@pytest.mark.parametrize("kind", [kind for kind in LOAD_ERRORS if kind is not ImportError])
def test_every_error_of_the_libraries_becomes_one_short_line(settings, kind):
    with pytest.raises(InputError) as caught, reporting_load_errors(settings):
        raise kind("a\nb" * 1000)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


# Straight onto the accelerator


@pytest.fixture
def sharded(model, folder):
    """The checkpoint with a float32 transformer in several shards; returns the size of the largest in bytes."""
    transformer = model.script.MODEL.transformer_class.from_pretrained(folder / "transformer", dtype=torch.float32)
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
    sizes = [path.stat().st_size for path in (folder / "transformer").glob("*.safetensors")]
    assert len(sizes) > 2
    return max(sizes)


def test_a_transformer_is_never_in_host_memory_as_a_whole(model, settings, sharded, monkeypatch):
    """The meta device stands for the accelerator. What is read is freed before the next shard is read."""
    read, peak = [], 0
    original = model_loading_utils.load_state_dict

    def recording(file, **kwargs):
        nonlocal peak
        weights = original(file, **kwargs)
        read.extend(weakref.ref(weight) for weight in weights.values())
        gc.collect()
        peak = max(peak, sum(weight().nbytes for weight in read if weight() is not None))
        return weights

    monkeypatch.setattr(model_loading_utils, "load_state_dict", recording)
    monkeypatch.setattr(modeling_utils, "load_state_dict", recording)
    transformer = load_transformer(model.script.MODEL, settings, torch.bfloat16, torch.device("meta"))
    assert {parameter.device.type for parameter in transformer.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}
    assert 0 < peak <= sharded < sum(parameter.numel() * 4 for parameter in transformer.parameters())


def test_on_a_cpu_nothing_changes(model, settings):
    kind = model.script.MODEL
    whole, placed = (
        load_transformer(kind, settings, torch.bfloat16, device).state_dict() for device in (None, torch.device("cpu"))
    )
    assert all(torch.equal(weight, placed[name]) and not weight.is_meta for name, weight in whole.items())


@ONE_MODEL
@pytest.mark.parametrize("quantized", [False, True])
def test_the_accelerator_is_passed_on_with_and_without_quantization(model, settings, monkeypatch, quantized):
    given = {}

    def from_pretrained(name, **kwargs):
        given.update(kwargs)
        return torch.nn.Linear(1, 1), {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    kind = model.script.MODEL
    monkeypatch.setattr(kind.transformer_class, "from_pretrained", from_pretrained)
    arguments = {"load_in_8bit": True} if quantized else None
    monkeypatch.setattr("dopsd.quantization.read_quantization_settings", lambda settings: arguments)
    device = torch.device("cuda", 1)
    load_transformer(kind, settings, torch.bfloat16, device)
    assert given["device_map"] == {"": device}
    assert (given["quantization_config"] is not None) == quantized


def test_the_text_encoder_is_put_onto_the_accelerator_too(model, settings, folder):
    text_encoder = load_text_encoder(model.script.MODEL, settings, folder, torch.bfloat16, torch.device("meta"))
    assert {parameter.device.type for parameter in text_encoder.parameters()} == {"meta"}


def test_nothing_moves_activations_between_devices_afterwards(model, settings, folder):
    kind, meta = model.script.MODEL, torch.device("meta")
    for loaded in (
        load_transformer(kind, settings, torch.bfloat16, meta),
        load_text_encoder(kind, settings, folder, torch.bfloat16, meta),
    ):
        assert not [name for name, module in loaded.named_modules() if hasattr(module, "_hf_hook")]
