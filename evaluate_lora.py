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
"""Compares LoRAs of any trainer for FLUX.2-klein or Z-Image-Turbo, on the same prompts and seeds.

Every LoRA, and the base model beside them, draws the same prompts from the same noise with the stock pipeline at the
deployed number of steps. The pictures are kept, then measured: see docs/evaluation.md.
"""

from functools import partial
from pathlib import Path

from dopsd.evaluation.settings import EvaluationSettings, parse_settings
from dopsd.terminal import ending_in_one_line, lasting_output
from pipelines import published


# What is filled into the flags' help texts.
TEXTS = {
    "default_vlm": published.DEFAULT_VLMS[2560],
    "deployed_steps": f"{published.KLEIN_STEPS} for FLUX.2-klein and {published.Z_IMAGE_STEPS} for Z-Image-Turbo",
}
ENDING = {
    "less_memory": "pass --enable_model_cpu_offload, or lower --resolution",
    "kept": "the pictures are kept: run the same command again to go on",
}


if __name__ == "__main__":
    # The imports below take seconds: --help and mistakes are answered before them.
    with ending_in_one_line(__file__, **ENDING):
        SETTINGS = parse_settings(TEXTS, __doc__)

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from diffusers.utils import check_min_version

from dopsd.errors import InputError, naming_flag
from dopsd.evaluation.comparison import LoRA
from dopsd.evaluation.contenders import all_contenders, check_loras, find_loras
from dopsd.evaluation.deployment import Deployment
from dopsd.evaluation.drawing import all_jobs, check_lengths, draw_missing, drawn_pictures
from dopsd.evaluation.features import open_feature_models
from dopsd.evaluation.judge import Judge
from dopsd.evaluation.measures import measure
from dopsd.evaluation.page import PAGE_FILE, SHEETS_DIR, write_page
from dopsd.evaluation.pictures import PICTURES_DIR, PictureStore, read_edited, read_training_pictures
from dopsd.evaluation.prompt_writing import write_prompts
from dopsd.evaluation.prompts import PROMPTS_FILE, choose_prompts, subject_words
from dopsd.evaluation.results import CSV_FILE, RESULTS_FILE, table_text, write_results
from dopsd.launch import set_up_logging
from dopsd.loading import check_weight_files, reporting_load_errors
from dopsd.memory import logging_cost
from dopsd.output import check_nothing_in_the_way, lock_output_dir, make_output_dir
from dopsd.pretrained import hub_options, model_identity, transformer_skeleton
from dopsd.sizes import size_problem
from pipelines.deployment import find_deployment
from pipelines.vlm_chat import VLMChat


check_min_version("0.40.0")
logger = get_logger(__name__)

# From the command line to the page


def main(settings: EvaluationSettings) -> None:
    device = start()
    output_dir = Path(settings.output_dir)
    make_output_dir(output_dir)
    files = PROMPTS_FILE, RESULTS_FILE, CSV_FILE, PAGE_FILE
    check_nothing_in_the_way(output_dir, files, folders=(PICTURES_DIR, SHEETS_DIR))
    lock = lock_output_dir(output_dir)  # noqa: F841 - held until the process ends

    # Everything that a user can get wrong is checked before any weight is loaded.
    deployment = find_deployment(settings.pretrained_model_name_or_path, **hub_options(settings))
    settings = resolve(settings, deployment, device)
    edited = read_edited(settings, deployment.sizes)
    training = read_training_pictures(settings)
    loras, together = find_loras(settings)
    mask_model = settings.mask_model if settings.mask_background else None
    models = open_feature_models(settings.clip_model, settings.dino_model, mask_model, settings.cache_dir)
    chat = open_chat(settings)
    check_weights(settings, deployment, loras, together)

    written, basis = None, [settings.vlm_name_or_path, *training.digests]
    if settings.write_prompts:
        written = partial(
            write_prompts,
            chat,
            training.images,
            settings.num_prompts,
            kind=settings.kind,
            subject=subject_words(settings),
            device=device,
        )
    prompts = choose_prompts(settings, training.captions, written, basis)
    check_lengths(prompts, deployment, settings)
    contenders = all_contenders(loras, together, settings.strengths)
    jobs = all_jobs(contenders, prompts, settings)
    size = settings.height, settings.width
    store = PictureStore(output_dir / PICTURES_DIR, drawing_basis(settings, deployment), size, edited)
    logger.info(
        f"Comparing {', '.join(lora.name for lora in loras)} with the base model: {len(prompts)} prompts, "
        f"{settings.num_seeds} seeds, {settings.num_inference_steps} steps"
    )
    with logging_cost("Drawing"):
        num_drawn = draw_missing(jobs, store, deployment, settings, device)
    logger.info(f"Drew {num_drawn} of {len(jobs)} pictures; the others were there")

    # The pipeline is freed: what measures has the memory for itself.
    drawn = drawn_pictures(jobs, store, contenders)
    to_edit = [one.images[0] for one in edited]
    with logging_cost("Measuring"):
        comparison = measure(
            prompts,
            drawn,
            training.images,
            models,
            device=device,
            settings=settings.as_dict(),
            subject=settings.class_word or None,
            to_edit=to_edit,
            judge=Judge(chat, settings.kind, settings.class_word, output_dir) if settings.judge else None,
        )
    write_results(output_dir, comparison)
    page = write_page(output_dir, comparison, drawn, training.images, to_edit)
    print(table_text(comparison))
    logger.info(f"All figures, with what they mean, and the pictures: {page}")


def start() -> torch.device:
    """Sets up accelerate's state and the logging; returns the device to compute on."""
    state = PartialState()
    set_up_logging()
    if state.num_processes > 1:
        raise InputError("evaluate_lora.py is started as several processes, and uses one; start it with python")
    return state.device


def resolve(settings: EvaluationSettings, deployment: Deployment, device: torch.device) -> EvaluationSettings:
    """Fills in the defaults that follow from the base model and the device.

    Raises:
        InputError: the model cannot draw what is asked for.
    """
    if settings.validation_image is not None and not deployment.can_edit:
        raise InputError(f"--validation_image: {deployment.name} takes no pictures to edit; drop the flag")
    if problem := size_problem(settings.height, settings.width, deployment.sizes):
        flags = f"--height {settings.height} --width {settings.width}"
        is_square = settings.height == settings.width == settings.resolution
        raise InputError(f"{f'--resolution {settings.resolution}' if is_square else flags}: {problem}")
    if settings.mixed_precision == "fp16" and not deployment.works_in_fp16:
        raise InputError(f"--mixed_precision fp16: {deployment.name} draws nothing in it; pass bf16 or no")
    return settings.replace(
        num_inference_steps=settings.num_inference_steps or deployment.num_inference_steps,
        mixed_precision=settings.mixed_precision or ("no" if device.type == "cpu" else "bf16"),
    )


def open_chat(settings: EvaluationSettings) -> VLMChat | None:
    """The vision-language model without its weights, if a flag asks for it."""
    if not (settings.judge or settings.write_prompts):
        return None
    with naming_flag("--vlm_name_or_path"):
        return VLMChat(settings.vlm_name_or_path, settings.cache_dir)


def check_weights(
    settings: EvaluationSettings, deployment: Deployment, loras: list[LoRA], together: LoRA | None
) -> None:
    """Opens the base model's weight files, and tries each LoRA on a transformer without weights.

    Raises:
        InputError: a file is missing or damaged, or a LoRA does not fit.
    """
    name = settings.pretrained_model_name_or_path
    with reporting_load_errors(settings):
        skeleton = transformer_skeleton(deployment.transformer_class, name, **hub_options(settings))
        if Path(name).is_dir():
            for component in ("transformer", "text_encoder"):
                check_weight_files(Path(name), component, settings.variant)
    check_loras(loras, deployment, skeleton, "--lora")
    if together is not None:
        check_loras([together], deployment, skeleton, "--together_with")


def drawing_basis(settings: EvaluationSettings, deployment: Deployment) -> dict:
    """What all pictures depend on."""
    return {
        "model": model_identity(settings),
        "variant": settings.variant,
        "precision": settings.mixed_precision,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": deployment.guidance_scale,
        "max_sequence_length": settings.max_sequence_length,
    }


if __name__ == "__main__":
    with ending_in_one_line(__file__, **ENDING), lasting_output():
        main(SETTINGS)
