"""Z-Image-Turbo: contexts, states and images are those of the stock pipeline."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from dopsd.lora_roles import lora_target_modules
from dopsd.pretrained import transformer_skeleton
from dopsd.rollout import rollout, seeded_noise
from pipelines.published import Z_IMAGE_LORA_LAYERS
from pipelines.vision_encoder import VisionEncoder
from pipelines.z_image import ZImageContext, ZImageDOPSDPipeline, is_turbo
from stock_helpers import assert_decodes_as_stock
from tiny_vlm import make_tiny_vlm
from tiny_zimage import tiny_text_config


PROMPT = "a striped ball on grass"
PROMPTS = [PROMPT, "a ball", "a much longer caption of a ball that lies on the grass of a garden"]
LENGTH = 100


@pytest.fixture
def pipeline(zimage_path):
    return ZImageDOPSDPipeline.from_pretrained(zimage_path)


@pytest.fixture
def stock(zimage_path):
    stock = ZImagePipeline.from_pretrained(zimage_path)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture(scope="module")
def vlm_path(tmp_path_factory):
    return make_tiny_vlm(tmp_path_factory.mktemp("vlm"), text_config=tiny_text_config())


def vision_encoder(pipeline, vlm_path, **settings):
    limits = {"min_pixels": 64 * 64, "max_pixels": 96 * 96}
    encoder = VisionEncoder(vlm_path, pipeline.tokenizer, pipeline.text_encoder.config, **limits | settings)
    encoder.load(pipeline.text_encoder)
    return encoder


def stock_latents(stock, noise, num_steps):
    return stock(
        prompt=PROMPT,
        height=noise.shape[2] * 8,
        width=noise.shape[3] * 8,
        num_inference_steps=num_steps,
        guidance_scale=0.0,
        latents=noise,
        max_sequence_length=LENGTH,
        output_type="latent",
    ).images


@pytest.mark.parametrize("num_steps", [1, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (64, 144)])
def test_rollout_and_samples_equal_the_stock_pipelines_bit_for_bit(pipeline, stock, height, width, num_steps):
    noise = seeded_noise(pipeline.latent_shape(height, width), [3])
    context = pipeline.encode_student([PROMPT], max_sequence_length=LENGTH)

    def velocity(latents, timestep):
        return pipeline.predict_velocity(latents, timestep, context)

    expected = stock_latents(stock, noise, num_steps)
    with torch.no_grad():
        *_, last = rollout(velocity, velocity, noise, pipeline.schedule(height, width, num_steps))
    assert torch.equal(last.next_latents, expected)
    assert torch.equal(pipeline.sample(context, noise, num_steps), expected)


def test_bfloat16_samples_equal_the_stock_pipelines_bit_for_bit(zimage_path):
    """The latents stay in float32, only the transformer is in bfloat16."""
    pipeline = ZImageDOPSDPipeline.from_pretrained(zimage_path, dtype=torch.bfloat16)
    stock = ZImagePipeline.from_pretrained(zimage_path, dtype=torch.bfloat16)
    noise = seeded_noise(pipeline.latent_shape(64, 96), [3])
    latents = pipeline.sample(pipeline.encode_student([PROMPT], max_sequence_length=LENGTH), noise, 8)
    assert latents.dtype == pipeline.latents_dtype == torch.float32
    assert torch.equal(latents, stock_latents(stock, noise, 8))


def test_a_schedule_that_depends_on_the_image_size_is_followed(pipeline, stock):
    for one in (pipeline, stock):
        one.scheduler = FlowMatchEulerDiscreteScheduler.from_config(one.scheduler.config, use_dynamic_shifting=True)
    noise = seeded_noise(pipeline.latent_shape(64, 144), [3])
    context = pipeline.encode_student([PROMPT], max_sequence_length=LENGTH)
    assert torch.equal(pipeline.sample(context, noise, 4), stock_latents(stock, noise, 4))
    assert not torch.equal(pipeline.schedule(64, 64, 4).sigmas, pipeline.schedule(512, 512, 4).sigmas)


def test_sigmas_are_the_published_ones(pipeline):
    four, eight = (pipeline.schedule(1024, 1024, num_steps).sigmas for num_steps in (4, 8))
    torch.testing.assert_close(four, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]), atol=1e-4, rtol=0)
    expected = torch.tensor([1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0.0])
    torch.testing.assert_close(eight, expected, atol=1e-4, rtol=0)


def test_velocity_points_from_the_image_to_the_noise(pipeline):
    """With a transformer that returns x0 - noise, one step ends at x0."""
    context = pipeline.encode_student([PROMPT], max_sequence_length=LENGTH)
    noise, x0 = seeded_noise(pipeline.latent_shape(64, 64), [0]), seeded_noise(pipeline.latent_shape(64, 64), [1])
    pipeline.transformer.forward = lambda inputs, *args, **kwargs: ([(x0 - noise)[0, :, None]],)
    torch.testing.assert_close(pipeline.sample(context, noise, 1), x0)


def test_decoded_images_are_those_of_the_stock_pipeline(pipeline, stock):
    assert_decodes_as_stock(pipeline, stock, PROMPT, guidance_scale=0.0, max_sequence_length=LENGTH)


def test_a_pictures_latents_are_the_vaes(pipeline, make_picture):
    picture = make_picture(1, 96, 64)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist.mode()[0]
    torch.testing.assert_close(pipeline.picture_latents(picture), expected, atol=1e-4, rtol=1e-4)


def test_a_batch_of_different_lengths_gives_the_velocities_of_its_single_samples(pipeline, vlm_path, make_picture):
    encoder = vision_encoder(pipeline, vlm_path)
    pictures = [make_picture(1), make_picture(2, 96, 64), make_picture(3, 64, 128)]
    noise = seeded_noise(pipeline.latent_shape(64, 80), [0, 1, 2])
    time = pipeline.schedule(64, 80, 4).timesteps[1]
    for encode in (
        lambda indices: pipeline.encode_student([PROMPTS[i] for i in indices], max_sequence_length=LENGTH),
        lambda indices: pipeline.encode_vlm_teacher(
            [PROMPTS[i] for i in indices], [pictures[i] for i in indices], vision_encoder=encoder
        ),
    ):
        together = encode([0, 1, 2])
        assert len({embeds.shape[0] for embeds in together.prompt_embeds}) == 3
        with torch.no_grad():
            velocities = pipeline.predict_velocity(noise, time, together)
            for index in range(3):
                alone = pipeline.predict_velocity(noise[index : index + 1], time, encode([index]))
                torch.testing.assert_close(velocities[index : index + 1], alone, atol=1e-5, rtol=1e-5)


def test_encoding_does_not_change_the_list_of_prompts(pipeline, vlm_path, make_picture):
    prompts = list(PROMPTS)
    first = pipeline.encode_student(prompts, max_sequence_length=LENGTH)
    pipeline.encode_vlm_teacher(prompts, [make_picture(1)] * 3, vision_encoder=vision_encoder(pipeline, vlm_path))
    assert prompts == PROMPTS
    second = pipeline.encode_student(prompts, max_sequence_length=LENGTH)
    assert all(torch.equal(a, b) for a, b in zip(first.prompt_embeds, second.prompt_embeds, strict=True))


def test_the_teachers_text_is_the_students_with_the_image_before_the_prompt(pipeline, vlm_path, make_picture):
    encoder = vision_encoder(pipeline, vlm_path)
    seen = []
    encoder.hidden_states = lambda text, image, pad_to: seen.append(text) or [torch.zeros(1, 2, 3)] * 3
    pipeline.encode_vlm_teacher(["a ball"], [make_picture(1, 64, 96)], vision_encoder=encoder)
    assert seen == [
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>a ball<|im_end|>\n"
        "<|im_start|>assistant\n"
    ]
    assert pipeline.chat_text("a ball") == "<|im_start|>user\na ball<|im_end|>\n<|im_start|>assistant\n"


def test_the_teacher_has_the_second_to_last_layer_of_all_tokens(pipeline, vlm_path, make_picture):
    encoder, picture = vision_encoder(pipeline, vlm_path), make_picture(1, 64, 96)
    text = pipeline.chat_text(encoder.content("a ball", 6))
    (embeds,) = pipeline.encode_vlm_teacher(["a ball"], [picture], vision_encoder=encoder).prompt_embeds
    layers = encoder.hidden_states(text, picture)
    assert len(layers) == pipeline.text_encoder.config.num_hidden_layers + 1
    assert torch.equal(embeds, layers[-2][0])
    assert embeds.shape == (pipeline.chat_token_count(encoder.content("a ball", 6)), 32)


def test_without_an_image_the_teacher_with_the_text_encoders_rope_equals_the_student(pipeline, vlm_path):
    text = pipeline.chat_text(PROMPT)
    (student,) = pipeline.encode_student([PROMPT], max_sequence_length=LENGTH).prompt_embeds
    for rope, is_same in (("text_encoder", True), ("vlm", False)):
        features = vision_encoder(pipeline, vlm_path, rope=rope).hidden_states(text)[-2][0]
        assert torch.allclose(features, student, atol=1e-5) == is_same


def test_the_image_changes_the_velocity(pipeline, vlm_path, make_picture):
    encoder = vision_encoder(pipeline, vlm_path)
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0])
    time = pipeline.schedule(64, 64, 4).timesteps[0]
    contexts = [pipeline.encode_student([PROMPT], max_sequence_length=LENGTH)]
    contexts += [
        pipeline.encode_vlm_teacher([PROMPT], [picture], vision_encoder=encoder)
        for picture in (make_picture(1), make_picture(5))
    ]
    with torch.no_grad():
        velocities = [pipeline.predict_velocity(noise, time, context) for context in contexts]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (velocities[one] - velocities[other]).norm() / velocities[one].norm() > 1e-3


def test_the_longest_allowed_text_fits_the_transformers_positions(pipeline):
    """The script allows 1504 tokens for 1536 positions. With 32 more, no position is left for the image."""
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0])
    time = pipeline.schedule(64, 64, 4).timesteps[0]
    with torch.no_grad():
        pipeline.predict_velocity(noise, time, ZImageContext((torch.randn(1504, 32),)))
        with pytest.raises(IndexError):
            pipeline.predict_velocity(noise, time, ZImageContext((torch.randn(1505, 32),)))


def test_all_of_a_context_is_moved(pipeline):
    context = pipeline.encode_student(PROMPTS, max_sequence_length=LENGTH)
    moved = context.to(torch.device("meta"))
    assert isinstance(moved, ZImageContext) and {embeds.device.type for embeds in moved.prompt_embeds} == {"meta"}


def test_default_targets_are_the_attention_and_feed_forward_layers(zimage_path, pipeline):
    skeleton = transformer_skeleton(ZImageTransformer2DModel, zimage_path)
    assert {name for name, _ in skeleton.named_modules()} == {name for name, _ in pipeline.transformer.named_modules()}
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    blocks = ["noise_refiner.0", "context_refiner.0", "layers.0", "layers.1"]
    parts = [f"attention.to_{part}" for part in ("q", "k", "v", "out.0")] + [f"feed_forward.w{i}" for i in (1, 2, 3)]
    expected = {f"{block}.{part}" for block in blocks for part in parts}
    assert set(lora_target_modules(skeleton, Z_IMAGE_LORA_LAYERS)) == expected


def test_turbo_is_recognised_by_its_schedule(pipeline):
    assert is_turbo(pipeline.scheduler.config)
    assert not is_turbo({"shift": 6.0, "use_dynamic_shifting": False})
    assert not is_turbo({"shift": 3.0, "use_dynamic_shifting": True})
