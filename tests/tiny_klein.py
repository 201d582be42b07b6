"""A tiny FLUX.2-klein of the real classes, with random weights: no download, milliseconds on a CPU.

It draws nothing recognizable. It has every part and every convention of the real checkpoint (chat template, text
layers 9, 18 and 27, batch-normalized latents, shifted schedule), so code that runs on it runs on the real one.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.miniature.parts import byte_tokenizer, make_scheduler


def make_tiny_klein(folder: str | Path, *, seed: int = 0, is_distilled: bool = True) -> Path:
    """Writes a tiny `Flux2KleinPipeline` with `save_pretrained`.

    Args:
        folder: where the checkpoint is written.
        seed: of the random weights.
        is_distilled: as in model_index.json (False for the undistilled klein).

    Returns:
        `folder`. A token has 16 latent channels and stands for 16 x 16 pixels; 2 double and 2 single blocks.
    """
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    text_width = 32
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=text_width,
            intermediate_size=48,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    # A trained VAE's statistics are neither zero nor one: a missing normalization must show.
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.05, 0.2)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * text_width,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    # torch's default gain of 1 / sqrt(3) per layer would leave little of prompt and reference in the output.
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    pipeline = Flux2KleinPipeline(
        scheduler=make_scheduler(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=is_distilled,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)
