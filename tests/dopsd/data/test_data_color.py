"""Color profiles: pictures are converted to sRGB, and sRGB pictures stay as they are."""

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_helpers import WHITE, as_picture, assert_names, warnings_in
from dopsd.data.checking import check_pictures, warn_of_profiles
from dopsd.data.images import decode, read_image
from icc_profiles import ADOBE_RGB, DISPLAY_P3, SRGB, cmyk_profile, gamma_curve, gray_profile, rgb_profile


P3 = rgb_profile(DISPLAY_P3)
ADOBE = rgb_profile(ADOBE_RGB, gamma_curve(2.19921875))


def saved(tmp_path, image, profile, name="a.png"):
    image.save(tmp_path / name, icc_profile=profile)
    return as_picture(tmp_path / name)


def pixel(picture):
    return read_image(picture).getpixel((0, 0))


def assert_close(color, expected, atol=1):
    np.testing.assert_allclose(color, expected, atol=atol)


# The primaries and a grey of sRGB in other color spaces, as published by their converters.
@pytest.mark.parametrize(
    ("profile", "stored", "expected"),
    [
        (P3, (234, 51, 35), (255, 0, 0)),
        (P3, (117, 251, 76), (0, 255, 0)),
        (P3, (0, 0, 245), (0, 0, 255)),
        (P3, (128, 128, 128), (128, 128, 128)),
        (P3, (255, 255, 255), WHITE),
        (ADOBE, (219, 0, 0), (255, 0, 0)),
        (ADOBE, (144, 255, 60), (0, 255, 0)),
        (ADOBE, (0, 0, 250), (0, 0, 255)),
        (ADOBE, (128, 128, 128), (129, 129, 129)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_pictures_are_converted_to_srgb(tmp_path, profile, stored, expected, suffix):
    lossless = {"lossless": True} if suffix == "webp" else {}
    Image.new("RGB", (8, 8), stored).save(tmp_path / f"a.{suffix}", icc_profile=profile, **lossless)
    assert_close(pixel(as_picture(tmp_path / f"a.{suffix}")), expected, atol=3)


def test_photos_of_a_phone_are_converted(tmp_path):
    Image.new("RGB", (16, 16), (234, 51, 35)).save(tmp_path / "a.jpg", icc_profile=P3, quality=100)
    assert_close(pixel(as_picture(tmp_path / "a.jpg")), (255, 0, 0), atol=3)


def test_colors_outside_srgb_are_clipped(tmp_path):
    assert pixel(saved(tmp_path, Image.new("RGB", (1, 1), (0, 255, 0)), P3)) == (0, 255, 0)


@pytest.mark.parametrize(
    "profile", [ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), rgb_profile(SRGB)]
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
def test_srgb_pictures_keep_every_bit(tmp_path, profile, mode):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    with_profile, without = saved(tmp_path, image, profile), saved(tmp_path, image, None, "b.png")
    assert read_image(with_profile).tobytes() == read_image(without).tobytes()


def test_a_gamma_that_is_close_to_srgb_is_converted(tmp_path):
    picture = saved(tmp_path, Image.new("RGB", (1, 1), (20, 20, 20)), rgb_profile(SRGB, gamma_curve(2.2)))
    assert_close(pixel(picture), (12, 12, 12))  # 20 / 255 to the power of 2.2 is .0037, on sRGB's linear part


def test_transparency_is_kept(tmp_path):
    image = Image.new("RGBA", (3, 1), (*(234, 51, 35), 255))
    image.putpixel((1, 0), (234, 51, 35, 0))
    image.putpixel((2, 0), (234, 51, 35, 128))
    read = read_image(saved(tmp_path, image, P3))
    for place, expected in enumerate([(255, 0, 0), WHITE, (255, 127, 127)]):
        assert_close(read.getpixel((place, 0)), expected, atol=2)


def test_a_palette_is_converted(tmp_path):
    image = Image.new("P", (1, 1))
    image.putpalette([234, 51, 35])
    assert_close(pixel(saved(tmp_path, image, P3)), (255, 0, 0))


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (1, 1), 55),
        Image.new("LA", (1, 1), (55, 255)),
        Image.new("I;16", (1, 1), 55 * 257),
    ],
    ids=lambda image: image.mode,
)
def test_gray_pictures_with_a_gray_profile(tmp_path, image):
    """55 / 255 is .216; as linear light that is .502 in sRGB."""
    assert_close(pixel(saved(tmp_path, image, gray_profile(1.0))), (128, 128, 128))


def test_gray_pictures_with_an_rgb_profile(tmp_path):
    assert_close(pixel(saved(tmp_path, Image.new("L", (1, 1), 128), ADOBE)), (129, 129, 129))


def test_cmyk_pictures_are_converted_by_their_profile(tmp_path):
    """Lab (60, -20, -30) is sRGB (54, 156, 197). Without a profile, cyan ink is (0, 255, 255)."""
    profile = cmyk_profile((60, -20, -30))
    for name in ("a.tiff", "a.jpg"):
        cyan = saved(tmp_path, Image.new("CMYK", (16, 16), (255, 0, 0, 0)), profile, name)
        assert_close(pixel(cyan), (54, 156, 197), atol=4)
    for ink, expected in (((0, 0, 0, 0), WHITE), ((0, 0, 0, 255), (0, 0, 0))):
        assert_close(pixel(saved(tmp_path, Image.new("CMYK", (1, 1), ink), profile, "a.tiff")), expected)


def test_orientation_and_profile_together(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (24, 16), (234, 51, 35)).save(tmp_path / "a.png", exif=exif, icc_profile=P3)
    image = read_image(as_picture(tmp_path / "a.png"))
    assert image.size == (16, 24)
    assert_close(image.getpixel((0, 0)), (255, 0, 0))


def test_the_profile_is_not_passed_on(tmp_path):
    """It would be saved in sheets, whose pixels are sRGB."""
    assert "icc_profile" not in read_image(saved(tmp_path, Image.new("RGB", (1, 1)), P3)).info


@pytest.mark.parametrize(
    ("image", "profile"),
    [
        (Image.new("RGB", (4, 4), (9, 8, 7)), b"not a profile"),
        (Image.new("RGB", (4, 4), (9, 8, 7)), P3[:200]),
        (Image.new("RGB", (4, 4), (9, 8, 7)), gray_profile(1.0)),
        (Image.new("RGB", (4, 4), (9, 8, 7)), cmyk_profile((62, -31, -64))),
        (Image.new("CMYK", (4, 4), (9, 8, 7, 0)), P3),
    ],
    ids=["no profile", "cut", "gray", "CMYK", "RGB for CMYK"],
)
def test_a_profile_that_cannot_be_used_leaves_the_picture_as_it_is(tmp_path, image, profile):
    decoded = decode(saved(tmp_path, image, profile, "a.tiff"))
    assert decoded.profile_problem
    assert decoded.image.getpixel((0, 0)) == image.convert("RGB").getpixel((0, 0))


def test_unusable_profiles_give_one_warning(tmp_path, caplog):
    pictures = [saved(tmp_path, Image.new("RGB", (4, 4)), b"not a profile", f"{n}.png") for n in range(3)]
    pictures.append(saved(tmp_path, Image.new("RGB", (4, 4)), P3, "good.png"))
    checked = check_pictures(pictures, resolution=64, disable_progress=True)
    assert [one.size for one in checked] == [(4, 4)] * 4
    warn_of_profiles(pictures, checked)
    (warning,) = warnings_in(caplog)
    assert_names(warning, "0.png", "color profile", "3 such pictures")


def test_profiles_that_work_give_no_warning(tmp_path, caplog):
    pictures = [saved(tmp_path, Image.new("RGB", (4, 4)), P3)]
    warn_of_profiles(pictures, check_pictures(pictures, resolution=64, disable_progress=True))
    assert not warnings_in(caplog)
