"""Crops of the pictures to edit: like the result if they have its shape, else the whole picture."""

import numpy as np
import pytest
from PIL import Image

from data_helpers import LIMITS, RED, assert_names, error_of
from dopsd.data import buckets
from dopsd.data.buckets import Framing, are_aligned, crop_image
from dopsd.data.pictures import Picture, PictureFile
from dopsd.settings import DataSettings


def plan_examples(size, *cond_sizes, **flags):
    files = tuple(PictureFile(f"source-{number}.png", None) for number in range(len(cond_sizes)))
    pictures = [Picture("0.png", ("edit",), None, cond_images=files)]
    return buckets.plan_examples(pictures, [size], DataSettings(**flags), LIMITS, 0, [cond_sizes])


def whole(size):
    return Framing(size, (0.5, 0.5))


@pytest.mark.parametrize(
    ("size", "cond_size"),
    [((120, 80), (120, 80)), ((120, 80), (1200, 800)), ((1200, 800), (150, 100)), ((1000, 667), (300, 200))],
)
@pytest.mark.parametrize("flags", [{}, {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "96,64;64,64"}])
def test_a_source_of_the_results_shape_is_cropped_like_the_result_at_any_scale(size, cond_size, flags):
    examples = plan_examples(size, cond_size, resolution=64, repeats=4, **flags)
    assert all(example.cond_framings == (example.framing,) for example in examples)
    places = {example.centering for example in examples}
    assert len(places) == (1 if flags and size[0] * 64 == size[1] * 96 else 4)


@pytest.mark.parametrize(("cond_size", "is_aligned"), [((200, 100), True), ((216, 100), True), ((217, 100), False)])
def test_shapes_up_to_a_step_between_buckets_apart_are_the_same(cond_size, is_aligned):
    assert are_aligned(cond_size, (200, 100), (200, 100), LIMITS) == is_aligned
    assert are_aligned(cond_size, (200, 100), (100, 50), LIMITS)


def test_a_source_of_another_shape_is_seen_whole():
    (example,) = plan_examples((128, 128), (100, 300), (256, 256), (70, 90), resolution=64)
    assert example.cond_framings == (whole((100, 300)), example.framing, whole((70, 90)))


def test_aligned_crops_show_the_same_place():
    """A marked corner stays at one place in both, also when mirrored, though the source is twice as large."""
    result, source = Image.new("RGB", (96, 64)), Image.new("RGB", (192, 128))
    result.paste(RED, (24, 16, 32, 24))
    source.paste(RED, (48, 32, 64, 48))
    for example in plan_examples((64, 96), (128, 192), resolution=64, repeats=3):
        for flip in (False, True):
            crops = [
                np.asarray(crop_image(image, framing, flip))[..., 0] > 200
                for image, framing in ((result, example.framing), (source, *example.cond_framings))
            ]
            centers = [np.argwhere(crop).mean(axis=0) for crop in crops]
            assert abs(centers[0] - centers[1]).max() < 1
    assert len({example.centering for example in plan_examples((64, 96), (128, 192), resolution=64, repeats=3)}) == 3


@pytest.mark.parametrize(
    ("cond_size", "part"),
    [
        ((63, 64), "source-1.png: 63x64 pixels are too small to edit; use at least 64 pixels per side, or remove"),
        ((64, 513), "source-1.png: 64x513 pixels are too long and narrow; use an aspect ratio of at most 8:1, or rem"),
    ],
)
def test_a_source_that_the_model_does_not_take_is_one_line(cond_size, part):
    assert_names(error_of(plan_examples, (64, 64), (64, 512), cond_size, resolution=64), part)
