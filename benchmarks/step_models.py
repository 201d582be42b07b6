"""What `benchmarks.step` measures on: models of the published architectures with random weights.

Nothing is downloaded. Weights are made on the device, in the precision in which they are used, and shared by all
copies of the transformer. Encodings have the real shapes and random values, and are read from a cache as in a run.
"""

import copy
import itertools
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from benchmarks.miniature.files import REPOSITORY
from benchmarks.startup import load_script
from dopsd.command_line import parse_settings
from dopsd.context_cache import ContextCache
from dopsd.contexts import Contexts
from dopsd.data.buckets import Example
from dopsd.data.order import SampleOrder
from dopsd.data.pictures import Picture
from dopsd.data.training_data import TrainingData
from dopsd.launch import start_accelerator, weight_dtype
from dopsd.model import Conditioning, Encoder, FewStepPipeline, Model, TokenLimit
from dopsd.settings import Settings
from pipelines.flux2_klein import KleinContext
from pipelines.published_shapes import KLEIN_4B, KLEIN_9B, QWEN3_4B, Z_IMAGE_TURBO, PublishedShape
from pipelines.z_image import ZImageContext


PRIOR_PROMPT = "a lighthouse on a cliff at sunset, oil painting"
STACK = {"train_dopsd_flux2": KleinContext.stack, "train_dopsd_zimage": ZImageContext.stack}


@dataclass(frozen=True)
class Size:
    """A model with the sizes of its inputs.

    Attributes:
        shape: of its components.
        student_text, teacher_text: shapes of one sample's encoded prompt. A `vlm` teacher's includes the picture.
        resolution: of the steps that are timed, in pixels.
        resolutions: at which memory is measured; at the smallest, with several numbers of states.
        rank: of the LoRA.
        mixed_precision: of the frozen model.
        needs_gpu: whether it is too large for a CPU.
    """

    shape: PublishedShape
    student_text: tuple[int, ...]
    teacher_text: tuple[int, ...]
    resolution: int = 1024
    resolutions: tuple[int, ...] = (512, 768, 1024)
    rank: int = 64
    mixed_precision: str = "bf16"
    needs_gpu: bool = True


# klein-4B at an eighth of its width, with all of its blocks.
THIN = PublishedShape(
    script=KLEIN_4B.script,
    transformer=KLEIN_4B.transformer
    | {
        "num_attention_heads": 6,
        "attention_head_dim": 64,
        "axes_dims_rope": (16, 16, 16, 16),
        "joint_attention_dim": 768,
    },
    text_encoder=QWEN3_4B
    | {
        "hidden_size": 256,
        "intermediate_size": 1216,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
    },
    vae={"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8},
    scheduler=KLEIN_4B.scheduler,
    vision_tower={},
)
# For tests: as few layers as the architectures allow.
TINY_TEXT = QWEN3_4B | {
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
TINY_VAE = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2}
TINY_KLEIN = PublishedShape(
    script=KLEIN_4B.script,
    transformer=KLEIN_4B.transformer
    | {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 4, 4, 4),
        "joint_attention_dim": 48,
        "in_channels": 16,
    },
    text_encoder=TINY_TEXT,
    vae=TINY_VAE,
    scheduler=KLEIN_4B.scheduler,
    vision_tower={},
)
TINY_Z_IMAGE = PublishedShape(
    script=Z_IMAGE_TURBO.script,
    transformer=Z_IMAGE_TURBO.transformer
    | {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [4, 6, 6],
    },
    text_encoder=TINY_TEXT,
    vae=Z_IMAGE_TURBO.vae | TINY_VAE,
    scheduler=Z_IMAGE_TURBO.scheduler,
    vision_tower={},
)
ON_CPU = {"mixed_precision": "no", "needs_gpu": False}
SIZES = {
    "thin": Size(THIN, (1, 64, 768), (1, 64, 768), 128, (64, 384), 8, **ON_CPU),
    "klein-4b": Size(KLEIN_4B, (1, 512, 7680), (1, 512, 7680)),
    "klein-9b": Size(KLEIN_9B, (1, 512, 12288), (1, 512, 12288)),
    # A prompt of 128 tokens, and a picture of 512 x 512 pixels as the vision tower's 256 tokens.
    "z-image": Size(Z_IMAGE_TURBO, (128, 2560), (128 + 256, 2560)),
    "tiny-klein": Size(TINY_KLEIN, (1, 8, 48), (1, 8, 48), 64, (64,), 2, **ON_CPU),
    "tiny-z-image": Size(TINY_Z_IMAGE, (8, 16), (12, 16), 64, (64,), 2, mixed_precision="bf16", needs_gpu=False),
}


class RandomEncoder(Encoder):
    """Encodings of a given shape with random values, which depend on the prompt."""

    noun, component = "inputs", "vae"

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype):
        self.name, self.fixed_shape, self.dtype = name, shape, dtype
        self.reads_prompt, self.sees_picture = name != "vae", name != "text"

    def encode(self, prompt: str, pictures: Sequence[Image.Image]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name} {prompt}".encode()))
        return torch.randn(self.fixed_shape, generator=generator).to(self.dtype)

    def cache_key(self) -> list:
        return [self.fixed_shape]


class RandomModel:
    """A model with random weights, and what a training script puts around it.

    Args:
        size: of the model and its inputs.
        folder: for the cache of encodings.

    Attributes:
        accelerator: as the script starts it, for all loops.
        base: the transformer without adapters.
    """

    def __init__(self, size: Size, folder: Path):
        self.size, self.folder = size, folder
        self.model: Model = load_script(REPOSITORY / f"{size.shape.script}.py").MODEL
        settings = self.settings([])
        self.accelerator: Accelerator = start_accelerator(settings, self.model)
        self.device = self.accelerator.device
        self.dtype = weight_dtype(settings.training.mixed_precision)
        self.vae = make_random(self.model.vae_class, size.shape.vae, self.dtype, torch.device("cpu"))
        self.base: torch.nn.Module | None = None

    def make_base(self) -> None:
        self.base = make_random(self.model.transformer_class, self.size.shape.transformer, self.dtype, self.device)

    def make_text_encoder(self) -> torch.nn.Module:
        text_class = self.model.text_encoder_class
        config = text_class.config_class(**self.size.shape.text_encoder)
        return make_random(text_class, {"config": config}, self.dtype, self.device)

    def settings(self, flags: list[str]) -> Settings:
        """The script's settings with these flags.

        Neither learning rate nor decay changes a weight, so all loops have the same ones in all steps. Gradients are
        not clipped, so that they can be compared.
        """
        size = self.size
        own = {
            "pretrained_model_name_or_path": "random",
            "output_dir": self.folder,
            "report_to": "none",
            "seed": 0,
            "resolution": size.resolution,
            "mixed_precision": size.mixed_precision,
            "rank": size.rank,
            "learning_rate": 1e-30,
            "ema_decay": 1,
            "max_grad_norm": 1e9,
            "with_prior_preservation": "false",
        }
        pairs = [(f"--{name}", str(value)) for name, value in own.items()]
        return parse_settings(self.model, "", [*itertools.chain(*pairs), *flags])

    def transformer(self) -> torch.nn.Module:
        """A transformer of its own, without adapters, whose weights are the base's."""
        tensors = itertools.chain(self.base.parameters(), self.base.buffers())
        return copy.deepcopy(self.base, {id(tensor): tensor for tensor in tensors})

    def pipeline(self, transformer: torch.nn.Module) -> FewStepPipeline:
        scheduler = FlowMatchEulerDiscreteScheduler(**self.size.shape.scheduler)
        return self.model.pipeline_class(
            scheduler=scheduler, vae=self.vae, text_encoder=None, tokenizer=None, transformer=transformer
        )

    def contexts(self, pipeline: FewStepPipeline, settings: Settings) -> Contexts:
        """Contexts of one picture with one caption and of `PRIOR_PROMPT`, all in the cache."""
        bucket = (settings.data.resolution, settings.data.resolution)
        pictures, examples = [Picture("picture", ("a photo",), None)], [Example(0, 0, bucket, (0.5, 0.5))]
        order = SampleOrder(pictures, examples, batch_size=1, random_flip=False, seed=settings.training.seed)
        contexts = Contexts(
            pipeline,
            self.conditioning(pipeline, settings),
            TrainingData(pictures, [""], examples, order),
            teacher_prompt_suffix=settings.teacher.teacher_prompt_suffix,
            load_text_encoder=self.make_text_encoder,
            device=self.device,
        )
        contexts.cache = ContextCache(self.folder / "context_cache")
        contexts.fingerprints = {RandomEncoder.component: "random"}
        for encoding in contexts.all_encodings([PRIOR_PROMPT]):
            contexts.cache.save(contexts.key(encoding), contexts.encode(encoding))
        return contexts

    def conditioning(self, pipeline: FewStepPipeline, settings: Settings) -> Conditioning:
        size, side = self.size, settings.data.resolution
        shapes = {
            "text": size.student_text,
            "vae": (1, *pipeline.latent_shape(side, side)),
            "vlm": size.teacher_text,
        }
        encoders = {name: RandomEncoder(name, shape, self.dtype) for name, shape in shapes.items()}
        teacher = tuple(encoders[name] for name in self.model.teacher_context(settings).encoders)
        limit = TokenLimit("--max_sequence_length", settings.model.max_sequence_length)
        stack = STACK[size.shape.script]
        return Conditioning((encoders["text"],), teacher, stack, student_limit=limit, teacher_limit=limit)


def make_random(
    module_class: type[torch.nn.Module], arguments: dict, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """A frozen module whose weights are initialised on the device, in the dtype: they are nowhere else before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), default_dtype(dtype), device:
        torch.manual_seed(0)
        module = module_class(**arguments)
        for parameter in module.parameters(recurse=False):  # padding tokens, which are left as they were in memory
            torch.nn.init.normal_(parameter)
    return module.requires_grad_(False).eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
