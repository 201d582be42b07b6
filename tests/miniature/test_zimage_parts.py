"""The miniature Z-Image-Turbo computes what the stock pipeline and the stock Qwen3-VL compute."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, ZImagePipeline
from transformers import Qwen3VLForConditionalGeneration

from benchmarks.miniature import vae as klein_vae
from benchmarks.miniature import world
from benchmarks.miniature.evaluate import decode, final_latents
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.tasks import make_task
from benchmarks.miniature.tower import patches
from benchmarks.miniature.zimage import VLM_FOLDER, ZIMAGE
from benchmarks.miniature.zimage_parts import NUM_VISUAL_TOKENS
from dopsd.rollout import seeded_noise
from pipelines.vision_encoder import IMAGE_PAD


def random_pictures(count: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    sprites = np.stack([world.random_sprite(rng) for _ in range(8)])
    return klein_vae.random_pictures(sprites, rng, count)


def picture_task(count: int):
    return make_task(world.known_appearances(), count, with_reference=True, seed=0)


@pytest.fixture(scope="module")
def klein():
    return AutoencoderKLFlux2.from_pretrained(MODEL, subfolder="vae")


@pytest.fixture(scope="module")
def stock_pipeline(zimage_folder):
    pipeline = ZImagePipeline.from_pretrained(zimage_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def test_its_vae_decodes_what_kleins_decodes(zimage, klein):
    pictures = random_pictures(8)
    tokens = ZIMAGE.encode(zimage.vae, pictures)
    decoded = zimage.vae.decode(zimage.vae_latents(ZIMAGE.latents(tokens))).sample
    expected = klein_vae.decode(klein, klein_vae.encode(klein, pictures))
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_its_latents_are_normalised_and_as_uncertain_as_kleins(zimage, klein):
    pictures = random_pictures(128)
    latents = ZIMAGE.latents(ZIMAGE.encode(zimage.vae, pictures))
    assert latents.mean((0, 2, 3)).abs().max() < 0.15
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.15
    ours, theirs = (vae.encode(pictures[:4]).latent_dist for vae in (zimage.vae, klein))
    scale = ours.mean.std((0, 2, 3)) / theirs.mean.std((0, 2, 3))
    torch.testing.assert_close(ours.std, theirs.std * scale.view(1, -1, 1, 1))


@torch.no_grad()
def test_tokens_are_the_transformers_patches(zimage):
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ZIMAGE.latents(ZIMAGE.tokens(latents)), latents)
    (embedder,) = zimage.transformer.all_x_embedder.values()
    seen = []
    hook = embedder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    zimage.predict_velocity(latents, torch.tensor(500.0), ZIMAGE.text_context(zimage, ["a plain red disc on sand"]))
    hook.remove()
    assert torch.equal(ZIMAGE.tokens(latents).view(64, 64), seen[0].view(64, 64))


@pytest.mark.parametrize("num_steps", [8, 4])
@pytest.mark.parametrize("has_picture", [False, True])
def test_samples_are_the_stock_pipelines(zimage, stock_pipeline, num_steps, has_picture):
    task = picture_task(1)
    if has_picture:
        context = ZIMAGE.reference_context(zimage, task.prompts, task.references)
        conditioning = {"prompt_embeds": list(context.prompt_embeds)}
    else:
        conditioning = {"prompt": list(task.prompts)}  # the stock pipeline writes into the list
    expected = stock_pipeline(
        **conditioning,
        height=world.SIDE,
        width=world.SIDE,
        num_inference_steps=num_steps,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]
    references = task.references if has_picture else ()
    latents = final_latents(zimage, task.prompts, [3], references=references, num_steps=num_steps)
    assert latents.shape == (1, 16, 16, 16)
    drawn = decode(zimage, latents)[0].permute(1, 2, 0).numpy() / 2 + 0.5
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_velocities_are_those_of_the_samples_each_at_its_own_sigma(zimage):
    context = ZIMAGE.text_context(zimage, ["a plain red disc on sand", "a zofu on mint"])
    noise = seeded_noise(zimage.latent_shape(world.SIDE, world.SIDE), [0, 1])
    states = ZIMAGE.tokens(noise)
    at_one, mixed = (
        ZIMAGE.velocity(zimage, states, torch.tensor(sigmas), context) for sigmas in ([1.0, 1.0], [0.3, 1.0])
    )
    assert at_one.shape == (2, 8, 8, 64) and at_one.dtype == torch.float32
    # The one step of a sample leads from sigma = 1 to 0.
    torch.testing.assert_close(states - at_one, ZIMAGE.tokens(zimage.sample(context, noise, 1)))
    torch.testing.assert_close(mixed[1], at_one[1])
    assert (mixed[0] - at_one[0]).abs().max() > 1e-3


def test_texts_fit_into_the_blocks_of_32_tokens_that_training_sees(zimage):
    prompts = [
        world.caption(appearance.words, background) + world.REFERENCE_SUFFIX
        for appearance in world.all_appearances()[::7]
        for background in world.BACKGROUNDS
    ]
    longest = max(map(zimage.chat_token_count, prompts))
    assert 16 < longest <= 32
    # With a picture there are its tokens, their two marks, and a nonsense word of up to three tokens.
    task = picture_task(16)
    context = ZIMAGE.reference_context(zimage, task.prompts, task.references)
    lengths = {len(embeds) for embeds in context.prompt_embeds}
    assert lengths == {zimage.chat_token_count(prompt) + NUM_VISUAL_TOKENS + 2 for prompt in task.prompts}
    assert longest + NUM_VISUAL_TOKENS + 2 + 3 <= 96


@torch.no_grad()
def test_the_teachers_context_is_the_whole_qwen3_vls(zimage, zimage_folder):
    """As transformers loads it from the folder, with its own token ids, positions and RoPE base."""
    vlm = Qwen3VLForConditionalGeneration.from_pretrained(zimage_folder / VLM_FOLDER).eval()
    for name, weight in vlm.model.language_model.state_dict().items():
        assert torch.equal(weight, zimage.text_encoder.state_dict()[name]), name
    task = picture_task(1)
    (context,) = ZIMAGE.reference_context(zimage, task.prompts, task.references).prompt_embeds
    encoder = zimage.vision_encoder
    text = zimage.chat_text(encoder.content(task.prompts[0], NUM_VISUAL_TOKENS))
    ids = zimage.tokenizer(text, return_tensors="pt").input_ids
    is_image = ids == zimage.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    assert is_image.sum() == NUM_VISUAL_TOKENS
    inputs = {
        "input_ids": ids,
        "pixel_values": patches(world.to_tensor([np.asarray(task.references[0]) / 127.5 - 1])),
        "image_grid_thw": torch.tensor([[1, 16, 16]]),
    }
    if "mm_token_type_ids" in inspect.signature(vlm.model.forward).parameters:
        inputs["mm_token_type_ids"] = is_image.int()
    hidden = vlm(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(hidden[-2][0], context, rtol=1e-4, atol=1e-4)
