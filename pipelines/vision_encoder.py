"""Qwen3-VL's vision tower around a pipeline's own Qwen3 text encoder: no second language model in memory."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from reprlib import repr as shortened
from typing import Literal

import PIL.Image
import safetensors
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, StrictDataclassError
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model, Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel, Qwen3VLVisionModel

from dopsd.errors import InputError


try:
    from transformers import Qwen2VLImageProcessorPil
except ImportError:  # Before transformers 5.4 this name is PIL's, and torchvision's ends in Fast.
    from transformers import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil


VISION_START, IMAGE_PAD, VISION_END = VISION_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")

# With these equal, tensors give in the VLM's language model what they give in the text encoder.
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
INDEX_FILE = "model.safetensors.index.json"
# What transformers raises on a configuration that is JSON but wrong, found by damaging some.
CONFIG_ERRORS = (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError)

# Saved without its head, the model has no prefix.
VISUAL_KEY = re.compile(r"(?:model\.)?visual\.(?P<name>.+)")

# By the width of the text encoder that it fits.
DEFAULT_VLMS = {2560: "Qwen/Qwen3-VL-4B-Instruct", 4096: "Qwen/Qwen3-VL-8B-Instruct"}
WHICH_VLM = "pass Qwen/Qwen3-VL-4B-Instruct (Z-Image, FLUX.2-klein-4B) or Qwen/Qwen3-VL-8B-Instruct (FLUX.2-klein-9B)"


class VisionEncoder:
    """Qwen3-VL whose language model is the pipeline's text encoder: hidden states of chat texts with a picture.

    Making one reads configurations and the weights' index, and downloads no weights. `load` comes before
    `hidden_states`.

    Args:
        name_or_path: a Qwen3-VL checkpoint, as a folder or by its name on the Hub.
        tokenizer: the pipeline's. Qwen3's vocabulary holds the tokens that stand for a picture.
        text_config: of the pipeline's text encoder.
        min_pixels: smaller pictures are enlarged to this area.
        max_pixels: larger pictures are shrunk to it.
        rope: whose rotary base the language model has. "vlm" is the one that the tower was trained with, 5e6 against
            Qwen3's 1e6. With "text_encoder", a text without a picture has the text encoder's own hidden states.
        cache_dir: the hub cache, if not the default one.

    Raises:
        InputError: no such checkpoint, it is incomplete, of another model, or does not fit the text encoder.
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
        self.name_or_path = str(name_or_path)
        self.tokenizer = tokenizer
        self._cache_dir = cache_dir
        self._is_local = Path(name_or_path).is_dir()
        self._revision = None
        self._model = None

        if not self._is_local:
            # The snapshot's commit: a push between two downloads must not mix versions.
            self._revision = self._path("config.json").parent.name
        config = self._read_json("config.json")
        if (kind := config.get("model_type")) != "qwen3_vl":
            raise self._error(f"its model_type is {kind}, not qwen3_vl; {WHICH_VLM}")
        try:
            self._config = Qwen3VLConfig.from_dict(config)
        except CONFIG_ERRORS as error:
            raise self._error(f"its config.json is damaged ({_one_line(error)}); download it again") from error
        self._check_fit(text_config)
        self._take_token_ids()
        if rope == "text_encoder":
            self._config.text_config.rope_parameters["rope_theta"] = text_config.rope_parameters["rope_theta"]

        self._image_processor = self._make_image_processor(min_pixels, max_pixels)
        self._weight_names = ["model.safetensors"]
        if self._path(INDEX_FILE, required=False) is not None:
            shard_of = self._read_json(INDEX_FILE).get("weight_map")
            if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
                raise self._error(f"its {INDEX_FILE} has no weight_map of file names; download it again")
            self._weight_names = sorted({shard for key, shard in shard_of.items() if VISUAL_KEY.fullmatch(key)})
        self._check_has_tower(self._weight_names)
        if self._is_local:
            _ = self.weight_files  # What is missing or damaged shows before a text encoder is loaded.

    def _error(self, message: str) -> InputError:
        return InputError(f"--vlm_model_name_or_path {self.name_or_path}: {message}")

    def _path(self, name: str, *, required: bool = True) -> Path | None:
        """One file of the checkpoint, downloaded if it has to be. None if it lacks one that is not required."""
        if self._is_local:
            path = Path(self.name_or_path) / name
            if path.is_file():
                return path
            if required:
                raise self._error(f"this folder has no {name}; pass a whole Qwen3-VL checkpoint")
            return None
        try:
            return Path(hf_hub_download(self.name_or_path, name, revision=self._revision, cache_dir=self._cache_dir))
        except (OSError, ValueError) as error:
            if isinstance(error, EntryNotFoundError) and not required:
                return None
            raise self._error(
                f"there is no such folder, and the Hub did not give its {name}; check the name and the connection "
                f"({_one_line(error)})"
            ) from error

    def _read_json(self, name: str) -> dict:
        path = self._path(name)
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise self._error(f"its {name} is damaged ({_one_line(error)}); download it again") from error
        if not isinstance(content, dict):
            raise self._error(f"its {name} holds no object; download it again")
        return content

    def _make_image_processor(self, min_pixels: int, max_pixels: int) -> Qwen2VLImageProcessorPil:
        """PIL's even where torchvision is installed, which resizes to other pixels."""
        settings = self._read_json(PREPROCESSOR_FILE) | {
            "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
            "do_resize": True,
            # The limits' former names, which some files hold, would win over the size.
            "min_pixels": None,
            "max_pixels": None,
        }
        vision = self._config.vision_config
        wanted = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }
        different = [name for name, value in wanted.items() if settings.get(name) != value]
        if different:
            found = ", ".join(f"{name} {settings.get(name)}, not {wanted[name]}" for name in different)
            raise self._error(f"its {PREPROCESSOR_FILE} does not fit its config.json: {found}; download it again")
        try:
            processor = Qwen2VLImageProcessorPil.from_dict(settings)
            processor(PIL.Image.new("RGB", (64, 64)), size={"shortest_edge": 64 * 64, "longest_edge": 64 * 64})
        except CONFIG_ERRORS as error:
            raise self._error(f"its {PREPROCESSOR_FILE} is damaged ({_one_line(error)}); download it again") from error
        return processor

    def _check_fit(self, text_config: Qwen3Config) -> None:
        language, width = self._config.text_config, self._config.vision_config.out_hidden_size
        text_encoder = f"the pipeline's text encoder {text_config.name_or_path}".rstrip()
        different = [
            f"{field} {getattr(language, field)}, not {getattr(text_config, field)}"
            for field in LANGUAGE_FIELDS
            if getattr(language, field) != getattr(text_config, field)
        ]
        if different:
            raise self._error(f"its language model does not fit {text_encoder}: {', '.join(different)}; {WHICH_VLM}")
        if width != text_config.hidden_size:
            raise self._error(
                f"its vision tower does not fit {text_encoder}: out_hidden_size {width}, "
                f"not {text_config.hidden_size}; {WHICH_VLM}"
            )

    def _take_token_ids(self) -> None:
        """The model finds the picture's tokens by the ids in its configuration: the tokenizer's from now on."""
        ids = dict(zip(VISION_TOKENS, self.tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)), strict=True))
        # The unknown token's id is None where there is no such token.
        if missing := [token for token, index in ids.items() if index == self.tokenizer.unk_token_id]:
            raise self._error(
                f"the pipeline's tokenizer has no {', '.join(missing)}, which stand for a picture; "
                "use a pipeline with Qwen3's tokenizer"
            )
        self._config.image_token_id = ids[IMAGE_PAD]
        self._config.vision_start_token_id = ids[VISION_START]

    def _check_has_tower(self, found: list) -> None:
        if not found:
            raise self._error(f"its weights hold no visual.*, the vision tower; {WHICH_VLM}")

    @contextmanager
    def _opened(self, path: Path) -> Iterator[safetensors.safe_open]:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                yield file
        except (OSError, safetensors.SafetensorError) as error:
            raise self._error(f"its {path.name} is damaged ({_one_line(error)}); download it again") from error

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files that hold the tower. The first use downloads them, and no others.

        Raises:
            InputError: one is missing or damaged, or none holds the tower.
        """
        paths, visual_keys = tuple(self._path(name) for name in self._weight_names), []
        for path in paths:
            with self._opened(path) as file:
                visual_keys += filter(VISUAL_KEY.fullmatch, file.keys())
        self._check_has_tower(visual_keys)
        return paths

    def files(self) -> dict[str, Path]:
        """What the hidden states depend on besides the text encoder: the files by their names in the checkpoint.

        Raises:
            InputError: as `weight_files`.
        """
        names = ("config.json", PREPROCESSOR_FILE)
        return {name: self._path(name) for name in names} | dict(
            zip(self._weight_names, self.weight_files, strict=True)
        )

    def num_image_tokens(self, height: int, width: int) -> int:
        """How many `<|image_pad|>` stand for a picture of that many pixels: its patches after merging.

        With equal limits this is not one number for all shapes: a picture that is enlarged is rounded up.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        patches = self._image_processor.get_number_of_image_patches(height, width, {})
        return patches // self._image_processor.merge_size**2

    def content(self, prompt: str, num_image_tokens: int) -> str:
        """The user's turn of the chat, for the pipeline's own template: the picture before the prompt.

        Raises:
            InputError: the prompt holds one of the picture's tokens.
        """
        if found := [token for token in VISION_TOKENS if token in prompt]:
            raise InputError(
                f"{shortened(prompt)}: {', '.join(found)} stands for a picture in the teacher's text; take it out of "
                "the caption or --teacher_prompt_suffix"
            )
        return VISION_START + IMAGE_PAD * num_image_tokens + VISION_END + prompt

    def load(self, text_encoder: Qwen3Model | Qwen3ForCausalLM) -> None:
        """Reads the tower, in the text encoder's dtype and on its device, and joins the two.

        The text encoder's tensors are used where they are, and need no gradient from then on. Load again after moving
        or casting it.

        Raises:
            InputError: a weight file is damaged, or does not hold the tower that config.json describes.
        """
        self._config._attn_implementation = text_encoder.config._attn_implementation
        with torch.device("meta"):
            model = Qwen3VLModel(self._config)
        model.visual = Qwen3VLVisionModel.from_pretrained(
            None,
            config=self._config.vision_config,
            state_dict=self._read_tower(model.visual),
            dtype=text_encoder.dtype,
        ).to(text_encoder.device)
        # The parameters themselves: after a move or a cast, bare tensors would be a second copy.
        parameters = text_encoder.base_model.state_dict(keep_vars=True)
        model.language_model.load_state_dict(parameters, assign=True)
        # Its buffers are in no state dict, and are still on meta.
        rotary_embedding = type(model.language_model.rotary_emb)
        model.language_model.rotary_emb = rotary_embedding(self._config.text_config).to(text_encoder.device)
        self._model = model.eval().requires_grad_(False)

    def _read_tower(self, skeleton: Qwen3VLVisionModel) -> dict[str, torch.Tensor]:
        """The tower's tensors by their names in it, as stored. No other tensor is read."""
        tensors = {}
        for path in self.weight_files:
            with self._opened(path) as file:
                for key in file.keys():
                    if match := VISUAL_KEY.fullmatch(key):
                        tensors[match["name"]] = file.get_tensor(key)
        for name, expected in skeleton.state_dict().items():
            if name not in tensors:
                raise self._error(f"its weights have no visual.{name}; download it again")
            if tensors[name].shape != expected.shape:
                raise self._error(
                    f"the shape of its visual.{name} is {list(tensors[name].shape)}, and by its config.json "
                    f"{list(expected.shape)}; download it again"
                )
        return tensors

    def unload(self) -> None:
        """Lets go of the tower. The text encoder stays as it is."""
        self._model = None

    @torch.no_grad()
    def hidden_states(
        self, chat_text: str, image: PIL.Image.Image | None, *, pad_to: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Of the chat text with its picture, or of a text alone.

        Args:
            chat_text: the template's, with `content` for a user's turn.
            image: of the size for which `num_image_tokens` counted.
            pad_to: tokens, at least the text's. The model does not attend to the padding, whose positions go on after
                the text's, as in the text encoder. (The whole model puts all padding on one position, which one
                depends on transformers' version; a transformer that sees padding would see that.)

        Returns:
            One (1, L, D) a layer, after that of the embeddings, as the text encoder gives them. Those after the first
            layers lack what the tower adds there (DeepStack), which the next layer has.
        """
        padding = "max_length" if pad_to else False
        tokens = self.tokenizer(chat_text, padding=padding, max_length=pad_to, return_tensors="pt")
        tokens = tokens.to(self._model.device)
        assert pad_to is None or tokens.input_ids.shape[1] == pad_to
        inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        options = {"output_hidden_states": True, "use_cache": False}
        if image is None:
            return self._model.language_model(**inputs, **options).hidden_states
        picture = self._image_processor(image, return_tensors="pt").to(self._model.device)
        inputs["position_ids"] = self._positions(tokens.input_ids[0], picture["image_grid_thw"][0])[:, None]
        return self._model(**inputs, **picture, **options).hidden_states

    def _positions(self, input_ids: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """(3, L), Qwen3-VL's M-RoPE for one picture in a text: time, row and column of every token of (L,).

        The picture's tokens share the time at which it comes and count rows and columns from there; what follows goes
        on after the larger of the two. `Qwen3VLModel.get_rope_index` but for padding.

        Args:
            grid: (3,), the picture's patches in time, height and width.
        """
        merge = self._config.vision_config.spatial_merge_size
        rows, columns = (int(count) // merge for count in grid[1:])
        start = int((input_ids == self._config.image_token_id).nonzero()[0])
        before, count = torch.arange(start), rows * columns
        place = torch.arange(count)
        picture = start + torch.stack([torch.zeros_like(place), place // columns, place % columns])
        after = start + max(rows, columns) + torch.arange(len(input_ids) - start - count)
        return torch.cat([before.expand(3, -1), picture, after.expand(3, -1)], dim=1).to(input_ids.device)


def default_vlm(text_config: Qwen3Config) -> str:
    """The hub id of the Qwen3-VL whose language model has the text encoder's size.

    Raises:
        InputError: none is known.
    """
    if text_config.hidden_size not in DEFAULT_VLMS:
        raise InputError(
            f"--vlm_model_name_or_path: none is known for a text encoder of {text_config.hidden_size} channels; name "
            "a Qwen3-VL whose language model has its shapes"
        )
    return DEFAULT_VLMS[text_config.hidden_size]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
