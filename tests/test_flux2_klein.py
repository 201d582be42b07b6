"""FLUX.2-klein's conventions: what the rollout visits is what the stock pipeline visits."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline

from pipelines import InputError
from pipelines.flux2_klein import KleinContext, check_is_klein, transformer_skeleton
from pipelines.rollout import rollout, seeded_noise
from tiny_klein import make_tiny_klein


PROMPT = "a striped ball on grass"
LENGTH = 64


@pytest.mark.parametrize("num_references", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (64, 128)])
def test_rollout_equals_the_stock_pipeline_bit_for_bit(
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
    context = pipeline.encode_teacher([PROMPT], [picture], prompt_suffix=suffix, max_sequence_length=LENGTH)
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


def test_rollout_visits_what_the_sampler_visits(pipeline):
    context = pipeline.encode_student([PROMPT], max_sequence_length=LENGTH)
    noise = seeded_noise(pipeline.latent_shape(64, 96), [3])

    def velocity(latents, timestep):
        return pipeline.predict_velocity(latents, timestep, context)

    with torch.no_grad():
        *_, last = rollout(velocity, velocity, noise, pipeline.schedule(64, 96, 4))
    assert torch.equal(pipeline.image_latents(last.next_latents), pipeline.sample(context, noise, 4))


def test_decoded_pictures_are_the_stock_pipelines(pipeline, klein_path):
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0, 1])
    context = pipeline.encode_student([PROMPT] * 2, max_sequence_length=LENGTH)
    stock = Flux2KleinPipeline.from_pretrained(klein_path)
    images = pipeline.decode(pipeline.sample(context, noise, 2))
    for seed, image in enumerate(images):
        expected = stock(
            prompt=PROMPT,
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(seed),
            max_sequence_length=LENGTH,
        ).images[0]
        assert abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1  # a batch of two rounds otherwise


def test_a_large_reference_is_shrunk_as_the_stock_pipeline_does(pipeline, make_picture):
    # 1040 x 1040 pixels become 1023 x 1023 at the pipeline's area limit, and 63 x 63 tokens.
    assert pipeline.encode_reference(make_picture(1, 1040, 1040)).shape == (1, 16, 63, 63)


def test_a_batch_gives_what_each_gives_alone(pipeline, make_picture):
    prompts, pictures = ["a ball", "a much longer caption of a ball"], [make_picture(1), make_picture(2)]
    together = pipeline.encode_teacher(prompts, pictures, max_sequence_length=LENGTH)
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0, 1])
    time = pipeline.schedule(64, 64, 4).timesteps[1]
    with torch.no_grad():
        velocities = pipeline.predict_velocity(noise, time, together)
        for index in range(2):
            alone = pipeline.encode_teacher([prompts[index]], [pictures[index]], max_sequence_length=LENGTH)
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


def test_context_moves_as_a_whole(pipeline, make_picture):
    context = pipeline.encode_teacher([PROMPT], [make_picture(1)], max_sequence_length=LENGTH)
    moved = context.to(torch.device("meta"))
    assert moved.prompt_embeds.device.type == moved.references[0].device.type == "meta"
    assert isinstance(moved, KleinContext)


def test_chat_token_count_counts_before_padding(pipeline):
    text = "<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert pipeline.chat_token_count("abc") == len(pipeline.tokenizer(text).input_ids)
    assert pipeline.chat_token_count("abcd") == pipeline.chat_token_count("abc") + 1


def test_skeleton_has_the_modules_and_no_weights(klein_path, pipeline):
    skeleton = transformer_skeleton(klein_path)
    assert {name for name, _ in skeleton.named_modules()} == {name for name, _ in pipeline.transformer.named_modules()}
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_distilled_and_undistilled_are_told_apart(klein_path, tmp_path):
    assert check_is_klein(klein_path) is True
    assert check_is_klein(make_tiny_klein(tmp_path / "base", is_distilled=False)) is False


@pytest.fixture
def other_model(klein_path, tmp_path):
    """The checkpoint with one JSON file changed."""

    def change(file, **values):
        folder = shutil.copytree(klein_path, tmp_path / "other")
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | values))
        return folder

    return change


def test_another_model_is_refused(other_model):
    folder = other_model("model_index.json", _class_name="Flux2Pipeline")
    with pytest.raises(InputError, match="--pretrained_model_name_or_path .* is a Flux2Pipeline, not FLUX.2-klein"):
        check_is_klein(folder)


def test_another_scheduler_is_refused(other_model):
    folder = other_model("scheduler/scheduler_config.json", stochastic_sampling=True)
    with pytest.raises(InputError, match="--pretrained_model_name_or_path .* scheduler"):
        check_is_klein(folder)


def test_no_checkpoint_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="--pretrained_model_name_or_path .* no folder of a diffusers") as caught:
        check_is_klein(str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="org/name: there is no such folder, and the Hub did not give it"):
        check_is_klein("org/name")
