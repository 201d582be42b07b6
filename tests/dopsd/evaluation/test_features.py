"""The models that measure comparisons: their texts, masks and batches, and what may be given in their place."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPSegForImageSegmentation

from dopsd.errors import InputError
from dopsd.evaluation.features import NEUTRAL, MaskModel, cutout, is_separable, open_feature_models


CPU = torch.device("cpu")


@pytest.fixture
def models(feature_models):
    return open_feature_models(*map(str, feature_models.values()))


def test_features_do_not_depend_on_the_batches(models, make_picture):
    images = [make_picture(number, 64 + 8 * number) for number in range(5)]
    one_by_one = models.dino.features(images, CPU)
    assert one_by_one.shape == (5, 32)
    torch.testing.assert_close(models.dino.features(iter(images), CPU, 2), one_by_one)


def test_texts_have_clips_own_features(models, feature_models):
    texts = ["a dog", "a much longer text about a dog"]
    features = models.clip.text_features(texts, CPU)
    clip = CLIPModel.from_pretrained(feature_models["clip"]).eval()
    for text, row in zip(texts, features, strict=True):
        tokens = models.clip.tokenizer(text, return_tensors="pt")  # without padding
        expected = clip.get_text_features(**tokens)
        expected = expected if torch.is_tensor(expected) else expected.pooler_output
        torch.testing.assert_close(row[None], expected.detach())
    assert models.clip.too_long([*texts, "x" * 200]) == ["x" * 200]


def test_certainties_are_the_mask_models(models, feature_models, make_picture):
    images = [make_picture(0), make_picture(1)]
    together = models.mask.certainties(images, "dog", CPU)
    alone = models.mask.certainties(images[1:], "dog", CPU)
    reference = CLIPSegForImageSegmentation.from_pretrained(feature_models["clipseg"]).eval()
    pixels = torch.cat([models.mask.pixels(image) for image in images])
    tokens = models.mask.tokenizer(["dog"] * 2, return_tensors="pt")
    expected = reference(pixel_values=pixels, **tokens).logits.sigmoid().detach()
    torch.testing.assert_close(torch.stack(together), expected)
    torch.testing.assert_close(alone[0], expected[1])


def test_a_cutout_is_the_subject_in_a_square_on_a_neutral_ground():
    image = Image.new("RGB", (80, 40), "red")
    certainty = torch.zeros(8, 8)
    certainty[2:6, 2:4] = 0.9
    assert is_separable(certainty)
    cut = cutout(image, certainty)
    assert cut.width == cut.height and 20 <= cut.width <= 26  # 20 x 20 pixels of the subject, and a margin
    assert cut.getpixel((cut.width // 2, cut.height // 2)) == (255, 0, 0)
    assert cut.getpixel((0, 0)) == NEUTRAL


@pytest.mark.parametrize("certainty", [torch.full((8, 8), 0.9), torch.eye(8) * 0.4, torch.eye(64)[:1] * 0.9])
def test_a_subject_that_fills_the_picture_is_unsure_or_tiny_is_not_separated(certainty):
    if certainty.shape[0] == 1:  # one pixel of 64 x 64
        certainty = torch.zeros(64, 64).index_put((torch.tensor(3), torch.tensor(3)), torch.tensor(0.9))
    assert not is_separable(certainty)


@pytest.mark.parametrize(
    "clip, dino, mask, problem",
    [
        ("dino", "dino", None, "--clip_model .*: reads no texts; pass for example openai/clip-vit-large-patch14"),
        (
            "clip",
            "nowhere",
            None,
            "--dino_model .*: there is no such folder; check the path, or pass for example face",
        ),
        ("clip", "dino", "clip", "--mask_model .*its model_type is clip, not clipseg.*pass for example CIDAS/clipseg"),
        ("clip", "dino", "dino", "--mask_model .*its model_type is dinov2, not clipseg"),
    ],
)
def test_models_of_another_kind_are_refused_without_loading_weights(clip, dino, mask, problem, feature_models):
    folders = feature_models | {"nowhere": Path("./nowhere/there")}
    names = [None if name is None else str(folders[name]) for name in (clip, dino, mask)]
    if dino == "nowhere":
        names[1] = "./nowhere/there"
    with pytest.raises(InputError, match=problem):
        open_feature_models(*names)


def test_a_mask_model_whose_processor_crops_is_refused(feature_models, tmp_path):
    import shutil

    folder = shutil.copytree(feature_models["clipseg"], tmp_path / "clipseg")
    path = folder / "preprocessor_config.json"
    clip_like = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | clip_like))
    with pytest.raises(InputError, match="its processor crops the pictures"):
        MaskModel(str(folder), None, flag="--mask_model", example="a/b")
