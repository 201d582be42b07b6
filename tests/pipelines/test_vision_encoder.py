"""The vision encoder computes what the whole Qwen3-VL computes, without loading its language weights."""

import gc
import inspect
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3ForCausalLM, Qwen3Model, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks.miniature.parts import byte_tokenizer
from dopsd.errors import InputError
from dopsd.quantization import text_encoder_quantization
from pipelines.vision_encoder import PatchProjection
from tiny_vlm import make_tiny_vlm
from vlm_helpers import (
    PROMPT,
    TALL,
    WIDE,
    change_json,
    chat_text,
    equal,
    features,
    make_encoder,
    make_text_encoder,
    text_features,
)


ROPE_THETA = {"vlm": 5e6, "text_encoder": 1e6}


def whole_model(path, text_encoder, rope, dtype=torch.float32, *, convolution=False):
    """`Qwen3VLForConditionalGeneration` as transformers loads it, with the text encoder's weights copied in.

    Its convolution becomes a matrix product too, which rounds differently, so that the rest can be compared exactly.
    """
    config = Qwen3VLConfig.from_pretrained(path)
    config.text_config.rope_parameters["rope_theta"] = ROPE_THETA[rope]
    vocabulary = byte_tokenizer().get_vocab()
    config.image_token_id, config.vision_start_token_id = vocabulary["<|image_pad|>"], vocabulary["<|vision_start|>"]
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        path, config=config, dtype=dtype, attn_implementation=text_encoder.config._attn_implementation
    )
    model.model.language_model.load_state_dict(text_encoder.base_model.state_dict())
    embedding = model.model.visual.patch_embed
    assert isinstance(embedding.proj, torch.nn.Conv3d)
    if not convolution:
        embedding.proj = PatchProjection(embedding.proj)
    return model.eval()


def patches(image):
    """Input of the vision tower, (N, 3 * 2 * 16 * 16), in [-1, 1]. The two frames of a still image are equal."""
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


def whole_features(model, *images, pad_to=None):
    """Hidden states of the whole model, with positions of padding that continue after the text's.

    By itself, it gives all padding tokens the same position.
    """
    tokenizer = byte_tokenizer()
    ids = tokenizer(chat_text(*(image.width * image.height // 32**2 for image in images))).input_ids
    padding = [0] * (pad_to - len(ids) if pad_to else 0)
    input_ids = torch.tensor([ids + [tokenizer.pad_token_id for _ in padding]])
    grid = torch.tensor([[1, image.height // 16, image.width // 16] for image in images])
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
            pixel_values=torch.cat([*map(patches, images)]),
            image_grid_thw=grid,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states


@pytest.mark.parametrize("rope", ["vlm", "text_encoder"])
@pytest.mark.parametrize("vlm_tied", [True, False])
@pytest.mark.parametrize(("kind", "tied"), [(Qwen3ForCausalLM, True), (Qwen3ForCausalLM, False), (Qwen3Model, True)])
def test_features_with_images_equal_those_of_the_whole_model(vlm_paths, make_picture, kind, tied, vlm_tied, rope):
    text_encoder = make_text_encoder(kind, tie_word_embeddings=tied)
    encoder = make_encoder(vlm_paths[vlm_tied], rope=rope)
    encoder.load(text_encoder)
    whole = whole_model(vlm_paths[vlm_tied], text_encoder, rope)
    wide, tall = make_picture(1, *WIDE), make_picture(2, *TALL)
    for images in ([wide], [tall], [wide, tall], [tall, wide, tall]):
        for pad_to in (None, 110):
            found = features(encoder, *images, pad_to=pad_to)
            assert len(found) == 6 and found[0].shape[2] == 32 and (pad_to is None or found[0].shape[1] == pad_to)
            assert equal(found, whole_features(whole, *images, pad_to=pad_to))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_patch_projection_equals_the_convolution_and_shares_its_weights(dtype):
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(3, 32, (2, 16, 16), (2, 16, 16)).to(dtype)
    linear = PatchProjection(convolution)
    pixels = torch.randn(24, 3, 2, 16, 16).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(linear(pixels), convolution(pixels).flatten(1))
    assert linear.weight.data_ptr() == convolution.weight.data_ptr()
    assert linear.bias.data_ptr() == convolution.bias.data_ptr()


def test_no_convolution_remains_in_the_vision_tower(vlm_path, text_encoder, make_picture):
    encoder = make_encoder(vlm_path)
    encoder.load(text_encoder)
    assert not any(isinstance(module, torch.nn.Conv3d) for module in encoder._model.modules())
    picture = make_picture(1, *WIDE)
    whole = whole_model(vlm_path, text_encoder, "vlm", convolution=True)
    for found, expected in zip(features(encoder, picture), whole_features(whole, picture), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "attention"), [(torch.bfloat16, "sdpa"), (torch.float32, "eager"), (torch.bfloat16, "eager")]
)
def test_dtype_and_attention_are_those_of_the_text_encoder(vlm_path, make_picture, dtype, attention):
    text_encoder = make_text_encoder(attn_implementation=attention).to(dtype)
    encoder = make_encoder(vlm_path)
    encoder.load(text_encoder)
    found = features(encoder, make_picture(1, *WIDE), pad_to=80)
    assert {tensor.dtype for tensor in (*found, *encoder._model.parameters())} == {dtype}
    whole = whole_model(vlm_path, text_encoder, "vlm", dtype)
    assert equal(found, whole_features(whole, make_picture(1, *WIDE), pad_to=80))


@pytest.mark.parametrize("pad_to", [None, 100])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [Qwen3ForCausalLM, Qwen3Model])
def test_a_text_without_an_image_has_the_text_encoders_features_with_its_rope(
    vlm_path, make_picture, kind, attention, pad_to
):
    text_encoder = make_text_encoder(kind, attn_implementation=attention)
    own = text_features(text_encoder, pad_to)
    for rope in ("text_encoder", "vlm"):
        encoder = make_encoder(vlm_path, rope=rope)
        encoder.load(text_encoder)
        features(encoder, make_picture(1, *WIDE))  # must not leave a state in the model
        found = features(encoder, pad_to=pad_to)
        assert equal(found, own) == (rope == "text_encoder")
        assert torch.equal(found[0], own[0])
        assert (found[-1] - own[-1]).abs().max() > 0.01 or rope == "text_encoder"


def test_the_tiny_vlm_fits_the_tiny_kleins_text_encoder(pipeline, make_picture, tmp_path):
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


@pytest.mark.parametrize("kind", ["nf4", "int8", "float8"])
def test_a_quantized_text_encoder_is_shared_too(vlm_path, make_picture, tmp_path, kind):
    text_encoder = make_text_encoder(hidden_size=64, intermediate_size=128, head_dim=32)
    text_encoder.save_pretrained(tmp_path / "text_encoder")
    config = text_encoder_quantization(SimpleNamespace(quantize_text_encoder=kind), torch.float32)
    quantized = Qwen3ForCausalLM.from_pretrained(
        tmp_path / "text_encoder", dtype=torch.float32, device_map="cpu", quantization_config=config
    )
    encoder = make_encoder(make_tiny_vlm(tmp_path / "vlm", text_config=text_encoder.config), text_encoder.config)
    encoder.load(quantized)
    theirs = dict(quantized.model.named_parameters())
    ours = dict(encoder._model.language_model.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
    assert {"nf4": "Params4bit", "int8": "Int8Tensor", "float8": "Float8Tensor"}[kind] in {
        type(parameter).__name__ for parameter in ours.values()
    }
    found = features(encoder, make_picture(1, *WIDE))
    encoder.load(text_encoder)
    whole = features(encoder, make_picture(1, *WIDE))
    moved = [float((a - b).norm() / b.norm()) for a, b in zip(found, whole, strict=True)]
    assert moved[0] == 0 and 0 < moved[1] < 0.4  # the embeddings, and what the first layer adds


def test_the_language_model_shares_the_text_encoders_tensors_after_moves_and_casts(vlm_path, text_encoder):
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
        (200, 300, 512, 512, 14 * 20),  # enlarged and rounded up to more than 16 * 16
        (640, 640, 512, 768, 20 * 20),
        (1024, 1024, 512, 768, 24 * 24),
        (100, 100, 512, 768, 16 * 16),
    ],
)
def test_number_of_image_tokens(vlm_path, height, width, min_side, max_side, tokens):
    encoder = make_encoder(vlm_path, min_pixels=min_side**2, max_pixels=max_side**2)
    assert encoder.num_image_tokens(height, width) == tokens
    processed = encoder._image_processor(Image.new("RGB", (width, height)), return_tensors="pt")
    assert len(processed["pixel_values"]) == 4 * tokens


def test_pixel_limits_of_the_checkpoint_are_ignored(vlm_copy):
    change_json(vlm_copy / "preprocessor_config.json", min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    assert make_encoder(vlm_copy).num_image_tokens(512, 512) == 4 * 4


def test_content_has_the_image_before_the_prompt(vlm_path):
    content = make_encoder(vlm_path).content("a ball", 3)
    assert content == "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>a ball"


@pytest.mark.parametrize("token", ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
def test_a_prompt_with_an_image_token_is_refused(vlm_path, token):
    with pytest.raises(InputError) as caught:
        make_encoder(vlm_path).content(f"a\nball {token}", 3)
    message = str(caught.value)
    assert message.startswith("'a\\nball ") and f"contains {token}, reserved for the image" in message
    assert message.endswith("; remove it from the caption or from the teacher's prompt suffix")
    assert "\n" not in message


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


def test_the_content_of_the_image_matters(vlm_path, text_encoder, make_picture):
    encoder = make_encoder(vlm_path)
    encoder.load(text_encoder)
    ball, other, again = (features(encoder, make_picture(number, *WIDE)) for number in (1, 2, 1))
    assert equal(ball, again)
    # The text after the image attends to it, so all layers after the embeddings differ.
    assert all((one[:, -1] - two[:, -1]).abs().max() > 0.01 for one, two in zip(ball[1:], other[1:], strict=True))
    alone = features(encoder)
    assert (ball[-1][:, -1] - alone[-1][:, -1]).abs().max() > 0.01


def test_features_of_a_picture_are_the_mean_of_its_tokens(vlm_path, text_encoder, make_picture):
    encoder = make_encoder(vlm_path)
    encoder.load(text_encoder)
    picture = make_picture(1, *WIDE)
    tokens = byte_tokenizer()(chat_text(6)).input_ids
    is_image = torch.tensor(tokens) == byte_tokenizer().get_vocab()["<|image_pad|>"]
    embedded = features(encoder, picture)[0][0, is_image]
    torch.testing.assert_close(encoder.features(picture), embedded.mean(0))


def test_no_tensor_is_on_the_meta_device_or_requires_a_gradient(vlm_path, text_encoder, make_picture):
    encoder = make_encoder(vlm_path)
    encoder.load(text_encoder)
    tensors = [*encoder._model.parameters(), *encoder._model.buffers(), *text_encoder.parameters()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert not any(parameter.requires_grad for parameter in encoder._model.parameters())
    assert not any(module.training for module in encoder._model.modules())
    text_encoder.requires_grad_(True)
    assert not any(state.requires_grad for state in features(encoder, make_picture(1, *WIDE)))


def test_unload_frees_the_tower_and_keeps_the_text_encoder(vlm_path, text_encoder, make_picture):
    before = text_features(text_encoder)
    encoder = make_encoder(vlm_path)
    encoder.load(text_encoder)
    with_image = features(encoder, make_picture(1, *WIDE))
    model, tower = weakref.ref(encoder._model), weakref.ref(encoder._model.visual.patch_embed.proj.weight)
    encoder.unload()
    gc.collect()
    assert model() is None and tower() is None
    assert equal(text_features(text_encoder), before)
    encoder.load(text_encoder)
    assert equal(features(encoder, make_picture(1, *WIDE)), with_image)
