"""The vision tower of the miniature's Qwen3-VL is trained on what the transformer will see of it."""

from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.miniature import tower as tower_module
from benchmarks.miniature import world
from benchmarks.miniature.make_zimage import image_prefix
from benchmarks.miniature.tower import COLUMN, ROW, TowerTraining, place_targets, train_tower
from benchmarks.miniature.zimage import ZIMAGE
from benchmarks.miniature.zimage_parts import NUM_VISUAL_TOKENS


@pytest.fixture
def training(zimage):
    """Of the tower that `zimage` has."""
    encode = partial(ZIMAGE.encode, zimage.vae)
    return TowerTraining(zimage.text_encoder, image_prefix(zimage), encode, seed=0)


@pytest.fixture(scope="module")
def sprites():
    rng = np.random.default_rng(0)
    return np.stack([world.random_sprite(rng) for _ in range(4)])


@torch.no_grad()
def test_it_trains_on_the_states_that_the_pipeline_has_whatever_the_prompt(zimage, training, sprites):
    rng = np.random.default_rng(0)
    drawn = [world.draw(sprites[index], world.random_pose(rng), "sky", rng) for index in range(2)]
    images = [world.to_image(picture) for picture in drawn]
    pictures = world.to_tensor([np.asarray(image) / 127.5 - 1 for image in images])  # with the image's 256 levels
    states = training.visual_states(pictures)
    assert states.shape == (2, NUM_VISUAL_TOKENS, 128)
    prompts = ["a zofu on mint like the picture", "a striped red and blue diamond on sand"]
    start = len(image_prefix(zimage))
    for references in (images, images[::-1]):
        context = ZIMAGE.reference_context(zimage, prompts, references)
        of_images = torch.stack([embeds[start : start + NUM_VISUAL_TOKENS] for embeds in context.prompt_embeds])
        torch.testing.assert_close(of_images, states if references is images else states.flip(0), atol=1e-4, rtol=1e-4)
    assert (states[0] - states[1]).abs().max() > 0.1


def test_place_targets():
    targets, is_inside = place_targets(torch.tensor([[2, 0], [3, 3]]))
    assert targets.shape == (2, 64, 11) and is_inside.shape == (2, 64)
    targets, is_inside = targets.view(2, 8, 8, 11), is_inside.view(2, 8, 8)
    assert is_inside[0].nonzero().tolist() == [[row, column] for row in range(2, 7) for column in range(5)]
    assert is_inside[1].nonzero().tolist() == [[row, column] for row in range(3, 8) for column in range(3, 8)]
    assert targets[0, 3, 4].tolist() == [0, 1, 0, 0, 0] + [0, 0, 0, 0, 1] + [1]
    assert targets[1, 7, 3, ROW].tolist() == [0, 0, 0, 0, 1] and targets[1, 7, 3, COLUMN].tolist() == [1, 0, 0, 0, 0]
    assert not targets[~is_inside].any()
    assert (targets[is_inside].sum(-1) == 3).all()


def test_the_head_is_asked_for_the_object_on_the_canonical_background(training, sprites, monkeypatch):
    """With a head that knows the answers, the errors are 0."""
    monkeypatch.setattr(world, "random_pose", lambda rng: (1, 3))
    clean = world.to_tensor([world.draw(sprites[0], (1, 3), tower_module.CANONICAL_BACKGROUND)])
    place, is_inside = place_targets(torch.tensor([[1, 3]]))
    answers = torch.cat([training.encode(clean).flatten(1, 2), place], -1)
    training.head.forward = lambda states: answers.expand(len(states), -1, -1)
    losses = training.losses(sprites[:1], np.random.default_rng(0), 2)
    figures = {name: value.item() for name, value in losses.items()}
    assert figures == pytest.approx({"content": 0, "place": 0, "right": 1}, abs=1e-9)

    wrong = answers.clone()
    wrong[..., :64] += torch.where(is_inside, 1.0, 3.0)[..., None]
    wrong[:, is_inside[0].nonzero()[0], -11:-1] = 0  # the first of 25 tokens has row 0 and column 0, which ties win
    wrong[:, is_inside[0].nonzero()[1], -6:-1] = torch.tensor([1.0, 0, 0, 0, 0])  # the second has column 1
    training.head.forward = lambda states: wrong.expand(len(states), -1, -1)
    losses = training.losses(sprites[:1], np.random.default_rng(0), 2)
    assert losses["content"].item() == pytest.approx((25 * 1 + 39 * 0.1 * 9) / (25 + 39 * 0.1))
    assert losses["place"].item() == pytest.approx((2 + 2) / (64 * 11))
    assert losses["right"].item() == pytest.approx(24 / 25)


def test_a_stopped_training_continues_bit_for_bit(zimage, sprites, tmp_path, monkeypatch):
    monkeypatch.setattr(tower_module, "BATCH_SIZE", 2)
    monkeypatch.setattr(tower_module, "STEPS_PER_SAVE", 1)
    encode = partial(ZIMAGE.encode, zimage.vae)

    def train(name: str, log) -> dict[str, torch.Tensor]:
        training = TowerTraining(zimage.text_encoder, image_prefix(zimage), encode, seed=0)
        tower = train_tower(training, sprites, sprites[:1], tmp_path / name, num_steps=3, seed=0, log=log)
        assert not any(parameter.requires_grad for parameter in tower.parameters()) and not tower.training
        return tower.state_dict()

    def stop(figures: dict) -> None:
        if figures["tower_step"] == 2:
            raise KeyboardInterrupt

    whole_lines, lines = [], []
    whole = train("whole.pt", whole_lines.append)
    with pytest.raises(KeyboardInterrupt):
        train("parts.pt", stop)
    parts = train("parts.pt", lines.append)
    assert [(line["tower_step"], line["objects"]) for line in lines] == [
        (step, objects) for step in (2, 3) for objects in ("seen", "unseen")
    ]
    assert lines == whole_lines[2:]
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())
    state = torch.load(tmp_path / "parts.pt", weights_only=True)
    assert {name.split(".")[0] for name in state["training"]} == {"tower", "head"}  # not the text encoder


def test_every_weight_of_the_tower_is_trained_and_the_text_encoder_is_not(zimage, training, sprites):
    losses = training.losses(sprites, np.random.default_rng(0), 2)
    (losses["content"] + losses["place"]).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in training.parameters())
    assert not any(parameter.requires_grad for parameter in zimage.text_encoder.parameters())
    (language_model,) = training.language_model
    assert language_model.embed_tokens.weight.data_ptr() == zimage.text_encoder.embed_tokens.weight.data_ptr()
