"""The shipped miniature: what it is made of, and what it can draw."""

import pytest
import torch
from diffusers import Flux2KleinPipeline

from benchmarks.miniature import world
from benchmarks.miniature.files import MODEL, REPOSITORY
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.parts import make_text_encoder, make_tokenizer
from benchmarks.miniature.tasks import standard_tasks
from stock_helpers import draw_miniature


@pytest.fixture(scope="module")
def stock_pipeline():
    pipeline = Flux2KleinPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_small_and_its_text_encoder_is_what_the_code_makes(stock_pipeline):
    files = [*MODEL.rglob("*.safetensors")]
    assert sum(file.stat().st_size for file in files) <= 30e6
    assert stock_pipeline.config.is_distilled and len(stock_pipeline.text_encoder.model.layers) == 28
    tokenizer = make_tokenizer()
    prompt = world.caption("striped red and blue diamond", "sand")
    assert stock_pipeline.tokenizer(prompt).input_ids == tokenizer(prompt).input_ids
    made = make_text_encoder(len(tokenizer)).state_dict()
    for name, weight in stock_pipeline.text_encoder.state_dict().items():
        assert torch.equal(weight, made[name]), name


@pytest.mark.parametrize("kind", ["text_seen", "text_unseen", "reference_seen", "reference_unseen"])
def test_stock_diffusers_draws_what_is_asked_for(stock_pipeline, reader, kind):
    task = standard_tasks(16)[kind]
    seeds = range(len(task.prompts))
    if task.references:  # the stock pipeline gives all references to every prompt of a batch
        rows = zip(task.prompts, seeds, task.references, strict=True)
        pictures = torch.cat(
            [draw_miniature(stock_pipeline, KLEIN, [seed], prompt=prompt, image=image) for prompt, seed, image in rows]
        )
    else:
        pictures = draw_miniature(stock_pipeline, KLEIN, seeds, prompt=task.prompts)
    figures = reader.accuracy(reader.read(pictures), task.wanted, task.backgrounds)
    assert figures["exact"] >= 0.9 and figures["background"] >= 0.9


def test_the_readmes_example_draws(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    text = (MODEL.parent / "README.md").read_text()
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["image"].size == (world.SIDE, world.SIDE)
