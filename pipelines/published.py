"""Facts about the published checkpoints. Imports nothing, so that a script can show its flags at once."""

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

# Optimizer steps of the published runs, with one picture on each of 4 GPUs.
KLEIN_TRAIN_STEPS, Z_IMAGE_TRAIN_STEPS = 3000, 2000

# Vision-language models by the hidden size of the text encoder.
DEFAULT_VLMS = {2560: "Qwen/Qwen3-VL-4B-Instruct", 4096: "Qwen/Qwen3-VL-8B-Instruct"}
