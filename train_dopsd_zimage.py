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
"""Trains a LoRA on Z-Image-Turbo by on-policy self-distillation (D-OPSD, arXiv 2605.05204).

The file reads from top to bottom: the model, arguments, pictures and captions, their order, contexts, checkpoints,
the training loop, main. What has an equation or a model's convention is in `pipelines/`. What differs from
train_dopsd_flux2.py is this docstring, imports and the section "The model"; a test compares the rest.
"""

import argparse
import csv
import difflib
import hashlib
import io
import itertools
import json
import logging
import math
import mimetypes
import os
import posixpath
import random
import reprlib
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Literal

import datasets
import diffusers
import fsspec
import numpy as np
import psutil
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from diffusers import BitsAndBytesConfig, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import (
    find_nearest_bucket,
    free_memory,
    generate_aspect_ratio_buckets,
    offload_models,
    parse_buckets_string,
)
from diffusers.utils import check_min_version
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoConfig, PretrainedConfig, Qwen3Model

from dopsd.context_cache import ContextCache, checkpoint_fingerprint, content_key, files_fingerprint
from dopsd.errors import InputError
from dopsd.pretrained import read_configs
from dopsd.publish import LORA_FILE, CardModel, publish, write_card
from dopsd.roles import StudentTeacherLoRA, lora_target_modules
from dopsd.rollout import rollout, seeded_noise
from dopsd.sheets import Cell, contact_sheet, plot_curves, save_png, stack
from pipelines.vision_encoder import VisionEncoder, default_vlm
from pipelines.z_image import (
    DEFAULT_LORA_LAYERS,
    ZImageContext,
    ZImageDOPSDPipeline,
    is_turbo,
    transformer_skeleton,
)


check_min_version("0.40.0")

logger = get_logger(__name__)

TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet_ml"}
HISTORY_FILE = "metrics.jsonl"
MAX_SKIPPED_STEPS = 20
NUM_PREVIEW_PICTURES = 4
NUM_DEFAULT_VALIDATION_PROMPTS = 2

# Unlike one another and unlike what people train on: what the base draws for them should stay.
RETENTION_PROMPTS = (
    "a lighthouse on a cliff at sunset, oil painting",
    "a bowl of ramen on a wooden table, top view",
    "an astronaut riding a horse through a snowy forest",
    "a city street at night in the rain, neon signs",
)


# The model


Pipeline, StockPipeline, Context = ZImageDOPSDPipeline, ZImagePipeline, ZImageContext
Transformer, TextEncoder = ZImageTransformer2DModel, Qwen3Model

MODEL_NAME = "Z-Image-Turbo"
EXAMPLE_MODEL = "Tongyi-MAI/Z-Image-Turbo"
CARD_MODEL = CardModel(
    pipeline="ZImagePipeline",
    tags=("z-image",),
    guidance_scale=0.0,
    sampling_defaults={"max_sequence_length": 512},
)
TRACKER_NAME = "dopsd-z-image-lora"
DEFAULT_OUTPUT_DIR = "z-image-dopsd-lora"
DEFAULT_LEARNING_RATE = 1e-4
DEFAULT_NUM_INFERENCE_STEPS = 8

# The first is the default.
TEACHER_CONTEXTS = {
    "vlm": "its text encoder sees the picture through Qwen3-VL's vision tower",
    "caption": "it reads --teacher_caption_column, and sees no picture",
}
DEFAULT_TEACHER_PROMPT_SUFFIX = {}
TEACHER_LENGTH_FLAG = "teacher_max_sequence_length"
DEFAULT_TEACHER_MAX_SEQUENCE_LENGTH = 1024
# The published runs'.
DEFAULT_VLM_MIN_PIXELS, DEFAULT_VLM_MAX_PIXELS = 512 * 512, 768 * 768

PIXELS_PER_TOKEN = 16  # per side: the VAE's factor 8, and patches of 2
MIN_SIDE_PIXELS = 64  # less is most likely a typing error
MAX_IMAGE_TOKENS = 128 * 128  # 2048 x 2048 pixels


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--teacher_max_sequence_length",
        type=positive_int,
        default=None,
        help="Tokens of the teacher's text, with its picture's. Longer is an error. "
        f"Default: {DEFAULT_TEACHER_MAX_SEQUENCE_LENGTH}",
    )


def check_model(args: argparse.Namespace) -> None:
    """Reads the checkpoint's configurations alone."""
    _, scheduler = read_configs(
        args.pretrained_model_name_or_path, StockPipeline, model=MODEL_NAME, example=EXAMPLE_MODEL, **hub_kwargs(args)
    )
    if not is_turbo(scheduler):
        logger.warning(
            f"{args.pretrained_model_name_or_path} has another schedule than Z-Image-Turbo, so it is probably not "
            "step-distilled: D-OPSD keeps few steps, it does not make them. Its samples at --num_rollout_steps will "
            "stay as poor as they are."
        )


def check_text_encoder(text: PretrainedConfig, transformer_config: dict, args: argparse.Namespace) -> None:
    if text.hidden_size != transformer_config["cap_feat_dim"]:
        raise InputError(
            f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: its text encoder has "
            f"{text.hidden_size} channels, its transformer takes {transformer_config['cap_feat_dim']}; pass a whole "
            f"checkpoint, such as {EXAMPLE_MODEL}"
        )
    positions = transformer_config["axes_lens"][0]
    longest = (positions - 2) // SEQ_MULTI_OF * SEQ_MULTI_OF  # one position before the padded text, one after it
    for name in ("max_sequence_length", "teacher_max_sequence_length"):
        if (getattr(args, name) or 0) > longest:
            raise InputError(
                f"--{name} {getattr(args, name)}: the transformer has {positions} positions for a text and the "
                f"picture after it; pass at most {longest}"
            )
    if args.teacher_max_sequence_length is None:
        args.teacher_max_sequence_length = min(DEFAULT_TEACHER_MAX_SEQUENCE_LENGTH, longest)


def text_settings(args: argparse.Namespace) -> dict:
    """What an encoding of a prompt depends on, besides the prompt and the model."""
    return {"max_sequence_length": args.max_sequence_length}


def teacher_encodings(args: argparse.Namespace, prompt: str, crop: "Crop") -> tuple["Encoding", ...]:
    """What makes the teacher's context of one sample, from its prompt and its crop."""
    return (Encoding("vlm", prompt, crop) if args.teacher_context == "vlm" else Encoding("text", prompt),)


def encode(
    pipeline: Pipeline,
    encoding: "Encoding",
    image: Image.Image | None,
    vision_encoder: VisionEncoder | None,
    args: argparse.Namespace,
) -> torch.Tensor:
    """(L, D) of a prompt, with or without a picture."""
    if encoding.encoder == "vlm":
        return pipeline.encode_teacher([encoding.prompt], [image], vision_encoder=vision_encoder).prompt_embeds[0]
    # A teacher's caption alone may be longer than a student's.
    length = max(args.max_sequence_length, pipeline.chat_token_count(encoding.prompt))
    return pipeline.encode_student([encoding.prompt], max_sequence_length=length).prompt_embeds[0]


def encoding_shape(contexts: "Contexts", encoding: "Encoding") -> tuple[int, ...]:
    return contexts.token_count(encoding), contexts.text_width


# Arguments


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the list of all flags."""

    def error(self, message: str):
        wrong = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        near = difflib.get_close_matches(wrong, self._option_string_actions, n=1)
        if wrong.startswith("--") and near:
            message += f"; did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def below_one(text: str) -> float:
    if (value := fraction(text)) == 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not below 1")
    return value


def not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 4294967295")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)

    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path", default=None, help=f"Hub id or folder of a {MODEL_NAME} checkpoint."
    )
    model.add_argument("--revision", default=None, help="Branch, tag or commit of the hub checkpoint.")
    model.add_argument("--variant", default=None, help="Variant of the checkpoint's files, such as fp16.")
    model.add_argument("--cache_dir", default=None, help="Where downloads are kept.")
    model.add_argument(
        "--bnb_quantization_config_path",
        default=None,
        help="JSON file of a bitsandbytes configuration: the frozen transformer is loaded quantized. Needs a GPU.",
    )
    model.add_argument(
        "--max_sequence_length",
        type=positive_int,
        default=512,
        help="Tokens of a prompt, as in the stock pipeline.",
    )
    add_model_flags(model)

    data = parser.add_argument_group("data")
    data.add_argument(
        "--instance_data_dir",
        default=None,
        help="Folder of pictures: with --instance_prompt, with a .txt beside each, or with metadata.jsonl or .csv.",
    )
    data.add_argument("--dataset_name", default=None, help="Data set on the hub or on disk that `datasets` reads.")
    data.add_argument("--dataset_config_name", default=None, help="Configuration of the data set.")
    data.add_argument("--image_column", default="image", help="Column of the pictures.")
    data.add_argument(
        "--caption_column",
        nargs="+",
        default=None,
        help="Column of the captions. Of several, one is drawn each time a picture is seen.",
    )
    data.add_argument("--instance_prompt", default=None, help="The caption of every picture that has no own.")
    data.add_argument("--repeats", type=positive_int, default=1, help="How often each picture is seen in an epoch.")
    data.add_argument(
        "--resolution", type=positive_int, default=1024, help="Side in pixels that pictures are resized to."
    )
    data.add_argument(
        "--use_aspect_ratio_buckets",
        action="store_true",
        help="Keep each picture near its own aspect ratio, at about resolution x resolution pixels; smaller pictures "
        "are not enlarged.",
    )
    data.add_argument(
        "--aspect_ratio_buckets",
        default=None,
        help="The buckets to use, 'height,width;height,width'. Needs --use_aspect_ratio_buckets.",
    )
    data.add_argument("--center_crop", action="store_true", help="Crop at the centre, not at a random place.")
    data.add_argument("--random_flip", action="store_true", help="Mirror pictures left to right half of the time.")

    method = parser.add_argument_group("D-OPSD")
    method.add_argument(
        "--teacher_context",
        choices=list(TEACHER_CONTEXTS),
        default=next(iter(TEACHER_CONTEXTS)),
        help="What the teacher knows of the target. "
        + "; ".join(f"{context}: {meaning}" for context, meaning in TEACHER_CONTEXTS.items()),
    )
    suffixes = "; ".join(f"with {context} '{suffix}'" for context, suffix in DEFAULT_TEACHER_PROMPT_SUFFIX.items())
    method.add_argument(
        "--teacher_prompt_suffix",
        default=None,
        help=f"Follows the caption in the teacher's prompt. Default: {suffixes or 'nothing'}",
    )
    method.add_argument(
        "--teacher_caption_column", default=None, help="Column of the teacher's captions. With caption only."
    )
    method.add_argument(
        "--vlm_model_name_or_path",
        default=None,
        help="Hub id or folder of the Qwen3-VL whose vision tower is used; of its weights only the tower is read. "
        "Default: Qwen/Qwen3-VL-4B-Instruct or -8B-Instruct, by the text encoder's size.",
    )
    method.add_argument(
        "--vlm_min_pixels",
        type=positive_int,
        default=None,
        help="Smaller pictures are enlarged for the vision tower to this area. 32 x 32 pixels make a token. "
        f"Default: {DEFAULT_VLM_MIN_PIXELS}",
    )
    method.add_argument(
        "--vlm_max_pixels",
        type=positive_int,
        default=None,
        help=f"Larger pictures are shrunk for the vision tower to this area. Default: {DEFAULT_VLM_MAX_PIXELS}",
    )
    method.add_argument(
        "--vlm_rope",
        choices=["vlm", "text_encoder"],
        default=None,
        help="Rotary base of the text encoder where it reads with the tower: Qwen3-VL's (default, published runs) or "
        "its own.",
    )
    method.add_argument(
        "--teacher",
        choices=["ema", "base", "student"],
        default="ema",
        help="The teacher's weights: the student's average, the model as it was, or the student's own.",
    )
    method.add_argument("--ema_decay", type=fraction, default=0.9999, help="Decay of the teacher's average.")
    method.add_argument(
        "--num_rollout_steps", type=positive_int, default=4, help="Steps of the deployed sampler that are trained on."
    )
    method.add_argument(
        "--loss_space",
        choices=["x0", "velocity"],
        default="x0",
        help="Compare the implied clean latents (published runs) or the velocities (Eq. 7 of the paper).",
    )

    seeing = parser.add_argument_group("what you see")
    seeing.add_argument(
        "--validation_prompt",
        nargs="+",
        default=None,
        help="Prompts that are drawn with the base model and the student. Default: the first captions.",
    )
    seeing.add_argument("--final_validation_prompt", default=None, help="Drawn too, at the end only.")
    seeing.add_argument("--num_validation_images", type=positive_int, default=4, help="Pictures a prompt, seeds 0 up.")
    seeing.add_argument(
        "--validation_steps", type=int, default=250, help="Steps between validations. 0: draw nothing at all."
    )
    seeing.add_argument(
        "--num_inference_steps",
        type=positive_int,
        default=DEFAULT_NUM_INFERENCE_STEPS,
        help="Steps of the drawn pictures.",
    )
    seeing.add_argument("--validation_height", type=positive_int, default=None, help="Pixels. Default: --resolution.")
    seeing.add_argument("--validation_width", type=positive_int, default=None, help="Pixels. Default: --resolution.")
    seeing.add_argument(
        "--retention_prompts",
        nargs="+",
        default=list(RETENTION_PROMPTS),
        help="At least two prompts that have nothing to do with the training pictures: what should stay as it is.",
    )
    seeing.add_argument(
        "--preview_only", action="store_true", help="Draw what the teacher sees before the first step, then stop."
    )
    seeing.add_argument(
        "--context_cache_dir", default=None, help="Where encodings are kept. Default: context_cache in --output_dir."
    )
    seeing.add_argument(
        "--no_context_cache", action="store_true", help="Keep the encoders in memory and encode each batch anew."
    )

    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--rank", type=positive_int, default=64, help="Rank of the LoRA.")
    lora.add_argument(
        "--lora_alpha", type=positive_float, default=None, help="The update is scaled by alpha / rank. Default: 2 rank"
    )
    lora.add_argument("--lora_dropout", type=below_one, default=0.0, help="Dropout in the student's training forward.")
    lora.add_argument(
        "--lora_layers",
        default=DEFAULT_LORA_LAYERS,
        help="Modules to train: names or their endings, comma-separated, or a regular expression of whole names. "
        "Default: attention and feed-forward of all blocks.",
    )
    lora.add_argument(
        "--init_lora", default=None, help="LoRA file, folder or hub id that student and teacher start from."
    )

    training = parser.add_argument_group("training")
    training.add_argument("--output_dir", default=DEFAULT_OUTPUT_DIR, help="Where everything is written.")
    training.add_argument("--seed", type=seed, default=None, help="Default: drawn, printed and kept in checkpoints.")
    training.add_argument("--train_batch_size", type=positive_int, default=1, help="Pictures a device and forward.")
    training.add_argument("--num_train_epochs", type=positive_int, default=1, help="Ignored with --max_train_steps.")
    training.add_argument("--max_train_steps", type=positive_int, default=None, help="Optimizer steps.")
    training.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="Batches a step.")
    training.add_argument(
        "--gradient_checkpointing", action="store_true", help="Recompute activations: less memory, slower."
    )
    training.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        default=None,
        help="Precision of the frozen model. Default: what accelerate is configured for. LoRA weights are float32.",
    )
    training.add_argument("--allow_tf32", action="store_true", help="Faster float32 products on Ampere and later.")
    training.add_argument("--checkpointing_steps", type=positive_int, default=500, help="Steps between checkpoints.")
    training.add_argument("--checkpoints_total_limit", type=positive_int, default=None, help="How many are kept.")
    training.add_argument(
        "--resume_from_checkpoint", default=None, help="A checkpoint's name in --output_dir, its path, or latest."
    )
    training.add_argument(
        "--upcast_before_saving", action="store_true", help="Save the LoRA in float32 whatever the precision."
    )
    training.add_argument("--logging_dir", default="logs", help="Tracker files, in --output_dir.")
    training.add_argument(
        "--report_to",
        choices=["tensorboard", "wandb", "comet_ml", "all", "none"],
        default="tensorboard",
        help="Where loss, learning rate and gradient norm are logged.",
    )
    training.add_argument("--cache_latents", action="store_true", help="Accepted: pictures are always encoded ahead.")
    training.add_argument("--offload", action="store_true", help="Accepted: encoders always leave the accelerator.")
    training.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)

    publishing = parser.add_argument_group("publishing")
    publishing.add_argument(
        "--push_to_hub",
        action="store_true",
        help="Publish weights, card and sheets on the Hugging Face Hub at the end.",
    )
    publishing.add_argument(
        "--push_only", action="store_true", help="Publish what a finished run left in --output_dir; train nothing."
    )
    publishing.add_argument("--hub_model_id", default=None, help="ACCOUNT/NAME. Default: the output folder's name.")
    publishing.add_argument("--hub_private_repo", action="store_true", help="Make the repository private.")
    publishing.add_argument("--hub_token", default=None, help="Default: the token that `hf auth login` left.")

    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--optimizer", type=str.lower, choices=["adamw", "prodigy"], default="adamw")
    optimizer.add_argument("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes: states in 8 bit.")
    optimizer.add_argument(
        "--learning_rate", type=positive_float, default=DEFAULT_LEARNING_RATE, help="Prodigy wants 1."
    )
    optimizer.add_argument(
        "--scale_lr", action="store_true", help="Multiply by processes, accumulation steps and batch size."
    )
    optimizer.add_argument(
        "--lr_scheduler",
        choices=[kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT],
        default="constant",
    )
    optimizer.add_argument("--lr_warmup_steps", type=int, default=0)
    optimizer.add_argument("--lr_num_cycles", type=positive_int, default=1, help="Of cosine_with_restarts.")
    optimizer.add_argument("--lr_power", type=positive_float, default=1.0, help="Of the polynomial scheduler.")
    optimizer.add_argument("--max_grad_norm", type=positive_float, default=1.0)
    optimizer.add_argument("--adam_beta1", type=below_one, default=0.9)
    optimizer.add_argument("--adam_beta2", type=below_one, default=0.999)
    optimizer.add_argument("--adam_weight_decay", type=not_negative, default=0.0)
    optimizer.add_argument("--adam_epsilon", type=positive_float, default=1e-8)
    optimizer.add_argument("--prodigy_beta3", type=below_one, default=None)
    optimizer.add_argument("--prodigy_decouple", type=boolean, default=True)
    optimizer.add_argument("--prodigy_use_bias_correction", type=boolean, default=True)
    optimizer.add_argument("--prodigy_safeguard_warmup", type=boolean, default=True)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    if args.lora_alpha is None:
        args.lora_alpha = 2 * args.rank
    if args.teacher_prompt_suffix is None:
        args.teacher_prompt_suffix = DEFAULT_TEACHER_PROMPT_SUFFIX.get(args.teacher_context, "")
    return args


VLM_DEFAULTS = {
    "vlm_model_name_or_path": None,  # by the text encoder's size
    "vlm_min_pixels": DEFAULT_VLM_MIN_PIXELS,
    "vlm_max_pixels": DEFAULT_VLM_MAX_PIXELS,
    "vlm_rope": "vlm",
}


def check_args(args: argparse.Namespace) -> None:
    """What can be said before a file is read."""
    if args.pretrained_model_name_or_path is None:
        raise InputError(f"--pretrained_model_name_or_path: is required, such as {EXAMPLE_MODEL}")
    if args.hub_token is not None and args.report_to in ("wandb", "all"):
        raise InputError(
            f"--hub_token: goes without --report_to {args.report_to}, which would show it; run hf auth login instead"
        )
    check_geometry(args)
    check_teacher_flags(args)
    if args.use_8bit_adam and args.optimizer != "adamw":
        raise InputError("--use_8bit_adam: goes with --optimizer AdamW; drop it for prodigy")
    for name in ("lr_warmup_steps", "validation_steps"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name} {getattr(args, name)}: must be 0 or more")
    if args.preview_only and args.validation_steps == 0:
        raise InputError("--preview_only: draws the preview, which --validation_steps 0 turns off; drop one of them")
    if args.report_to in TRACKER_PACKAGES and find_spec(TRACKER_PACKAGES[args.report_to]) is None:
        raise InputError(f"--report_to {args.report_to}: run pip install {TRACKER_PACKAGES[args.report_to]} first")
    read_quantization_settings(args)
    for name in ("validation_height", "validation_width"):
        if getattr(args, name) is None:
            setattr(args, name, args.resolution)
    if problem := size_problem(args.validation_height, args.validation_width):
        raise InputError(
            f"--validation_height {args.validation_height} --validation_width {args.validation_width}: {problem}."
        )
    if len(args.retention_prompts) < 2:
        raise InputError("--retention_prompts: give two prompts or more, whose distance is the measure")
    if args.no_context_cache and args.context_cache_dir:
        raise InputError("--no_context_cache: goes without --context_cache_dir; drop one of them")
    if args.context_cache_dir is None:
        args.context_cache_dir = str(Path(args.output_dir, "context_cache"))


def check_teacher_flags(args: argparse.Namespace) -> None:
    if (args.teacher_context == "caption") != (args.teacher_caption_column is not None):
        raise InputError(
            "--teacher_context caption: name the column of the teacher's captions with --teacher_caption_column"
            if args.teacher_context == "caption"
            else "--teacher_caption_column: goes with --teacher_context caption; add that, or drop the flag"
        )
    for name, default in VLM_DEFAULTS.items():
        if args.teacher_context != "vlm" and getattr(args, name) is not None:
            raise InputError(f"--{name}: goes with --teacher_context vlm; add that, or drop the flag")
        if args.teacher_context == "vlm" and getattr(args, name) is None:
            setattr(args, name, default)
    if args.teacher_context == "vlm" and args.vlm_min_pixels > args.vlm_max_pixels:
        raise InputError(
            f"--vlm_min_pixels {args.vlm_min_pixels}: is above --vlm_max_pixels {args.vlm_max_pixels}; pass both, the "
            "smaller one first"
        )


# Data: pictures and captions


METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

# What Pillow raises on damaged files, found by damaging some; AVIF's decoder raises RuntimeError.
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Picture:
    """One picture and its captions. Nothing is decoded before `read_image`."""

    name: str  # path relative to the folder, or "row 12 of DATASET": for messages
    captions: tuple[str, ...]
    # A file, or (dataset, row, image column). None: with --teacher_context caption, captions need no picture.
    source: Path | tuple[datasets.Dataset, int, str] | None
    teacher_caption: str | None = None  # of --teacher_caption_column


def read_pictures(args: argparse.Namespace) -> list[Picture]:
    """Returns the pictures of `--instance_data_dir` (sorted by path) or `--dataset_name` (in row order), captioned.

    Decodes no picture. Raises `InputError` for a picture without a caption, a caption without a picture, and flags
    that do not fit what is there.
    """
    if (args.instance_data_dir is None) == (args.dataset_name is None):
        raise InputError("Give one of --instance_data_dir (a folder of pictures) and --dataset_name, and not both.")
    return read_dataset(args) if args.instance_data_dir is None else read_folder(args)


def read_folder(args: argparse.Namespace) -> list[Picture]:
    folder = Path(args.instance_data_dir)
    if not args.instance_data_dir.strip():
        raise InputError("--instance_data_dir is empty: name the folder of pictures.")
    if not folder.is_dir():
        problem = "is a file: give the folder that holds it" if folder.exists() else "does not exist: check the path"
        raise InputError(f"--instance_data_dir {folder} {problem}.")
    names = sorted(path.relative_to(folder).as_posix() for path in files_below(folder))
    pictures = [name for name in names if is_picture(name)]
    sidecars = [name for name in names if name.lower().endswith(".txt")]
    metadata = find_metadata(names)
    warn_of_ignored(sorted({*names} - {*pictures, *sidecars, metadata}))
    if not pictures and not (metadata and args.teacher_context == "caption"):
        raise InputError(f"--instance_data_dir {folder} holds no picture: give a folder that does.")
    if metadata and sidecars:
        raise InputError(f"{metadata} and {sidecars[0]} both hold captions: keep the metadata or the .txt files.")
    if metadata:
        return metadata_pictures(folder, metadata, pictures, args)
    refuse_column_flags(args)
    captions = sidecar_captions(folder, sidecars, pictures, args) if sidecars else prompt_captions(pictures, args)
    return [Picture(name, captions[name], folder / name) for name in sorted(captions)]


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file below `folder` whose path has no part that starts with "." or "__"; links are followed."""
    above = (*above, folder.resolve())
    for path in folder.iterdir():
        if path.name.startswith((".", "__")):
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() not in above:  # a link to a folder above would never end
            yield from files_below(path, above)


def is_picture(name: str) -> bool:
    """Whether the name is a picture's, also one that Pillow cannot open: that is an error later, not a gap."""
    pillow_format = Image.registered_extensions().get(posixpath.splitext(name)[1].lower())
    pillow_opens = pillow_format in Image.OPEN and Image.MIME.get(pillow_format, "").startswith("image/")
    return pillow_opens or (mimetypes.guess_type(name, strict=False)[0] or "").startswith("image/")


def find_metadata(names: list[str]) -> str | None:
    """Returns the folder's metadata file: "metadata.jsonl", "metadata.csv" or None."""
    found = [name for name in names if posixpath.basename(name) in METADATA_NAMES]
    for name in found:
        if name.endswith(".parquet"):
            raise InputError(f"{name}: --instance_data_dir reads no parquet; pass the folder as --dataset_name.")
        if "/" in name:
            raise InputError(f"{name} lies in a subfolder: put one metadata file at the top of --instance_data_dir.")
    if len(found) > 1:
        raise InputError(f"--instance_data_dir holds both {found[0]} and {found[1]}: keep one of them.")
    return found[0] if found else None


def warn_of_ignored(names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        logger.warning(f"Neither pictures nor captions, ignored: {', '.join(names[:5])}{more}.")


def refuse_column_flags(args: argparse.Namespace) -> None:
    for flag, is_given in (
        ("--caption_column", args.caption_column),
        ("--image_column", args.image_column != "image"),
        ("--teacher_caption_column", args.teacher_caption_column),
    ):
        if is_given:
            raise InputError(
                f"{flag} needs a metadata.jsonl or metadata.csv in --instance_data_dir: add it, or drop the flag."
            )


def prompt_captions(pictures: list[str], args: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    if not has_prompt(args):
        raise InputError(
            "The pictures in --instance_data_dir have no captions: give one --instance_prompt, or put PICTURE.txt "
            "beside each picture, or a metadata.jsonl or metadata.csv at the top."
        )
    return {name: (args.instance_prompt,) for name in pictures}


def has_prompt(args: argparse.Namespace) -> bool:
    return bool(args.instance_prompt and args.instance_prompt.strip())


def sidecar_captions(
    folder: Path, sidecars: list[str], pictures: list[str], args: argparse.Namespace
) -> dict[str, tuple[str, ...]]:
    sidecar_of = {posixpath.splitext(name)[0]: name for name in sidecars}
    stem_of = {name: posixpath.splitext(name)[0] for name in pictures}
    stems = {*stem_of.values()}
    for name, stem in stem_of.items():
        if stem not in sidecar_of:
            raise InputError(f"{name} has no caption: write it to {stem}.txt (other pictures have such a file).")
    for stem, sidecar in sidecar_of.items():
        if stem not in stems:
            raise InputError(
                f"{sidecar} has no picture {posixpath.basename(stem)} beside it: add it or move the file."
            )
    if has_prompt(args):
        logger.warning("--instance_prompt is not used: the .txt files beside the pictures are their captions.")
    return {name: (sidecar_text(folder, sidecar_of[stem]),) for name, stem in stem_of.items()}


def sidecar_text(folder: Path, name: str) -> str:
    text = read_text(folder, name).strip()
    if not text:
        raise InputError(f"{name} is empty: write the caption into it.")
    return text


def read_text(folder: Path, name: str) -> str:
    """Returns the file's text with its line ends as they are."""
    try:
        return (folder / name).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error


def metadata_pictures(folder: Path, metadata: str, pictures: list[str], args: argparse.Namespace) -> list[Picture]:
    rows = (read_csv if metadata.endswith(".csv") else read_jsonl)(folder, metadata)
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    chosen = caption_columns(columns, metadata, args)
    path_column = "file_name" if args.image_column == "image" else f"{args.image_column}_file_name"
    if args.teacher_context == "caption" and not pictures and path_column not in columns:
        places = [(f"{metadata} line {line}", row) for line, row in rows]
        return [captioned(place, None, row, chosen, place, args) for place, row in places]
    if path_column not in columns:
        raise InputError(
            f"{metadata} has no column {path_column!r} for --image_column {args.image_column}, "
            f"only {listed(columns)}: add it, or name another --image_column X (column X_file_name)."
        )
    found: dict[str, Picture] = {}
    line_of: dict[str, int] = {}
    for line, row in rows:
        place = f"{metadata} line {line}"
        name = picture_name(folder, row.get(path_column), f"{place}, column {path_column!r}")
        if name in found:
            raise InputError(f"{place} lists {name} again (line {line_of[name]}): give several captions as columns.")
        line_of[name] = line
        found[name] = captioned(name, folder / name, row, chosen, place, args)
    check_every_picture_has_a_row(pictures, rows, metadata)
    return [found[name] for name in sorted(found)]


def captioned(
    name: str,
    source: Path | tuple[datasets.Dataset, int, str] | None,
    row: dict,
    columns: list[str],
    place: str,
    args: argparse.Namespace,
) -> Picture:
    """The picture with its row's captions: of these columns, or `--instance_prompt` where there are none."""
    captions = tuple(row_caption(row, column, place) for column in columns) or (args.instance_prompt,)
    column = args.teacher_caption_column
    return Picture(name, captions, source, None if column is None else row_caption(row, column, place))


def read_jsonl(folder: Path, metadata: str) -> list[tuple[int, dict]]:
    """Returns (line number, row) pairs. Not by `datasets`: see `read_csv`."""
    rows = []
    # not splitlines(): it also cuts at characters that JSON allows inside a string
    for line, text in enumerate(read_text(folder, metadata).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{metadata} line {line} is not JSON ({error}): correct it.") from error
        if not isinstance(row, dict):
            raise InputError(f'{metadata} line {line} is not an object: write {{"file_name": ..., "text": ...}}.')
        rows.append((line, row))
    if not rows:
        raise InputError(f"{metadata} has no row: write one for each picture, or delete the file.")
    return rows


def read_csv(folder: Path, metadata: str) -> list[tuple[int, dict]]:
    """Returns (line number, row) pairs; every value is text.

    Not by `datasets`: it turns the caption `None` to null and `007` to a number, and renames columns.
    """
    reader = csv.reader(io.StringIO(read_text(folder, metadata), newline=""), strict=True)
    records = []
    line = 1
    try:
        for cells in reader:
            if cells:  # the reader gives [] for an empty line
                records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{metadata} line {line} is not CSV ({error}): correct it.") from error
    if len(records) < 2:
        raise InputError(f"{metadata} has no row: write the columns' names, then one row for each picture.")
    header = records[0][1]
    if len({*header}) < len(header):
        raise InputError(f"{metadata} names a column twice, in {listed(header)}: rename one.")
    for line, cells in records[1:]:
        if len(cells) != len(header):
            raise InputError(
                f"{metadata} line {line} has {len(cells)} cells for {len(header)} columns: "
                'put "quotes" around a value that holds a comma.'
            )
    return [(line, dict(zip(header, cells, strict=True))) for line, cells in records[1:]]


def listed(columns: list[str]) -> str:
    return ", ".join(map(repr, columns))


def picture_name(folder: Path, value: object, place: str) -> str:
    """Returns the metadata's path of one picture, relative to `folder` and normalised."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place} holds {reprlib.repr(value)}: write a picture's path there.")
    name = posixpath.normpath(value)
    if os.path.isabs(value) or name.split("/")[0] == "..":
        raise InputError(f"{place} leads out of --instance_data_dir: {value!r}; write a path below that folder.")
    if not (folder / name).is_file():
        raise InputError(f"{place} names {value!r}, and there is no such file: correct the path or delete the row.")
    return name


def check_every_picture_has_a_row(pictures: list[str], rows: list[tuple[int, dict]], metadata: str) -> None:
    """A picture counts in any `file_name` or `*_file_name` column: editing pairs have several."""
    with_row = {
        posixpath.normpath(value)
        for _, row in rows
        for column, value in row.items()
        if (column == "file_name" or column.endswith("_file_name")) and isinstance(value, str)
    }
    without_row = [name for name in pictures if name not in with_row]
    if without_row:
        raise InputError(
            f"{without_row[0]} has no row in {metadata} ({len(without_row)} of {len(pictures)} pictures have none): "
            "add it or move the picture out."
        )


def caption_columns(columns: list[str], table: str, args: argparse.Namespace) -> list[str]:
    """Returns the columns that hold captions; none where `--instance_prompt` captions every picture."""
    if args.teacher_caption_column not in (None, *columns):
        raise InputError(
            f"--teacher_caption_column {args.teacher_caption_column}: {table} has no such column, "
            f"only {listed(columns)}."
        )
    if args.caption_column:
        for column in args.caption_column:
            if column not in columns:
                raise InputError(f"--caption_column {column}: {table} has no such column, only {listed(columns)}.")
        if has_prompt(args):
            logger.warning("--instance_prompt is not used: --caption_column names the captions.")
        return args.caption_column
    if not has_prompt(args):
        raise InputError(
            f"{table} needs captions: name their column with --caption_column (there are {listed(columns)}), "
            "or give one --instance_prompt for all."
        )
    logger.warning(
        f"--instance_prompt captions every picture of {table}; --caption_column could name one of {listed(columns)}."
    )
    return []


def row_caption(row: dict, column: str, place: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place}, column {column!r} holds {reprlib.repr(value)}: write a caption there, as text.")
    return value


def read_dataset(args: argparse.Namespace) -> list[Picture]:
    name = args.dataset_name
    dataset = load_train_split(args)
    columns = dataset.column_names
    without_pictures = args.teacher_context == "caption" and args.image_column == "image" and "image" not in columns
    if args.image_column not in columns and not without_pictures:
        raise InputError(f"--image_column {args.image_column}: {name} has no such column, only {listed(columns)}.")
    chosen = caption_columns(columns, name, args)
    read = list(dict.fromkeys([*chosen, *filter(None, [args.teacher_caption_column])]))
    rows = dataset.select_columns(read) if read else [{}] * len(dataset)
    places = [(f"row {index} of {name}", row) for index, row in enumerate(rows)]
    if without_pictures:
        return [captioned(place, None, row, chosen, place, args) for place, row in places]
    try:
        # undecoded, so that one decoder reads every picture; a column of paths or bytes works too
        dataset = dataset.cast_column(args.image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"--image_column {args.image_column} of {name} holds no pictures ({first_line(error)}): name another."
        ) from error
    # an imagefolder leaves out what it has no row for, and names that hold test or val, without a word
    if dataset.builder_name == "imagefolder" and Path(name).is_dir():
        check_none_left_out(dataset, Path(name))
    images = dataset.select_columns([args.image_column])
    return [
        captioned(place, (images, index, args.image_column), row, chosen, place, args)
        for index, (place, row) in enumerate(places)
    ]


def load_train_split(args: argparse.Namespace) -> datasets.Dataset:
    name = args.dataset_name
    try:
        splits = datasets.load_dataset(name, args.dataset_config_name, cache_dir=args.cache_dir)
    except Exception as error:  # load_dataset documents no base class for what it raises
        raise InputError(
            f"--dataset_name {name} cannot be loaded ({first_line(error)}): check it and --dataset_config_name."
        ) from error
    if "train" not in splits:
        raise InputError(
            f"--dataset_name {name} has no split train, only {listed(list(splits))}: "
            "name its files so, or pass a folder of pictures as --instance_data_dir."
        )
    return splits["train"]


def check_none_left_out(dataset: datasets.Dataset, folder: Path) -> None:
    kept = {os.path.realpath(path) for path in cell_paths(dataset.with_format("arrow")[:].to_pylist())}
    pictures = sorted(path for path in files_below(folder) if is_picture(path.name))
    left_out = [path for path in pictures if os.path.realpath(path) not in kept]
    if left_out:
        raise InputError(
            f"--dataset_name {folder} leaves out {left_out[0].relative_to(folder).as_posix()} "
            f"({len(left_out)} of {len(pictures)} pictures: no metadata row, or a name with test or val): "
            f"use --instance_data_dir {folder}."
        )


def cell_paths(cell: object) -> Iterator[str]:
    """Every path of an undecoded picture ({"bytes": ..., "path": ...}) in nested lists and dictionaries."""
    if isinstance(cell, dict):
        if isinstance(cell.get("path"), str):
            yield cell["path"]
        cell = list(cell.values())
    if isinstance(cell, list):
        for inner in cell:
            yield from cell_paths(inner)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Data: decoding


def read_image(picture: Picture) -> Image.Image:
    """Returns the picture in RGB, 8 bits: upright by its EXIF, transparency on white, first frame of several.

    Raises `InputError` that names a picture that is missing, damaged or of unknown format.
    """
    try:
        with Image.open(io.BytesIO(source_bytes(picture))) as image:
            image.load()
            image.getexif()
            image.info.pop("exif", None)  # read above; exif_transpose would rewrite it, and fail on odd tags
            return to_rgb(ImageOps.exif_transpose(image))
    except PILLOW_ERRORS as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise InputError(
            f"{picture.name} cannot be read as a picture ({reason}): convert it to JPEG or PNG, or take it out."
        ) from error


def source_bytes(picture: Picture) -> bytes:
    if isinstance(picture.source, Path):
        return picture.source.read_bytes()
    dataset, row, column = picture.source
    cell = dataset[row][column] or {"bytes": None, "path": None}
    if cell["bytes"] is not None:
        return cell["bytes"]
    if cell["path"] is None:
        raise ValueError(f"column {column!r} is empty")
    with fsspec.open(cell["path"], "rb") as file:  # the path may lie in an archive, zip://...
        return file.read()


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are fractions, of unknown range")
    if image.mode.startswith("I"):
        image = to_8_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # premultiplied grey converts to nothing else
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Returns a 16-bit grey picture (modes I and I;16) as L or LA, 65535 -> 255; Pillow's convert would clip."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels do not fit in 16 bits")
    grey = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if "transparency" in image.info:
        opaque = values != image.info["transparency"]
        grey.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
    return grey


def picture_digests(pictures: list[Picture]) -> list[str]:
    """sha256 of each picture's undecoded content; nothing where captions have no picture."""
    return [
        "" if picture.source is None else hashlib.sha256(source_bytes(picture)).hexdigest() for picture in pictures
    ]


def check_pictures(pictures: list[Picture], *, resolution: int, disable_progress: bool) -> list[tuple[int, int]]:
    """Decodes every picture once, keeps none. Returns each upright (height, width); raises `InputError`.

    Captions without a picture are trained at `resolution`, in pixels.
    """
    sizes = []
    for picture in tqdm(pictures, desc="Reading pictures", disable=disable_progress):
        if picture.source is None:
            sizes.append((resolution, resolution))
        else:
            image = read_image(picture)
            sizes.append((image.height, image.width))
    return sizes


# Data: buckets and crops


MAX_ASPECT_RATIO = 8  # of a bucket; a longer strip is most likely a typing error


@dataclass(frozen=True)
class Example:
    """One repeat of one picture, with its crop drawn once for the run."""

    picture: int  # index into the pictures
    repeat: int
    bucket: tuple[int, int]  # (height, width), pixels
    centering: tuple[float, float]  # where the crop lies: 0 left/top .. 1 right/bottom


def check_geometry(args: argparse.Namespace) -> None:
    """Raises `InputError` for a `--resolution` or bucket that the model cannot be trained at. Reads no file."""
    problem = size_problem(args.resolution, args.resolution)
    if problem:
        raise InputError(f"--resolution {args.resolution} {problem}.")
    if args.aspect_ratio_buckets is None:
        return
    if not args.use_aspect_ratio_buckets:
        raise InputError("--aspect_ratio_buckets needs --use_aspect_ratio_buckets: give both or neither.")
    try:
        buckets = parse_buckets_string(args.aspect_ratio_buckets)
    except ValueError as error:
        raise InputError(
            f"--aspect_ratio_buckets {args.aspect_ratio_buckets!r} cannot be read ({first_line(error)}): "
            "write height,width;height,width."
        ) from error
    for height, width in buckets:
        problem = size_problem(height, width)
        if problem:
            raise InputError(f"--aspect_ratio_buckets: {height},{width} {problem}.")


def size_problem(height: int, width: int) -> str | None:
    """Returns what is wrong with a training size in pixels and what to do, or None."""
    if min(height, width) < MIN_SIDE_PIXELS:
        return f"is too small: use at least {MIN_SIDE_PIXELS} pixels a side"
    if height % PIXELS_PER_TOKEN or width % PIXELS_PER_TOKEN:
        return f"does not fit the model's patches: use multiples of {PIXELS_PER_TOKEN} pixels"
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        return f"is too long a strip: use at most {MAX_ASPECT_RATIO}:1"
    tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
    if tokens > MAX_IMAGE_TOKENS:
        side = math.isqrt(MAX_IMAGE_TOKENS) * PIXELS_PER_TOKEN
        return f"is too large ({tokens} image tokens of at most {MAX_IMAGE_TOKENS}): use {side}x{side} pixels or less"
    return None


def bucket_for(height: int, width: int, args: argparse.Namespace) -> tuple[int, int]:
    """Returns the (height, width) in pixels that a picture of this size is cropped to."""
    if not args.use_aspect_ratio_buckets:
        return (args.resolution, args.resolution)
    if args.aspect_ratio_buckets is None:
        resolution = min(args.resolution, round((height * width) ** 0.5))  # small pictures are not enlarged
        buckets = generate_aspect_ratio_buckets(resolution, divisibility=PIXELS_PER_TOKEN)
    else:
        buckets = parse_buckets_string(args.aspect_ratio_buckets)
    return buckets[find_nearest_bucket(height, width, buckets)]


def plan_examples(pictures: list[Picture], sizes: list[tuple[int, int]], args: argparse.Namespace) -> list[Example]:
    """Returns `--repeats` examples of every picture; `sizes` are the pictures' (height, width) in pixels.

    A crop is drawn from (seed, picture, repeat) alone. Raises `InputError` for a picture that is too small.
    """
    examples = []
    for index, (picture, (height, width)) in enumerate(zip(pictures, sizes, strict=True)):
        bucket = bucket_for(height, width, args)
        problem = size_problem(*bucket)
        if problem:
            raise InputError(
                f"{picture.name} ({height}x{width} pixels) at --resolution {args.resolution} falls in the bucket "
                f"{bucket[0]}x{bucket[1]}, which {problem}; change --resolution or the picture."
            )
        # A side that the crop keeps whole has no place to draw: equal crops are then encoded once.
        too_wide, too_tall = width * bucket[0] > height * bucket[1], width * bucket[0] < height * bucket[1]
        for repeat in range(args.repeats):
            rng = random.Random(f"{args.seed}/crop/{index}/{repeat}")
            x, y = (0.5, 0.5) if args.center_crop else (rng.random(), rng.random())
            centering = (x if too_wide else 0.5, y if too_tall else 0.5)
            examples.append(Example(index, repeat, bucket, centering))
    return examples


def crop_image(image: Image.Image, example: Example, flip: bool) -> Image.Image:
    """Returns the example's part of its picture, scaled to the bucket's size, mirrored if `flip`."""
    height, width = example.bucket
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=example.centering)
    return ImageOps.mirror(image) if flip else image


# Data: order


@dataclass(frozen=True)
class Sample:
    """One example as it is seen in one epoch."""

    example: int  # index into the examples
    epoch: int
    caption: int  # index into the picture's captions
    flip: bool


class SampleOrder:
    """An endless run's micro-batches. In each epoch every example comes once, and a batch is of one bucket.

    Everything is drawn from (seed, place in the run) alone: any process can compute any batch, and a resumed run needs
    no generator state. A bucket's last batch may be smaller than `batch_size`.
    """

    def __init__(
        self, pictures: list[Picture], examples: list[Example], *, batch_size: int, random_flip: bool, seed: int
    ):
        self.batch_size = batch_size
        self.random_flip = random_flip
        self.seed = seed
        self.caption_counts = [len(pictures[example.picture].captions) for example in examples]
        self.buckets: dict[tuple[int, int], list[int]] = {}
        for index, example in enumerate(examples):
            self.buckets.setdefault(example.bucket, []).append(index)
        self.num_batches = sum(math.ceil(len(members) / batch_size) for members in self.buckets.values())
        self._epoch = -1  # the one whose batches are kept
        self._batches: list[list[int]] = []

    def batch(self, index: int) -> list[Sample]:
        """Returns the run's micro-batch `index`, counted from 0; its epoch is `index // num_batches`."""
        epoch, place = divmod(index, self.num_batches)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self.shuffled_batches(epoch)
        return [self.sample(epoch, example) for example in self._batches[place]]

    def shuffled_batches(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}/order/{epoch}")
        batches = []
        for members in self.buckets.values():
            shuffled = rng.sample(members, len(members))
            batches += [shuffled[i : i + self.batch_size] for i in range(0, len(shuffled), self.batch_size)]
        rng.shuffle(batches)
        return batches

    def sample(self, epoch: int, example: int) -> Sample:
        place = f"{epoch}/{example}"
        caption = random.Random(f"{self.seed}/caption/{place}").randrange(self.caption_counts[example])
        flip = self.random_flip and random.Random(f"{self.seed}/flip/{place}").random() < 0.5
        return Sample(example, epoch, caption, flip)


@dataclass(frozen=True)
class Crop:
    """What of which picture is seen."""

    example: int  # index into the examples
    flip: bool


@dataclass(frozen=True)
class Encoding:
    """What one encoder makes one tensor of: a prompt ("text"), a crop ("vae"), or a prompt after a crop ("vlm")."""

    encoder: Literal["text", "vlm", "vae"]
    prompt: str = ""
    crop: Crop | None = None


def place_seed(seed: int, purpose: str, place: str) -> int:
    """Returns a generator's seed, below 2**63, for one purpose at one place in the run."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{place}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def noise_seed(seed: int, sample: Sample) -> int:
    """Returns the seed of a sample's noise: the same in any process, at any batch size."""
    return place_seed(seed, "noise", f"{sample.epoch}/{sample.example}")


# Contexts


# Counted up when an encoding of the same inputs changes: a cache from before is not used then.
ENCODING_FORMAT = 1


class Contexts:
    """Contexts for training and drawing, read from the cache or, without one, encoded when they are asked for."""

    def __init__(
        self,
        pipeline: Pipeline,
        folder: Path,
        text_width: int,
        pictures: list[Picture],
        digests: list[str],
        examples: list[Example],
        args: argparse.Namespace,
        device: torch.device,
    ):
        self.pipeline, self.folder = pipeline, folder  # the pipeline's checkpoint
        self.pictures, self.digests, self.examples = pictures, digests, examples
        self.args, self.device = args, device
        self.vision_encoder: VisionEncoder | None = None
        self.cache: ContextCache | None = None
        self.model_fingerprint = self.vlm_fingerprint = ""
        self.text_width = text_width
        self._last_image: tuple[int, Image.Image] | None = None

    @property
    def captions(self) -> list[str]:
        return list(dict.fromkeys(caption for picture in self.pictures for caption in picture.captions))

    def caption(self, sample: Sample) -> str:
        return self.pictures[self.examples[sample.example].picture].captions[sample.caption]

    def cropped(self, crop: Crop) -> Image.Image | None:
        """The picture as the teacher sees it; None where captions have no picture."""
        example = self.examples[crop.example]
        if self.pictures[example.picture].source is None:
            return None
        if self._last_image is None or self._last_image[0] != example.picture:
            self._last_image = example.picture, read_image(self.pictures[example.picture])
        return crop_image(self._last_image[1], example, crop.flip)

    def teacher_encodings(self, sample: Sample) -> tuple[Encoding, ...]:
        picture = self.pictures[self.examples[sample.example].picture]
        caption = picture.teacher_caption or picture.captions[sample.caption]
        prompt = caption + self.args.teacher_prompt_suffix
        return teacher_encodings(self.args, prompt, Crop(sample.example, sample.flip))

    def all_teacher_encodings(self) -> Iterator[tuple[Picture, Encoding]]:
        """Every one that any sample may need, with its picture."""
        flips = (False, True) if self.args.random_flip else (False,)
        for (index, example), flip in itertools.product(enumerate(self.examples), flips):
            picture = self.pictures[example.picture]
            for caption in range(len(picture.captions)):
                for encoding in self.teacher_encodings(Sample(index, 0, caption, flip)):
                    yield picture, encoding

    def token_count(self, encoding: Encoding) -> int:
        """Tokens of the encoding's text, pictures included."""
        if encoding.encoder != "vlm":
            return self.pipeline.chat_token_count(encoding.prompt)
        size = self.examples[encoding.crop.example].bucket
        # Apart: a picture of absurd size must not be written out to be counted.
        without_picture = self.vision_encoder.content(encoding.prompt, 0)
        return self.pipeline.chat_token_count(without_picture) + self.vision_encoder.num_image_tokens(*size)

    def key(self, encoding: Encoding) -> str:
        """All that the encoding depends on."""
        parts = [ENCODING_FORMAT, encoding.encoder, self.model_fingerprint, str(self.pipeline.vae.dtype)]
        if encoding.encoder != "vae":
            parts += [encoding.prompt, text_settings(self.args)]
        if encoding.encoder == "vlm":
            parts += [self.vlm_fingerprint, self.args.vlm_min_pixels, self.args.vlm_max_pixels, self.args.vlm_rope]
        if encoding.crop is not None:
            example = self.examples[encoding.crop.example]
            parts += [self.digests[example.picture], *example.bucket, *example.centering, encoding.crop.flip]
        return content_key(*parts)

    def encode(self, encoding: Encoding) -> torch.Tensor:
        image = None if encoding.crop is None else self.cropped(encoding.crop)
        encoded = encode(self.pipeline, encoding, image, self.vision_encoder, self.args)
        if not encoded.isfinite().all():
            name = reprlib.repr(encoding.prompt)
            if encoding.crop is not None:
                name = self.pictures[self.examples[encoding.crop.example].picture].name
            advice = "use --mixed_precision bf16 or no" if self.args.mixed_precision == "fp16" else "check the weights"
            raise InputError(f"{name}: its encoding is not finite; {advice}")
        return encoded

    def tensor(self, encoding: Encoding) -> torch.Tensor:
        return self.encode(encoding) if self.cache is None else self.cache.load(self.key(encoding))

    # Contexts of a batch, on the device.

    def student(self, prompts: list[str]) -> Context:
        return Context.stack([(self.tensor(Encoding("text", prompt)),) for prompt in prompts]).to(self.device)

    def teacher(self, samples: list[Sample]) -> Context:
        encodings = [self.teacher_encodings(sample) for sample in samples]
        return Context.stack([tuple(map(self.tensor, of_sample)) for of_sample in encodings]).to(self.device)

    def load(self, samples: list[Sample]) -> tuple[Context, Context]:
        """(student's, teacher's) contexts of one batch."""
        return self.student([self.caption(sample) for sample in samples]), self.teacher(samples)


def checkpoint_folder(args: argparse.Namespace) -> Path:
    """The checkpoint's folder, downloaded but for the transformer where it is a hub id."""
    if Path(args.pretrained_model_name_or_path).is_dir():
        return Path(args.pretrained_model_name_or_path)
    return Path(
        Pipeline.download(
            args.pretrained_model_name_or_path, transformer=None, variant=args.variant, **hub_kwargs(args)
        )
    )


def check_prompt_lengths(contexts: Contexts, drawn_prompts: list[str]) -> None:
    """The text encoder cuts a long text without a word, and with it the teacher's suffix or picture."""
    args = contexts.args
    for prompt in drawn_prompts:
        check_length(contexts, "--validation_prompt or --retention_prompts", Encoding("text", prompt), "shorten it")
    for picture in contexts.pictures:
        for caption in picture.captions:
            check_length(contexts, picture.name, Encoding("text", caption), "shorten the caption")
    advice = "shorten the caption or --teacher_prompt_suffix"
    if args.teacher_context == "vlm":
        advice += ", or lower --vlm_min_pixels and --vlm_max_pixels"
    seen = set()
    for picture, encoding in contexts.all_teacher_encodings():
        size = contexts.examples[encoding.crop.example].bucket if encoding.encoder == "vlm" else None
        if encoding.encoder != "vae" and (encoding.prompt, size) not in seen:
            seen.add((encoding.prompt, size))
            name = f"{picture.name}, as the teacher reads it"
            check_length(contexts, name, encoding, advice, flag=TEACHER_LENGTH_FLAG)


def check_length(
    contexts: Contexts, name: str, encoding: Encoding, advice: str, *, flag: str = "max_sequence_length"
) -> None:
    count, limit = contexts.token_count(encoding), getattr(contexts.args, flag)
    if count > limit:
        picture = " with the picture" if encoding.encoder == "vlm" else ""
        raise InputError(
            f"{name}: {reprlib.repr(encoding.prompt)} has {count} tokens{picture} and the chat text, --{flag} is "
            f"{limit}: {advice}"
        )


def check_teacher_knows_more(contexts: Contexts) -> None:
    """With equal texts and no picture the loss is zero from the first step to the last."""
    if contexts.args.teacher_context == "caption" and not contexts.args.teacher_prompt_suffix:
        if all({*picture.captions} == {picture.teacher_caption} for picture in contexts.pictures):
            raise InputError(
                f"--teacher_caption_column {contexts.args.teacher_caption_column}: the teacher reads what the student "
                "reads, so there is nothing to learn; name a column of longer captions"
            )


@contextmanager
def naming_the_checkpoint(args: argparse.Namespace) -> Iterator[None]:
    """A part of the checkpoint that is missing or damaged is one line."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: cannot be loaded "
            f"({first_line(error)}); check its files and --variant, --revision"
        ) from error


def load_text_encoder(folder: Path, args: argparse.Namespace, dtype: torch.dtype) -> TextEncoder:
    with naming_the_checkpoint(args):
        return TextEncoder.from_pretrained(folder, subfolder="text_encoder", dtype=dtype, variant=args.variant)


def load_text_encoders(contexts: Contexts, *, with_vision: bool) -> None:
    """The pipeline's text encoder on the accelerator, with the vision tower around it if asked for."""
    pipeline, args = contexts.pipeline, contexts.args
    pipeline.text_encoder = load_text_encoder(contexts.folder, args, pipeline.vae.dtype).to(contexts.device)
    if with_vision:
        contexts.vision_encoder.load(pipeline.text_encoder)


def free_text_encoders(contexts: Contexts) -> None:
    if contexts.vision_encoder is not None:
        contexts.vision_encoder.unload()
    contexts.pipeline.text_encoder = None
    free_memory()


def fill_cache(contexts: Contexts, drawn_prompts: list[str], accelerator: Accelerator) -> None:
    """Encodes what the cache lacks, shared among processes. One encoder at a time is on the accelerator.

    Where nothing is missing, no encoder is loaded.
    """
    pipeline, cache = contexts.pipeline, contexts.cache
    bar = partial(tqdm, disable=not accelerator.is_local_main_process)
    prompts = [Encoding("text", prompt) for prompt in [*contexts.captions, *drawn_prompts]]
    needed = [*prompts, *(encoding for _, encoding in contexts.all_teacher_encodings())]
    encoding_of = {contexts.key(encoding): encoding for encoding in dict.fromkeys(needed)}
    missing = [encoding_of[key] for key in cache.missing(bar([*encoding_of], desc="Checking the context cache"))]
    accelerator.wait_for_everyone()  # all have seen the same gaps before anyone fills one
    sizes = [math.prod(encoding_shape(contexts, encoding)) for encoding in missing]
    total = sum(sizes) * pipeline.vae.dtype.itemsize
    logger.info(f"Encoding {counted(missing, encoding_of.values())}: {total / 1e6:,.1f} MB in {cache.folder}")
    cache.check_space(total)

    def encode_and_save(encoder: str, description: str) -> None:
        share = [encoding for encoding in missing if encoding.encoder == encoder]
        for encoding in bar(share[accelerator.process_index :: accelerator.num_processes], desc=description):
            cache.save(contexts.key(encoding), contexts.encode(encoding).cpu())

    encoders = {encoding.encoder for encoding in missing}
    if encoders & {"text", "vlm"}:
        load_text_encoders(contexts, with_vision="vlm" in encoders)
        encode_and_save("text", "Encoding prompts")
        encode_and_save("vlm", "Encoding prompts with pictures")
        free_text_encoders(contexts)
    if "vae" in encoders:
        pipeline.vae.to(accelerator.device)
        encode_and_save("vae", "Encoding pictures")
        pipeline.vae.to("cpu")
        free_memory()
    accelerator.wait_for_everyone()


def counted(missing: list[Encoding], needed: Iterable[Encoding]) -> str:
    """How many of each kind are missing, in words."""
    names = {"text": "prompts", "vlm": "prompts with pictures", "vae": "pictures"}
    missing_of, needed_of = (Counter(encoding.encoder for encoding in some) for some in (missing, needed))
    return " and ".join(f"{missing_of[kind]} of {needed_of[kind]} {names[kind]}" for kind in names if needed_of[kind])


# Models and optimizer


def hub_kwargs(args: argparse.Namespace) -> dict:
    return {"revision": args.revision, "cache_dir": args.cache_dir}


def read_quantization_settings(args: argparse.Namespace) -> dict | None:
    if args.bnb_quantization_config_path is None:
        return None
    path = args.bnb_quantization_config_path
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        kinds = [kind for kind in ("load_in_4bit", "load_in_8bit") if settings.get(kind)]
        if len(kinds) != 1:
            raise ValueError("it sets neither or both of load_in_4bit and load_in_8bit")
        BitsAndBytesConfig(**settings)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise InputError(
            f"--bnb_quantization_config_path {path}: cannot be used ({first_line(error)}); give a JSON file with the "
            'arguments of BitsAndBytesConfig, such as {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}'
        ) from error
    if not torch.cuda.is_available():
        raise InputError(f"--bnb_quantization_config_path {path}: quantized weights need a GPU; drop the flag")
    return settings


def load_transformer(args: argparse.Namespace, dtype: torch.dtype) -> Transformer:
    settings = read_quantization_settings(args)
    if settings is not None and settings.get("load_in_4bit"):
        settings["bnb_4bit_compute_dtype"] = dtype
    with naming_the_checkpoint(args):
        return Transformer.from_pretrained(
            args.pretrained_model_name_or_path,
            subfolder="transformer",
            dtype=dtype,
            variant=args.variant,
            quantization_config=None if settings is None else BitsAndBytesConfig(**settings),
            **hub_kwargs(args),
        )


def build_optimizer(
    args: argparse.Namespace, parameters: list[torch.nn.Parameter], num_processes: int
) -> torch.optim.Optimizer:
    pictures_per_step = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    settings = {
        "lr": args.learning_rate * (pictures_per_step if args.scale_lr else 1),
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "prodigy":
        try:
            import prodigyopt
        except ImportError as error:
            raise InputError("--optimizer prodigy: run pip install prodigyopt first") from error
        if args.learning_rate <= 0.1:
            logger.warning(f"--learning_rate {args.learning_rate}: with prodigy it is a factor; 1.0 is usual")
        return prodigyopt.Prodigy(
            parameters,
            beta3=args.prodigy_beta3,
            decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction,
            safeguard_warmup=args.prodigy_safeguard_warmup,
            **settings,
        )
    if args.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise InputError("--use_8bit_adam: run pip install bitsandbytes first") from error
        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings)


class StudentVelocity(torch.nn.Module):
    """The student as a module: what accelerate wraps, so that processes share its gradients."""

    def __init__(self, pipeline: Pipeline):
        super().__init__()
        self.pipeline = pipeline
        self.transformer = pipeline.transformer

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        return self.pipeline.predict_velocity(latents, timestep, context)


@dataclass
class Run:
    """What the training loop works on."""

    args: argparse.Namespace
    accelerator: Accelerator
    pipeline: Pipeline
    roles: StudentTeacherLoRA
    student: torch.nn.Module
    contexts: Contexts
    order: SampleOrder
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    save_dtype: torch.dtype
    settings: dict  # see `fixed_settings`
    skipped_steps: int = 0  # in a row, by the fp16 gradient scaler


# Checkpoints and the LoRA file


# What a resumed run must share with its checkpoint to end in the same weights: flags, and what follows from flags,
# data and launcher.
FIXED_FLAGS = """
    variant bnb_quantization_config_path
    repeats resolution use_aspect_ratio_buckets aspect_ratio_buckets center_crop random_flip
    teacher_context teacher_prompt_suffix vlm_min_pixels vlm_max_pixels vlm_rope
    teacher ema_decay num_rollout_steps loss_space
    rank lora_alpha lora_dropout lora_layers init_lora
    seed train_batch_size mixed_precision
    optimizer use_8bit_adam learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power max_grad_norm
    adam_beta1 adam_beta2 adam_weight_decay adam_epsilon
    prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup
""".split()
PICTURES = "pictures and captions"
CHECKPOINT_FILES = ("adapters.safetensors", "trainer_state.pt", "state.json")


def fixed_settings(contexts: Contexts, batches: int) -> dict:
    """What is kept in a checkpoint and compared on resuming; as JSON gives it back.

    Args:
        batches: a step's, over all processes.
    """
    args = contexts.args
    settings = {f"--{name}": getattr(args, name) for name in FIXED_FLAGS} | {
        "model": model_identity(args),
        **{f"--{name}": value for name, value in text_settings(args).items()},
        "--vlm_model_name_or_path": contexts.vlm_fingerprint[:16],
        PICTURES: {
            picture.name: content_key(digest, picture.captions, picture.teacher_caption)[:16]
            for picture, digest in zip(contexts.pictures, contexts.digests, strict=True)
        },
        "processes x --gradient_accumulation_steps": batches,
    }
    return json.loads(json.dumps(settings))


def model_identity(args: argparse.Namespace) -> str:
    """What a folder holds, wherever it lies; of a hub checkpoint its name and revision."""
    folder = Path(args.pretrained_model_name_or_path)
    if folder.is_dir():
        return checkpoint_fingerprint(folder, ("transformer", "text_encoder", "tokenizer", "vae", "scheduler"))[:16]
    return f"{args.pretrained_model_name_or_path}@{args.revision or 'main'}"


def checkpoint_step(path: Path) -> int:
    """The step of a whole checkpoint's folder, or -1 for anything else."""
    number = path.name.removeprefix("checkpoint-")
    is_whole = all((path / name).is_file() for name in CHECKPOINT_FILES)
    return int(number) if number != path.name and number.isdecimal() and is_whole else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in output_dir.iterdir() if checkpoint_step(path) >= 0] if output_dir.is_dir() else []
    return sorted(found, key=checkpoint_step)


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from; None for a run from the start.

    Raises:
        InputError: it is not there, or this run would overwrite another's results or mix with them.
    """
    output_dir = Path(args.output_dir)
    existing = list_checkpoints(output_dir)
    names = ", ".join(path.name for path in existing) or "none"
    if args.resume_from_checkpoint is None:
        if existing:
            raise InputError(
                f"--output_dir {args.output_dir}: holds an earlier run ({names}); choose another folder, or go on "
                "with --resume_from_checkpoint latest"
            )
        refuse_finished(args)
        return None
    if args.resume_from_checkpoint == "latest":
        if not existing:
            refuse_finished(args)
        return existing[-1] if existing else None
    for path in (output_dir / args.resume_from_checkpoint, Path(args.resume_from_checkpoint)):
        if checkpoint_step(path) >= 0:
            if existing and checkpoint_step(existing[-1]) > checkpoint_step(path):
                raise InputError(
                    f"--resume_from_checkpoint {args.resume_from_checkpoint}: {args.output_dir} holds newer ones "
                    f"({names}), which a new branch would mix with; move them away, or resume from latest"
                )
            return path
    raise InputError(
        f"--resume_from_checkpoint {args.resume_from_checkpoint}: no whole checkpoint; {args.output_dir} has: {names}"
    )


def refuse_finished(args: argparse.Namespace) -> None:
    if Path(args.output_dir, LORA_FILE).exists():
        raise InputError(
            f"--output_dir {args.output_dir}: holds a finished run's {LORA_FILE} and no checkpoint to go on from; "
            "choose another folder"
        )


def read_state(checkpoint: Path) -> dict:
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return {"step": state["step"], "settings": state["settings"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume_from_checkpoint {checkpoint}: state.json is damaged; remove the folder") from error


def check_settings(checkpoint: Path, settings: dict) -> None:
    """Refuses to go on with settings that differ from the checkpoint's."""
    for name, saved in read_state(checkpoint)["settings"].items():
        now = settings.get(name)
        if name == PICTURES and saved != now:
            changed = sorted(
                picture for picture in saved.keys() | now.keys() if saved.get(picture) != now.get(picture)
            )
            raise InputError(
                f"--resume_from_checkpoint {checkpoint.name}: {changed[0]} or its caption is new, changed or gone "
                f"({len(changed)} such pictures); undo that, or start in another --output_dir"
            )
        if saved != now:
            raise InputError(
                f"--resume_from_checkpoint {checkpoint.name}: its {name} was {saved}, now it is {now}; "
                "pass the same, or start in another --output_dir"
            )


@contextmanager
def naming_the_output(run: Run, what: str) -> Iterator[None]:
    """A full disk or a folder that cannot be written is one line, which says what is safe."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        kept = [path.name for path in list_checkpoints(Path(run.args.output_dir))[-1:]] or ["no checkpoint"]
        raise InputError(
            f"--output_dir {run.args.output_dir}: {what} could not be written ({first_line(error)}); {kept[0]} is "
            "whole: make room, then run the same command with --resume_from_checkpoint latest"
        ) from error


def sync_to_disk(path: Path) -> None:
    """What a rename makes visible must be on the disk before: a power cut keeps no promise otherwise."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_lora(run: Run, folder: Path) -> None:
    """Writes the student as stock diffusers reads it, beside its place first."""
    weights, metadata = run.roles.export(run.save_dtype)
    unfinished = f".{LORA_FILE}.tmp"
    StockPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=weights,
        transformer_lora_adapter_metadata=metadata,
        weight_name=unfinished,
    )
    sync_to_disk(folder / unfinished)
    os.replace(folder / unfinished, folder / LORA_FILE)


def save_checkpoint(run: Run, step: int) -> None:
    """Adapters, optimizer, scheduler and step; never the frozen base. There whole or not at all.

    Raises:
        InputError: it could not be written. Those before it are as they were.
    """
    output_dir = Path(run.args.output_dir)
    target, unfinished = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    if checkpoint_step(target) == step:
        return
    with naming_the_output(run, target.name):
        try:
            write_checkpoint(run, step, unfinished)
            os.rename(unfinished, target)
            sync_to_disk(output_dir)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    logger.info(f"Saved {target}")
    if run.args.checkpoints_total_limit is not None:
        older = [path for path in list_checkpoints(output_dir) if checkpoint_step(path) < step]
        for old in older[: max(0, len(older) + 1 - run.args.checkpoints_total_limit)]:
            # Renamed first: a run killed while it deletes leaves no half checkpoint.
            shutil.rmtree(old.rename(output_dir / f".{old.name}.tmp"))


def write_checkpoint(run: Run, step: int, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file({name: weight.cpu() for name, weight in run.roles.state_dict().items()}, folder / "adapters.safetensors")
    trainer_state = {"optimizer": run.optimizer.state_dict(), "lr_scheduler": run.lr_scheduler.state_dict()}
    if run.accelerator.scaler is not None:
        trainer_state["scaler"] = run.accelerator.scaler.state_dict()
    torch.save(trainer_state, folder / "trainer_state.pt")
    state = json.dumps({"step": step, "settings": run.settings}, indent=2)
    (folder / "state.json").write_text(state, encoding="utf-8")
    save_lora(run, folder)
    for path in (*folder.iterdir(), folder):
        sync_to_disk(path)


def remove_unfinished(output_dir: Path) -> None:
    """What a killed run was writing or deleting."""
    for path in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(run: Run, checkpoint: Path) -> int:
    """Restores what `save_checkpoint` wrote; returns its step."""
    try:
        adapters = load_file(checkpoint / "adapters.safetensors")
        trainer_state = torch.load(checkpoint / "trainer_state.pt", map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint.name}: is damaged ({first_line(error)}); remove it and resume again"
        ) from error
    run.roles.load_state_dict(adapters)
    run.optimizer.load_state_dict(trainer_state["optimizer"])
    run.lr_scheduler.load_state_dict(trainer_state["lr_scheduler"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(trainer_state["scaler"])
    return read_state(checkpoint)["step"]


# What the user sees


@dataclass(frozen=True)
class Drawing:
    """One picture and the latents it was decoded from."""

    latents: torch.Tensor  # (1, C, H / 8, W / 8), on the CPU
    image: Image.Image


class Gallery:
    """Draws with base, student and teacher at the deployed steps; writes contact sheets and curves.

    Every picture is what the stock pipeline draws from the same noise with the saved LoRA. Nothing here touches
    the weights or the generators that training uses.
    """

    def __init__(self, run: Run):
        self.run, self.args = run, run.args
        self.folder = Path(run.args.output_dir)
        self.base_drawings: dict[tuple[str, int], Drawing] = {}  # (prompt, seed): drawn once
        # (step, prompt, seed) -> the student's picture: of validation prompts at seed 0, and of retention prompts
        self.story: dict[tuple[int, str, int], Image.Image] = {}
        self.card_gallery: list[tuple[str, str]] = []  # (prompt, path in the output folder)
        one_per_picture = {
            example.picture: index for index, example in reversed(list(enumerate(run.contexts.examples)))
        }
        self.shown = [
            Sample(example=index, epoch=0, caption=0, flip=False)
            for index in sorted(one_per_picture.values())[:NUM_PREVIEW_PICTURES]
        ]

    # Drawing

    def noise(self, height: int, width: int, seed: int) -> torch.Tensor:
        """(1, C, h, w): in float32 what a pipeline draws with `torch.Generator().manual_seed(seed)`."""
        pipeline = self.run.pipeline
        noise = seeded_noise(pipeline.latent_shape(height, width), [seed])
        return noise.to(self.run.accelerator.device, pipeline.latents_dtype)

    def draw(self, context: Context, noise: torch.Tensor) -> Drawing:
        latents = self.run.pipeline.sample(context, noise, self.args.num_inference_steps)
        return Drawing(latents.cpu(), self.decode(latents)[0])

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """The VAE is on the accelerator for this alone."""
        vae = self.run.pipeline.vae
        with offload_models(vae, device=self.run.accelerator.device, offload=True):
            return self.run.pipeline.decode(latents)

    def draw_prompt(self, prompt: str, seed: int) -> Drawing:
        noise = self.noise(self.args.validation_height, self.args.validation_width, seed)
        return self.draw(self.run.contexts.student([prompt]), noise)

    def base_drawing(self, prompt: str, seed: int) -> Drawing:
        if (prompt, seed) not in self.base_drawings:
            with self.run.roles.base_role():
                self.base_drawings[prompt, seed] = self.draw_prompt(prompt, seed)
        return self.base_drawings[prompt, seed]

    def student_drawing(self, prompt: str, seed: int) -> Drawing:
        with self.run.roles.shipped_role(self.run.save_dtype):
            return self.draw_prompt(prompt, seed)

    # Sheets

    def write(self, name: str, step: int, title: str, columns: list[str], rows: list[tuple], note: str) -> None:
        """One contact sheet, in the output folder and to the trackers; rows of (label, pictures or None)."""
        self.write_parts(name, step, [(title, columns, rows, note)])

    def write_parts(self, name: str, step: int, parts: list[tuple]) -> None:
        """Contact sheets below each other, as one picture; each part is (title, columns, rows, note)."""
        sheets = [
            contact_sheet(title, columns, [(label, [*map(Cell, images)]) for label, images in rows], note=note)
            for title, columns, rows, note in parts
        ]
        sheet = stack(sheets, 0)
        path = self.folder / f"{name}.png"
        with naming_the_output(self.run, path.name):
            save_png(sheet, path)
        for tracker in self.run.accelerator.trackers:
            if tracker.name in ("tensorboard", "wandb"):
                form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name.partition("-")[0]: np.asarray(sheet)[None]}, step=step, **form)
        logger.info(f"Wrote {path}")

    def preview(self) -> None:
        """Before the first step: what the teacher draws where it sees the picture. It can teach no more than that."""
        rows = []
        for seed, sample in enumerate(progress_bar(self.shown, "Drawing the preview")):
            example = self.run.contexts.examples[sample.example]
            noise = self.noise(*example.bucket, seed)
            caption = self.run.contexts.caption(sample)
            with self.run.roles.base_role():
                base = self.draw(self.run.contexts.student([caption]), noise)
            with self.run.roles.teacher_role():
                teacher = self.draw(self.run.contexts.teacher([sample]), noise)
            pictures = [picture] if (picture := self.run.contexts.cropped(Crop(sample.example, sample.flip))) else []
            teacher_caption = self.run.contexts.pictures[example.picture].teacher_caption
            label = caption if teacher_caption is None else f"{caption} (teacher: {teacher_caption})"
            rows.append((label, [base.image, teacher.image, *pictures]))
        self.write(
            "preview",
            0,
            f"Before training, drawn in {self.args.num_inference_steps} sampling steps",
            [
                "base",
                f"teacher: {TEACHER_CONTEXTS[self.args.teacher_context]}",
                *(["the picture"] if pictures else []),
            ],
            rows,
            note="The student is pulled from the base's column towards the teacher's. If the teacher's does not show "
            "what you want, training cannot teach it: change "
            + (
                "the teacher's captions"
                if self.args.teacher_context == "caption"
                else "--teacher_context, --teacher_prompt_suffix, --resolution or the pictures"
            )
            + " before you spend hours.",
        )

    def validate(self, step: int) -> float:
        """Draws prompts, a rollout and the retention prompts with the student as it would be saved.

        Returns:
            Retention: how far the student's final latents lie from the base's, from the same noise, over how far the
            base's lie from one another. 0: unrelated prompts are drawn as before; 1: as unlike as another picture.
        """
        self.draw_validation(step)
        self.draw_rollout(step)
        return self.draw_retention(step)

    def validation_prompts(self, step: int) -> list[str]:
        final = [self.args.final_validation_prompt] if self.args.final_validation_prompt else []
        return self.args.validation_prompt + (final if step == self.args.max_train_steps else [])

    def draw_validation(self, step: int) -> None:
        rows = []
        seeds = range(self.args.num_validation_images)
        for prompt in progress_bar(self.validation_prompts(step), "Validating"):
            bases = [self.base_drawing(prompt, seed).image for seed in seeds]
            students = [self.student_drawing(prompt, seed).image for seed in seeds]
            rows += [(f"base: {prompt}", bases), (f"student: {prompt}", students)]
            self.story[step, prompt, 0] = students[0]
            if step == self.args.max_train_steps:
                self.keep_for_card(prompt, students[0])
        self.write(
            f"validation-{step}",
            step,
            f"After training step {step}, drawn in {self.args.num_inference_steps} sampling steps",
            [f"seed {seed}" for seed in seeds],
            rows,
            note="A column starts from the same noise. Look for your subject, and for edges as sharp as the base's.",
        )

    def keep_for_card(self, prompt: str, image: Image.Image) -> None:
        name = f"images/validation_{len(self.card_gallery)}.png"
        (self.folder / "images").mkdir(exist_ok=True)
        save_png(image, self.folder / name)
        self.card_gallery.append((prompt, name))

    def draw_rollout(self, step: int) -> None:
        """The clean picture that student and teacher imply at each state the student visits."""
        sample = self.shown[0]
        example, contexts, pipeline = self.run.contexts.examples[sample.example], self.run.contexts, self.run.pipeline
        student_context, teacher_context = contexts.load([sample])
        schedule = pipeline.schedule(*example.bucket, self.args.num_rollout_steps, self.run.accelerator.device)
        with self.run.roles.shipped_role(self.run.save_dtype):
            states = rollout(
                partial(pipeline.predict_velocity, context=student_context),
                self.run.roles.as_teacher(partial(pipeline.predict_velocity, context=teacher_context)),
                self.noise(*example.bucket, 0),
                schedule,
            )
            pairs = [(float(state.sigma), state.student_x0, state.teacher_x0) for state in states]
        students, teachers = (
            [self.decode(pipeline.image_latents(pair[place]))[0] for pair in pairs] for place in (1, 2)
        )
        self.write(
            f"rollout-{step}",
            step,
            f"After training step {step}: the clean picture implied at each visited state, noisiest first",
            [f"sigma {sigma:.3f}" for sigma, *_ in pairs],
            [("student", students), ("teacher", teachers)],
            note=f"Caption: {contexts.caption(sample)}. The loss is the distance between the two rows.",
        )

    def draw_retention(self, step: int) -> float:
        bases, students = [], []
        for seed, prompt in enumerate(progress_bar(self.args.retention_prompts, "Measuring retention")):
            bases.append(self.base_drawing(prompt, seed))
            students.append(self.student_drawing(prompt, seed))
            self.story[step, prompt, seed] = students[-1].image
        retention = relative_drift(
            torch.cat([drawing.latents for drawing in bases]), torch.cat([drawing.latents for drawing in students])
        )
        self.write(
            f"retention-{step}",
            step,
            f"After training step {step}: prompts that have nothing to do with it, retention {retention:.3f}",
            self.args.retention_prompts,
            [("base", [drawing.image for drawing in bases]), ("student", [drawing.image for drawing in students])],
            note="A column starts from the same noise. Retention 0: drawn as before. 1: as unlike the base's picture "
            "as another prompt's picture is.",
        )
        return retention

    def tell_story(self, step: int) -> None:
        """One sheet of the whole run, and its curves."""
        steps = sorted({told for told, *_ in self.story})
        shown = steps if len(steps) <= 4 else [steps[round(place * (len(steps) - 1) / 3)] for place in range(4)]
        columns = ["base", *(f"after step {told}" for told in shown)]
        drawn = f"drawn in {self.args.num_inference_steps} sampling steps"

        def rows(asked: list[tuple[str, int]]) -> list[tuple]:
            return [
                (prompt, [self.base_drawing(prompt, seed).image, *(self.story.get((t, prompt, seed)) for t in shown)])
                for prompt, seed in asked
            ]

        pictures = [self.run.contexts.cropped(Crop(sample.example, sample.flip)) for sample in self.shown]
        pictures = [picture for picture in pictures if picture is not None]
        self.write_parts(
            "story",
            step,
            [
                (
                    f"{self.folder.name}: {step} training steps, {drawn}",
                    columns,
                    rows([(prompt, 0) for prompt in self.args.validation_prompt]),
                    "Validation prompts. Each row starts from the same noise.",
                ),
                *([("The training pictures", [""] * len(pictures), [("", pictures)], "")] if pictures else []),
                (
                    "Prompts that have nothing to do with the training",
                    columns,
                    rows([(prompt, seed) for seed, prompt in enumerate(self.args.retention_prompts)]),
                    "These should stay as the base draws them.",
                ),
            ],
        )
        plot_curves(read_history(self.folder), self.folder / "curves.png", title=self.folder.name)
        logger.info(f"Wrote {self.folder / 'curves.png'}")


def progress_bar(items: list, description: str) -> Iterator:
    return tqdm(items, desc=description, leave=False)


def relative_drift(base: torch.Tensor, student: torch.Tensor) -> float:
    """Mean distance of each student's latents to its base's, over the mean distance between bases.

    Args:
        base, student: (N, ...), N of 2 or more; row i of both is drawn from the same prompt and noise.
    """
    base, student = base.float().flatten(1), student.float().flatten(1)
    moved = (student - base).norm(dim=1).mean()
    apart = torch.nn.functional.pdist(base).mean()
    return (moved / apart).item()


def read_history(folder: Path) -> list[dict]:
    """The logged steps; a line that a killed run did not finish is none."""
    path = folder / HISTORY_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewind_history(folder: Path, step: int) -> None:
    """Forgets what an interrupted run logged after the checkpoint that this one goes on from."""
    kept = [line for line in read_history(folder) if line["step"] <= step]
    unfinished = folder / f".{HISTORY_FILE}.tmp"
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(unfinished, folder / HISTORY_FILE)


def log(run: Run, step: int, values: dict[str, float]) -> None:
    """To the trackers and to the run's own history."""
    run.accelerator.log(values, step=step)
    if run.accelerator.is_main_process:
        with naming_the_output(run, HISTORY_FILE):
            with open(Path(run.args.output_dir, HISTORY_FILE), "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


# Training


def micro_batches(run: Run, step: int) -> Iterator[tuple[int, list[Sample], float]]:
    """This process's share of one optimizer step: (place in the run, samples, weight).

    Step s takes the places s * G to (s + 1) * G of the endless order, G = processes * accumulation steps. The weight
    makes every sample of the step count the same where batches differ in size; its mean over the step is 1.
    """
    accelerator = run.accelerator
    per_step = accelerator.num_processes * run.args.gradient_accumulation_steps
    places = range(step * per_step, (step + 1) * per_step)
    batches = [run.order.batch(place) for place in places]
    mean_size = sum(map(len, batches)) / per_step
    for offset in range(accelerator.process_index, per_step, accelerator.num_processes):
        yield places[offset], batches[offset], len(batches[offset]) / mean_size


def distil(run: Run, samples: list[Sample], weight: float) -> torch.Tensor:
    """One micro-batch's rollout, each visited state backwarded before the next is computed.

    Returns:
        (K, 3), float32: loss, cosine and norm ratio of student and teacher at each visited state, times the weight.
    """
    args, accelerator, pipeline = run.args, run.accelerator, run.pipeline
    height, width = run.contexts.examples[samples[0].example].bucket
    student_context, teacher_context = run.contexts.load(samples)
    noise = seeded_noise(pipeline.latent_shape(height, width), [noise_seed(args.seed, sample) for sample in samples])
    schedule = pipeline.schedule(height, width, args.num_rollout_steps, accelerator.device)
    visited = itertools.count(1)

    def student(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        # Processes exchange gradients in the last visited state's backward only.
        last = next(visited) == len(schedule) and accelerator.sync_gradients
        with nullcontext() if last else accelerator.no_sync(run.student):
            velocity = run.student(latents, timestep, student_context)
        return velocity.to(latents.dtype)  # accelerate returns float32

    teacher = run.roles.as_teacher(partial(pipeline.predict_velocity, context=teacher_context))
    noise = noise.to(accelerator.device, pipeline.latents_dtype)
    measured = []
    for state in rollout(student, teacher, noise, schedule, loss_space=args.loss_space):
        accelerator.backward(state.loss * weight / len(schedule))
        measured.append(torch.cat([state.loss.detach()[None], state.agreement]))
    return torch.stack(measured) * weight


class StopRequest:
    """SIGTERM, SIGINT, or the launcher's death: the step is finished, a checkpoint saved, the run ended.

    A second signal ends the process at once.
    """

    def __init__(self):
        self.reason: str | None = None
        self.exit_code = 1
        self._launcher = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        for handled in (signal.SIGTERM, signal.SIGINT):
            signal.signal(handled, signal.SIG_DFL)
        self.reason, self.exit_code = signal.Signals(number).name, 128 + number

    @property
    def is_made(self) -> bool:
        # `accelerate launch` of one process dies of a SIGTERM and leaves its child training.
        if self.reason is None and os.getppid() != self._launcher:
            self.reason = "its launcher has ended"
        return self.reason is not None


def train_step(run: Run, step: int, first_step: int, stop: StopRequest) -> tuple[dict[str, float], bool]:
    """One optimizer step over this process's micro-batches.

    Returns:
        What is logged of it, and whether any process was asked to stop.
    """
    args, accelerator = run.args, run.accelerator
    started = time.perf_counter()
    measured = torch.zeros(args.num_rollout_steps, 3, device=accelerator.device)
    for place, samples, weight in micro_batches(run, step):
        with accelerator.accumulate(run.student):
            if args.lora_dropout > 0:
                torch.manual_seed(place_seed(args.seed, "dropout", str(place)))
            measured += distil(run, samples, weight) / args.gradient_accumulation_steps
            if accelerator.sync_gradients:
                # One exchange: all processes see the same figures, and stop at the same step.
                asked = torch.full((1, 3), float(stop.is_made), device=accelerator.device)
                *per_state, asked = accelerator.reduce(torch.cat([measured, asked]), reduction="mean").tolist()
                losses, cosines, norm_ratios = zip(*per_state, strict=True)
                loss = sum(losses) / len(losses)
                grad_norm = accelerator.clip_grad_norm_(run.roles.student_parameters, args.max_grad_norm).item()
                stop_if_not_finite(run, step, first_step, loss, grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
    logs = {"loss": loss, "lr": run.lr_scheduler.get_last_lr()[0], "grad_norm": grad_norm}
    run.skipped_steps = count_skipped(run.skipped_steps, run.optimizer.step_was_skipped)
    if not run.optimizer.step_was_skipped:
        run.lr_scheduler.step()
        run.roles.update_teacher(args.ema_decay)
    for name, values in (("loss", losses), ("cosine", cosines), ("norm_ratio", norm_ratios)):
        logs |= {f"{name}/state_{index}": value for index, value in enumerate(values, start=1)}
    logs |= {"seconds_per_step": time.perf_counter() - started, "peak_memory_gb": peak_memory_gb()}
    return logs, asked[0] > 0


def count_skipped(skipped: int, was_skipped: bool) -> int:
    """How many steps in a row the fp16 gradient scaler has skipped: a few are how it finds its scale.

    Raises:
        InputError: so many that it will not find one.
    """
    skipped = skipped + 1 if was_skipped else 0
    if skipped == MAX_SKIPPED_STEPS:
        raise InputError(
            f"--mixed_precision fp16: gradients overflowed in {skipped} steps in a row; use bf16, or a lower "
            "--learning_rate"
        )
    return skipped


def peak_memory_gb() -> float:
    """Largest memory allocated on the GPU so far; where there is none, what this process has resident now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


def train(run: Run, gallery: Gallery, first_step: int) -> None:
    args, accelerator = run.args, run.accelerator
    stop, must_stop = StopRequest(), False
    bar = partial(tqdm, desc="Steps", disable=not accelerator.is_local_main_process)
    with bar(initial=first_step, total=args.max_train_steps) as progress:
        for step in range(first_step, args.max_train_steps):
            logs, must_stop = train_step(run, step, first_step, stop)
            progress.set_postfix(loss=f"{logs['loss']:.3g}", lr=f"{logs['lr']:.3g}")
            progress.update()
            done = step + 1
            log(run, done, logs)
            if (done % args.checkpointing_steps == 0 or must_stop) and accelerator.is_main_process:
                save_checkpoint(run, done)
            if must_stop:
                break
            if is_validation_step(args, done):
                validate(run, gallery, done)
    if must_stop:
        end_early(run, stop, done)


def end_early(run: Run, stop: StopRequest, step: int) -> None:
    run.accelerator.wait_for_everyone()  # the launcher ends all processes when the first one leaves
    logger.info(
        f"Stopped after step {step} ({stop.reason or 'another process was asked to'}); checkpoint-{step} is saved. "
        "Go on with the same command and --resume_from_checkpoint latest"
    )
    run.accelerator.end_training()
    sys.exit(stop.exit_code)


def is_validation_step(args: argparse.Namespace, step: int) -> bool:
    return args.validation_steps > 0 and (step % args.validation_steps == 0 or step == args.max_train_steps)


def validate(run: Run, gallery: Gallery, step: int) -> None:
    """Draws and logs retention. A drawing that fails (memory, a full disk) does not end the run."""
    if run.accelerator.is_main_process:
        try:
            log(run, step, {"retention": gallery.validate(step)})
        except Exception:
            logger.exception(f"Validation at step {step} failed; training goes on")


def draw_what_is_due(run: Run, gallery: Gallery, first_step: int) -> None:
    """Before the first step the preview; after a checkpoint whose drawing an interruption cut short, that."""
    if run.args.validation_steps == 0:
        return
    if first_step == 0 and run.accelerator.is_main_process:
        try:
            gallery.preview()
        except Exception:
            if run.args.preview_only:
                raise
            logger.exception("The preview failed; training goes on")
    history = read_history(Path(run.args.output_dir))
    drawn = any(line["step"] == first_step and "retention" in line for line in history)
    if first_step > 0 and is_validation_step(run.args, first_step) and not drawn:
        validate(run, gallery, first_step)


def stop_if_not_finite(run: Run, step: int, first_step: int, loss: float, grad_norm: float) -> None:
    """Before the optimizer steps: keeps the weights of the steps that were good, then stops the run.

    Under fp16 the gradient scaler skips a step whose gradients overflow; that is no fault.
    """
    if math.isfinite(loss) and (math.isfinite(grad_norm) or run.accelerator.scaler is not None):
        return
    kept = f"nothing was trained since step {first_step}"
    if step > first_step:
        if run.accelerator.is_main_process:
            save_checkpoint(run, step)
        kept = f"the weights before it are in checkpoint-{step}"
    run.accelerator.wait_for_everyone()  # a process that ends takes the one that writes with it
    raise InputError(
        f"at step {step + 1} the loss is {loss:g} and the gradient norm {grad_norm:g}; {kept}; start in another "
        "--output_dir with a lower --learning_rate (a checkpoint's folder can be --init_lora), or without fp16"
    )


# Main


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
        ),
        kwargs_handlers=[
            # The frozen model runs as deployed; the adapters cast their own weights (`CastLinear`).
            AutocastKwargs(enabled=False),
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    if accelerator.mixed_precision not in ("no", "fp16", "bf16"):
        raise InputError(f"--mixed_precision {accelerator.mixed_precision}: pass bf16, fp16 or no")
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise InputError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}: accelerate is configured for "
            f"{accelerator.gradient_accumulation_steps}; pass the same, or configure accelerate anew"
        )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise InputError("--mixed_precision fp16: has no gradient scaler on a CPU; use bf16 or no")
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    for library in (transformers, diffusers, datasets):
        library.utils.logging.set_verbosity_error()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def make_output_dir(args: argparse.Namespace) -> None:
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir):
            pass
    except OSError as error:
        raise InputError(
            f"--output_dir {args.output_dir}: cannot be written ({error.strerror}); choose another"
        ) from error


def resolve_seed(args: argparse.Namespace) -> None:
    """Draws a seed where none is given, the same on all processes."""
    if args.seed is None:
        args.seed = broadcast_object_list([random.SystemRandom().randrange(2**31)])[0]
        logger.info(f"--seed {args.seed} was drawn")


def resolve_steps(args: argparse.Namespace, order: SampleOrder, num_processes: int) -> None:
    if args.max_train_steps is None:
        per_step = num_processes * args.gradient_accumulation_steps
        args.max_train_steps = math.ceil(args.num_train_epochs * order.num_batches / per_step)


def read_init_lora(args: argparse.Namespace) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Weights and metadata of `--init_lora`, as diffusers reads them."""
    try:
        return StockPipeline.lora_state_dict(args.init_lora, return_lora_metadata=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"--init_lora {args.init_lora}: no LoRA is found there ({first_line(error)}); give a .safetensors file, "
            "its folder or a hub id"
        ) from error


def report_plan(run: Run, first_step: int) -> None:
    args, order = run.args, run.order
    count = sum(parameter.numel() for parameter in run.roles.student_parameters)
    total_batch = args.train_batch_size * args.gradient_accumulation_steps * run.accelerator.num_processes
    logger.info(f"Training {len(run.roles.module_names)} modules, {count:,} parameters, rank {args.rank}")
    logger.info(f"Pictures: {len(run.contexts.pictures)}; batches an epoch: {order.num_batches}")
    checkpointing = "on" if run.pipeline.transformer.is_gradient_checkpointing else "off"
    logger.info(f"Precision of the frozen model: {args.mixed_precision}; gradient checkpointing: {checkpointing}")
    logger.info(f"Pictures a step over all processes: {total_batch}; steps: {first_step} to {args.max_train_steps}")


def main(args: argparse.Namespace) -> None:
    check_args(args)
    accelerator = make_accelerator(args)
    args.mixed_precision = accelerator.mixed_precision
    make_output_dir(args)
    checkpoint = find_checkpoint(args)
    if checkpoint is not None and args.seed is None:
        args.seed = read_state(checkpoint)["settings"]["--seed"]
    resolve_seed(args)

    # Everything that a user can get wrong, before any weight is loaded.
    pictures = read_pictures(args)
    sizes = check_pictures(
        pictures, resolution=args.resolution, disable_progress=not accelerator.is_local_main_process
    )
    digests = picture_digests(pictures)
    examples = plan_examples(pictures, sizes, args)
    order = SampleOrder(
        pictures, examples, batch_size=args.train_batch_size, random_flip=args.random_flip, seed=args.seed
    )
    resolve_steps(args, order, accelerator.num_processes)
    check_model(args)
    with naming_the_checkpoint(args):
        skeleton = transformer_skeleton(args.pretrained_model_name_or_path, **hub_kwargs(args))
    lora = {
        "target_modules": lora_target_modules(skeleton, args.lora_layers),
        "rank": args.rank,
        "alpha": args.lora_alpha,
        "dropout": args.lora_dropout,
        "teacher": args.teacher,
    }
    init_lora = read_init_lora(args) if args.init_lora else None
    if init_lora is not None:
        StudentTeacherLoRA(skeleton, **lora | {"teacher": "base"}).check_lora(init_lora[0], origin=args.init_lora)

    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision, torch.float32)
    contexts = open_contexts(args, accelerator, pictures, digests, examples, skeleton.config, weight_dtype)
    settings = fixed_settings(contexts, accelerator.num_processes * args.gradient_accumulation_steps)
    if checkpoint is not None:
        check_settings(checkpoint, settings)

    # Encoders first; the transformer is loaded when they are gone, so that they are never in memory together.
    load_contexts(contexts, accelerator)
    pipeline = contexts.pipeline
    pipeline.transformer = load_transformer(args, weight_dtype)
    set_seed(args.seed)
    roles = StudentTeacherLoRA(pipeline.transformer, **lora)
    if init_lora is not None and (fresh := roles.load_lora(*init_lora, origin=args.init_lora)):
        logger.warning(f"--init_lora {args.init_lora}: {fresh} trained modules are not in it and start at zero")
    if args.gradient_checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    pipeline.transformer.to(accelerator.device)
    optimizer = build_optimizer(args, roles.student_parameters, accelerator.num_processes)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    student, optimizer = accelerator.prepare(StudentVelocity(pipeline), optimizer)
    save_dtype = torch.float32 if args.upcast_before_saving else weight_dtype
    run = Run(
        args, accelerator, pipeline, roles, student, contexts, order, optimizer, lr_scheduler, save_dtype, settings
    )
    first_step = load_checkpoint(run, checkpoint) if checkpoint is not None else 0
    report_plan(run, first_step)
    shown = {name: str(value) for name, value in vars(args).items() if name != "hub_token"}
    accelerator.init_trackers(TRACKER_NAME, config=shown)

    gallery = Gallery(run)
    if accelerator.is_main_process:
        remove_unfinished(Path(args.output_dir))
        rewind_history(Path(args.output_dir), first_step)
    accelerator.wait_for_everyone()
    draw_what_is_due(run, gallery, first_step)
    if not args.preview_only:
        train(run, gallery, first_step)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish(run, gallery)
    accelerator.end_training()


def open_contexts(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pictures: list[Picture],
    digests: list[str],
    examples: list[Example],
    transformer_config: dict,
    weight_dtype: torch.dtype,
) -> Contexts:
    """What will be encoded, with the pipeline, still without its encoders and its transformer."""
    with naming_the_checkpoint(args):
        folder = checkpoint_folder(args)
        text_config = AutoConfig.from_pretrained(folder, subfolder="text_encoder")
        pipeline = Pipeline.from_pretrained(
            folder, transformer=None, text_encoder=None, dtype=weight_dtype, variant=args.variant
        )
    check_text_encoder(text_config, transformer_config, args)
    contexts = Contexts(
        pipeline, folder, text_config.hidden_size, pictures, digests, examples, args, accelerator.device
    )
    if args.teacher_context == "vlm":
        contexts.vision_encoder = make_vision_encoder(pipeline, text_config, args)
        contexts.vlm_fingerprint = files_fingerprint(contexts.vision_encoder.files())
    if args.validation_prompt is None:
        args.validation_prompt = contexts.captions[:NUM_DEFAULT_VALIDATION_PROMPTS]
    check_teacher_knows_more(contexts)
    check_prompt_lengths(contexts, drawn_prompts(args))
    return contexts


def drawn_prompts(args: argparse.Namespace) -> list[str]:
    final = [args.final_validation_prompt] if args.final_validation_prompt else []
    return [*args.validation_prompt, *final, *args.retention_prompts] if args.validation_steps > 0 else []


def load_contexts(contexts: Contexts, accelerator: Accelerator) -> None:
    """Encodes all that the run will ask for or, without a cache, loads the encoders that do it later."""
    args, folder = contexts.args, contexts.folder
    if args.no_context_cache:
        load_text_encoders(contexts, with_vision=contexts.vision_encoder is not None)
        contexts.pipeline.vae.to(accelerator.device)
    else:
        contexts.model_fingerprint = checkpoint_fingerprint(folder, ("text_encoder", "tokenizer", "vae"))
        contexts.cache = ContextCache(Path(args.context_cache_dir))
        fill_cache(contexts, drawn_prompts(args), accelerator)


def make_vision_encoder(pipeline: Pipeline, text_config: PretrainedConfig, args: argparse.Namespace) -> VisionEncoder:
    if args.vlm_model_name_or_path is None:
        args.vlm_model_name_or_path = default_vlm(text_config)
    return VisionEncoder(
        args.vlm_model_name_or_path,
        pipeline.tokenizer,
        text_config,
        min_pixels=args.vlm_min_pixels,
        max_pixels=args.vlm_max_pixels,
        rope=args.vlm_rope,
        cache_dir=args.cache_dir,
    )


def finish(run: Run, gallery: Gallery) -> None:
    folder = Path(run.args.output_dir)
    try:
        with naming_the_output(run, LORA_FILE):
            save_lora(run, folder)
    except InputError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="dopsd-lora-"))
        save_lora(run, elsewhere)
        raise InputError(f"{error}; the LoRA is in {elsewhere}, move it to a safe place") from error
    logger.info(f"The LoRA is {folder / LORA_FILE}; load it: pipe.load_lora_weights({run.args.output_dir!r})")
    if gallery.story:
        try:
            gallery.tell_story(run.args.max_train_steps)
        except Exception:
            logger.exception("The story could not be drawn; the LoRA is saved")
    write_run_card(run, gallery)
    if run.args.push_to_hub:
        push(run.args)


def write_run_card(run: Run, gallery: Gallery) -> None:
    folder = Path(run.args.output_dir)
    card = folder / "README.md"
    if card.exists() and "d-opsd" not in card.read_text(encoding="utf-8", errors="replace"):
        logger.warning(f"{card} is not a card of such a run and is left as it is; --push_to_hub would publish it")
        return
    with naming_the_output(run, card.name):
        figures = [line["retention"] for line in read_history(folder) if "retention" in line]
        write_card(
            folder,
            model=CARD_MODEL,
            repo_id=run.args.hub_model_id or folder.resolve().name,
            base_model=run.args.pretrained_model_name_or_path,
            instance_prompt=run.args.instance_prompt,
            gallery=gallery.card_gallery,
            settings=vars(run.args),
            retention=figures[-1] if figures else None,
        )


def push(args: argparse.Namespace) -> None:
    url = publish(
        Path(args.output_dir), repo_id=args.hub_model_id, private=args.hub_private_repo, token=args.hub_token
    )
    print(f"Published: {url}")


if __name__ == "__main__":
    try:
        args = parse_args()
        push(args) if args.push_only else main(args)
    except InputError as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{Path(__file__).name}: interrupted before training; what was encoded is in the context cache")
