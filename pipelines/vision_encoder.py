"""Qwen3-VL's vision tower on top of a pipeline's own Qwen3 text encoder, without a second language model in memory."""

import re
from functools import cached_property
from pathlib import Path
from reprlib import repr as shortened
from typing import Literal

import PIL.Image
import torch
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model, Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel, Qwen3VLVisionModel

from dopsd.errors import InputError
from dopsd.loading import LOAD_ERRORS, brief, check_config, limited_size

from .checkpoint_files import CheckpointFiles
from .published import DEFAULT_VLMS


try:
    from transformers import Qwen2VLImageProcessorPil
except ImportError:  # Before transformers 5.4, this name was the PIL version's; torchvision's ended in "Fast".
    from transformers import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil


VISION_START, IMAGE_PAD, VISION_END = VISION_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")

# If these are equal, the VLM's language model computes with the text encoder's weights what the text encoder computes.
LANGUAGE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "hidden_act",
    "attention_bias",
)

PREPROCESSOR_FILE = "preprocessor_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# A checkpoint that was saved without the language model head has no "model." prefix.
VISUAL_KEY = re.compile(r"(?:model\.)?visual\.(?P<name>.+)")

WHICH_VLM = "pass Qwen/Qwen3-VL-4B-Instruct (Z-Image, FLUX.2-klein-4B) or Qwen/Qwen3-VL-8B-Instruct (FLUX.2-klein-9B)"


class PatchProjection(torch.nn.Linear):
    """Linear map of flattened patches, equal to a convolution whose kernel and stride are the patch.

    Some versions of PyTorch compute that convolution thousands of times more slowly.

    Args:
        convolution: its weights are shared, not copied.
    """

    def __init__(self, convolution: torch.nn.Conv3d):
        assert convolution.kernel_size == convolution.stride and convolution.groups == 1
        weight = convolution.weight.flatten(1)
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = convolution.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(N, D) from (N, C, frames, height, width)."""
        return super().forward(patches.flatten(1))


class VisionEncoder:
    """Qwen3-VL with the pipeline's text encoder as its language model: hidden states for chat texts with images.

    The constructor reads the configuration files and the index of the weights, and downloads no weights. Call `load`
    before `hidden_states`.

    Args:
        name_or_path: folder or hub id of a Qwen3-VL checkpoint.
        tokenizer: of the pipeline. Qwen3's vocabulary contains the tokens that mark an image.
        text_config: of the pipeline's text encoder.
        min_pixels: smaller images are enlarged to this area.
        max_pixels: larger images are shrunk to this area.
        rope: the RoPE base of the language model. "vlm" is the one that the vision tower was trained with, 5e6 instead
            of Qwen3's 1e6. With "text_encoder", a text without an image has the same hidden states as in the text
            encoder.
        cache_dir: folder of the hub cache, or None for the default one.

    Raises:
        InputError: the checkpoint does not exist, is incomplete or damaged, belongs to another model, or does not fit
            the text encoder. The message starts with `name_or_path`.
    """

    def __init__(
        self,
        name_or_path: str,
        tokenizer: Qwen2TokenizerFast,
        text_config: Qwen3Config,
        *,
        min_pixels: int,
        max_pixels: int,
        rope: Literal["vlm", "text_encoder"] = "vlm",
        cache_dir: str | None = None,
    ):
        self.tokenizer = tokenizer
        self._checkpoint = CheckpointFiles(name_or_path, cache_dir)
        self._model = None
        self._config = self._read_config(text_config)
        if rope == "text_encoder":
            self._config.text_config.rope_parameters["rope_theta"] = text_config.rope_parameters["rope_theta"]
        self._image_processor = self._make_image_processor(min_pixels, max_pixels)
        self._weight_names = self._read_weight_names()
        if self._checkpoint.is_local:
            _ = self.weight_files  # Notices missing and damaged files before the text encoder is loaded.

    def _read_config(self, text_config: Qwen3Config) -> Qwen3VLConfig:
        """The configuration, with the token ids of the pipeline's tokenizer."""
        content = self._checkpoint.read_json("config.json")
        if (kind := content.get("model_type")) != "qwen3_vl":
            raise self._checkpoint.error(f"its model_type is {kind}, not qwen3_vl; {WHICH_VLM}")
        try:
            check_config(content, "its vision-language model")
            config = Qwen3VLConfig.from_dict(content)
        except LOAD_ERRORS as error:
            raise self._checkpoint.damaged("config.json", error) from error
        if problem := _mismatch(config, text_config):
            raise self._checkpoint.error(problem)
        ids = dict(zip(VISION_TOKENS, self.tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)), strict=True))
        # A missing token has the id of the unknown token, which is None if there is no such token.
        if missing := [token for token, index in ids.items() if index == self.tokenizer.unk_token_id]:
            raise self._checkpoint.error(
                f"the pipeline's tokenizer lacks {', '.join(missing)}, needed to mark an image; use a pipeline with "
                "Qwen3's tokenizer"
            )
        config.image_token_id, config.vision_start_token_id = ids[IMAGE_PAD], ids[VISION_START]
        return config

    def _make_image_processor(self, min_pixels: int, max_pixels: int) -> Qwen2VLImageProcessorPil:
        """The PIL image processor. If torchvision is installed, its version would resize to different pixels."""
        settings = self._checkpoint.read_json(PREPROCESSOR_FILE) | {
            "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
            "do_resize": True,
            # Old names of the limits. Some files contain them, and they would override the size.
            "min_pixels": None,
            "max_pixels": None,
        }
        vision = self._config.vision_config
        expected = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }
        different = [
            f"{name} {settings.get(name)}, not {value}"
            for name, value in expected.items()
            if settings.get(name) != value
        ]
        if different:
            raise self._checkpoint.error(
                f"its {PREPROCESSOR_FILE} does not fit its config.json: {', '.join(different)}; download it again"
            )
        try:
            processor = Qwen2VLImageProcessorPil.from_dict(settings)
            processor(PIL.Image.new("RGB", (64, 64)), size={"shortest_edge": 64 * 64, "longest_edge": 64 * 64})
        except LOAD_ERRORS as error:
            raise self._checkpoint.damaged(PREPROCESSOR_FILE, error) from error
        return processor

    def _read_weight_names(self) -> list[str]:
        """Names of the safetensors files that contain the vision tower, according to the index if there is one."""
        if not self._checkpoint.has(INDEX_FILE):
            return [WEIGHTS_FILE]
        shard_of = self._checkpoint.read_json(INDEX_FILE).get("weight_map")
        if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
            raise self._checkpoint.error(f"its {INDEX_FILE} has no weight_map with file names; download it again")
        names = sorted({shard for key, shard in shard_of.items() if VISUAL_KEY.fullmatch(key)})
        self._check_has_tower(names)
        return names

    def _check_has_tower(self, found: list[str]) -> None:
        if not found:
            raise self._checkpoint.error(f"its weights contain no visual.*, the vision tower; {WHICH_VLM}")

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files that contain the vision tower. They are downloaded on first use, and no others.

        Raises:
            InputError: a file is missing or damaged, or none contains the tower.
        """
        paths, visual_keys = tuple(self._checkpoint.path(name) for name in self._weight_names), []
        for path in paths:
            with self._checkpoint.open(path) as file:
                visual_keys += filter(VISUAL_KEY.fullmatch, file.keys())
        self._check_has_tower(visual_keys)
        return paths

    def files(self) -> dict[str, Path]:
        """The files that the hidden states depend on besides the text encoder, by their names in the checkpoint.

        Raises:
            InputError: see `weight_files`.
        """
        settings = {name: self._checkpoint.path(name) for name in ("config.json", PREPROCESSOR_FILE)}
        return settings | dict(zip(self._weight_names, self.weight_files, strict=True))

    def num_image_tokens(self, height: int, width: int) -> int:
        """Number of `<|image_pad|>` tokens for an image of this size in pixels, one per merged patch.

        It depends on the aspect ratio even if both limits are equal, because sides are rounded to whole tokens.

        Raises:
            ValueError: one side is more than 200 times as long as the other.
        """
        patches = self._image_processor.get_number_of_image_patches(height, width, {})
        return patches // self._image_processor.merge_size**2

    def num_parameters(self) -> int:
        """Of the vision tower, according to config.json."""
        with torch.device("meta"), limited_size():
            tower = Qwen3VLVisionModel(self._config.vision_config)
        return sum(parameter.numel() for parameter in tower.parameters())

    def content(self, prompt: str, *num_image_tokens: int) -> str:
        """The user's message, with the images before the prompt, for the pipeline's chat template.

        Args:
            num_image_tokens: of each image.

        Raises:
            InputError: the prompt contains one of the tokens that mark an image.
        """
        if found := [token for token in VISION_TOKENS if token in prompt]:
            raise InputError(
                f"{shortened(prompt)}: contains {', '.join(found)}, reserved for the image in the teacher's text; "
                "remove it from the caption or from the teacher's prompt suffix"
            )
        images = (VISION_START + IMAGE_PAD * count + VISION_END for count in num_image_tokens)
        return "".join(images) + prompt

    def load(self, text_encoder: Qwen3Model | Qwen3ForCausalLM) -> None:
        """Loads the vision tower in the text encoder's dtype and on its device, and connects the two.

        The text encoder's weights are shared, not copied, and no longer require gradients. Call `load` again after
        moving or casting the text encoder.

        Raises:
            InputError: a weight file is damaged, or does not contain the tower that config.json describes.
        """
        self._config._attn_implementation = text_encoder.config._attn_implementation
        try:
            with torch.device("meta"), limited_size():
                model = Qwen3VLModel(self._config)
        except LOAD_ERRORS as error:
            raise self._checkpoint.damaged("config.json", error) from error
        model.visual = Qwen3VLVisionModel.from_pretrained(
            None,
            config=self._config.vision_config,
            state_dict=self._read_tower(model.visual),
            dtype=text_encoder.dtype,
        ).to(text_encoder.device)
        model.visual.patch_embed.proj = PatchProjection(model.visual.patch_embed.proj)
        # Linear layers are shared as modules, since a quantized text encoder may have its own class of them. Of other
        # layers the parameters are: tensors would become a second copy when one of the two models is moved or cast.
        for name, module in text_encoder.base_model.named_modules():
            if isinstance(module, torch.nn.Linear):
                model.language_model.set_submodule(name, module)
        model.language_model.load_state_dict(dict(text_encoder.base_model.named_parameters()), assign=True)
        # The buffers are not in the state dict and still on the meta device.
        rotary_embedding = type(model.language_model.rotary_emb)
        model.language_model.rotary_emb = rotary_embedding(self._config.text_config).to(text_encoder.device)
        self._model = model.eval().requires_grad_(False)

    def _read_tower(self, skeleton: Qwen3VLVisionModel) -> dict[str, torch.Tensor]:
        """State dict of the vision tower, with the stored dtypes. Reads no other tensors."""
        tensors = {}
        for path in self.weight_files:
            with self._checkpoint.open(path) as file:
                for key in file.keys():
                    if match := VISUAL_KEY.fullmatch(key):
                        tensors[match["name"]] = file.get_tensor(key)
        known = skeleton.state_dict()
        if unknown := sorted(tensors.keys() - known.keys()):
            raise self._checkpoint.error(
                f"its visual.{brief(unknown[0], 80)} is no part of the tower in its config.json; download it again"
            )
        for name, expected in known.items():
            if name not in tensors:
                raise self._checkpoint.error(f"its weights have no visual.{name}; download it again")
            if tensors[name].shape != expected.shape:
                raise self._checkpoint.error(
                    f"its visual.{name} has shape {list(tensors[name].shape)}, but {list(expected.shape)} according "
                    "to its config.json; download it again"
                )
        return tensors

    @torch.no_grad()
    def features(self, picture: PIL.Image.Image) -> torch.Tensor:
        """(D,), the mean of the merged tokens that the tower makes of a picture, by which pictures are compared."""
        pixels = self._image_processor(picture, return_tensors="pt").to(self._model.device)
        output = self._model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"])
        # Older versions of transformers return a tuple.
        merged = output.pooler_output if hasattr(output, "pooler_output") else output[0]
        return merged[0].float().mean(0)

    def unload(self) -> None:
        """Frees the vision tower. The text encoder is not changed."""
        self._model = None

    @torch.no_grad()
    def hidden_states(
        self, chat_text: str, *images: PIL.Image.Image, pad_to: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Hidden states for a chat text with images, or for a text without any.

        Args:
            chat_text: a filled-in chat template. With images, the user's message comes from `content`.
            images: in the order of the text, of the sizes for which `num_image_tokens` was called.
            pad_to: number of tokens to pad to, at least the length of the text. Padding is masked, and its positions
                continue after the text's, as in the text encoder. (Qwen3-VL itself gives all padding tokens the same
                position, which depends on the transformers version; a transformer that sees the padding would notice.)

        Returns:
            (1, L, D) for the embeddings and each layer, as from the text encoder. In the first layers, the features
            that the vision tower adds after a layer (DeepStack) are only visible from the next layer on.
        """
        padding = "max_length" if pad_to else False
        tokens = self.tokenizer(chat_text, padding=padding, max_length=pad_to, return_tensors="pt")
        tokens = tokens.to(self._model.device)
        assert pad_to is None or tokens.input_ids.shape[1] == pad_to
        inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        options = {"output_hidden_states": True, "use_cache": False}
        if not images:
            return self._model.language_model(**inputs, **options).hidden_states
        pixels = self._image_processor(list(images), return_tensors="pt").to(self._model.device)
        inputs["position_ids"] = self._positions(tokens.input_ids[0], pixels["image_grid_thw"])[:, None]
        return self._model(**inputs, **pixels, **options).hidden_states

    def _positions(self, input_ids: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """M-RoPE positions of Qwen3-VL for images in a text.

        The tokens of an image share the time position at which it starts and count rows and columns from there. The
        text after it continues after the larger of the two. Equals `Qwen3VLModel.get_rope_index` except for padding.

        Args:
            input_ids: (L,).
            grids: (N, 3), number of patches of each image in time, height and width.

        Returns:
            (3, L), time, row and column of every token.
        """
        merge = self._config.vision_config.spatial_merge_size
        is_image = (input_ids == self._config.image_token_id).tolist()
        parts, place, position = [], 0, 0  # of the next token, in the text and in M-RoPE
        for rows, columns in (grids[:, 1:] // merge).tolist():
            start = is_image.index(True, place)
            parts.append(torch.arange(position, position + start - place).expand(3, -1))
            position += start - place
            index = torch.arange(rows * columns)
            parts.append(position + torch.stack([torch.zeros_like(index), index // columns, index % columns]))
            place, position = start + rows * columns, position + max(rows, columns)
        parts.append(torch.arange(position, position + len(input_ids) - place).expand(3, -1))
        return torch.cat(parts, dim=1).to(input_ids.device)


def _mismatch(config: Qwen3VLConfig, text_config: Qwen3Config) -> str | None:
    """What keeps the VLM from using the text encoder as its language model; None if it fits."""
    language, width = config.text_config, config.vision_config.out_hidden_size
    text_encoder = f"the pipeline's text encoder {text_config.name_or_path}".rstrip()
    different = [
        f"{field} {getattr(language, field)}, not {getattr(text_config, field)}"
        for field in LANGUAGE_FIELDS
        if getattr(language, field) != getattr(text_config, field)
    ]
    if different:
        return f"its language model does not fit {text_encoder}: {', '.join(different)}; {WHICH_VLM}"
    if width != text_config.hidden_size:
        return (
            f"its vision tower does not fit {text_encoder}: out_hidden_size {width}, not {text_config.hidden_size}; "
            f"{WHICH_VLM}"
        )
    return None


def default_vlm(text_config: Qwen3Config) -> str:
    """Hub id of the Qwen3-VL whose language model has the shapes of the text encoder.

    Raises:
        InputError: there is none. The message continues the name of a flag or setting.
    """
    if text_config.hidden_size not in DEFAULT_VLMS:
        raise InputError(
            f"has no default for a text encoder with hidden size {text_config.hidden_size}; pass a Qwen3-VL "
            "checkpoint whose language model has the same shapes"
        )
    return DEFAULT_VLMS[text_config.hidden_size]
