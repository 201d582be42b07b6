"""The models that pictures are measured with: CLIP, DINO, and CLIPSeg to separate the subject."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import AutoTokenizer, BatchEncoding, CLIPSegForImageSegmentation, PretrainedConfig

from ..errors import InputError
from ..picture_model import PictureModel


CLIP_EXAMPLE = "openai/clip-vit-large-patch14"
DINO_EXAMPLE = "facebook/dinov2-base"
MASK_EXAMPLE = "CIDAS/clipseg-rd64-refined"
BATCH_SIZE = 16
# A subject that is found with less certainty, or that has less or more of the picture, is not separated from it.
LEAST_CERTAINTY, LEAST_SUBJECT, MOST_SUBJECT = 0.5, 0.01, 0.95
MARGIN = 0.05  # around the subject, as a share of its longer side
NEUTRAL = (124, 116, 104)  # the mean colour of photographs, which feature models are given as zero


class TextPictureModel(PictureModel):
    """A model that turns pictures and texts into features of one space, such as CLIP.

    Raises:
        InputError: it cannot be read, or lacks one of the two.
    """

    def try_out(self, skeleton: torch.nn.Module, pixels: torch.Tensor) -> None:
        super().try_out(skeleton, pixels)
        if not hasattr(skeleton, "get_text_features"):
            raise InputError(f"{self.named}: reads no texts; {self.advice}")
        self.tokenizer = AutoTokenizer.from_pretrained(self.name_or_path, **self.options)
        if not 0 < len(self.tokenizer) <= self.config.get_text_config().vocab_size:
            raise ValueError("its tokenizer does not fit its vocabulary")
        self.tokens(["a photo"])

    @property
    def max_tokens(self) -> int:
        return self.config.get_text_config().max_position_embeddings

    def tokens(self, texts: Sequence[str]) -> BatchEncoding:
        return self.tokenizer(
            list(texts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """Those of which the model reads only the beginning."""
        return [text for text in texts if len(self.tokenizer(text).input_ids) > self.max_tokens]

    @torch.no_grad()
    def text_features(self, texts: Sequence[str], device: torch.device) -> torch.Tensor:
        """(N, D), float32, on the CPU. There is at least one text.

        Raises:
            InputError: the weights cannot be loaded, or the features are not finite.
        """
        with self.loaded(device) as model:
            output = model.get_text_features(**self.tokens(texts).to(device))
            return self.checked(output if torch.is_tensor(output) else output.pooler_output)


class MaskModel(PictureModel):
    """A CLIPSeg model, which finds in a picture what a text names.

    Raises:
        InputError: it cannot be read, or is another model.
    """

    model_class = CLIPSegForImageSegmentation

    @staticmethod
    def skeleton(config: PretrainedConfig) -> torch.nn.Module:
        if config.model_type != "clipseg":
            raise ValueError(f"its model_type is {config.model_type}, not clipseg")
        return CLIPSegForImageSegmentation(config)

    def try_out(self, skeleton: torch.nn.Module, pixels: torch.Tensor) -> None:
        if getattr(self.processor, "do_center_crop", False):
            raise ValueError("its processor crops the pictures")
        self.tokenizer = AutoTokenizer.from_pretrained(self.name_or_path, **self.options)
        self.tokenizer(["a photo"], return_tensors="pt")

    @torch.no_grad()
    def certainties(self, images: Iterable[Image.Image], subject: str, device: torch.device) -> list[torch.Tensor]:
        """How surely each pixel shows the subject: (h, w) per picture, 0 to 1, at the model's own size, on the CPU.

        Raises:
            InputError: the weights cannot be loaded, or the values are not finite.
        """
        found = []
        with self.loaded(device) as model:
            for pixels in self.batches(images, BATCH_SIZE):
                tokens = self.tokenizer([subject] * len(pixels), return_tensors="pt", truncation=True).to(device)
                # One picture has no dimension for the batch in some versions of transformers.
                logits = model(pixel_values=pixels.to(device), **tokens).logits
                found += self.checked(logits.sigmoid()).view(len(pixels), *logits.shape[-2:])
        return found


def is_separable(certainty: torch.Tensor) -> bool:
    """Whether the subject can be told from the rest of a picture, by `MaskModel.certainties`."""
    return certainty.max() >= LEAST_CERTAINTY and LEAST_SUBJECT <= shown(certainty).float().mean() <= MOST_SUBJECT


def shown(certainty: torch.Tensor) -> torch.Tensor:
    """Where the subject is, bool: what is at least half as sure as the surest pixel."""
    return certainty >= certainty.max() / 2


def cutout(image: Image.Image, certainty: torch.Tensor) -> Image.Image:
    """The subject on a neutral ground, in a square that it fills, so that neither background nor place are compared.

    Args:
        certainty: from `MaskModel.certainties`, of a subject that is separable.
    """
    width, height = image.size
    mask = shown(interpolate(certainty[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0])
    rows, columns = (mask.any(dim).nonzero().flatten() for dim in (1, 0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    side = max(bottom - top, right - left)
    side += 2 * round(side * MARGIN)
    square = Image.new("RGB", (side, side), NEUTRAL)
    place = ((side - right + left) // 2 - left, (side - bottom + top) // 2 - top)
    square.paste(image.convert("RGB"), place, Image.fromarray(mask.byte().mul(255).numpy()))
    return square


@dataclass(frozen=True)
class FeatureModels:
    """What pictures are measured with.

    Attributes:
        clip: reads texts, too.
        dino: of pictures alone.
        mask: finds the subject; None if nothing is masked.
    """

    clip: TextPictureModel
    dino: PictureModel
    mask: MaskModel | None = None


def open_feature_models(
    clip_model: str, dino_model: str, mask_model: str | None = None, cache_dir: str | None = None
) -> FeatureModels:
    """The models without their weights.

    Args:
        clip_model, dino_model, mask_model: hub ids or folders, as of the flags of these names. Without `mask_model`,
            nothing is masked.
        cache_dir: folder of the hub cache, or None for the default one.

    Raises:
        InputError: one of them cannot be read, or is not such a model.
    """
    return FeatureModels(
        TextPictureModel(clip_model, cache_dir, flag="--clip_model", example=CLIP_EXAMPLE),
        PictureModel(dino_model, cache_dir, flag="--dino_model", example=DINO_EXAMPLE),
        None if mask_model is None else MaskModel(mask_model, cache_dir, flag="--mask_model", example=MASK_EXAMPLE),
    )
