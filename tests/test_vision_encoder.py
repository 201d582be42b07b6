"""Qwen3-VL around the pipeline's text encoder: the features of the whole model, without its language weights."""

import gc
import inspect
import json
import shutil
import weakref
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import tiny_klein
from dopsd.errors import InputError
from pipelines.vision_encoder import LANGUAGE_FIELDS, VisionEncoder, default_vlm
from tiny_klein import byte_tokenizer
from tiny_vlm import make_tiny_vlm


PROMPT = "a striped ball on grass"
# Width and height in whole tokens of 32 x 32 pixels, so that resizing keeps them.
WIDE, TALL = (96, 64), (64, 160)
LIMITS = {"min_pixels": 64 * 64, "max_pixels": 128 * 128}
ROPE_THETA = {"vlm": 5e6, "text_encoder": 1e6}


def make_text_config(**values):
    return Qwen3Config(
        **{
            "vocab_size": len(byte_tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            **values,
        }
    )


def make_text_encoder(kind=Qwen3ForCausalLM, **values):
    torch.manual_seed(0)
    return kind(make_text_config(**values)).eval()


@pytest.fixture(scope="session")
def vlm_paths(tmp_path_factory):
    """Two VLMs that fit the text encoders here, by whether their embeddings are tied."""
    folder = tmp_path_factory.mktemp("vlm")
    return {
        tied: make_tiny_vlm(folder / str(tied), text_config=make_text_config(), tie_word_embeddings=tied)
        for tied in (True, False)
    }


@pytest.fixture(scope="session")
def vlm_path(vlm_paths):
    return vlm_paths[True]


@pytest.fixture
def vlm_copy(vlm_path, tmp_path):
    return shutil.copytree(vlm_path, tmp_path / "vlm")


@pytest.fixture
def text_encoder():
    return make_text_encoder()


def make_encoder(path, text_config=None, tokenizer=None, **options):
    return VisionEncoder(
        path, tokenizer or byte_tokenizer(), text_config or make_text_config(), **{**LIMITS, **options}
    )


def chat_text(num_image_tokens):
    picture = "<|vision_start|>" + "<|image_pad|>" * num_image_tokens + "<|vision_end|>" if num_image_tokens else ""
    return f"<|im_start|>user\n{picture}{PROMPT}<|im_end|>\n<|im_start|>assistant\n"


def features(encoder, image=None, **options):
    count = encoder.num_image_tokens(image.height, image.width) if image else 0
    return encoder.hidden_states(chat_text(count), image, **options)


def text_features(text_encoder, pad_to=None):
    """The text encoder's own hidden states, asked for as the pipelines do."""
    tokens = byte_tokenizer()(
        chat_text(0), return_tensors="pt", padding="max_length" if pad_to else False, max_length=pad_to
    )
    with torch.no_grad():
        return text_encoder(**tokens, output_hidden_states=True, use_cache=False).hidden_states


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def whole_model(path, text_encoder, rope, dtype=torch.float32):
    """`Qwen3VLForConditionalGeneration` as transformers loads it, with the text encoder's weights copied in."""
    config = Qwen3VLConfig.from_pretrained(path)
    config.text_config.rope_parameters["rope_theta"] = ROPE_THETA[rope]
    vocabulary = byte_tokenizer().get_vocab()
    config.image_token_id, config.vision_start_token_id = vocabulary["<|image_pad|>"], vocabulary["<|vision_start|>"]
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        path, config=config, dtype=dtype, attn_implementation=text_encoder.config._attn_implementation
    )
    model.model.language_model.load_state_dict(text_encoder.base_model.state_dict())
    return model.eval()


def patches(image):
    """Pixels in [-1, 1] as the tower takes them, (N, 3 * 2 * 16 * 16): a still picture's two frames are equal."""
    pixels = (np.asarray(image).transpose(2, 0, 1) / 255).astype(np.float32)
    pixels = (pixels - np.float32(0.5)) / np.float32(0.5)
    rows = []
    for top in range(0, image.height, 32):
        for left in range(0, image.width, 32):
            for y in (top, top + 16):
                for x in (left, left + 16):
                    patch = pixels[:, y : y + 16, x : x + 16]
                    rows.append(np.stack([patch, patch], axis=1).ravel())
    return torch.from_numpy(np.stack(rows))


def whole_features(model, image, pad_to=None):
    """The whole model's; of padding, where its positions go on after the text's (by itself it gives all the same)."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(chat_text(image.width * image.height // 32**2)).input_ids
    padding = [0] * (pad_to - len(ids) if pad_to else 0)
    input_ids = torch.tensor([ids + [tokenizer.pad_token_id for _ in padding]])
    grid = torch.tensor([[1, image.height // 16, image.width // 16]])
    positions = None
    if padding:
        own = {"input_ids": input_ids[:, : len(ids)], "image_grid_thw": grid}
        if "mm_token_type_ids" in inspect.signature(model.model.get_rope_index).parameters:
            own["mm_token_type_ids"] = (own["input_ids"] == tokenizer.get_vocab()["<|image_pad|>"]).int()
        positions, _ = model.model.get_rope_index(**own)
        more = positions.max() + 1 + torch.arange(len(padding))
        positions = torch.cat([positions, more.expand(3, 1, -1)], dim=-1)
    with torch.no_grad():
        return model(
            input_ids=input_ids,
            attention_mask=torch.tensor([[1] * len(ids) + padding]),
            position_ids=positions,
            mm_token_type_ids=(input_ids == tokenizer.get_vocab()["<|image_pad|>"]).int(),
            pixel_values=patches(image),
            image_grid_thw=grid,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states


@pytest.mark.parametrize("rope", ["vlm", "text_encoder"])
@pytest.mark.parametrize("vlm_tied", [True, False])
@pytest.mark.parametrize(("kind", "tied"), [(Qwen3ForCausalLM, True), (Qwen3ForCausalLM, False), (Qwen3Model, True)])
def test_features_with_a_picture_are_the_whole_models(vlm_paths, make_picture, kind, tied, vlm_tied, rope):
    text_encoder = make_text_encoder(kind, tie_word_embeddings=tied)
    encoder = make_encoder(vlm_paths[vlm_tied], rope=rope)
    encoder.load(text_encoder)
    whole = whole_model(vlm_paths[vlm_tied], text_encoder, rope)
    for size in (WIDE, TALL):
        image = make_picture(1, *size)
        for pad_to in (None, 100):
            found = features(encoder, image, pad_to=pad_to)
            assert len(found) == 6 and found[0].shape[2] == 32 and (pad_to is None or found[0].shape[1] == pad_to)
            assert equal(found, whole_features(whole, image, pad_to))


@pytest.mark.parametrize(
    ("dtype", "attention"), [(torch.bfloat16, "sdpa"), (torch.float32, "eager"), (torch.bfloat16, "eager")]
)
def test_dtype_and_attention_are_the_text_encoders(vlm_path, make_picture, dtype, attention):
    text_encoder = make_text_encoder(attn_implementation=attention).to(dtype)
    encoder = make_encoder(vlm_path)
    encoder.load(text_encoder)
    found = features(encoder, make_picture(1, *WIDE), pad_to=80)
    assert {tensor.dtype for tensor in (*found, *encoder._model.parameters())} == {dtype}
    assert equal(found, whole_features(whole_model(vlm_path, text_encoder, "vlm", dtype), make_picture(1, *WIDE), 80))


@pytest.mark.parametrize("pad_to", [None, 100])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [Qwen3ForCausalLM, Qwen3Model])
def test_text_alone_gives_the_text_encoders_own_features_with_its_rope(
    vlm_path, make_picture, kind, attention, pad_to
):
    text_encoder = make_text_encoder(kind, attn_implementation=attention)
    own = text_features(text_encoder, pad_to)
    for rope in ("text_encoder", "vlm"):
        encoder = make_encoder(vlm_path, rope=rope)
        encoder.load(text_encoder)
        features(encoder, make_picture(1, *WIDE))  # What a picture leaves behind in the model must not count.
        found = features(encoder, pad_to=pad_to)
        assert equal(found, own) == (rope == "text_encoder")
        assert torch.equal(found[0], own[0])
        assert (found[-1] - own[-1]).abs().max() > 0.01 or rope == "text_encoder"


def test_it_fits_the_tiny_kleins_text_encoder(pipeline, make_picture, tmp_path):
    encoder = make_encoder(make_tiny_vlm(tmp_path), pipeline.text_encoder.config, pipeline.tokenizer)
    encoder.load(pipeline.text_encoder)
    text = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": encoder.content(PROMPT, 6)}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert text == chat_text(6) + "<think>\n\n</think>\n\n"
    found = encoder.hidden_states(text, make_picture(1, *WIDE), pad_to=128)
    assert [state.shape for state in found] == [(1, 128, 32)] * 29


def test_the_language_tensors_are_the_text_encoders_and_stay_so(vlm_path, text_encoder):
    encoder = make_encoder(vlm_path)
    encoder.load(text_encoder)

    def check(dtype):
        theirs = text_encoder.model.state_dict()
        ours = encoder._model.language_model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
        assert {tensor.dtype for tensor in ours.values()} == {dtype}

    check(torch.float32)
    text_encoder.to("cpu")
    check(torch.float32)
    text_encoder.to(torch.bfloat16)
    check(torch.bfloat16)
    encoder._model.to(torch.float64)
    check(torch.float64)
    text_encoder.to("cpu")
    check(torch.float64)


@pytest.mark.parametrize(
    ("height", "width", "min_side", "max_side", "tokens"),
    [
        (512, 512, 512, 512, 16 * 16),
        (2048, 2048, 512, 512, 16 * 16),
        (64, 64, 512, 512, 16 * 16),
        (512, 768, 512, 512, 13 * 19),
        (768, 512, 512, 512, 19 * 13),
        (200, 300, 512, 512, 14 * 20),  # enlarged and rounded up: more than 16 * 16
        (640, 640, 512, 768, 20 * 20),
        (1024, 1024, 512, 768, 24 * 24),
        (100, 100, 512, 768, 16 * 16),
    ],
)
def test_number_of_image_tokens(vlm_path, height, width, min_side, max_side, tokens):
    encoder = make_encoder(vlm_path, min_pixels=min_side**2, max_pixels=max_side**2)
    assert encoder.num_image_tokens(height, width) == tokens
    picture = encoder._image_processor(Image.new("RGB", (width, height)), return_tensors="pt")
    assert len(picture["pixel_values"]) == 4 * tokens


def test_limits_in_the_checkpoint_do_not_count(vlm_copy):
    change_json(vlm_copy / "preprocessor_config.json", min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    assert make_encoder(vlm_copy).num_image_tokens(512, 512) == 4 * 4


def test_content_puts_the_picture_before_the_prompt(vlm_path):
    content = make_encoder(vlm_path).content("a ball", 3)
    assert content == "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>a ball"


@pytest.mark.parametrize("token", ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
def test_a_caption_with_a_picture_token_is_refused(vlm_path, token):
    with pytest.raises(InputError) as caught:
        make_encoder(vlm_path).content(f"a\nball {token}", 3)
    message = str(caught.value)
    assert message.startswith("'a\\nball ") and f"{token} stands for a picture" in message
    assert "take it out of the caption" in message and "\n" not in message


def test_mrope_counts_rows_and_columns(vlm_path, text_encoder, make_picture):
    encoder = make_encoder(vlm_path)
    encoder.load(text_encoder)
    positions = []
    encoder._model.language_model.rotary_emb.register_forward_hook(
        lambda module, args, output: positions.append(args[1][:, 0])
    )
    wide, tall = (features(encoder, make_picture(1, *size)) for size in ((96, 64), (64, 96)))
    before = len(byte_tokenizer()("<|im_start|>user\n<|vision_start|>").input_ids)
    for found, rows, columns in ((positions[0], 2, 3), (positions[1], 3, 2)):
        text = torch.arange(before)
        assert torch.equal(found[:, :before], torch.stack([text] * 3))
        time, height, width = found[:, before : before + 6] - before
        assert time.tolist() == [0] * 6
        assert height.tolist() == [row for row in range(rows) for _ in range(columns)]
        assert width.tolist() == list(range(columns)) * rows
        assert found[:, before + 6].tolist() == [before + 3] * 3
    assert wide[-1].shape == tall[-1].shape
    assert torch.equal(wide[0][:, :before], tall[0][:, :before])
    assert not torch.allclose(wide[-1][:, -1], tall[-1][:, -1], atol=0.01)


def test_what_the_picture_shows_counts(vlm_path, text_encoder, make_picture):
    encoder = make_encoder(vlm_path)
    encoder.load(text_encoder)
    ball, other, again = (features(encoder, make_picture(number, *WIDE)) for number in (1, 2, 1))
    assert equal(ball, again)
    # From the second layer on, the text after the picture has seen it.
    assert all((one[:, -1] - two[:, -1]).abs().max() > 0.01 for one, two in zip(ball[1:], other[1:], strict=True))
    alone = features(encoder)
    assert (ball[-1][:, -1] - alone[-1][:, -1]).abs().max() > 0.01


@pytest.fixture
def recorded(monkeypatch):
    """Which safetensors files are opened, and which of their tensors are read."""
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


def shards(path):
    """The files with visual.* tensors, and the others."""
    shard_of = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    visual = {shard for key, shard in shard_of.items() if ".visual." in key}
    return sorted(visual), sorted(set(shard_of.values()) - visual)


def test_only_the_towers_tensors_are_read(vlm_copy, text_encoder, make_picture, recorded):
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
def test_one_weight_file_without_index_serves_too(vlm_copy, text_encoder, make_picture, recorded, prefix):
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


def merge_shards(path):
    """All tensors of a checkpoint, whose files are removed."""
    visual, others = shards(path)
    tensors = {}
    for name in visual + others:
        tensors |= safetensors.torch.load_file(path / name)
        (path / name).unlink()
    (path / "model.safetensors.index.json").unlink()
    return tensors


def save_single(path, tensors):
    safetensors.torch.save_file(tensors, path / "model.safetensors")


COMMIT = "0123456789abcdef" * 2 + "01234567"
LIGHT_FILES = ("config.json", "preprocessor_config.json", "model.safetensors.index.json")


def fill_hub_cache(cache, path, names):
    """The hub cache's entry for org/tiny-vlm, with these of the checkpoint's files alone."""
    entry = cache / "models--org--tiny-vlm"
    snapshot = entry / "snapshots" / COMMIT
    for folder in (entry / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (entry / "refs/main").write_text(COMMIT)
    for name in names:
        shutil.copy(path / name, snapshot / name)
    return snapshot


@pytest.mark.parametrize("is_default_cache", [True, False])
def test_a_hub_name_loads_offline_with_the_towers_files_alone(
    vlm_path, text_encoder, make_picture, tmp_path, monkeypatch, is_default_cache
):
    snapshot = fill_hub_cache(tmp_path, vlm_path, [*LIGHT_FILES, *shards(vlm_path)[0]])
    if is_default_cache:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub = make_encoder("org/tiny-vlm", cache_dir=None if is_default_cache else str(tmp_path))
    assert hub.files()["config.json"] == snapshot / "config.json"
    assert hub.weight_files == tuple(snapshot / name for name in shards(vlm_path)[0])
    local = make_encoder(vlm_path)
    for encoder in (hub, local):
        encoder.load(text_encoder)
    assert equal(features(hub, make_picture(1, *WIDE)), features(local, make_picture(1, *WIDE)))


def test_a_hub_name_with_one_weight_file_loads_too(vlm_copy, text_encoder, tmp_path):
    save_single(vlm_copy, merge_shards(vlm_copy))
    snapshot = fill_hub_cache(tmp_path / "cache", vlm_copy, [*LIGHT_FILES[:2], "model.safetensors"])
    encoder = make_encoder("org/tiny-vlm", cache_dir=str(tmp_path / "cache"))
    assert encoder.weight_files == (snapshot / "model.safetensors",)
    encoder.load(text_encoder)


def test_a_hub_names_weights_are_fetched_when_used_and_from_one_commit(vlm_path, tmp_path, monkeypatch):
    snapshot = fill_hub_cache(tmp_path, vlm_path, LIGHT_FILES)
    encoder = make_encoder("org/tiny-vlm", cache_dir=str(tmp_path))
    asked = []

    def download(name, file, *, revision, cache_dir):
        asked.append((name, file, revision, cache_dir))
        return shutil.copy(vlm_path / file, snapshot / file)

    monkeypatch.setattr("pipelines.vision_encoder.hf_hub_download", download)
    assert [path.name for path in encoder.weight_files] == shards(vlm_path)[0]
    assert asked == [("org/tiny-vlm", name, COMMIT, str(tmp_path)) for name in shards(vlm_path)[0]]


def test_nothing_is_left_on_meta_or_needs_a_gradient(vlm_path, text_encoder, make_picture):
    encoder = make_encoder(vlm_path)
    encoder.load(text_encoder)
    tensors = [*encoder._model.parameters(), *encoder._model.buffers(), *text_encoder.parameters()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert not any(parameter.requires_grad for parameter in encoder._model.parameters())
    assert not any(module.training for module in encoder._model.modules())
    text_encoder.requires_grad_(True)
    assert not any(state.requires_grad for state in features(encoder, make_picture(1, *WIDE)))


def test_unload_lets_go_of_the_tower_and_leaves_the_text_encoder_whole(vlm_path, text_encoder, make_picture):
    before = text_features(text_encoder)
    encoder = make_encoder(vlm_path)
    encoder.load(text_encoder)
    with_picture = features(encoder, make_picture(1, *WIDE))
    model, tower = weakref.ref(encoder._model), weakref.ref(encoder._model.visual.patch_embed.proj.weight)
    encoder.unload()
    gc.collect()
    assert model() is None and tower() is None
    assert equal(text_features(text_encoder), before)
    encoder.load(text_encoder)
    assert equal(features(encoder, make_picture(1, *WIDE)), with_picture)


@contextmanager
def refused(path, *words):
    """An `InputError` of one line that names the flag, its value, and these words."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert message.startswith(f"--vlm_model_name_or_path {path}: ") and "\n" not in message
    assert all(word in message for word in words), message


def change_json(path, section=None, **values):
    content = json.loads(path.read_text())
    (content[section] if section else content).update(values)
    path.write_text(json.dumps(content))


def test_no_checkpoint_is_refused(tmp_path):
    for name in (str(tmp_path / "nothing"), "org/no-such-vlm"):
        with refused(name, "there is no such folder", "Hub did not give its config.json", "check the name"):
            make_encoder(name, cache_dir=str(tmp_path / "cache"))
    with refused(tmp_path, "has no config.json", "whole Qwen3-VL"):
        make_encoder(tmp_path)


def test_an_incomplete_checkpoint_is_refused(vlm_copy):
    for name in (shards(vlm_copy)[0][1], "preprocessor_config.json", "config.json"):
        (vlm_copy / name).unlink()
        with refused(vlm_copy, f"has no {name}", "whole Qwen3-VL"):
            make_encoder(vlm_copy)


def test_an_incomplete_hub_cache_is_refused(vlm_path, tmp_path):
    fill_hub_cache(tmp_path, vlm_path, LIGHT_FILES[:1])
    with refused("org/tiny-vlm", "Hub did not give its preprocessor_config.json", "connection"):
        make_encoder("org/tiny-vlm", cache_dir=str(tmp_path))
    fill_hub_cache(tmp_path, vlm_path, LIGHT_FILES)
    encoder = make_encoder("org/tiny-vlm", cache_dir=str(tmp_path))
    with refused("org/tiny-vlm", f"Hub did not give its {shards(vlm_path)[0][0]}", "connection"):
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
    with refused(vlm_copy, "hold no visual.*"):
        make_encoder(vlm_copy)
    fill_hub_cache(tmp_path / "cache", vlm_copy, LIGHT_FILES)
    with refused("org/tiny-vlm", "hold no visual.*"):
        make_encoder("org/tiny-vlm", cache_dir=str(tmp_path / "cache"))
    index.write_text(saved)
    save_single(vlm_copy, {key: tensor for key, tensor in merge_shards(vlm_copy).items() if ".visual." not in key})
    with refused(vlm_copy, "hold no visual.*"):
        make_encoder(vlm_copy)


@pytest.mark.parametrize("unknown", [None, "<|endoftext|>"])
@pytest.mark.parametrize("token", ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
def test_a_tokenizer_without_the_pictures_tokens_is_refused(vlm_path, monkeypatch, token, unknown):
    tokens = tuple("<|other|>" if special == token else special for special in tiny_klein.SPECIAL_TOKENS)
    monkeypatch.setattr(tiny_klein, "SPECIAL_TOKENS", tokens)
    tokenizer = byte_tokenizer()
    tokenizer.unk_token = unknown
    with refused(vlm_path, f"tokenizer has no {token}, which"):
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


def test_a_tower_of_other_shapes_is_refused(vlm_copy, text_encoder):
    change_json(vlm_copy / "config.json", "vision_config", intermediate_size=32)
    with refused(vlm_copy, "visual.blocks.0.mlp.linear_fc1.weight is [24, 16], and by its config.json [32, 16]"):
        make_encoder(vlm_copy).load(text_encoder)


@pytest.mark.parametrize("name", LIGHT_FILES)
def test_damaged_settings_are_refused(vlm_copy, name):
    (vlm_copy / name).write_text('{\n  "a": \n')
    with refused(vlm_copy, f"{name} is damaged", "download it again"):
        make_encoder(vlm_copy)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", [], "config.json holds no object"),
        ("config.json", {"vision_config": "x"}, ""),  # transformers 5.0 finds other words
        ("config.json", {"vision_config": {"depth": "x"}}, ""),
        ("model.safetensors.index.json", {"weight_map": None}, "has no weight_map"),
        ("model.safetensors.index.json", {"weight_map": {"model.visual.x": 1}}, "has no weight_map"),
        ("preprocessor_config.json", [], "preprocessor_config.json holds no object"),
        ("preprocessor_config.json", {"patch_size": 14}, "does not fit its config.json: patch_size 14, not 16;"),
        ("preprocessor_config.json", {"temporal_patch_size": 1}, "temporal_patch_size 1, not 2;"),
        ("preprocessor_config.json", {"merge_size": None}, "merge_size None, not 2;"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "preprocessor_config.json is damaged"),
        ("preprocessor_config.json", {"image_std": "x"}, "preprocessor_config.json is damaged"),
    ],
)
def test_json_that_is_wrong_is_one_line(vlm_copy, file, content, words):
    old = json.loads((vlm_copy / file).read_text())
    (vlm_copy / file).write_text(json.dumps(old | content if isinstance(content, dict) else content))
    with refused(vlm_copy, words):
        make_encoder(vlm_copy)


def test_pictures_are_resized_whatever_the_checkpoint_says(vlm_copy):
    change_json(vlm_copy / "preprocessor_config.json", do_resize=False)
    encoder = make_encoder(vlm_copy)
    picture = encoder._image_processor(Image.new("RGB", (100, 70)), return_tensors="pt")
    assert len(picture["pixel_values"]) == 4 * encoder.num_image_tokens(70, 100)


@pytest.mark.parametrize(("width", "size"), [(2560, "4B"), (4096, "8B")])
def test_the_default_goes_by_the_text_encoders_size(width, size):
    assert default_vlm(Qwen3Config(hidden_size=width)) == f"Qwen/Qwen3-VL-{size}-Instruct"
    with pytest.raises(InputError, match="--vlm_model_name_or_path: none is known for a text encoder of 32 channels"):
        default_vlm(Qwen3Config(hidden_size=32))
