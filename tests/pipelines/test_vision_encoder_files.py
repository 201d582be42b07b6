"""Which files of a Qwen3-VL checkpoint are read, and the errors for incomplete, damaged and unsuitable ones."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
from PIL import Image
from transformers import Qwen3Config

from benchmarks.miniature import parts
from benchmarks.miniature.parts import byte_tokenizer
from dopsd.errors import InputError
from pipelines.vision_encoder import LANGUAGE_FIELDS, default_vlm
from vlm_helpers import (
    COMMIT,
    FILES_WITHOUT_WEIGHTS,
    WIDE,
    change_json,
    equal,
    features,
    fill_hub_cache,
    make_encoder,
    make_text_config,
    merge_shards,
    save_single,
    shards,
)


# What is read


@pytest.fixture
def recorded(monkeypatch):
    """Names of the safetensors files that are opened, and of the tensors that are read."""
    opened, read, safe_open = [], [], safetensors.safe_open

    @contextmanager
    def recording_open(path, framework):
        opened.append(Path(path).name)
        with safe_open(path, framework=framework) as file:
            yield RecordingFile(file)

    class RecordingFile:
        def __init__(self, file):
            self.keys, self._file = file.keys, file

        def get_tensor(self, key):
            read.append(key)
            return self._file.get_tensor(key)

    monkeypatch.setattr(safetensors, "safe_open", recording_open)
    return opened, read


def test_only_the_tensors_of_the_tower_are_read(vlm_copy, text_encoder, make_picture, recorded):
    expected = make_encoder(vlm_copy)
    expected.load(text_encoder)
    expected = features(expected, make_picture(1, *WIDE))
    for log in recorded:
        log.clear()

    opened, read = recorded
    visual, others = shards(vlm_copy)
    assert len(visual) >= 2 and others
    for name in others:
        (vlm_copy / name).unlink()
    encoder = make_encoder(vlm_copy)
    assert encoder.weight_files == tuple(vlm_copy / name for name in visual)
    assert encoder.files() == {name: vlm_copy / name for name in ("config.json", "preprocessor_config.json", *visual)}
    assert not read
    encoder.load(text_encoder)
    assert set(opened) == set(visual)
    shard_of = json.loads((vlm_copy / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(read) == sorted(key for key in shard_of if key.startswith("model.visual."))
    assert equal(features(encoder, make_picture(1, *WIDE)), expected)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_single_weight_file_without_an_index_can_be_read(vlm_copy, text_encoder, make_picture, recorded, prefix):
    expected = make_encoder(vlm_copy)
    expected.load(text_encoder)
    expected = features(expected, make_picture(1, *WIDE))
    tensors = merge_shards(vlm_copy)
    save_single(vlm_copy, {prefix + key.removeprefix("model."): tensor for key, tensor in tensors.items()})

    encoder = make_encoder(vlm_copy)
    assert encoder.weight_files == (vlm_copy / "model.safetensors",)
    recorded[1].clear()
    encoder.load(text_encoder)
    assert recorded[1] and all(key.startswith(f"{prefix}visual.") for key in recorded[1])
    assert equal(features(encoder, make_picture(1, *WIDE)), expected)


@pytest.mark.parametrize("is_default_cache", [True, False])
def test_a_hub_id_can_be_read_offline_from_the_files_with_the_tower(
    vlm_path, text_encoder, make_picture, tmp_path, monkeypatch, is_default_cache
):
    snapshot = fill_hub_cache(tmp_path, vlm_path, [*FILES_WITHOUT_WEIGHTS, *shards(vlm_path)[0]])
    if is_default_cache:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub = make_encoder("org/tiny-vlm", cache_dir=None if is_default_cache else str(tmp_path))
    assert hub.files()["config.json"] == snapshot / "config.json"
    assert hub.weight_files == tuple(snapshot / name for name in shards(vlm_path)[0])
    local = make_encoder(vlm_path)
    for encoder in (hub, local):
        encoder.load(text_encoder)
    assert equal(features(hub, make_picture(1, *WIDE)), features(local, make_picture(1, *WIDE)))


def test_a_hub_id_with_a_single_weight_file_can_be_read(vlm_copy, text_encoder, tmp_path):
    save_single(vlm_copy, merge_shards(vlm_copy))
    snapshot = fill_hub_cache(tmp_path / "cache", vlm_copy, [*FILES_WITHOUT_WEIGHTS[:2], "model.safetensors"])
    encoder = make_encoder("org/tiny-vlm", cache_dir=str(tmp_path / "cache"))
    assert encoder.weight_files == (snapshot / "model.safetensors",)
    encoder.load(text_encoder)


def test_weights_of_a_hub_id_are_downloaded_on_first_use_and_from_one_commit(vlm_path, tmp_path, monkeypatch):
    snapshot = fill_hub_cache(tmp_path, vlm_path, FILES_WITHOUT_WEIGHTS)
    encoder = make_encoder("org/tiny-vlm", cache_dir=str(tmp_path))
    downloads = []

    def download(name, file, *, revision, cache_dir):
        downloads.append((name, file, revision, cache_dir))
        return shutil.copy(vlm_path / file, snapshot / file)

    monkeypatch.setattr("pipelines.checkpoint_files.hf_hub_download", download)
    assert [path.name for path in encoder.weight_files] == shards(vlm_path)[0]
    assert downloads == [("org/tiny-vlm", name, COMMIT, str(tmp_path)) for name in shards(vlm_path)[0]]


# What is refused


@contextmanager
def refused(path, *words):
    """Expects an `InputError` of one line that starts with the checkpoint and contains these words."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_no_checkpoint_is_refused(tmp_path):
    for name in (str(tmp_path / "nothing"), "org/no-such-vlm"):
        with refused(name, "there is no such folder", "config.json could not be read from the Hub", "check the name"):
            make_encoder(name, cache_dir=str(tmp_path / "cache"))
    with refused(tmp_path, "has no config.json", "complete Qwen3-VL"):
        make_encoder(tmp_path)


def test_an_incomplete_checkpoint_is_refused(vlm_copy):
    for name in (shards(vlm_copy)[0][1], "preprocessor_config.json", "config.json"):
        (vlm_copy / name).unlink()
        with refused(vlm_copy, f"has no {name}", "complete Qwen3-VL"):
            make_encoder(vlm_copy)


def test_an_incomplete_hub_cache_is_refused(vlm_path, tmp_path):
    fill_hub_cache(tmp_path, vlm_path, FILES_WITHOUT_WEIGHTS[:1])
    with refused("org/tiny-vlm", "its preprocessor_config.json could not be read from the Hub", "connection"):
        make_encoder("org/tiny-vlm", cache_dir=str(tmp_path))
    fill_hub_cache(tmp_path, vlm_path, FILES_WITHOUT_WEIGHTS)
    encoder = make_encoder("org/tiny-vlm", cache_dir=str(tmp_path))
    with refused("org/tiny-vlm", f"its {shards(vlm_path)[0][0]} could not be read from the Hub", "connection"):
        encoder.files()


def test_another_model_is_refused(vlm_copy):
    change_json(vlm_copy / "config.json", model_type="qwen2_5_vl")
    with refused(vlm_copy, "model_type is qwen2_5_vl, not qwen3_vl", "Qwen/Qwen3-VL-4B-Instruct"):
        make_encoder(vlm_copy)


OTHER_SHAPES = {
    "vocab_size": (265, 300),
    "hidden_size": (32, 64),
    "intermediate_size": (48, 96),
    "num_hidden_layers": (5, 6),
    "num_attention_heads": (2, 4),
    "num_key_value_heads": (1, 2),
    "head_dim": (16, 8),
    "rms_norm_eps": (1e-06, 1e-05),
    "hidden_act": ("silu", "gelu"),
    "attention_bias": (False, True),
}


@pytest.mark.parametrize("field", OTHER_SHAPES)
def test_another_language_model_is_refused(vlm_path, field):
    assert OTHER_SHAPES.keys() == set(LANGUAGE_FIELDS)
    ours, theirs = OTHER_SHAPES[field]
    text_config = make_text_config(**{field: theirs})
    text_config.name_or_path = "org/klein"
    with refused(vlm_path, "text encoder org/klein: ", f": {field} {ours}, not {theirs}; pass", "VL-8B-Instruct"):
        make_encoder(vlm_path, text_config)


def test_all_differences_are_named(vlm_path):
    with refused(vlm_path, "text encoder: hidden_size 32, not 64, num_hidden_layers 5, not 9;"):
        make_encoder(vlm_path, make_text_config(hidden_size=64, num_hidden_layers=9))


def test_a_tower_of_another_width_is_refused(vlm_copy):
    change_json(vlm_copy / "config.json", "vision_config", out_hidden_size=48)
    with refused(vlm_copy, "vision tower does not fit the pipeline's text encoder", "out_hidden_size 48, not 32"):
        make_encoder(vlm_copy)


def test_weights_without_a_tower_are_refused(vlm_copy, tmp_path):
    index = vlm_copy / "model.safetensors.index.json"
    shard_of = json.loads(index.read_text())["weight_map"]
    language = {key: shard for key, shard in shard_of.items() if ".visual." not in key}
    saved = index.read_text()
    index.write_text(json.dumps({"weight_map": language}))
    with refused(vlm_copy, "contain no visual.*"):
        make_encoder(vlm_copy)
    fill_hub_cache(tmp_path / "cache", vlm_copy, FILES_WITHOUT_WEIGHTS)
    with refused("org/tiny-vlm", "contain no visual.*"):
        make_encoder("org/tiny-vlm", cache_dir=str(tmp_path / "cache"))
    index.write_text(saved)
    save_single(vlm_copy, {key: tensor for key, tensor in merge_shards(vlm_copy).items() if ".visual." not in key})
    with refused(vlm_copy, "contain no visual.*"):
        make_encoder(vlm_copy)


@pytest.mark.parametrize("unknown", [None, "<|endoftext|>"])
@pytest.mark.parametrize("token", ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
def test_a_tokenizer_without_the_image_tokens_is_refused(vlm_path, monkeypatch, token, unknown):
    tokens = tuple("<|other|>" if special == token else special for special in parts.SPECIAL_TOKENS)
    monkeypatch.setattr(parts, "SPECIAL_TOKENS", tokens)
    tokenizer = byte_tokenizer()
    tokenizer.unk_token = unknown
    with refused(vlm_path, f"tokenizer lacks {token}, needed"):
        make_encoder(vlm_path, tokenizer=tokenizer)


def test_damaged_weights_are_refused(vlm_copy, text_encoder):
    shard = vlm_copy / shards(vlm_copy)[0][0]
    whole = shard.read_bytes()
    encoder = make_encoder(vlm_copy)
    shard.write_bytes(whole[: len(whole) // 2])
    with refused(vlm_copy, f"{shard.name} is damaged", "download it again"):
        make_encoder(vlm_copy)
    with refused(vlm_copy, f"{shard.name} is damaged", "download it again"):
        encoder.load(text_encoder)
    shard.write_bytes(b"")
    with refused(vlm_copy, f"{shard.name} is damaged"):
        make_encoder(vlm_copy)


def test_an_incomplete_tower_is_refused(vlm_copy, text_encoder):
    shard = vlm_copy / shards(vlm_copy)[0][0]
    tensors = safetensors.torch.load_file(shard)
    removed = next(key for key in tensors if ".visual." in key)
    del tensors[removed]
    safetensors.torch.save_file(tensors, shard)
    with refused(vlm_copy, f"have no {removed.removeprefix('model.')};", "download it again"):
        make_encoder(vlm_copy).load(text_encoder)


def test_a_tower_with_more_tensors_than_its_configuration_is_refused(vlm_copy, text_encoder):
    change_json(vlm_copy / "config.json", "vision_config", depth=3, deepstack_visual_indexes=[0, 1, 2])
    with refused(vlm_copy, "its visual.blocks.3.", "is no part of the tower in its config.json; download it again"):
        make_encoder(vlm_copy).load(text_encoder)


@pytest.mark.parametrize("depth", [10**9, 5000])
def test_a_tower_without_end_is_refused(vlm_copy, text_encoder, depth):
    change_json(vlm_copy / "config.json", "vision_config", depth=depth)
    with refused(vlm_copy, "its config.json is damaged", "download it again"):
        make_encoder(vlm_copy).load(text_encoder)


def test_nested_and_endless_json_is_refused(vlm_copy):
    for text in ("[" * 100_000, '{"a": ' + "1" * 5000 + "}"):
        (vlm_copy / "config.json").write_text(text)
        with refused(vlm_copy, "its config.json is damaged"):
            make_encoder(vlm_copy)


def test_a_tower_of_other_shapes_is_refused(vlm_copy, text_encoder):
    change_json(vlm_copy / "config.json", "vision_config", intermediate_size=32)
    with refused(
        vlm_copy, "visual.blocks.0.mlp.linear_fc1.weight has shape [24, 16], but [32, 16] according to its config.json"
    ):
        make_encoder(vlm_copy).load(text_encoder)


@pytest.mark.parametrize("name", FILES_WITHOUT_WEIGHTS)
def test_damaged_settings_are_refused(vlm_copy, name):
    (vlm_copy / name).write_text('{\n  "a": \n')
    with refused(vlm_copy, f"{name} is damaged", "download it again"):
        make_encoder(vlm_copy)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", [], "config.json is not a JSON object"),
        ("config.json", {"vision_config": "x"}, ""),  # the error differs between versions of transformers
        ("config.json", {"vision_config": {"depth": "x"}}, ""),
        ("model.safetensors.index.json", {"weight_map": None}, "has no weight_map"),
        ("model.safetensors.index.json", {"weight_map": {"model.visual.x": 1}}, "has no weight_map"),
        ("preprocessor_config.json", [], "preprocessor_config.json is not a JSON object"),
        ("preprocessor_config.json", {"patch_size": 14}, "does not fit its config.json: patch_size 14, not 16;"),
        ("preprocessor_config.json", {"temporal_patch_size": 1}, "temporal_patch_size 1, not 2;"),
        ("preprocessor_config.json", {"merge_size": None}, "merge_size None, not 2;"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "preprocessor_config.json is damaged"),
        ("preprocessor_config.json", {"image_std": "x"}, "preprocessor_config.json is damaged"),
    ],
)
def test_wrong_values_in_json_files_are_refused(vlm_copy, file, content, words):
    old = json.loads((vlm_copy / file).read_text())
    (vlm_copy / file).write_text(json.dumps(old | content if isinstance(content, dict) else content))
    with refused(vlm_copy, words):
        make_encoder(vlm_copy)


def test_images_are_resized_even_if_the_checkpoint_disables_it(vlm_copy):
    change_json(vlm_copy / "preprocessor_config.json", do_resize=False)
    encoder = make_encoder(vlm_copy)
    processed = encoder._image_processor(Image.new("RGB", (100, 70)), return_tensors="pt")
    assert len(processed["pixel_values"]) == 4 * encoder.num_image_tokens(70, 100)


@pytest.mark.parametrize(("width", "size"), [(2560, "4B"), (4096, "8B")])
def test_the_default_depends_on_the_size_of_the_text_encoder(width, size):
    assert default_vlm(Qwen3Config(hidden_size=width)) == f"Qwen/Qwen3-VL-{size}-Instruct"
    with pytest.raises(InputError, match="^has no default for a text encoder with hidden size 32; pass a Qwen3-VL"):
        default_vlm(Qwen3Config(hidden_size=32))
