"""How far pictures on a base in fewer bits are from those of the stock pipeline, on the trained miniature."""

import pytest
import torch
from diffusers import Flux2KleinPipeline

import train_dopsd_flux2
from benchmarks.miniature import world
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.parts import MAX_SEQUENCE_LENGTH, NUM_STEPS
from dopsd.command_line import parse_settings
from dopsd.lora_roles import StudentTeacherLoRA, adapter_options
from dopsd.pretrained import load_skeleton, load_text_encoder, load_transformer
from dopsd.rollout import seeded_noise
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline


KIND = train_dopsd_flux2.MODEL
PROMPTS = [world.caption("red disc", "sand"), world.caption("blue star", "grass")]


def settings(**flags):
    arguments = [text for name, value in flags.items() for text in (f"--{name}", value)]
    return parse_settings(KIND, "", ["--pretrained_model_name_or_path", str(MODEL), "--rank", "4", *arguments])


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Relative to the norm of `second`."""
    return float((first - second).norm() / second.norm())


@pytest.fixture
def stock_pipeline():
    pipeline = Flux2KleinPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompt: str) -> torch.Tensor:
    """Final latents of the stock pipeline, from the noise of seed 0."""
    return pipeline(
        prompt=prompt,
        height=world.SIDE,
        width=world.SIDE,
        num_inference_steps=NUM_STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        output_type="latent",
    ).images


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.02), ("float8", 0.06)])
def test_the_lora_of_a_quantized_base_draws_nearly_the_same_in_the_stock_pipeline(
    stock_pipeline, tmp_path, kind, limit
):
    """Measured for a trained LoRA: docs/memory_and_speed.md."""
    flags = settings(quantize=kind)
    transformer = load_transformer(KIND, flags.model, torch.float32)
    pipeline = Flux2KleinDOPSDPipeline.from_pretrained(MODEL, transformer=transformer)
    torch.manual_seed(0)
    roles = StudentTeacherLoRA(transformer, **adapter_options(flags.lora, load_skeleton(KIND, flags.model)))
    with torch.no_grad():
        for parameter in roles.student_parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape))

    def in_training(prompt: str) -> torch.Tensor:
        context = pipeline.encode_student([prompt], max_sequence_length=MAX_SEQUENCE_LENGTH)
        noise = seeded_noise(pipeline.latent_shape(world.SIDE, world.SIDE), [0])
        with roles.shipped_role(torch.float32):
            return pipeline.sample(context, noise, NUM_STEPS)

    base = [draw(stock_pipeline, prompt) for prompt in PROMPTS]
    weights, metadata = roles.export(torch.float32)
    Flux2KleinPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata
    )
    stock_pipeline.load_lora_weights(tmp_path)
    for prompt, without_lora in zip(PROMPTS, base, strict=True):
        shipped = draw(stock_pipeline, prompt)
        assert 0 < distance(in_training(prompt), shipped) < limit < distance(without_lora, shipped)


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.005), ("float8", 0.02)])
def test_a_quantized_text_encoder_moves_encodings_by_a_percent_at_most(stock_pipeline, kind, limit):
    flags = settings(quantize_text_encoder=kind).model
    quantized = load_text_encoder(KIND, flags, MODEL, torch.float32)
    pipelines = [
        Flux2KleinDOPSDPipeline(**stock_pipeline.components | {"text_encoder": encoder})
        for encoder in (quantized, stock_pipeline.text_encoder)
    ]
    with torch.no_grad():
        ours, theirs = (
            pipeline.encode_student(PROMPTS, max_sequence_length=MAX_SEQUENCE_LENGTH).prompt_embeds
            for pipeline in pipelines
        )
    assert 0 < distance(ours, theirs) < limit
