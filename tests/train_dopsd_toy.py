"""A third training script, for the toy model in toy_pipeline.py: what docs/add_a_model.md asks for."""

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import Qwen3Model

from dopsd.command_line import parse_settings
from dopsd.encoders import PromptEncoder
from dopsd.model import Conditioning, Encoder, Model, Size, TokenLimit
from dopsd.model_card import CardInfo
from dopsd.model_flags import TeacherContext
from dopsd.sizes import SizeLimits
from dopsd.terminal import ending_in_one_line, lasting_output
from toy_pipeline import ToyContext, ToyPipeline, ToyTransformer, ToyVAE
from train_dopsd_flux2 import main


# What student and teacher are conditioned on


class Prompts(PromptEncoder):
    def encode(self, prompt: str, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return self.pipeline.encode_prompt(prompt)

    def shape(self, prompt: str, sizes: Sequence[Size]) -> tuple[int, ...]:
        return 1, self.width


class Colours(Encoder):
    name, noun, component = "colours", "pictures", "vae"
    reads_prompt, sees_picture = False, True

    def __init__(self, pipeline: ToyPipeline):
        self.pipeline = pipeline

    def encode(self, prompt: str, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return self.pipeline.vae.encode(*pictures)

    def shape(self, prompt: str, sizes: Sequence[Size]) -> tuple[int, ...]:
        return self.pipeline.latent_shape(*sizes[0])


# The model's settings and limits


class Toy(Model):
    name, example, tracker_name = "Toy", "someone/toy", "dopsd-toy"
    pipeline_class = stock_pipeline_class = ToyPipeline
    transformer_class, text_encoder_class, vae_class = ToyTransformer, Qwen3Model, ToyVAE
    sizes = SizeLimits(pixels_per_token=16, min_side=16, max_tokens=100)
    default_settings = {"lora_layers": "linear_in,linear_out", "learning_rate": 1e-2, "max_train_steps": 60}
    teacher_contexts = {"colours": TeacherContext("it sees the picture's colours", encoders=("text", "colours"))}
    card = CardInfo(pipeline="ToyPipeline", tags=("toy",), guidance_scale=1.0, sampling_defaults={})

    def is_distilled(self, index, scheduler):
        return True

    def resolve_settings(self, settings, transformer_config, text_config):
        return settings

    def conditioning(self, pipeline, text_config, settings):
        limit = TokenLimit("--max_sequence_length", settings.model.max_sequence_length)
        prompts = Prompts(pipeline, width=text_config.hidden_size, options={})
        return Conditioning((prompts,), (prompts, Colours(pipeline)), ToyContext.stack, limit, limit)


if __name__ == "__main__":
    with ending_in_one_line(__file__), lasting_output():
        main(parse_settings(Toy(), __doc__), Toy())
