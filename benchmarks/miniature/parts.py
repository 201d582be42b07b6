"""The untrained parts of the miniature FLUX.2-klein, all of the real classes."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

import world
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline


# The tokens that Qwen3's chat text and Qwen3-VL's picture placeholders are made of.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
)

# One user turn of Qwen3's template: the only form that the pipeline uses.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{ '<think>\n\n</think>\n\n' }}"
    "{%- endif -%}"
    "{%- endif -%}"
)

# The miniature is trained with this many text tokens, padding included: the transformer sees the padding.
MAX_SEQUENCE_LENGTH = 26
TEXT_WIDTH = 64
TOKEN_CHANNELS = 64  # of a token's 8x8 pixels
NUM_STEPS = 4


def make_tokenizer() -> Qwen2TokenizerFast:
    """Byte-level BPE trained on the world's captions, so that a word is a token and nonsense two or three."""
    random = np.random.default_rng(0)
    texts = [
        world.caption(appearance.words, background) + world.REFERENCE_SUFFIX
        for appearance in world.all_appearances()
        for background in world.BACKGROUNDS
    ]
    texts += [world.caption(world.nonsense_word(random), "sand") for _ in range(4000)]
    texts += ["user\nassistant\n\n"] * 100
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return qwen_tokenizer(tokenizer)


def qwen_tokenizer(tokenizer: Tokenizer) -> Qwen2TokenizerFast:
    """With Qwen's special tokens and chat template."""
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        chat_template=CHAT_TEMPLATE,
    )


def make_text_encoder(vocab_size: int) -> Qwen3ForCausalLM:
    """28 thin layers, random and never trained: their mixing of word embeddings is all the transformer needs."""
    torch.manual_seed(0)
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=96,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            initializer_range=0.04,
            tie_word_embeddings=True,
        )
    )
    torch.nn.init.normal_(text_encoder.model.embed_tokens.weight)
    return text_encoder.eval().requires_grad_(False)


def make_vae() -> AutoencoderKLFlux2:
    """4 pixels a latent side, 16 channels; the pipeline's 2x2 patches make 64 channels for 8x8 pixels."""
    return AutoencoderKLFlux2(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=TOKEN_CHANNELS // 4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def make_transformer() -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=TOKEN_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=64,
        axes_dims_rope=(4, 10, 10, 8),
        rope_theta=100,
        guidance_embeds=False,
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """As FLUX.2-klein ships it."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
    )


def make_pipeline(vae: AutoencoderKLFlux2, transformer: Flux2Transformer2DModel) -> Flux2KleinDOPSDPipeline:
    """The whole pipeline around trained parts."""
    tokenizer = make_tokenizer()
    return Flux2KleinDOPSDPipeline(
        scheduler=make_scheduler(),
        vae=vae,
        text_encoder=make_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=True,
    )


def autocast() -> torch.autocast:
    """bfloat16 where the CPU multiplies it in hardware. Elsewhere torch emulates it, 20 times slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16)


def check_settings(path: Path, settings: dict, *, origin: str) -> None:
    """Writes what a folder's contents depend on, or compares it with what stands there.

    Args:
        path: a JSON file in the folder.
        origin: the flag and its folder, for the error.

    Raises:
        ValueError: the contents were made with something else.
    """
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n")
    before = json.loads(path.read_text())
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{origin}: what lies there was made with another {name} ({before.get(name)}, now {value}); "
                "choose a new folder"
            )


def load_or_none(path: Path) -> dict | None:
    """A state that `save_state` left, or None."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def save_state(state: dict, path: Path) -> None:
    """Written beside and renamed: a stop in between leaves the last state whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
