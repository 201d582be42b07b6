"""Questions to a tiny Qwen3-VL: its answers are the model's own, and other checkpoints are refused in one line."""

import json
import shutil

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from benchmarks.miniature.parts import byte_tokenizer
from dopsd.errors import InputError
from pipelines.vlm_chat import VLMChat
from tiny_vlm import make_tiny_vlm


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = make_tiny_vlm(tmp_path_factory.mktemp("chat") / "vlm")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "damaged")


def test_answers_are_the_likeliest_tokens_given_text_and_pictures(checkpoint, make_picture, monkeypatch):
    chat = VLMChat(str(checkpoint))
    seen = []
    generate = Qwen3VLForConditionalGeneration.generate

    def watching(model, **inputs):
        tokens = generate(model, **inputs)
        seen.append((inputs, tokens, model(**{k: v for k, v in inputs.items() if k != "generation_config"}).logits))
        return tokens

    monkeypatch.setattr(Qwen3VLForConditionalGeneration, "generate", watching)
    with chat.loaded(CPU) as ask:
        answers = [ask("a dog?", pictures, 4) for pictures in ([make_picture(0), make_picture(1, 300, 260)], [], [])]
    (inputs, tokens, logits), (plain, *_), _ = seen
    assert answers[1] == answers[2]
    length = inputs["input_ids"].shape[1]
    assert 1 <= tokens.shape[1] - length <= 4
    assert tokens[0, length] == logits[0, -1].argmax()  # greedy
    text = chat._tokenizer.decode(inputs["input_ids"][0])
    grids = inputs["image_grid_thw"]
    assert text.count("<|image_pad|>") == int(grids.prod(1).sum()) // 4 and len(grids) == 2
    assert text.index("<|image_pad|>") < text.index("a dog?") and text.count("<|vision_start|>") == 2
    assert "pixel_values" not in plain and "<|image_pad|>" not in chat._tokenizer.decode(plain["input_ids"][0])


def test_pictures_change_what_the_model_computes(checkpoint, make_picture, monkeypatch):
    found = []

    def generate(model, generation_config, **inputs):
        found.append(model(**inputs).logits[0, -1])
        return torch.cat([inputs["input_ids"], found[-1].argmax()[None, None]], 1)

    monkeypatch.setattr(Qwen3VLForConditionalGeneration, "generate", generate)
    with VLMChat(str(checkpoint)).loaded(CPU) as ask:
        for number in (0, 5, 0):
            ask("a dog?", [make_picture(number, 256, 256)], 1)
    assert not torch.allclose(found[0], found[1], atol=1e-4)
    torch.testing.assert_close(found[0], found[2])


def test_a_template_that_only_the_processor_has(checkpoint, damaged):
    tokenizer = byte_tokenizer()
    template, tokenizer.chat_template = tokenizer.chat_template, None
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (damaged / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(damaged)
    with pytest.raises(InputError, match="chat template"):
        VLMChat(str(damaged))
    (damaged / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert VLMChat(str(damaged))._tokenizer.chat_template == template


def change(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda folder: shutil.rmtree(folder), "there is no such folder"),
        (lambda folder: change(folder, "config.json", model_type="llava"), "its model_type is llava, not qwen3_vl"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: change(folder, "config.json", vision_config="large"), "cannot be used"),
        (lambda folder: change(folder, "preprocessor_config.json", patch_size="x"), "cannot be used"),
        (lambda folder: [path.unlink() for path in folder.glob("*.safetensors")], "has no weights in .safetensors"),
    ],
)
def test_what_cannot_be_used_is_refused_without_loading_weights(damage, problem, damaged):
    damage(damaged)
    with pytest.raises(InputError) as error:
        VLMChat(str(damaged))
    assert str(error.value).startswith(f"{damaged}: ") and problem in str(error.value)


def test_weights_that_are_incomplete_are_refused(damaged):
    index = damaged / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    dropped = next(name for name in content["weight_map"] if "layers.3.mlp" in name)
    del content["weight_map"][dropped]
    index.write_text(json.dumps(content))
    shard = next(path for path in damaged.glob("*.safetensors") if dropped in keys(path))
    from safetensors.torch import load_file, save_file

    save_file({name: t for name, t in load_file(shard).items() if name != dropped}, shard, {"format": "pt"})
    with pytest.raises(InputError, match="its weights cannot be loaded .*lacks 1 of the tensors"):
        with VLMChat(str(damaged)).loaded(CPU):
            pass


def keys(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return set(file.keys())
