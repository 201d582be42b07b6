"""A tiny Z-Image-Turbo of the real classes, with random weights. See tiny_klein.py."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from benchmarks.miniature.parts import byte_tokenizer


def tiny_text_config(**changed) -> Qwen3Config:
    """Configuration of a text encoder with byte-level vocabulary and 32 channels."""
    return Qwen3Config(
        **{
            "vocab_size": len(byte_tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
        }
        | changed
    )


def make_tiny_zimage(folder: str | Path, *, seed: int = 0, shift: float = 3.0) -> Path:
    """Writes a tiny `ZImagePipeline` with `save_pretrained`.

    Args:
        folder: where the checkpoint is written.
        seed: of the random weights.
        shift: of the scheduler; 3 for Z-Image-Turbo, another for the undistilled Z-Image.

    Returns:
        `folder`. 4 latent channels; a token stands for 16 x 16 pixels; 2 main blocks and 1 + 1 refiners.
    """
    torch.manual_seed(seed)
    text_encoder = Qwen3Model(tiny_text_config())
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[1536, 512, 512],
    )
    # torch's default gain of 1 / sqrt(3) per layer would leave little of the prompt in the output.
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    # A trained checkpoint's pads are not zero: a missing pad token must show.
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=byte_tokenizer(),
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)
