"""The components of the miniature Z-Image-Turbo before training, all of the real classes."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    ZImageTransformer2DModel,
)
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3Model, Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLVisionModel

from benchmarks.miniature import world
from benchmarks.miniature.parts import TOKEN_CHANNELS, make_tokenizer
from benchmarks.vlm_files import PREPROCESSOR, vlm_config
from pipelines.vision_encoder import IMAGE_PAD, PREPROCESSOR_FILE, VISION_END, VISION_START
from pipelines.z_image import TURBO_SHIFT, ZImageDOPSDPipeline


TEXT_WIDTH = 128
NUM_STEPS = 8  # sampling steps that the miniature is distilled for, as Z-Image-Turbo is
LATENT_CHANNELS = TOKEN_CHANNELS // 4
SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159  # of Z-Image's VAE
PATCH, MERGE = 4, 2  # of the tower: a visual token stands for 8 x 8 pixels, like a token of the transformer
NUM_VISUAL_TOKENS = (world.SIDE // (PATCH * MERGE)) ** 2


def make_vae(klein: AutoencoderKLFlux2) -> AutoencoderKL:
    """The VAE of the miniature FLUX.2-klein as `AutoencoderKL`.

    klein's pipeline normalises the latents by a mean and a variance per channel; here the 1 x 1 convolutions next to
    the latents do, so that the pipeline's one scale and shift fit all channels.
    """
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=True,
        use_post_quant_conv=True,
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
    )
    vae.load_state_dict({name: value for name, value in klein.state_dict().items() if not name.startswith("bn.")})
    # klein has statistics of each channel at each of the four places in a token.
    means, variances = (value.view(LATENT_CHANNELS, 4) for value in (klein.bn.running_mean, klein.bn.running_var))
    mean = means.mean(1)
    std = (variances.mean(1) + means.var(1, correction=0)).sqrt()
    with torch.no_grad():
        _normalise(vae.quant_conv, mean, std)
        weight, bias = vae.post_quant_conv.weight, vae.post_quant_conv.bias
        bias += weight[:, :, 0, 0] @ (mean - SHIFT_FACTOR * SCALING_FACTOR * std)
        weight *= (SCALING_FACTOR * std).view(1, -1, 1, 1)
    return vae.eval().requires_grad_(False)


def _normalise(quant_conv: torch.nn.Conv2d, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Gives the posterior's mean, after the pipeline's shift and scale, mean 0 and variance 1 in each channel.

    Args:
        quant_conv: makes the posterior's means, then its log-variances, of as many channels.
        mean, std: (C,), of the posterior's mean so far.
    """
    scale = std * SCALING_FACTOR
    means, log_variances = slice(LATENT_CHANNELS), slice(LATENT_CHANNELS, None)
    weight, bias = quant_conv.weight, quant_conv.bias
    weight[means] /= scale.view(-1, 1, 1, 1)
    bias[means] = (bias[means] - mean) / scale + SHIFT_FACTOR
    bias[log_variances] -= 2 * scale.log()


def make_text_encoder(vocab_size: int) -> Qwen3Model:
    """4 thin layers with random weights, never trained. The transformer sees the states before the last of them."""
    torch.manual_seed(0)
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            initializer_range=0.04,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )
    torch.nn.init.normal_(text_encoder.embed_tokens.weight)
    return text_encoder.eval().requires_grad_(False)


def make_transformer() -> ZImageTransformer2DModel:
    """1 + 1 refiners and 6 layers, 4 heads of 32 channels."""
    transformer = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=128,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=TEXT_WIDTH,
        rope_theta=64.0,
        axes_dims=[8, 12, 12],
        axes_lens=[1536, 512, 512],
    )
    # diffusers makes them zeros, where the gradient of the RMSNorm that follows is 1 / sqrt(eps).
    torch.nn.init.normal_(transformer.cap_pad_token)
    torch.nn.init.normal_(transformer.x_pad_token)
    return transformer


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler that Z-Image-Turbo ships with."""
    return FlowMatchEulerDiscreteScheduler(shift=TURBO_SHIFT, use_dynamic_shifting=False)


def make_pipeline(vae: AutoencoderKL, transformer: ZImageTransformer2DModel) -> ZImageDOPSDPipeline:
    """The pipeline with this VAE and transformer; its other components are not trained."""
    tokenizer = make_tokenizer()
    return ZImageDOPSDPipeline(
        scheduler=make_scheduler(),
        vae=vae,
        text_encoder=make_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def miniature_vlm_config(text_config: Qwen3Config) -> Qwen3VLConfig:
    """A Qwen3-VL that fits the text encoder, with a tower of 3 layers of width 64 and no DeepStack."""
    tower = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": text_config.hidden_size,
        "num_position_embeddings": (world.SIDE // PATCH) ** 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "deepstack_visual_indexes": [],
    }
    return vlm_config(text_config, tower)


def make_tower(config: Qwen3VLConfig, *, seed: int) -> Qwen3VLVisionModel:
    """With random weights that keep the size of the activations."""
    torch.manual_seed(seed)
    tower = Qwen3VLVisionModel(config.vision_config)
    for module in tower.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
    return tower


def write_vlm(
    folder: Path, text_encoder: Qwen3Model, tokenizer: Qwen2TokenizerFast, tower: Qwen3VLVisionModel
) -> None:
    """Writes a whole Qwen3-VL checkpoint, but for the pipeline's tokenizer: text encoder and tower in one file."""
    config = miniature_vlm_config(text_encoder.config)
    ids = tokenizer.convert_tokens_to_ids([IMAGE_PAD, VISION_START, VISION_END])
    config.image_token_id, config.vision_start_token_id, config.vision_end_token_id = ids
    vlm = Qwen3VLForConditionalGeneration(config)
    vlm.model.language_model.load_state_dict(text_encoder.state_dict())
    vlm.model.visual.load_state_dict(tower.state_dict())
    vlm.save_pretrained(folder)
    settings = PREPROCESSOR | {"patch_size": PATCH, "merge_size": MERGE}
    settings["size"] = settings["size"] | {"shortest_edge": world.SIDE**2}
    (folder / PREPROCESSOR_FILE).write_text(json.dumps(settings, indent=2) + "\n")
