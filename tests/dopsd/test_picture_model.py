"""--exam_model: tiny random models of the real classes, and everything else that may be given in their place."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dopsd import picture_model
from dopsd.errors import InputError
from dopsd.picture_model import PictureModel, image_features
from tiny_features import CROP, VISION, WIDTHS
from tiny_features import save as save_parts


CPU = torch.device("cpu")
TEXT = WIDTHS | {"vocab_size": 99}


def dino() -> tuple:
    return Dinov2Model(Dinov2Config(**VISION)), BitImageProcessorPil(**CROP)


def siglip() -> tuple:
    return SiglipVisionModel(SiglipVisionConfig(**VISION)), SiglipImageProcessorPil(size={"height": 32, "width": 32})


def clip() -> tuple:
    config = CLIPConfig(text_config={**TEXT}, vision_config={**VISION}, projection_dim=16)
    return CLIPModel(config), CLIPImageProcessorPil(**CROP)


def save(folder: Path, make=dino) -> str:
    torch.manual_seed(0)
    return str(save_parts(folder, *make()))


@pytest.mark.parametrize("make, width", [(dino, 32), (siglip, 32), (clip, 16)])
def test_features_are_the_models_pooled_ones(make, width, make_picture, tmp_path):
    model = PictureModel(save(tmp_path / "model", make), None)
    images = [make_picture(0), make_picture(1, 90, 64).convert("L")]
    features = model.features(images, CPU)
    assert features.shape == (2, width) and features.dtype == torch.float32
    torch.manual_seed(0)
    reference, processor = make()
    pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(features, image_features(reference.eval(), pixels))
    assert not torch.allclose(features[0], features[1], atol=1e-3)


def test_a_classifiers_head_is_not_needed_but_every_weight_of_the_model_is(tmp_path):
    from safetensors.torch import load_file, save_file

    name = save(tmp_path / "model")
    weights = load_file(f"{name}/model.safetensors")
    save_file(weights | {"classifier.weight": torch.zeros(2, 2)}, f"{name}/model.safetensors", {"format": "pt"})
    assert PictureModel(name, None).features([Image.new("RGB", (32, 32))], CPU).shape == (1, 32)
    del weights["layernorm.weight"]
    save_file(weights, f"{name}/model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="--exam_model .*its weights cannot be loaded .*layernorm.weight"):
        PictureModel(name, None).features([Image.new("RGB", (32, 32))], CPU)


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    name = save(tmp_path / "model")
    weights = load_file(f"{name}/model.safetensors")
    weights["layernorm.weight"][0] = torch.nan
    save_file(weights, f"{name}/model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="--exam_model .* its features are not finite"):
        PictureModel(name, None).features([Image.new("RGB", (32, 32))], CPU)


def change(name: str, file: str, **values) -> None:
    path = Path(name, file)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda name: shutil.rmtree(name), "there is no such folder; check the path"),
        (lambda name: Path(name, "config.json").write_text("{"), "cannot be read"),
        (lambda name: change(name, "config.json", num_hidden_layers=10**9), "cannot be read"),
        (lambda name: Path(name, "model.safetensors").unlink(), "no weights in .safetensors files"),
        (lambda name: Path(name, "model.safetensors").write_bytes(b"x" * 99), "model.safetensors is damaged"),
        (lambda name: Path(name, "preprocessor_config.json").unlink(), "is not a model of pictures"),
        (lambda name: change(name, "config.json", model_type="bert"), "is not a model of pictures"),
        (lambda name: change(name, "config.json", model_type="nonsense"), "cannot be read"),
        (lambda name: change(name, "config.json", patch_size=0), "is not a model of pictures"),
        (lambda name: change(name, "preprocessor_config.json", size="large"), "is not a model of pictures"),
    ],
)
def test_what_cannot_be_used_is_refused_without_loading_weights(damage, problem, tmp_path):
    name = save(tmp_path / "model")
    damage(name)
    with pytest.raises(InputError) as error:
        PictureModel(name, None)
    message = str(error.value)
    assert message.startswith(f"--exam_model {name}: ") and problem in message and "\n" not in message
    assert message.endswith("pass for example facebook/dinov2-small")


def test_every_file_of_sharded_weights_is_downloaded(monkeypatch):
    downloaded = []

    def hf_hub_download(name, file, cache_dir):
        if file == "model.safetensors":
            raise EntryNotFoundError("none")
        return f"{name}/{file}"

    def get_checkpoint_shard_files(name, path, cache_dir):
        downloaded.append((name, path, cache_dir))

    monkeypatch.setattr(picture_model, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(picture_model, "get_checkpoint_shard_files", get_checkpoint_shard_files)
    picture_model.check_weights("a/b", "cache")
    assert downloaded == [("a/b", "a/b/model.safetensors.index.json", "cache")]


@pytest.mark.parametrize("name", ["/nowhere/x", "./x", "../x", "a/b/c", "~/dino"])
def test_a_path_that_does_not_exist_is_no_hub_id(name):
    with pytest.raises(InputError, match=f"--exam_model {name}: there is no such folder; check the path, or pass "):
        PictureModel(name, None)


def test_a_name_that_is_not_on_the_hub(tmp_path):
    with pytest.raises(InputError, match="--exam_model nobody/nothing: cannot be read .*check the name and the con"):
        PictureModel("nobody/nothing", str(tmp_path))
