"""The two scripts, each with a tiny checkpoint: what tests that run on both need to know of a model."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import AutoConfig

import train_dopsd_flux2
import train_dopsd_zimage
from pipelines.vision_encoder import VisionEncoder
from tiny_klein import make_tiny_klein
from tiny_vlm import make_tiny_vlm
from tiny_zimage import make_tiny_zimage, tiny_text_config


SLOW = pytest.mark.slow
# What torch.compile uses on a CPU. It does not quote the path of torch's headers.
NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None or " " in torch.__file__,
    reason="torch.compile needs g++, and torch in a folder without blanks in its path",
)


def with_models(*names: str, quick: tuple[str, ...] | None = None) -> pytest.MarkDecorator:
    """Runs a test with these models; with those that are not in `quick`, it is slow."""
    params = [pytest.param(name, marks=[SLOW] if quick and name not in quick else []) for name in names]
    return pytest.mark.parametrize("model", params, indirect=True)


# The scripts share everything but their `Model`: what does not depend on it is tested with one of them.
ONE_MODEL = with_models("flux2")
ZIMAGE = with_models("zimage")
WITH_VLM = with_models("flux2-vlm", "zimage")
EVERY_CONTEXT = with_models("flux2", "flux2-vlm", "zimage")


def both_models(quick: str) -> pytest.MarkDecorator:
    return with_models("flux2", "zimage", quick=(quick,))


def with_exhaustive(name: str, *others: str) -> pytest.MarkDecorator:
    """Runs a test with one model, and with the others only on request."""
    params = [pytest.param(other, marks=pytest.mark.exhaustive) for other in others]
    return pytest.mark.parametrize("model", [name, *params], indirect=True)


def every_context(quick: str) -> pytest.MarkDecorator:
    return with_models("flux2", "flux2-vlm", "zimage", quick=(quick,))


SUFFIX = " like this"
SEQUENCE_LENGTH = 80
VLM_PIXELS = 64 * 64


@dataclass(frozen=True)
class TinyModel:
    """One script on one tiny checkpoint.

    Attributes:
        script: the training script as a module.
        path, vlm_path: checkpoints.
        make: writes another checkpoint of this model: (folder, seed=) -> its path.
        flags: what a short run needs besides the flags that both scripts share.
        call: arguments of the stock pipeline besides prompt, size and generator.
        encodings: how the log counts the encodings of a run on `photos` with one caption: all missing, none missing.
        attention: `--lora_layers` for some attention layers, and how the log counts them.
    """

    script: ModuleType
    path: Path
    vlm_path: Path
    make: Callable[..., Path]
    flags: dict
    call: dict
    encodings: tuple[str, str]
    attention: tuple[str, str] = field(repr=False)

    @property
    def script_path(self) -> Path:
        return Path(self.script.__file__)

    @property
    def stock(self) -> type[DiffusionPipeline]:
        return self.script.MODEL.stock_pipeline_class

    def pipeline(self, **settings) -> DiffusionPipeline:
        pipeline = self.stock.from_pretrained(self.path, **settings)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def run(self, pipeline: DiffusionPipeline, prompt: str = "a ball", seed: int = 0, **settings):
        """The stock pipeline's output at 64 x 64 pixels, in the deployed number of steps."""
        arguments = {"prompt": prompt, "height": 64, "width": 64, **self.call}
        return pipeline(**arguments | {"generator": torch.Generator().manual_seed(seed)} | settings).images

    def sample(self, pipeline: DiffusionPipeline, prompt: str = "a ball", seed: int = 0, **settings) -> torch.Tensor:
        """Final latents."""
        return self.run(pipeline, prompt, seed, output_type="latent", **settings).float()

    def draw(self, pipeline: DiffusionPipeline, prompt: str, seed: int, **settings) -> Image.Image:
        return self.run(pipeline, prompt, seed, **settings)[0]

    def vision_encoder(self, pipeline: DiffusionPipeline, **settings) -> VisionEncoder:
        """The vision tower, attached to the pipeline's text encoder."""
        text_config = AutoConfig.from_pretrained(self.path, subfolder="text_encoder")
        limits = {"min_pixels": VLM_PIXELS, "max_pixels": VLM_PIXELS}
        encoder = VisionEncoder(self.vlm_path, pipeline.tokenizer, text_config, **limits | settings)
        encoder.load(pipeline.text_encoder)
        return encoder

    def teacher_context(self, picture: Image.Image, prompt: str = "a ball"):
        """The teacher's context, encoded by the script's own pipeline."""
        pipeline = self.script.MODEL.pipeline_class.from_pretrained(self.path)
        prompts = [prompt + SUFFIX]
        if self.script is train_dopsd_zimage:
            return pipeline.encode_vlm_teacher(prompts, [picture], vision_encoder=self.vision_encoder(pipeline))
        if self.flags.get("teacher_context") == "vlm":
            return pipeline.encode_vlm_teacher(
                prompts,
                [picture],
                vision_encoder=self.vision_encoder(pipeline),
                max_sequence_length=SEQUENCE_LENGTH,
            )
        return pipeline.encode_edit_teacher(prompts, [picture], max_sequence_length=SEQUENCE_LENGTH)

    def as_teacher(self, picture: Image.Image, prompt: str = "a ball") -> dict:
        """Arguments with which the stock pipeline draws as the teacher. Klein takes the reference picture itself."""
        if "vlm_model_name_or_path" not in self.flags:
            return {"prompt": prompt + SUFFIX, "image": picture}
        embeds = self.teacher_context(picture, prompt).prompt_embeds
        return {"prompt": None, "prompt_embeds": list(embeds) if self.script is train_dopsd_zimage else embeds}


def make_model(name: str, klein_path: Path, zimage_path: Path, folder: Path) -> TinyModel:
    """The model of that name in the marks above. `folder` is for its vision-language model, made if it is missing."""
    text_config = tiny_text_config() if name == "zimage" else None
    vlm_path = folder / ("vlm-4" if name == "zimage" else "vlm-28")
    if not vlm_path.exists():
        make_tiny_vlm(vlm_path, text_config=text_config)
    vlm = {
        "vlm_model_name_or_path": vlm_path,
        "vlm_min_pixels": VLM_PIXELS,
        "vlm_max_pixels": VLM_PIXELS,
    }
    common = {"teacher_prompt_suffix": SUFFIX, "max_sequence_length": SEQUENCE_LENGTH}
    with_vlm = ("1 of 1 prompts and 3 of 3 prompts with pictures", "0 of 1 prompts and 0 of 3 prompts with pictures")
    if name == "zimage":
        return TinyModel(
            script=train_dopsd_zimage,
            path=zimage_path,
            vlm_path=vlm_path,
            make=make_tiny_zimage,
            flags=common | vlm,
            call={"num_inference_steps": 8, "guidance_scale": 0.0, "max_sequence_length": SEQUENCE_LENGTH},
            encodings=with_vlm,
            attention=(
                "attention.to_q,attention.to_k,attention.to_v,attention.to_out.0",
                "Training 16 modules, 4,096 parameters, rank 4",
            ),
        )
    return TinyModel(
        script=train_dopsd_flux2,
        path=klein_path,
        vlm_path=vlm_path,
        make=make_tiny_klein,
        flags=common | ({"teacher_context": "vlm"} | vlm if name == "flux2-vlm" else {}),
        call={"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": SEQUENCE_LENGTH},
        encodings=with_vlm
        if name == "flux2-vlm"
        else ("2 of 2 prompts and 3 of 3 pictures", "0 of 2 prompts and 0 of 3 pictures"),
        attention=(
            "attn.to_q,attn.to_k,attn.to_v,attn.to_out.0",
            "Training 8 modules, 2,048 parameters, rank 4",
        ),
    )
