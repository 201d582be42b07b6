"""FLUX.2-klein: contexts, states and images are those of the stock pipeline."""

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

from dopsd.pretrained import transformer_skeleton
from dopsd.rollout import rollout, seeded_noise
from pipelines.flux2_klein import KleinContext, shrunk_size
from pipelines.vision_encoder import VisionEncoder
from stock_helpers import assert_decodes_as_stock
from tiny_vlm import make_tiny_vlm


PROMPT = "a striped ball on grass"
LENGTH = 64


@pytest.mark.parametrize("num_references", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (64, 128)])
def test_samples_equal_the_stock_pipelines_bit_for_bit(
    pipeline, klein_path, make_picture, height, width, num_steps, num_references
):
    pictures = [make_picture(1, 80, 64), make_picture(2, 64, 112)][:num_references]
    noise = seeded_noise(pipeline.latent_shape(height, width), [3])
    context = pipeline.encode_student([PROMPT], max_sequence_length=LENGTH)
    context = context.with_references(*[pipeline.encode_reference(picture) for picture in pictures])

    stock = Flux2KleinPipeline.from_pretrained(klein_path)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        prompt=PROMPT,
        image=pictures or None,
        height=height,
        width=width,
        num_inference_steps=num_steps,
        guidance_scale=1.0,
        latents=noise,
        max_sequence_length=LENGTH,
        output_type="latent",
    ).images
    assert torch.equal(pipeline.sample(context, noise, num_steps), expected)


def test_edit_teacher_equals_the_stock_pipeline_with_image(pipeline, klein_path, make_picture):
    picture, suffix = make_picture(4, 96, 64), " like the reference"
    noise = seeded_noise(pipeline.latent_shape(64, 96), [5])
    context = pipeline.encode_edit_teacher([PROMPT], [picture], prompt_suffix=suffix, max_sequence_length=LENGTH)
    stock = Flux2KleinPipeline.from_pretrained(klein_path)
    expected = stock(
        prompt=PROMPT + suffix,
        image=picture,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=noise,
        max_sequence_length=LENGTH,
        output_type="latent",
    ).images
    assert torch.equal(pipeline.sample(context, noise, 4), expected)


def test_edit_teacher_takes_several_pictures_per_prompt(pipeline, make_picture):
    pictures = [[make_picture(number, 96, 64), make_picture(number + 5)] for number in range(2)]
    context = pipeline.encode_edit_teacher(["a", "b"], pictures, max_sequence_length=LENGTH)
    assert [reference.shape[2:] for reference in context.references] == [(4, 6), (4, 4)]
    for index, own in enumerate(pictures):
        for reference, picture in zip(context.references, own, strict=True):
            assert torch.equal(reference[index : index + 1], pipeline.encode_reference(picture))
    with pytest.raises(ValueError):
        pipeline.encode_edit_teacher(["a", "b"], [pictures[0], pictures[1][:1]], max_sequence_length=LENGTH)


@pytest.fixture
def vision_encoder(pipeline, vlm_folder):
    def make(**settings):
        path = vlm_folder / "vlm-28"
        if not path.exists():
            make_tiny_vlm(path)
        limits = {"min_pixels": 64 * 64, "max_pixels": 64 * 64}
        encoder = VisionEncoder(path, pipeline.tokenizer, pipeline.text_encoder.config, **limits | settings)
        encoder.load(pipeline.text_encoder)
        return encoder

    return make


def test_vlm_teacher_has_the_students_layers_of_the_padded_text(pipeline, vision_encoder, make_picture):
    encoder, picture = vision_encoder(), make_picture(4, 96, 64)
    count = encoder.num_image_tokens(64, 96)
    text = (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" + PROMPT + "<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    context = pipeline.encode_vlm_teacher(
        [PROMPT, "a box"], [picture, make_picture(1)], vision_encoder=encoder, max_sequence_length=LENGTH
    )
    layers = encoder.hidden_states(text, picture, pad_to=LENGTH)
    assert context.prompt_embeds.shape == (2, LENGTH, 96) and context.references == ()
    assert torch.equal(context.prompt_embeds[0], torch.cat([layers[layer][0] for layer in (9, 18, 27)], dim=-1))
    other = pipeline.encode_vlm_teacher(
        [PROMPT], [picture], vision_encoder=encoder, max_sequence_length=LENGTH, text_encoder_out_layers=(3, 6, 28)
    )
    assert torch.equal(other.prompt_embeds[0], torch.cat([layers[layer][0] for layer in (3, 6, 28)], dim=-1))


def test_without_an_image_the_vlm_teacher_equals_the_student_including_padding(pipeline, vision_encoder):
    student = pipeline.encode_student([PROMPT], max_sequence_length=LENGTH).prompt_embeds[0]
    text = pipeline.chat_text(PROMPT)
    for rope, is_same in (("text_encoder", True), ("vlm", False)):
        layers = vision_encoder(rope=rope).hidden_states(text, pad_to=LENGTH)
        assert torch.equal(torch.cat([layers[layer][0] for layer in (9, 18, 27)], dim=-1), student) == is_same


def test_rollout_ends_where_the_sampler_ends(pipeline):
    context = pipeline.encode_student([PROMPT], max_sequence_length=LENGTH)
    noise = seeded_noise(pipeline.latent_shape(64, 96), [3])

    def velocity(latents, timestep):
        return pipeline.predict_velocity(latents, timestep, context)

    with torch.no_grad():
        *_, last = rollout(velocity, velocity, noise, pipeline.schedule(64, 96, 4))
    assert torch.equal(pipeline.image_latents(last.next_latents), pipeline.sample(context, noise, 4))


def test_decoded_images_are_those_of_the_stock_pipeline(pipeline, klein_path):
    stock = Flux2KleinPipeline.from_pretrained(klein_path)
    assert_decodes_as_stock(pipeline, stock, PROMPT, guidance_scale=1.0, max_sequence_length=LENGTH)


def test_a_pictures_latents_are_those_of_a_reference_before_patches_and_norm(pipeline, make_picture):
    picture = make_picture(1, 96, 64)
    latents = pipeline.picture_latents(picture)
    assert latents.shape == (pipeline.vae.config.latent_channels, 8, 12)
    torch.testing.assert_close(latents[None], pipeline.image_latents(pipeline.encode_reference(picture)))


def test_a_large_reference_is_shrunk_as_in_the_stock_pipeline(pipeline, make_picture):
    # The area limit turns 1040 x 1040 pixels into 1023 x 1023, which are 63 x 63 tokens.
    assert pipeline.encode_reference(make_picture(1, 1040, 1040)).shape == (1, 16, 63, 63)


@pytest.mark.parametrize(
    ("height", "width", "resolution", "tokens"),
    [(128, 128, 64, (4, 4)), (128, 192, 96, (4, 7)), (176, 96, 112, (9, 5)), (80, 640, 64, (4, 32))],
)
def test_a_reference_is_shrunk_as_diffusers_resizes(pipeline, make_picture, height, width, resolution, tokens):
    picture = make_picture(1, width, height)
    area = max(resolution**2, 64 * 64 * max(height, width) // min(height, width))  # no side below 64 pixels
    shrunk = pipeline.image_processor._resize_to_target_area(picture, area)
    latents = pipeline.encode_reference(picture, resolution)
    assert latents.shape[2:] == tokens and torch.equal(latents, pipeline.encode_reference(shrunk))
    assert latents.shape[1:] == pipeline.reference_shape(height, width, resolution)
    assert not torch.equal(latents.mean(), pipeline.encode_reference(picture).mean())


def test_a_reference_is_never_enlarged_and_loses_no_row_of_tokens_to_rounding(pipeline, make_picture):
    picture = make_picture(1, 96, 64)
    assert torch.equal(pipeline.encode_reference(picture, 80), pipeline.encode_reference(picture))
    for resolution in range(64, 1040, 16):
        for side in range(resolution, 1025, 16):
            assert shrunk_size(side, side, resolution) == (resolution, resolution)
    for height in range(64, 1025, 48):
        for width in range(64, 8 * height, 112):
            shrunk = shrunk_size(height, width, 512)
            assert min(shrunk) >= 64 and shrunk[0] <= height and shrunk[1] <= width
            assert shrunk[0] * shrunk[1] <= max(512**2, 65**2 * 8.2)


def test_a_batch_gives_the_velocities_of_its_single_samples(pipeline, make_picture):
    prompts, pictures = ["a ball", "a much longer caption of a ball"], [make_picture(1), make_picture(2)]
    together = pipeline.encode_edit_teacher(prompts, pictures, max_sequence_length=LENGTH)
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0, 1])
    time = pipeline.schedule(64, 64, 4).timesteps[1]
    with torch.no_grad():
        velocities = pipeline.predict_velocity(noise, time, together)
        for index in range(2):
            alone = pipeline.encode_edit_teacher([prompts[index]], [pictures[index]], max_sequence_length=LENGTH)
            velocity = pipeline.predict_velocity(noise[index : index + 1], time, alone)
            torch.testing.assert_close(velocities[index : index + 1], velocity, atol=1e-5, rtol=1e-5)


def test_schedule_at_one_megapixel(pipeline):
    sigmas = pipeline.schedule(1024, 1024, 4).sigmas
    torch.testing.assert_close(sigmas, torch.tensor([1.0, 0.9674, 0.9081, 0.7672, 0.0]), atol=1e-4, rtol=0)


def test_references_change_the_velocity_and_keep_its_shape(pipeline, make_picture):
    noise = seeded_noise(pipeline.latent_shape(64, 96), [0])
    time = pipeline.schedule(64, 96, 4).timesteps[0]
    student = pipeline.encode_student([PROMPT], max_sequence_length=LENGTH)
    with torch.no_grad():
        without = pipeline.predict_velocity(noise, time, student)
        reference = pipeline.encode_reference(make_picture(1, 96, 64))
        seen = pipeline.predict_velocity(noise, time, student.with_references(reference))
    assert without.shape == seen.shape == noise.shape
    assert not torch.allclose(without, seen, atol=1e-3)


def test_all_of_a_context_is_moved(pipeline, make_picture):
    context = pipeline.encode_edit_teacher([PROMPT], [make_picture(1)], max_sequence_length=LENGTH)
    moved = context.to(torch.device("meta"))
    assert moved.prompt_embeds.device.type == moved.references[0].device.type == "meta"
    assert isinstance(moved, KleinContext)


def test_chat_token_count_excludes_padding(pipeline):
    text = "<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert pipeline.chat_token_count("abc") == len(pipeline.tokenizer(text).input_ids)
    assert pipeline.chat_token_count("abcd") == pipeline.chat_token_count("abc") + 1


def test_skeleton_has_the_modules_and_no_weights(klein_path, pipeline):
    skeleton = transformer_skeleton(Flux2Transformer2DModel, klein_path)
    assert {name for name, _ in skeleton.named_modules()} == {name for name, _ in pipeline.transformer.named_modules()}
    assert all(parameter.is_meta for parameter in skeleton.parameters())
