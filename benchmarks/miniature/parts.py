"""The components of the miniature FLUX.2-klein before training, all of the real classes."""

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.miniature import world
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline


# The special tokens of Qwen3's chat template and of Qwen3-VL's image placeholders.
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

# Qwen3's template for a single user turn, the only form that the pipeline uses.
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

# Prompts are padded to this many tokens, as in training: the transformer sees the padding.
MAX_SEQUENCE_LENGTH = 26
TEXT_WIDTH = 64
TOKEN_CHANNELS = 64  # latent channels of a token, which stands for 8x8 pixels
NUM_STEPS = 4  # sampling steps that the miniature is distilled for


def make_tokenizer() -> Qwen2TokenizerFast:
    """Byte-level BPE trained on the world's captions: a word is one token, a nonsense word two or three."""
    rng = np.random.default_rng(0)
    texts = [
        world.caption(appearance.words, background) + world.REFERENCE_SUFFIX
        for appearance in world.all_appearances()
        for background in world.BACKGROUNDS
    ]
    texts += [world.caption(world.nonsense_word(rng), "sand") for _ in range(4000)]
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


def byte_tokenizer() -> Qwen2TokenizerFast:
    """Byte-level tokenizer: one token per byte, plus Qwen's special tokens and chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return qwen_tokenizer(tokenizer)


def qwen_tokenizer(tokenizer: Tokenizer) -> Qwen2TokenizerFast:
    """Adds Qwen's special tokens and chat template to a tokenizer."""
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        chat_template=CHAT_TEMPLATE,
    )


def make_text_encoder(vocab_size: int) -> Qwen3ForCausalLM:
    """28 thin layers with random weights, never trained: mixing the word embeddings is all that is needed."""
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
    """16 latent channels per 4x4 pixels; the pipeline's 2x2 patches turn them into 64 channels per 8x8 pixels."""
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
    """2 double-stream and 4 single-stream blocks, 4 heads of 32 channels."""
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
    """The scheduler that FLUX.2-klein ships with."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
    )


def make_pipeline(vae: AutoencoderKLFlux2, transformer: Flux2Transformer2DModel) -> Flux2KleinDOPSDPipeline:
    """The pipeline with this VAE and transformer; its other components are not trained."""
    tokenizer = make_tokenizer()
    return Flux2KleinDOPSDPipeline(
        scheduler=make_scheduler(),
        vae=vae,
        text_encoder=make_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=True,
    )
