"""The shipped miniature Z-Image-Turbo and its Qwen3-VL: what they are made of, and what they draw."""

import pytest
import torch
from diffusers import AutoencoderKLFlux2, ZImagePipeline
from safetensors.torch import load_file
from transformers import Qwen3VLConfig

from benchmarks.miniature import world
from benchmarks.miniature.files import MODEL, ZIMAGE_MODEL
from benchmarks.miniature.parts import make_tokenizer
from benchmarks.miniature.tasks import standard_tasks
from benchmarks.miniature.zimage import VLM_FOLDER, ZIMAGE
from benchmarks.miniature.zimage_parts import make_text_encoder, make_vae, miniature_vlm_config
from pipelines.vision_encoder import IMAGE_PAD, WEIGHTS_FILE
from stock_helpers import draw_miniature


@pytest.fixture(scope="module")
def stock_pipeline():
    pipeline = ZImagePipeline.from_pretrained(ZIMAGE_MODEL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def teacher():
    return ZIMAGE.load(ZIMAGE_MODEL)


def test_it_is_small_and_what_is_not_trained_is_what_the_code_makes(stock_pipeline):
    assert sum(file.stat().st_size for file in ZIMAGE_MODEL.rglob("*") if file.is_file()) <= 20e6
    tokenizer = make_tokenizer()
    prompt = world.caption("striped red and blue diamond", "sand")
    assert stock_pipeline.tokenizer(prompt).input_ids == tokenizer(prompt).input_ids
    made = {
        "text_encoder": make_text_encoder(len(tokenizer)),
        "vae": make_vae(AutoencoderKLFlux2.from_pretrained(MODEL, subfolder="vae")),
    }
    for name, module in made.items():
        expected = module.state_dict()
        for key, weight in stock_pipeline.components[name].state_dict().items():
            torch.testing.assert_close(weight, expected[key], msg=f"{name}: {key}")  # CPUs round differently
    vlm = load_file(ZIMAGE_MODEL / VLM_FOLDER / WEIGHTS_FILE)
    for key, weight in made["text_encoder"].state_dict().items():
        assert torch.equal(vlm[f"model.language_model.{key}"], weight), key
    config = Qwen3VLConfig.from_pretrained(ZIMAGE_MODEL / VLM_FOLDER)
    assert config.image_token_id == tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    expected = miniature_vlm_config(stock_pipeline.text_encoder.config)
    for part in ("text_config", "vision_config"):
        ours, theirs = (getattr(item, part).to_dict() | {"dtype": None} for item in (config, expected))
        assert ours == theirs


@pytest.mark.parametrize(("kind", "least"), [("text_unseen", 0.9), ("reference_unseen", 0.8)])
@pytest.mark.parametrize("num_steps", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_stock_diffusers_draws_what_is_asked_for(stock_pipeline, teacher, reader, kind, least, num_steps):
    task = standard_tasks(32)[kind]
    if task.references:
        context = ZIMAGE.reference_context(teacher, task.prompts, task.references)
        conditioning = {"prompt_embeds": list(context.prompt_embeds)}
    else:
        conditioning = {"prompt": list(task.prompts)}
    seeds = range(len(task.prompts))
    pictures = draw_miniature(stock_pipeline, ZIMAGE, seeds, num_inference_steps=num_steps, **conditioning)
    figures = reader.accuracy(reader.read(pictures), task.wanted, task.backgrounds)
    assert figures["exact"] >= least and figures["background"] >= 0.9, figures
