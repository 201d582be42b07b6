"""Qwen3-VL that answers questions about pictures: the judge of comparisons, and the writer of their prompts."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import PIL.Image
import torch
from diffusers.training_utils import free_memory
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

from dopsd.loading import check_config, check_loaded, limited_size, reporting_library_errors

from .chat_template import apply_chat_template
from .checkpoint_files import CheckpointFiles
from .vision_encoder import (
    IMAGE_PAD,
    PREPROCESSOR_FILE,
    VISION_END,
    VISION_START,
    VISION_TOKENS,
    PatchProjection,
    Qwen2VLImageProcessorPil,
)


MIN_PIXELS, MAX_PIXELS = 256 * 256, 768 * 768  # smaller pictures are enlarged, larger ones shrunk
TEMPLATE_FILE = "chat_template.json"  # of processors; some checkpoints have the template only there
WHICH_VLM = "pass for example Qwen/Qwen3-VL-4B-Instruct"


class VLMChat:
    """A Qwen3-VL checkpoint. Its weights are loaded for the time of a context only.

    The constructor reads its configuration, tokenizer and image processor.

    Args:
        name_or_path: folder or hub id.
        cache_dir: folder of the hub cache, or None for the default one.

    Raises:
        InputError: the checkpoint does not exist, is damaged or is another model. The message starts with its name.
    """

    def __init__(self, name_or_path: str, cache_dir: str | None = None):
        self.name = str(name_or_path)
        self._options = {"cache_dir": cache_dir, "trust_remote_code": False}
        files = CheckpointFiles(self.name, cache_dir)
        content = files.read_json("config.json")
        if (kind := content.get("model_type")) != "qwen3_vl":
            raise files.error(f"its model_type is {kind}, not qwen3_vl; {WHICH_VLM}")
        settings = files.read_json(PREPROCESSOR_FILE) | {
            "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
            "min_pixels": None,  # old names of the limits, which would override the size
            "max_pixels": None,
        }
        with reporting_library_errors(f"{self.name}: cannot be used", f"download it again, or {WHICH_VLM}"):
            check_config(content, "its vision-language model")
            self._config = AutoConfig.from_pretrained(self.name, **self._options)
            with torch.device("meta"), limited_size():
                model = AutoModelForImageTextToText.from_config(self._config, trust_remote_code=False)
            self._tokenizer = AutoTokenizer.from_pretrained(self.name, **self._options)
            if self._tokenizer.chat_template is None and files.has(TEMPLATE_FILE):
                self._tokenizer.chat_template = files.read_json(TEMPLATE_FILE)["chat_template"]
            self._image_processor = Qwen2VLImageProcessorPil.from_dict(settings)
            self._image_processor(PIL.Image.new("RGB", (64, 64)), return_tensors="pt")
        ids = dict(zip(VISION_TOKENS, self._tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)), strict=True))
        if missing := [token for token, index in ids.items() if index in (None, self._tokenizer.unk_token_id)]:
            raise files.error(f"its tokenizer lacks {', '.join(missing)}, needed to mark an image; {WHICH_VLM}")
        self._config.image_token_id, self._config.vision_start_token_id = ids[IMAGE_PAD], ids[VISION_START]
        # Newer versions of transformers are told which tokens stand for a picture; older ones find out.
        self._needs_types = "mm_token_type_ids" in inspect.signature(model.forward).parameters
        apply_chat_template(self._tokenizer, "hello")
        if files.is_local and not any(Path(self.name).glob("*.safetensors")):
            raise files.error(f"has no weights in .safetensors files; {WHICH_VLM}")

    @contextmanager
    def loaded(self, device: torch.device) -> Iterator[Callable[[str, list[PIL.Image.Image], int], str]]:
        """Context with the model on the device; yields a function of question, pictures and the most new tokens.

        Raises:
            InputError: the weights cannot be loaded.
        """
        problem = f"{self.name}: its weights cannot be loaded"
        with reporting_library_errors(problem, f"download it again, or {WHICH_VLM}"):
            model, info = AutoModelForImageTextToText.from_pretrained(
                self.name,
                config=self._config,
                dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # They are in `info`.
                **self._options,
            )
            check_loaded("its model", info)
        model.model.visual.patch_embed.proj = PatchProjection(model.model.visual.patch_embed.proj)
        try:
            yield partial(self._answer, model.eval().to(device))
        finally:
            model.to("meta")  # Gives the memory back, whoever still has the function.
            free_memory()

    @torch.no_grad()
    def _answer(
        self, model: torch.nn.Module, question: str, images: list[PIL.Image.Image], max_new_tokens: int
    ) -> str:
        """The likeliest answer, token by token; the pictures come before the question."""
        pixels = {}
        content = question
        if images:
            pixels = dict(self._image_processor([image.convert("RGB") for image in images], return_tensors="pt"))
            counts = pixels["image_grid_thw"].prod(1) // self._image_processor.merge_size**2
            content = "".join(VISION_START + IMAGE_PAD * int(count) + VISION_END for count in counts) + question
        text = apply_chat_template(self._tokenizer, content)
        inputs = dict(self._tokenizer(text, return_tensors="pt")) | pixels
        if self._needs_types and images:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self._config.image_token_id).int()
        ends = model.generation_config.eos_token_id
        generation = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self._tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        tokens = model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()}, generation_config=generation
        )
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        return self._tokenizer.decode(answer, skip_special_tokens=True).strip()
