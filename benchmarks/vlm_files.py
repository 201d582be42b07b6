"""Configuration files of Qwen3-VL checkpoints that fit a given text encoder."""

from transformers import Qwen3Config, Qwen3VLConfig

from pipelines.vision_encoder import LANGUAGE_FIELDS


# Patches of 16 x 16 pixels, tokens of 2 x 2 patches.
PREPROCESSOR = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


def vlm_config(
    text_config: Qwen3Config, vision_tower: dict, *, tie_word_embeddings: bool = True, **changed: object
) -> Qwen3VLConfig:
    """Configuration of a Qwen3-VL that fits a text encoder.

    Args:
        vision_tower: arguments of `Qwen3VLVisionConfig`.
        changed: other arguments of the language model's configuration.
    """
    # Of each head's 64 frequencies, Qwen3-VL uses 24 for time and 20 each for height and width.
    frequencies = text_config.head_dim // 2
    spatial = frequencies * 20 // 64
    rope = {
        "rope_type": "default",
        "mrope_interleaved": True,
        "mrope_section": [frequencies - 2 * spatial, spatial, spatial],
        "rope_theta": 5e6,
    }
    fields = {field: getattr(text_config, field) for field in LANGUAGE_FIELDS}
    return Qwen3VLConfig(
        text_config={**fields, "rope_parameters": rope, **changed},
        vision_config=vision_tower,
        tie_word_embeddings=tie_word_embeddings,
    )
