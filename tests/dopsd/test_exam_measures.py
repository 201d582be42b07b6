"""The exam's measures on pictures that were made by hand, with known answers."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.nn.functional import avg_pool2d

from dopsd.exam.alignment import align
from dopsd.exam.closeness import distance_anywhere, distance_in_place, distance_of_features, missing, patches
from dopsd.exam.figures import ANYWHERE, FEATURES, IN_PLACE, Measures, Trial
from dopsd.exam.pixels import (
    as_tensor,
    background_colours,
    background_mask,
    fine_detail,
    sharpness,
    shown_background,
    shrunk,
)


WIDTH, HEIGHT = 192, 128


def scene(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Overlapping rectangles of random colours: edges of all sizes, and no symmetry."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128, np.uint8)
    for _ in range(60):
        top, left = rng.integers(height), rng.integers(width)
        pixels[top : top + rng.integers(4, 40), left : left + rng.integers(4, 40)] = rng.integers(256, size=3)
    return Image.fromarray(pixels)


def blurred(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def zoomed(image: Image.Image, scale: float) -> Image.Image:
    """The middle of the image, enlarged; or the image in the middle of a black one."""
    width, height = image.size
    inverse = (1 / scale, 0, (width - width / scale) / 2, 0, 1 / scale, (height - height / scale) / 2)
    return image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)


def shifted(image: Image.Image, right: int, down: int) -> Image.Image:
    return Image.fromarray(np.roll(np.array(image), (down, right), (0, 1)))


def with_square(colour: str, left: int, background: str = "white", side: int = 40) -> Image.Image:
    """A square on a plain background."""
    image = Image.new("RGB", (WIDTH, HEIGHT), background)
    image.paste(colour, (left, 40, left + side, 40 + side))
    return image


def noisy(image: Image.Image, deviation: float) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, deviation, np.array(image).shape)
    return Image.fromarray(np.clip(np.array(image) + noise, 0, 255).astype(np.uint8))


def aligned(drawing: Image.Image, picture: Image.Image):
    return align(as_tensor(drawing), as_tensor(picture))


# Alignment


def test_a_copy_is_aligned_as_it_is():
    found = aligned(scene(0), scene(0))
    assert (found.right, found.down) == (0, 0) and found.is_found
    assert found.scale == pytest.approx(1, abs=5e-3) and found.quality == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("scale", [0.85, 1.1, 1.2, 1.35])
def test_the_zoom_is_found(scale):
    found = aligned(zoomed(scene(1), scale), scene(1))
    assert found.is_found and found.scale == pytest.approx(scale, abs=0.012)
    assert abs(found.right) < 0.02 and abs(found.down) < 0.02


def test_the_shift_is_found():
    found = aligned(shifted(scene(2), right=24, down=-16), scene(2))
    assert found.is_found and found.scale == pytest.approx(1, abs=0.01)
    assert found.right == pytest.approx(24 / WIDTH, abs=0.01) and found.down == pytest.approx(-16 / HEIGHT, abs=0.015)


def test_zoom_and_shift_are_found_together():
    found = aligned(shifted(zoomed(scene(3), 1.2), right=12, down=8), scene(3))
    assert found.is_found and found.scale == pytest.approx(1.2, abs=0.015)
    assert found.right == pytest.approx(12 / WIDTH, abs=0.015) and found.down == pytest.approx(8 / HEIGHT, abs=0.015)


def test_a_blurred_or_noisy_copy_is_found_in_its_place():
    for copy in (blurred(scene(4), 2), noisy(scene(4), 30)):
        found = aligned(copy, scene(4))
        assert found.is_found and found.scale == pytest.approx(1, abs=0.01) and found.right == found.down == 0


def test_other_pictures_do_not_align():
    blank = Image.new("RGB", (WIDTH, HEIGHT), "gray")
    pairs = [(scene(5), scene(6)), (noisy(blank, 60), scene(5)), (blank, scene(5)), (scene(5), blank), (blank, blank)]
    for drawing, picture in pairs:
        assert not aligned(drawing, picture).is_found


def test_pictures_of_any_two_sizes_are_aligned():
    found = aligned(scene(7), scene(7).resize((640, 426)))
    assert found.is_found and found.scale == pytest.approx(1, abs=0.02)


# Sharpness


def test_blur_lowers_sharpness_and_contrast_does_not():
    picture = as_tensor(scene(8))
    sharp = sharpness(picture)
    assert sharpness(picture / 4) == pytest.approx(sharp, rel=1e-3)
    soft = [sharpness(as_tensor(blurred(scene(8), radius))) / sharp for radius in (0.7, 1, 2)]
    assert soft == sorted(soft, reverse=True) and soft[1] < 0.65 and soft[2] < 0.45
    assert sharpness(as_tensor(noisy(scene(8), 20))) > sharp


def test_fine_detail_is_that_of_flat_areas():
    with_grain = fine_detail(as_tensor(noisy(with_square("red", 20), 20)))
    half = fine_detail(as_tensor(noisy(with_square("red", 20), 10)))
    assert half == pytest.approx(with_grain / 2, rel=0.1)
    assert fine_detail(as_tensor(blurred(noisy(with_square("red", 20), 20), 1))) < with_grain / 3
    assert fine_detail(as_tensor(with_square("red", 20))) < with_grain / 20  # its edges do not count
    assert fine_detail(torch.zeros(3, 4, 6)) == 0


def test_a_background_out_of_focus_does_not_lower_sharpness():
    image = blurred(scene(9), 4)
    image.paste(scene(9).crop((60, 30, 140, 100)), (60, 30))
    assert sharpness(as_tensor(image)) == pytest.approx(sharpness(as_tensor(scene(9))), rel=0.15)


def test_a_blank_picture_has_no_sharpness():
    assert sharpness(torch.zeros(3, 64, 64)) == 0
    assert sharpness(torch.zeros(3, 4, 6)) == 0


# Background


def test_a_plain_background_is_told_from_the_subject():
    mask = background_mask(background_colours(as_tensor(with_square("red", 20))))
    assert mask.float().mean() == pytest.approx(1 - 40 * 40 / (WIDTH * HEIGHT), abs=0.06)
    assert background_mask(background_colours(as_tensor(scene(10)))) is None
    assert background_mask(background_colours(as_tensor(Image.new("RGB", (64, 64), "red")))) is None  # no subject


def test_the_share_of_the_background_that_is_shown():
    picture = as_tensor(with_square("red", 20))
    shares = {
        "the same": with_square("red", 20),
        "another subject in its place": with_square("blue", 20),
        "on another background": with_square("red", 20, background="black"),
        "elsewhere": with_square("red", 120),
    }
    shares = {name: shown_background(as_tensor(image), picture) for name, image in shares.items()}
    covered = 40 * 40 / (WIDTH * HEIGHT - 40 * 40)
    assert shares["the same"] == shares["another subject in its place"] == 1
    assert shares["on another background"] == 0
    assert shares["elsewhere"] == pytest.approx(1 - covered, abs=0.07)
    assert shown_background(picture, as_tensor(scene(10))) is None


# Closeness


def latents(image: Image.Image) -> torch.Tensor:
    return avg_pool2d(as_tensor(image), 4)


def test_distances_of_latents_are_computed_as_they_say():
    first = torch.zeros(2, 8, 8)
    second = torch.zeros(2, 8, 8)
    second[0, 0, 0] = 4
    assert distance_in_place(first, first) == distance_anywhere(first, first) == 0
    assert distance_in_place(first, second) == pytest.approx((16 / 128) ** 0.5)
    # One of the picture's 49 patches has the value in its corner; each patch has 2 x 2 x 2 numbers.
    assert missing(second, first) == pytest.approx(4 / 49 / 8**0.5) and missing(first, second) == 0
    assert distance_anywhere(first, second) == distance_anywhere(second, first) == missing(second, first) / 2
    assert patches(first, 1, stride=1).shape == (49, 8)
    assert distance_in_place(first, torch.zeros(2, 12, 10)) == 0
    assert distance_in_place(torch.zeros(2, 64, 48), torch.zeros(2, 64, 48)) == 0


def test_large_latents_are_averaged_and_found_at_any_offset():
    picture = torch.rand(3, 128, 96, generator=torch.Generator().manual_seed(0))
    assert patches(picture, 4, stride=4).shape == (31 * 23, 12)
    moved = picture.roll((3, 5), (1, 2))
    assert distance_in_place(moved, picture) > 0.01
    assert distance_anywhere(moved, picture) < 0.25 * distance_anywhere(picture.flip(1), picture)


def test_a_subject_that_is_drawn_elsewhere_is_close_only_anywhere():
    picture, elsewhere, other = (
        latents(image) for image in (with_square("red", 20), with_square("red", 120), with_square("blue", 20))
    )
    assert distance_anywhere(elsewhere, picture) < 0.02 < distance_anywhere(other, picture)
    assert distance_in_place(elsewhere, picture) > distance_in_place(other, picture)


def test_the_distance_of_features_is_one_minus_their_cosine():
    assert distance_of_features(torch.tensor([1.0, 0]), torch.tensor([3.0, 0])) == pytest.approx(0)
    assert distance_of_features(torch.tensor([1.0, 0]), torch.tensor([1.0, 1])) == pytest.approx(1 - 0.5**0.5)


def test_a_row_is_measured_against_its_picture_and_against_what_the_teacher_saw():
    calls = []

    def means(images):
        calls.append(len(images))
        return torch.stack([as_tensor(image).mean((1, 2)) + 2 for image in images])

    measures = Measures(lambda images: [latents(image) for image in images], {FEATURES: means})
    trial = Trial("a", with_square("blue", 20), with_square("red", 120), with_square("red", 20), scene(11))
    (row,) = measures.rows([trial])
    assert calls == [3]  # the model of the features is loaded once
    assert [*row.base.distances] == [IN_PLACE, ANYWHERE, FEATURES] and row.caption == "a"
    assert row.teacher.distances[ANYWHERE] < 0.02 < row.base.distances[ANYWHERE]
    assert row.change == pytest.approx(
        distance_in_place(latents(trial.teacher), latents(trial.base)) / row.base.distances[IN_PLACE]
    )
    assert row.teacher.background is None and not row.teacher.alignment.is_found  # of the scene
    (student,) = measures.students([trial.teacher], [trial])
    assert student == row.teacher


def test_pictures_are_shrunk_to_even_sides():
    assert shrunk(torch.rand(3, 100, 300), 64).shape == (3, 22, 64)
    assert shrunk(torch.rand(3, 300, 2), 64).shape == (3, 64, 2)
