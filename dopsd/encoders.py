"""Encoders and teacher contexts that several models share. Scripts add what their own model does with them."""

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from PIL import Image
from transformers import PretrainedConfig

from .context_cache import files_fingerprint
from .errors import naming_flag
from .model import Encoder, FewStepPipeline, Size, VisionTower
from .model_flags import TeacherContext
from .settings import Settings, TeacherSettings


VLM_FLAG = "--vlm_model_name_or_path"

# Increased when the vision tower's arithmetic changes. The last time, a convolution became a matrix product.
PICTURE_FORMAT = 2


class PromptEncoder(Encoder):
    """Prompts through the pipeline's text encoder. Subclasses add `encode_batch`, or `encode` if it takes one prompt.

    Args:
        pipeline: offers `chat_token_count(prompt)`.
        width: channels of an encoding.
        padded_length: tokens L that all encodings are padded to, which are then (1, L, width); None if they are not
            padded, and (L, width).
        options: keyword arguments for the pipeline's encoding, which are part of the cache key.
    """

    name, noun, component = "text", "prompts", "text_encoder"

    def __init__(
        self, pipeline: FewStepPipeline, *, width: int, padded_length: int | None = None, options: dict[str, Any]
    ):
        self.pipeline, self.width, self.padded_length, self.options = pipeline, width, padded_length, options
        # Counts are asked for when prompts are checked, when sizes are predicted and when batches are made.
        self.count_tokens = cache(pipeline.chat_token_count)

    def encode(self, prompt: str, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return self.encode_batch([prompt])[0]

    def batch_length(self, prompt: str) -> int | None:
        return self.padded_length or self.num_tokens(prompt, ())

    def shape(self, prompt: str, sizes: Sequence[Size]) -> tuple[int, ...]:
        if self.padded_length is not None:
            return 1, self.padded_length, self.width
        return self.num_tokens(prompt, sizes), self.width

    def num_tokens(self, prompt: str, sizes: Sequence[Size]) -> int:
        return self.count_tokens(prompt)

    def cache_key(self) -> list[Any]:
        return [self.options]

    def size_flags(self) -> tuple[str, ...]:
        return () if self.padded_length is None else ("--max_sequence_length",)


class PictureAndPromptEncoder(PromptEncoder):
    """Prompts after pictures, read by the text encoder together with the vision tower of a vision-language model.

    Args:
        vision_encoder_class: joins a vision tower to the pipeline's text encoder.
        text_config: configuration of the pipeline's text encoder.
        teacher: names the vision-language model and its pixel limits.
        cache_dir: folder for downloads.
        prompt_options: arguments of `PromptEncoder`.

    Raises:
        InputError: the vision-language model cannot be read or does not fit the text encoder.
    """

    name, noun = "vlm", "prompts with pictures"
    sees_picture = has_tower = True

    def __init__(
        self,
        pipeline: FewStepPipeline,
        vision_encoder_class: Callable[..., VisionTower],
        text_config: PretrainedConfig,
        teacher: TeacherSettings,
        cache_dir: str | None,
        **prompt_options: Any,
    ):
        super().__init__(pipeline, **prompt_options)
        self.teacher = teacher
        with naming_flag(VLM_FLAG):
            self.vision_encoder = vision_encoder_class(
                teacher.vlm_model_name_or_path,
                pipeline.tokenizer,
                text_config,
                min_pixels=teacher.vlm_min_pixels,
                max_pixels=teacher.vlm_max_pixels,
                rope=teacher.vlm_rope,
                cache_dir=cache_dir,
            )
        self.count_image_tokens = cache(self.vision_encoder.num_image_tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Of the vision tower's files, which are downloaded for it."""
        with naming_flag(VLM_FLAG):
            return files_fingerprint(self.vision_encoder.files())

    def num_tokens(self, prompt: str, sizes: Sequence[Size]) -> int:
        # Counted separately, so that a huge picture does not build a huge string.
        without_pictures = self.vision_encoder.content(prompt, *[0] * len(sizes))
        return self.count_tokens(without_pictures) + sum(self.count_image_tokens(*size) for size in sizes)

    def batch_length(self, prompt: str) -> int | None:
        return None

    def size_flags(self) -> tuple[str, ...]:
        return super().size_flags() or ("--vlm_max_pixels",)

    def cache_key(self) -> list[Any]:
        teacher = self.teacher
        return [
            PICTURE_FORMAT,
            self.options,
            self.fingerprint,
            teacher.vlm_min_pixels,
            teacher.vlm_max_pixels,
            teacher.vlm_rope,
        ]

    def identity(self) -> dict[str, str]:
        return {VLM_FLAG: self.fingerprint[:16]}

    def picture_features(self, picture: Image.Image) -> torch.Tensor:
        return self.vision_encoder.features(picture)

    def attach(self) -> None:
        with naming_flag(VLM_FLAG):
            self.vision_encoder.load(self.pipeline.text_encoder)

    def detach(self) -> None:
        self.vision_encoder.unload()


class ReferenceEncoder(Encoder):
    """A picture's latents as reference tokens, (1, C, h, w), as the stock pipeline's `image=` makes them.

    Args:
        pipeline: offers `encode_reference(picture, resolution)` and `reference_shape(height, width, resolution)`.
        resolution: `--teacher_resolution`, to which pictures are shrunk first.
    """

    name, noun, component = "vae", "pictures", "vae"
    reads_prompt, sees_picture = False, True

    def __init__(self, pipeline: FewStepPipeline, resolution: int | None = None):
        self.pipeline, self.resolution = pipeline, resolution

    def encode(self, prompt: str, pictures: Sequence[Image.Image]) -> torch.Tensor:
        (picture,) = pictures
        return self.pipeline.encode_reference(picture, self.resolution)

    def shape(self, prompt: str, sizes: Sequence[Size]) -> tuple[int, ...]:
        (size,) = sizes
        return 1, *self.pipeline.reference_shape(*size, self.resolution)

    def cache_key(self) -> list[Any]:
        return [] if self.resolution is None else [self.resolution]


class CondEncoder(ReferenceEncoder):
    """A picture to edit, at its own size."""

    name, noun = "cond", "pictures to edit"


def resolve_vlm(
    settings: Settings,
    context: TeacherContext,
    default_vlm: Callable[[PretrainedConfig], str],
    text_config: PretrainedConfig,
) -> Settings:
    """Fills in the vision-language model that fits the text encoder, if the teacher's context needs one.

    Raises:
        InputError: `default_vlm` knows none.
    """
    if settings.teacher.vlm_model_name_or_path is not None or PictureAndPromptEncoder.name not in context.encoders:
        return settings
    with naming_flag(VLM_FLAG):
        return settings.replace(vlm_model_name_or_path=default_vlm(text_config))
