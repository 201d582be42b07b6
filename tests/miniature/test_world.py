import numpy as np
import pytest
from PIL import Image, ImageFilter

from benchmarks.miniature import world


def test_known_and_held_out_objects_are_all_there_are():
    known, held_out = world.known_appearances(), world.held_out_appearances()
    assert {*known, *held_out} == {*world.all_appearances()} and not {*known} & {*held_out}
    assert not any(a.shape == world.HELD_OUT_SHAPE or a.texture == world.HELD_OUT_TEXTURE for a in known)
    others = [a for a in held_out if a.shape != world.HELD_OUT_SHAPE and a.texture != world.HELD_OUT_TEXTURE]
    assert len(others) / (len(others) + len(known)) == pytest.approx(1 / world.HELD_OUT_EVERY, abs=0.03)


def test_an_outline_is_what_pils_minimum_filter_leaves_out():
    rng = np.random.default_rng(0)
    mask = Image.fromarray(np.uint8(rng.random((160, 160)) < 0.995) * 255)
    expected = np.asarray(mask.filter(ImageFilter.MinFilter(17))) > 0
    assert 0 < expected.mean() < 1
    assert np.array_equal(world._erode(np.asarray(mask) > 0, 8), expected)


def test_a_picture_has_its_object_at_the_pose_and_its_background_elsewhere():
    appearance = world.Appearance("square", "plain", ("red",))
    picture = world.draw(world.sprite(appearance), (1, 2), "sky")
    assert picture.shape == (64, 64, 3)
    assert np.allclose(picture[8 + 20, 16 + 20], world.unit(world.COLOURS["red"]))
    outside = np.ones((64, 64), bool)
    outside[8:48, 16:56] = False
    assert np.array_equal(np.unique(picture[outside], axis=0), [world.unit(world.BACKGROUNDS["sky"])])


def test_the_outline_is_two_pixels_wide():
    column = world.sprite(world.Appearance("square", "plain", ("red",)))[:20, 20]  # from the top to the centre
    red, outline = world.unit(world.COLOURS["red"])[0], world.unit(world.OUTLINE_COLOUR)[0]
    shares = (column[:, 0] - red) / (outline - red) * column[:, 3]
    assert shares.sum() == pytest.approx(world.OUTLINE, abs=0.01)


def test_grain_is_one_brightness_offset_per_cell():
    sprite = world.sprite(world.all_appearances()[0])
    rng = np.random.default_rng(0)
    grain = world.draw(sprite, (0, 0), "mint", rng) - world.draw(sprite, (0, 0), "mint")
    cells = grain.reshape(32, 2, 32, 2, 3)
    assert np.allclose(cells, cells[:, :1, :, :1, :1], atol=1e-6)
    assert cells.std() == pytest.approx(world.GRAIN_STD, rel=0.1)


def test_an_image_becomes_the_pixels_that_it_was_made_of():
    pixels = np.array([[[-1.0, 0.0, 1.0], [-2.0, 0.5, 2.0]]])
    assert np.asarray(world.to_image(pixels)).tolist() == [[[0, 128, 255], [0, 191, 255]]]
    tensor = world.to_tensor([pixels, pixels + 1])
    assert tensor.shape == (2, 3, 1, 2) and tensor[1, 2, 0, 0] == 2
