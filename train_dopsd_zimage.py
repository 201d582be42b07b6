#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Trains a LoRA for Z-Image-Turbo, or its own weights, by on-policy self-distillation (D-OPSD, arXiv 2605.05204).

From top to bottom: the model's flags and limits, what student and teacher are conditioned on, and `main` with the
training loop. The method, and all of training that does not depend on the model, is in `dopsd/`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dopsd.command_line import parse_settings
from dopsd.errors import InputError
from dopsd.flag_types import Count, MayDiffer, flag
from dopsd.model_flags import CAPTION_CONTEXT, ModelFlags, vlm_context
from dopsd.settings import ModelSettings, Settings
from dopsd.terminal import ending_in_one_line, lasting_output
from pipelines import published


# The model's flags and limits


DEFAULT_TEACHER_MAX_SEQUENCE_LENGTH = 1024  # as in the published runs


@dataclass(frozen=True)
class ZImageSettings(ModelSettings):
    teacher_max_sequence_length: MayDiffer[Count | None] = flag(
        None,
        "Maximum number of tokens in the teacher's text, including its picture's. Default: "
        f"{DEFAULT_TEACHER_MAX_SEQUENCE_LENGTH}, or fewer if the transformer has fewer positions.",
    )


class ZImageFlags(ModelFlags):
    name = "Z-Image-Turbo"
    example = "Tongyi-MAI/Z-Image-Turbo"
    sizes = published.Z_IMAGE_SIZES
    settings_class = ZImageSettings
    default_settings = {
        "output_dir": "z-image-dopsd-lora",
        "learning_rate": 1e-4,
        "max_train_steps": published.Z_IMAGE_TRAIN_STEPS,
        "num_inference_steps": published.Z_IMAGE_STEPS,
        "lora_layers": published.Z_IMAGE_LORA_LAYERS,
    }
    teacher_contexts = {
        # The limits of the published runs.
        "vlm": vlm_context("Qwen3-VL", published.DEFAULT_VLMS, min_pixels=512 * 512, max_pixels=768 * 768),
        "caption": CAPTION_CONTEXT,
    }


if __name__ == "__main__":
    # The imports below take seconds: --help and mistakes are answered before them.
    with ending_in_one_line(__file__):
        SETTINGS = parse_settings(ZImageFlags(), __doc__)

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from diffusers.utils import check_min_version
from PIL import Image
from tqdm.auto import tqdm
from transformers import PretrainedConfig, Qwen3Model

from dopsd.checkpoints import Checkpoints
from dopsd.context_cache import ContextCache
from dopsd.contexts import Contexts, fill_cache, prepare_without_cache
from dopsd.data.training_data import load_training_data, resolve_data_defaults
from dopsd.encoders import PictureAndPromptEncoder, PromptEncoder, resolve_vlm
from dopsd.evaluation.after_training import check_evaluation, evaluate_run
from dopsd.execution import loading_device
from dopsd.gallery import Gallery
from dopsd.history import MetricsLog, last_retention
from dopsd.launch import log_plan, resolve_seed, start_accelerator, weight_dtype
from dopsd.model import Conditioning, Model, TokenLimit
from dopsd.model_card import CardInfo, License, write_run_card
from dopsd.optimizers import build_lr_scheduler, build_optimizer
from dopsd.output import open_output_dir
from dopsd.planner.dry_run import plan_run
from dopsd.pretrained import (
    check_pretrained,
    encoder_fingerprints,
    load_skeleton,
    load_text_encoder,
    load_transformer,
    open_pipeline,
)
from dopsd.prior import prior_prompts
from dopsd.prompts import drawn_prompts, resolve_prompts
from dopsd.publish import push_to_hub
from dopsd.resuming import check_resumable, find_checkpoint, resume_contract
from dopsd.step import TrainingStep, prepare_student
from dopsd.stopping import StopRequest
from dopsd.tracking import end_training, start_trackers
from dopsd.train_modes import train_mode
from pipelines.vision_encoder import VisionEncoder, default_vlm
from pipelines.z_image import ZImageContext, ZImageDOPSDPipeline, is_turbo


check_min_version("0.40.0")

# What student and teacher are conditioned on


class Prompts(PromptEncoder):
    """Prompt embeddings, (L, D), without padding. L may exceed the limit: a teacher's caption has its own."""

    def encode_batch(self, prompts: list[str]) -> list[torch.Tensor]:
        (length,) = {self.batch_length(prompt) for prompt in prompts}
        return list(self.pipeline.encode_student(prompts, max_sequence_length=length).prompt_embeds)

    def batch_length(self, prompt: str) -> int | None:
        return max(self.options["max_sequence_length"], self.num_tokens(prompt, ()))


class PicturesAndPrompts(PictureAndPromptEncoder):
    """Prompt embeddings, (L, D), of a picture followed by a prompt, without padding."""

    def encode(self, prompt: str, pictures: Sequence[Image.Image]) -> torch.Tensor:
        context = self.pipeline.encode_vlm_teacher([prompt], [pictures], vision_encoder=self.vision_encoder)
        return context.prompt_embeds[0]


class ZImageTurbo(ZImageFlags, Model):
    pipeline_class, stock_pipeline_class = ZImageDOPSDPipeline, ZImagePipeline
    transformer_class, text_encoder_class, vae_class = ZImageTransformer2DModel, Qwen3Model, AutoencoderKL
    portable_lora_layers = published.Z_IMAGE_LORA_LAYERS
    tracker_name = "dopsd-z-image-lora"
    masks_attention = True
    works_in_fp16 = False
    card = CardInfo(
        pipeline="ZImagePipeline",
        tags=("z-image",),
        guidance_scale=0.0,
        sampling_defaults={"max_sequence_length": 512},
        licenses=(License(r"Tongyi-MAI/Z-Image(-Turbo)?", title="Apache-2.0", id="apache-2.0"),),
    )

    def is_distilled(self, index: dict, scheduler: dict) -> bool:
        return is_turbo(scheduler)

    def resolve_settings(
        self, settings: Settings, transformer_config: dict, text_config: PretrainedConfig
    ) -> Settings:
        width = transformer_config["cap_feat_dim"]
        if text_config.hidden_size != width:
            raise InputError(
                f"--pretrained_model_name_or_path {settings.model.pretrained_model_name_or_path}: its text encoder "
                f"has {text_config.hidden_size} channels, its transformer takes {width}; pass a complete checkpoint, "
                f"such as {self.example}"
            )
        positions = transformer_config["axes_lens"][0]
        longest = (positions - 2) // SEQ_MULTI_OF * SEQ_MULTI_OF  # one position before the padded text, one after it
        for name in ("max_sequence_length", "teacher_max_sequence_length"):
            length = getattr(settings.model, name)
            if (length or 0) > longest:
                raise InputError(
                    f"--{name} {length}: the transformer has {positions} positions for a text and the picture after "
                    f"it; pass at most {longest}"
                )
        teacher_length = settings.model.teacher_max_sequence_length or min(
            DEFAULT_TEACHER_MAX_SEQUENCE_LENGTH, longest
        )
        settings = settings.replace(teacher_max_sequence_length=teacher_length)
        return resolve_vlm(settings, self.teacher_context(settings), default_vlm, text_config)

    def conditioning(
        self, pipeline: ZImageDOPSDPipeline, text_config: PretrainedConfig, settings: Settings
    ) -> Conditioning:
        length, teacher_length = settings.model.max_sequence_length, settings.model.teacher_max_sequence_length
        text = {"width": text_config.hidden_size, "options": {"max_sequence_length": length}}
        prompts = Prompts(pipeline, **text)
        vlm = VisionEncoder, text_config, settings.teacher, settings.model.cache_dir
        encoders = {"text": lambda: prompts, "vlm": lambda: PicturesAndPrompts(pipeline, *vlm, **text)}
        teacher = tuple(encoders[name]() for name in self.teacher_context(settings).encoders)
        return Conditioning(
            (prompts,),
            teacher,
            ZImageContext.stack,
            student_limit=TokenLimit("--max_sequence_length", length),
            teacher_limit=TokenLimit("--teacher_max_sequence_length", teacher_length),
        )


MODEL = ZImageTurbo()


# Training. This section is the same in all training scripts; a test compares them.


def main(settings: Settings, model: Model = MODEL) -> None:
    if settings.publishing.push_only:
        return push_to_hub(settings)
    if settings.performance.dry_run:
        return plan_run(settings, model)
    stop = StopRequest()
    accelerator = start_accelerator(settings, model)
    output_dir = Path(settings.training.output_dir)
    lock = open_output_dir(output_dir, accelerator)  # noqa: F841 - held until the run ends
    checkpoint = find_checkpoint(settings.training, accelerator)
    seed = resolve_seed(settings.training.seed, checkpoint)
    settings = settings.replace(mixed_precision=accelerator.mixed_precision, seed=seed)

    # Everything that a user can get wrong is checked before any weight is loaded.
    check_evaluation(settings)
    data = load_training_data(settings, model.sizes, accelerator)
    check_pretrained(model, settings.model)
    dtype = weight_dtype(settings.training.mixed_precision)
    skeleton = load_skeleton(model, settings.model)
    mode = train_mode(model, settings, skeleton)
    pipeline, folder, text_config = open_pipeline(model, settings.model, dtype)
    settings = resolve_data_defaults(settings, data, accelerator.num_processes)
    settings = model.resolve_settings(settings, skeleton.config, text_config)
    conditioning = model.conditioning(pipeline, text_config, settings)
    contexts = Contexts(
        pipeline,
        conditioning,
        data,
        teacher_prompt_suffix=settings.teacher.teacher_prompt_suffix,
        load_text_encoder=partial(load_text_encoder, model, settings.model, folder, dtype, accelerator.device),
        device=accelerator.device,
    )
    settings = resolve_prompts(settings, contexts, model.teacher_context(settings))
    prior = prior_prompts(settings, data.captions, contexts.fits, accelerator)
    prompts = [*drawn_prompts(settings.validation, prior), *prior.trained]
    contract = resume_contract(settings, conditioning, data, prior, accelerator.num_processes)
    if checkpoint is not None:
        check_resumable(checkpoint, contract, settings.training.max_train_steps)

    # The encoders are freed before the transformer is loaded, so that they are never in memory together.
    if settings.training.no_context_cache:
        prepare_without_cache(contexts)
    else:
        cache = ContextCache(Path(settings.training.context_cache_dir))
        fill_cache(contexts, cache, encoder_fingerprints(folder, settings.model), prompts, accelerator, prior.trained)
    if settings.training.encode_only:
        end_training(accelerator, "The context cache is complete: train with the same flags, without --encode_only")
        return
    pipeline.transformer = load_transformer(model, settings.model, dtype, loading_device(settings, accelerator))
    set_seed(seed)
    roles, compiled = mode.prepare(pipeline.transformer, settings, accelerator, has_prior=bool(prior.trained))

    pictures_per_step = data.pictures_per_step(settings, accelerator.num_processes)
    is_full = settings.full.is_full
    optimizer = build_optimizer(settings.optimizer, roles.student_parameters, pictures_per_step, is_full=is_full)
    lr_scheduler = build_lr_scheduler(settings.optimizer, optimizer, settings.training.max_train_steps)
    student, optimizer = prepare_student(pipeline, optimizer, settings.performance, accelerator)
    train_step = TrainingStep(
        settings,
        accelerator,
        pipeline=pipeline,
        roles=roles,
        contexts=contexts,
        student=student,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        prior=prior,
        compiled=compiled,
    )
    product = mode.product(folder, dtype)
    checkpoints = Checkpoints(
        settings.training,
        accelerator,
        roles=roles,
        state=mode.training_state(roles, optimizer),
        lr_scheduler=lr_scheduler,
        product=product,
        contract=contract,
    )
    first_step = checkpoints.resume(checkpoint)
    log_plan(settings, accelerator, data, roles, first_step)
    start_trackers(accelerator, model.tracker_name, settings)
    metrics_log = MetricsLog(accelerator, output_dir, first_step)
    gallery = Gallery(
        settings,
        accelerator,
        pipeline=pipeline,
        roles=roles,
        contexts=contexts,
        model=model,
        save_dtype=product.dtype,
        metrics_log=metrics_log,
        stop=stop,
        prior=prior,
    )
    gallery.draw_before_training(first_step)
    if settings.validation.preview_only:
        end_training(accelerator)
        return

    # The training loop: one optimizer step, log, checkpoint, validate.
    stop.begin_training()
    is_quiet = not accelerator.is_local_main_process
    with tqdm(desc="Steps", initial=first_step, total=settings.training.max_train_steps, disable=is_quiet) as progress:
        for step in range(first_step, settings.training.max_train_steps):
            with checkpoints.saved_on_divergence(step, first_step):
                metrics = train_step(step)
            progress.set_postfix(gallery.postfix(metrics))
            progress.update()
            num_done = step + 1
            metrics_log.write(num_done, metrics)
            if num_done % settings.training.checkpointing_steps == 0:
                checkpoints.save(num_done)
            if gallery.is_due(num_done):
                gallery.validate(num_done)
            if stop.is_set_on_any(accelerator):
                checkpoints.save(num_done)
                progress.close()
                gallery.write_report(num_done, "stopped")
                stop.end_run(accelerator, num_done)

    accelerator.wait_for_everyone()
    checkpoints.save_final(stop)
    if accelerator.is_main_process:
        gallery.draw_story()
        write_run_card(settings, model.card, gallery.card_images, last_retention(output_dir))
        if comparison := evaluate_run(settings, pipeline, optimizer):
            gallery.show_comparison(comparison)
            write_run_card(settings, model.card, gallery.card_images, last_retention(output_dir), comparison)
        if settings.publishing.push_to_hub:
            push_to_hub(settings)
    end_training(accelerator)


if __name__ == "__main__":
    with ending_in_one_line(__file__), lasting_output():
        main(SETTINGS)
