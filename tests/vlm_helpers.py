"""What the tests of the vision encoder share: tiny text encoders, features, and changes to checkpoints."""

import json
import shutil

import safetensors.torch
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.miniature.parts import byte_tokenizer
from pipelines.vision_encoder import VisionEncoder


PROMPT = "a striped ball on grass"
# Width and height are multiples of a token's 32 pixels, so the image processor does not resize.
WIDE, TALL = (96, 64), (64, 160)
LIMITS = {"min_pixels": 64 * 64, "max_pixels": 128 * 128}

COMMIT = "0123456789abcdef" * 2 + "01234567"
FILES_WITHOUT_WEIGHTS = ("config.json", "preprocessor_config.json", "model.safetensors.index.json")


def make_text_config(**values):
    return Qwen3Config(
        **{
            "vocab_size": len(byte_tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            **values,
        }
    )


def make_text_encoder(kind=Qwen3ForCausalLM, **values):
    torch.manual_seed(0)
    return kind(make_text_config(**values)).eval()


def make_encoder(path, text_config=None, tokenizer=None, **options):
    return VisionEncoder(
        path, tokenizer or byte_tokenizer(), text_config or make_text_config(), **{**LIMITS, **options}
    )


def chat_text(*num_image_tokens):
    images = "".join("<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in num_image_tokens)
    return f"<|im_start|>user\n{images}{PROMPT}<|im_end|>\n<|im_start|>assistant\n"


def features(encoder, *images, **options):
    counts = (encoder.num_image_tokens(image.height, image.width) for image in images)
    return encoder.hidden_states(chat_text(*counts), *images, **options)


def text_features(text_encoder, pad_to=None):
    """The text encoder's own hidden states, computed like the pipelines do."""
    tokens = byte_tokenizer()(
        chat_text(), return_tensors="pt", padding="max_length" if pad_to else False, max_length=pad_to
    )
    with torch.no_grad():
        return text_encoder(**tokens, output_hidden_states=True, use_cache=False).hidden_states


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def shards(path):
    """Names of the weight files with visual.* tensors, and of the others."""
    shard_of = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    visual = {shard for key, shard in shard_of.items() if ".visual." in key}
    return sorted(visual), sorted(set(shard_of.values()) - visual)


def merge_shards(path):
    """Returns all tensors of a checkpoint, and removes its weight files."""
    visual, others = shards(path)
    tensors = {}
    for name in visual + others:
        tensors |= safetensors.torch.load_file(path / name)
        (path / name).unlink()
    (path / "model.safetensors.index.json").unlink()
    return tensors


def save_single(path, tensors):
    """Saves a checkpoint's weights as one file without an index."""
    safetensors.torch.save_file(tensors, path / "model.safetensors")


def fill_hub_cache(cache, path, names):
    """Makes a hub cache entry for org/tiny-vlm with only these files of the checkpoint; returns its snapshot."""
    entry = cache / "models--org--tiny-vlm"
    snapshot = entry / "snapshots" / COMMIT
    for folder in (entry / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (entry / "refs/main").write_text(COMMIT)
    for name in names:
        shutil.copy(path / name, snapshot / name)
    return snapshot


def change_json(path, section=None, **values):
    """Sets values at the top level or in a section of a JSON file."""
    content = json.loads(path.read_text())
    (content[section] if section else content).update(values)
    path.write_text(json.dumps(content))
