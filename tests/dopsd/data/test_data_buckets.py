import itertools

import numpy as np
import pytest
from PIL import Image

from data_helpers import BLUE, LIMITS, assert_names, error_of, some_pictures
from dopsd.data import buckets
from dopsd.data.buckets import Example, Framing, crop_image
from dopsd.settings import DataSettings
from dopsd.sizes import SizeLimits, size_problem
from dopsd.sizes import check_geometry as geometry


def check_geometry(**flags):
    geometry(DataSettings(**flags), LIMITS)


def plan_examples(pictures, sizes, *, seed=0, **flags):
    return buckets.plan_examples(pictures, sizes, DataSettings(**flags), LIMITS, seed)


@pytest.mark.parametrize("resolution", [64, 512, 1024, 1040])
def test_valid_resolutions(resolution):
    check_geometry(resolution=resolution)


@pytest.mark.parametrize(
    ("resolution", "part"),
    [
        (0, "64"),
        (-64, "64"),
        (48, "64"),
        (100, "multiples of 16"),
        (1023, "multiples of 16"),
        (1056, "4356 image tokens"),
    ],
)
def test_invalid_resolutions(resolution, part):
    assert_names(error_of(check_geometry, resolution=resolution), f"--resolution {resolution}: ", part)


def test_valid_buckets():
    exactly_4300_tokens = "1376,800;800,1376"
    check_geometry(use_aspect_ratio_buckets=True, aspect_ratio_buckets=f"64,64; 64,512 ;{exactly_4300_tokens}")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["''", "height,width"]),
        ("1024", ["'1024'", "height,width"]),
        ("1024x1024", ["height,width"]),
        ("512,512;", ["height,width"]),
        ("512,-512", ["height,width"]),
        ("0,512", ["height,width"]),
        ("512,512;520,512", ["520,512", "multiples of 16"]),
        ("512,512;512,520", ["512,520", "multiples of 16"]),
        ("48,512", ["48,512", "64"]),
        ("512,48", ["512,48", "64"]),
        ("64,528", ["64,528", "8:1"]),
        ("528,64", ["528,64", "8:1"]),
        ("1104,1008", ["1104,1008", "4347 image tokens"]),
    ],
)
def test_invalid_buckets(text, parts):
    message = error_of(check_geometry, use_aspect_ratio_buckets=True, aspect_ratio_buckets=text)
    assert_names(message, "--aspect_ratio_buckets", *parts)


def test_a_list_of_buckets_needs_the_flag_that_enables_buckets():
    message = error_of(check_geometry, aspect_ratio_buckets="512,512")
    assert_names(message, "--aspect_ratio_buckets", "--use_aspect_ratio_buckets")


@pytest.mark.parametrize(
    ("size", "flags", "bucket"),
    [
        ((3000, 2000), {}, (1024, 1024)),
        ((100, 100), {"resolution": 512}, (512, 512)),
        ((2000, 2000), {"use_aspect_ratio_buckets": True}, (1024, 1024)),
        ((3000, 2000), {"use_aspect_ratio_buckets": True}, (1248, 832)),
        ((2000, 3000), {"use_aspect_ratio_buckets": True}, (832, 1248)),
        ((1000, 9000), {"use_aspect_ratio_buckets": True}, (720, 1456)),
        ((300, 200), {"use_aspect_ratio_buckets": True}, (304, 208)),  # not enlarged: 245 pixels squared
        ((3000, 2000), {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "512,512;768,512"}, (768, 512)),
        ((2000, 3000), {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "512,512;768,512"}, (512, 512)),
    ],
)
def test_bucket_for(size, flags, bucket):
    assert buckets.bucket_for(*size, DataSettings(**flags), LIMITS) == bucket


def test_limits_of_another_model():
    limits = SizeLimits(pixels_per_token=32, min_side=256, max_tokens=100)
    assert size_problem(320, 320, limits) is None
    assert "at least 256 pixels" in size_problem(240, 320, limits)
    assert "multiples of 32 pixels" in size_problem(320, 304, limits)
    assert "multiples of 32 pixels" in size_problem(304, 320, limits)
    assert "110 image tokens, the limit is 100); use at most 320x320 pixels" in size_problem(320, 352, limits)
    settings = DataSettings(use_aspect_ratio_buckets=True, resolution=320)
    assert buckets.bucket_for(3000, 1600, settings, limits) == (448, 224)
    assert buckets.bucket_for(3000, 1600, settings, LIMITS) == (432, 240)


def test_buckets_of_the_largest_resolution_stay_within_the_limits():
    sizes = [(height, width) for height in range(200, 4000, 190) for width in range(200, 4000, 190)]
    pictures = some_pictures(len(sizes))
    for example in plan_examples(pictures, sizes, resolution=1040, use_aspect_ratio_buckets=True):
        assert size_problem(*example.bucket, LIMITS) is None


def test_a_picture_too_small_for_the_buckets_is_an_error():
    sizes = [(600, 400), (60, 40)]
    message = error_of(plan_examples, some_pictures(2), sizes, use_aspect_ratio_buckets=True)
    assert_names(message, "1.png", "60x40", "--resolution 1024", "64 pixels")


def test_a_crop_is_drawn_for_each_picture_and_repeat():
    pictures = some_pictures(3)
    sizes = [(600, 400)] * 3
    flags = {"resolution": 64, "repeats": 4}
    examples = plan_examples(pictures, sizes, **flags)
    assert [(example.picture, example.repeat) for example in examples] == list(itertools.product(range(3), range(4)))
    assert {example.bucket for example in examples} == {(64, 64)}
    centerings = [example.centering for example in examples]
    assert len({*centerings}) == 12
    assert all(0 <= value <= 1 for centering in centerings for value in centering)
    # Tall pictures: the crop only moves along the height.
    assert max(y for _, y in centerings) > 0.6 and min(y for _, y in centerings) < 0.4
    assert {x for x, _ in centerings} == {0.5}
    assert plan_examples(pictures, sizes, **flags) == examples
    assert plan_examples(pictures[:1], sizes[:1], **flags) == examples[:4]  # whatever other pictures there are
    other_seed = plan_examples(pictures, sizes, **flags, seed=1)
    assert not {*centerings} & {example.centering for example in other_seed}


def test_a_picture_of_the_buckets_shape_has_one_crop():
    examples = plan_examples(some_pictures(1), [(128, 128)], resolution=64, repeats=5)
    assert [example.centering for example in examples] == [(0.5, 0.5)] * 5


def test_center_crop():
    examples = plan_examples(some_pictures(1), [(600, 400)], resolution=64, repeats=2, center_crop=True)
    assert [example.centering for example in examples] == [(0.5, 0.5)] * 2


def test_crops_are_the_same_on_every_machine():
    """Fixed values: a change here changes what a resumed run sees."""
    tall, wide = plan_examples(some_pictures(2), [(80, 64), (64, 80)], resolution=64)
    assert tall.centering == (0.5, 0.06165086885984905)
    assert wide.centering == (0.1385553791119012, 0.5)


def striped(width, height, axis):
    """A picture whose red value grows from left to right (axis 1) or from top to bottom (axis 0)."""
    ramp = np.indices((height, width))[axis].astype(np.uint8)
    return Image.fromarray(np.stack([ramp, 0 * ramp, 0 * ramp], axis=-1))


@pytest.mark.parametrize(("centering", "first"), [((0.0, 0.5), 0), ((1.0, 0.5), 96), ((0.5, 0.0), 48)])
def test_crop_of_a_wide_picture(centering, first):
    example = Example(0, 0, (64, 64), centering)
    cropped = crop_image(striped(160, 64, axis=1), example.framing, flip=False)
    assert cropped.size == (64, 64)
    assert np.asarray(cropped)[10, :, 0].tolist() == list(range(first, first + 64))
    mirrored = crop_image(striped(160, 64, axis=1), example.framing, flip=True)
    assert np.asarray(mirrored)[10, :, 0].tolist() == list(range(first, first + 64))[::-1]


@pytest.mark.parametrize(("centering", "first"), [((0.5, 0.0), 0), ((0.5, 1.0), 96)])
def test_crop_of_a_tall_picture(centering, first):
    cropped = crop_image(striped(64, 160, axis=0), Framing((64, 64), centering), flip=False)
    assert np.asarray(cropped)[:, 10, 0].tolist() == list(range(first, first + 64))


def test_crop_scales_to_the_bucket():
    cropped = crop_image(Image.new("RGB", (333, 77), BLUE), Framing((96, 160), (0.3, 0.9)), flip=False)
    assert cropped.size == (160, 96) and cropped.getpixel((80, 48)) == BLUE
