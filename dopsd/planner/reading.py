"""What a plan is made from: flags, pictures, captions and the checkpoint's small files. Reads no weights."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PretrainedConfig

from ..contexts import Contexts, Encoding
from ..data.order import Sample
from ..data.training_data import TrainingData, load_training_data, resolve_data_defaults
from ..launch import weight_dtype
from ..loading import limited_size, reporting_load_errors
from ..lora_roles import adapter_options
from ..model import FewStepPipeline, Model
from ..pretrained import assemble_pipeline, check_pretrained, hub_options, transformer_skeleton
from ..prior import PriorPrompts, prior_prompts
from ..prompts import drawn_prompts, resolve_prompts
from ..settings import Settings
from ..weight_roles import trained_weights
from .simulation import Batch, OneProcess, Shape, Simulator, on_meta


# Configurations, tokenizer and chat template.
SMALL_FILES = ("*.json", "*.txt", "*.jinja")


@dataclass
class PlannedRun:
    """A run as far as it is known without a weight.

    Attributes:
        model, settings, data, pipeline, contexts, prior: as in the script's `main`; settings are resolved.
        text_config: the text encoder's configuration.
        transformer: on the meta device, in its own dtype.
        lora_options: arguments of `StudentTeacherLoRA`.
        trained_names: of the weights that `--train_mode full` trains.
        vae_config: the VAE's configuration.
        num_processes: of the run.
    """

    model: Model
    settings: Settings
    data: TrainingData
    pipeline: FewStepPipeline
    contexts: Contexts
    prior: PriorPrompts
    text_config: PretrainedConfig
    transformer: torch.nn.Module
    lora_options: dict[str, Any]
    trained_names: list[str]
    vae_config: dict[str, Any]
    num_processes: int = 1

    # Components, to be built on the meta device

    def build_transformer(self) -> torch.nn.Module:
        return type(self.transformer).from_config(self.transformer.config)

    def build_text_encoder(self) -> torch.nn.Module:
        return self.model.text_encoder_class(self.text_config)

    def build_vae(self) -> torch.nn.Module:
        return self.model.vae_class.from_config(self.vae_config)

    def simulator(self, on_gpu: bool) -> Simulator:
        stack = self.contexts.conditioning.stack
        builders = self.build_transformer, self.build_text_encoder, self.build_vae
        return Simulator(self.pipeline, stack, *builders, on_gpu=on_gpu)

    # The largest micro-batch

    @cached_property
    def encodings(self) -> list[Encoding]:
        """Every encoding of the run, once."""
        prompts = [*drawn_prompts(self.settings.validation, self.prior), *self.prior.trained]
        return list(dict.fromkeys(self.contexts.all_encodings(prompts)))

    @cached_property
    def largest_sample(self) -> Sample:
        """The sample with most tokens: of its picture, of the student's context and of the teacher's."""
        return max(self.contexts.all_samples(), key=self.num_tokens)

    def student_encodings(self, sample: Sample) -> tuple[Encoding, ...]:
        return self.contexts.student_encodings(self.data.caption(sample), self.data.cond_crops(sample))

    def num_tokens(self, sample: Sample) -> int:
        """In the transformer, of student and teacher together."""
        side, size = self.model.sizes.pixels_per_token, self.data.bucket(sample)
        encodings = self.student_encodings(sample) + self.contexts.teacher_encodings(sample)
        return 2 * math.prod(size) // side**2 + self.num_context_tokens(encodings)

    def num_context_tokens(self, encodings: tuple[Encoding, ...]) -> int:
        num_pixels, num_texts = 0, 0
        for encoding in encodings:
            if encoding.encoder.reads_prompt:
                num_texts += encoding.encoder.num_tokens(encoding.prompt, encoding.sizes)
            else:
                num_pixels += math.prod(self.encoded_size(encoding))
        return num_pixels // self.model.sizes.pixels_per_token**2 + num_texts

    def encoded_size(self, encoding: Encoding) -> tuple[int, int]:
        """(height, width) in pixels at which a picture is encoded: large ones are shrunk."""
        rows, columns = encoding.encoder.shape(encoding.prompt, encoding.sizes)[-2:]
        side = self.model.sizes.pixels_per_token
        return rows * side, columns * side

    def batch(self, settings: Settings) -> Batch:
        """The largest micro-batch with other settings; a lower resolution shrinks pictures in proportion."""
        sample, contexts, order = self.largest_sample, self.contexts, self.data.order
        bucket = self.data.bucket(sample)
        side, ratio = self.model.sizes.pixels_per_token, settings.data.resolution / self.settings.data.resolution
        size = bucket if ratio == 1 else tuple(max(side, round(length * ratio / side) * side) for length in bucket)

        def shapes(encodings: tuple[Encoding, ...]) -> tuple[Shape, ...]:
            return tuple(
                encoding.encoder.shape(encoding.prompt, [size if one == bucket else one for one in encoding.sizes])
                for encoding in encodings
            )

        prior = None
        if settings.prior.with_prior_preservation:
            prior = max(map(self.held_encodings, self.prior.trained), key=self.num_context_tokens, default=None)
        return Batch(
            size,
            min(settings.training.train_batch_size, order.num_alike(sample.example)),
            student=shapes(self.student_encodings(sample)),
            teacher=shapes(contexts.teacher_encodings(sample)),
            prior=None if prior is None else shapes(prior),
        )

    def held_encodings(self, prompt: str) -> tuple[Encoding, ...]:
        """Of a prompt of prior preservation; an editor's instructions are held with pictures to edit."""
        cond_images = () if self.prior.is_unrelated(prompt) else self.data.cond_crops(self.largest_sample)
        return self.contexts.student_encodings(prompt, cond_images)


def checkpoint_folder(settings: Settings) -> Path:
    """The checkpoint's folder; of one on the Hub, only the small files are downloaded."""
    name = settings.model.pretrained_model_name_or_path
    if Path(name).is_dir():
        return Path(name)
    with reporting_load_errors(settings.model):
        return Path(snapshot_download(name, allow_patterns=SMALL_FILES, **hub_options(settings.model)))


def read_run(settings: Settings, model: Model, num_processes: int = 1) -> PlannedRun:
    """Reads pictures, captions and configurations, and checks them as the run itself does.

    Args:
        settings: with a seed and a precision.

    Raises:
        InputError: as in the run itself, but for what is wrong with weights.
    """
    process = OneProcess()
    data = load_training_data(settings, model.sizes, process)
    # Whether weights can be quantized on this machine does not matter here.
    unquantized = {"bnb_quantization_config_path": None, "quantize": None, "quantize_text_encoder": None}
    check_pretrained(model, replace(settings.model, **unquantized))
    folder = checkpoint_folder(settings)
    with reporting_load_errors(settings.model):
        transformer = transformer_skeleton(model.transformer_class, folder)
        vae_config = model.vae_class.load_config(folder, subfolder="vae")
    lora_options = adapter_options(settings.lora, transformer, model.portable_lora_layers)
    trained_names = trained_weights(transformer, settings.full.trainable_modules)
    dtype = weight_dtype(settings.training.mixed_precision)

    def empty_vae() -> torch.nn.Module:
        with limited_size():
            return on_meta(lambda: model.vae_class.from_config(vae_config), dtype)

    pipeline, text_config = assemble_pipeline(model, settings.model, folder, empty_vae)
    settings = resolve_data_defaults(settings, data, num_processes)
    settings = model.resolve_settings(settings, transformer.config, text_config)
    contexts = Contexts(
        pipeline,
        model.conditioning(pipeline, text_config, settings),
        data,
        teacher_prompt_suffix=settings.teacher.teacher_prompt_suffix,
        load_text_encoder=None,
        device=torch.device("cpu"),
    )
    settings = resolve_prompts(settings, contexts, model.teacher_context(settings))
    prior = prior_prompts(settings, data.captions, contexts.fits, process)
    return PlannedRun(
        model,
        settings,
        data,
        pipeline,
        contexts,
        prior,
        text_config,
        transformer,
        lora_options,
        trained_names,
        vae_config,
        num_processes,
    )
