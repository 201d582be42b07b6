"""Image models whose features compare pictures, read through transformers: --exam_model, and those of comparisons."""

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path

import safetensors
import torch
from diffusers.training_utils import free_memory
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PretrainedConfig
from transformers.models.auto import image_processing_auto
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import get_checkpoint_shard_files

from .errors import InputError
from .loading import check_config, check_loaded, limited_size, read_config, reporting_library_errors


REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
TRIAL_SIDE = 64  # pixels


def pil_backend() -> dict[str, object]:
    """The argument that chooses an image processor without torchvision, which would resize to other pixels."""
    has_backends = "backend" in inspect.getsource(image_processing_auto)
    return {"backend": "pil"} if has_backends else {"use_fast": False}


class PictureModel:
    """A model that turns pictures into features. Its weights are loaded for the time of a call only.

    The constructor reads its configurations and tries it without weights.

    Args:
        name_or_path: hub id or folder.
        cache_dir: folder of the hub cache, or None for the default one.
        flag: that names the model, for errors.
        example: hub id that the errors propose.

    Raises:
        InputError: it cannot be read, or takes no pictures.
    """

    model_class: type = AutoModel

    def __init__(
        self,
        name_or_path: str,
        cache_dir: str | None,
        *,
        flag: str = "--exam_model",
        example: str = "facebook/dinov2-small",
    ):
        self.name_or_path = name_or_path
        self.options = {"cache_dir": cache_dir, "trust_remote_code": False}
        self.named, self.advice = f"{flag} {name_or_path}", f"pass for example {example}"
        if not (Path(name_or_path).is_dir() or REPO_ID.fullmatch(name_or_path)):
            raise InputError(f"{self.named}: there is no such folder; check the path, or {self.advice}")
        with self.reporting("cannot be read", f"check the name and the connection, or {self.advice}"):
            # Some classes make a list of the layers.
            check_config(read_config(config_path(name_or_path, cache_dir)), "its model")
            self.config = AutoConfig.from_pretrained(name_or_path, **self.options)
            check_weights(name_or_path, cache_dir)
        with self.reporting("is not a model of pictures", self.advice):
            self.processor = AutoImageProcessor.from_pretrained(name_or_path, **self.options, **pil_backend())
            with torch.device("meta"), limited_size():
                skeleton = self.skeleton(self.config)
            self.try_out(skeleton.eval(), self.pixels(Image.new("RGB", (TRIAL_SIDE, TRIAL_SIDE))).to("meta"))

    @staticmethod
    def skeleton(config: PretrainedConfig) -> torch.nn.Module:
        """The model without weights."""
        return AutoModel.from_config(config, trust_remote_code=False)

    def try_out(self, skeleton: torch.nn.Module, pixels: torch.Tensor) -> None:
        """Tries the model on the meta device. Raises one of `LOAD_ERRORS` or an `InputError` if it cannot be used."""
        features = image_features(skeleton, pixels)
        if features.ndim != 2 or len(features) != 1:
            raise ValueError(f"its features have the shape {tuple(features.shape)}")

    def reporting(self, problem: str, advice: str) -> AbstractContextManager[None]:
        return reporting_library_errors(f"{self.named}: {problem}", advice)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]

    def batches(self, images: Iterable[Image.Image], batch_size: int) -> Iterator[torch.Tensor]:
        """Prepared pictures, (N, 3, H, W) with N at most `batch_size`; a batch has pictures of one size."""
        prepared = map(self.pixels, images)
        while batch := [*islice(prepared, batch_size)]:
            is_uniform = len({pixels.shape for pixels in batch}) == 1
            yield from [torch.cat(batch)] if is_uniform else batch

    def features(self, images: Iterable[Image.Image], device: torch.device, batch_size: int = 1) -> torch.Tensor:
        """(N, D), float32, on the CPU. There is at least one image.

        Raises:
            InputError: the weights cannot be loaded, or the features are not finite.
        """
        with self.loaded(device) as model:
            rows = [image_features(model, pixels.to(device)) for pixels in self.batches(images, batch_size)]
            return self.checked(torch.cat(rows))

    def checked(self, features: torch.Tensor) -> torch.Tensor:
        """The features in float32 on the CPU. Raises `InputError` if they are not finite."""
        features = features.float().cpu()
        if not features.isfinite().all():
            raise InputError(f"{self.named}: its features are not finite; {self.advice}")
        return features

    @contextmanager
    def loaded(self, device: torch.device) -> Iterator[torch.nn.Module]:
        """Context with the model on the device."""
        with self.reporting("its weights cannot be loaded", f"download it again, or {self.advice}"):
            with limited_size():
                model, info = self.model_class.from_pretrained(
                    self.name_or_path,
                    config=self.config,
                    dtype=torch.float32,
                    use_safetensors=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # They are in `info`.
                    **self.options,
                )
            # The head of a classifier is not needed.
            check_loaded("its model", {**info, "unexpected_keys": []})
        try:
            yield model.eval().to(device)
        finally:
            del model
            free_memory()


@torch.no_grad()
def image_features(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """(N, D): the pooled features of (N, 3, H, W) prepared pictures."""
    if hasattr(model, "get_image_features"):  # also reads texts
        output = model.get_image_features(pixel_values=pixels)
    else:
        output = model(pixel_values=pixels)
    if torch.is_tensor(output):
        return output.flatten(1)
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)


def config_path(name_or_path: str, cache_dir: str | None) -> Path:
    folder = Path(name_or_path)
    return (
        folder / CONFIG_NAME
        if folder.is_dir()
        else Path(hf_hub_download(name_or_path, CONFIG_NAME, cache_dir=cache_dir))
    )


def check_weights(name_or_path: str, cache_dir: str | None) -> None:
    """Opens a folder's safetensors files without reading a tensor, or downloads those of the Hub.

    Raises:
        ValueError, OSError: there are none, or one is damaged.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
            try:
                path = hf_hub_download(name_or_path, name, cache_dir=cache_dir)
                if name == SAFE_WEIGHTS_INDEX_NAME:
                    get_checkpoint_shard_files(name_or_path, path, cache_dir=cache_dir)
                return
            except LocalEntryNotFoundError:  # no connection
                raise
            except EntryNotFoundError:
                continue
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError("it has no weights in .safetensors files")
    for path in files:
        try:
            with safetensors.safe_open(path, framework="pt"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"its {path.name} is damaged: {error}") from error
