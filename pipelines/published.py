"""Facts about the published checkpoints. Imports nothing slow, so that a script can show its flags at once."""

from dopsd.sizes import SizeLimits


# Attention and feed-forward layers of the double-stream blocks, fused projections of the single-stream blocks.
KLEIN_LORA_LAYERS = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|(ff|ff_context)\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)

# Hidden states of these text encoder layers make up FLUX.2-klein's prompt embeddings.
KLEIN_OUT_LAYERS = (9, 18, 27)

# Attention and feed-forward layers of all blocks: the main ones and both refiners.
Z_IMAGE_LORA_LAYERS = (
    r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"
)

# Sampling steps that the distilled models are deployed at.
KLEIN_STEPS, Z_IMAGE_STEPS = 4, 8

KLEIN_SIZES = SizeLimits(
    pixels_per_token=16,  # the VAE's factor 8 times patches of 2
    min_side=64,  # the pipeline refuses smaller reference images
    max_tokens=4300,  # beyond, the shift of the schedule falls sharply
)
Z_IMAGE_SIZES = SizeLimits(
    pixels_per_token=16,  # the VAE's factor 8 times patches of 2
    min_side=64,  # less is most likely a typing error
    max_tokens=128 * 128,  # 2048 x 2048 pixels
)

# Optimizer steps of the published runs, with one picture on each of 4 GPUs.
KLEIN_TRAIN_STEPS, Z_IMAGE_TRAIN_STEPS = 3000, 2000

# Vision-language models by the hidden size of the text encoder.
DEFAULT_VLMS = {2560: "Qwen/Qwen3-VL-4B-Instruct", 4096: "Qwen/Qwen3-VL-8B-Instruct"}
