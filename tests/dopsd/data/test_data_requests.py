"""What an editor is validated on."""

import pytest
from PIL import Image

from data_helpers import LIMITS, assert_names, error_of, write_pictures
from dopsd.data.buckets import Crop, Framing
from dopsd.data.pictures import PictureFile
from dopsd.data.requests import Request, editing_requests
from dopsd.settings import ValidationSettings


def crop(name):
    return Crop(PictureFile(name, None), name, Framing((64, 64), (0.5, 0.5)))


TRAINED = [Request(f"edit {number}", (crop(f"{number}"),), (64, 64 + 16 * number)) for number in range(3)]


def requests(prompts=None, images=None, side=256):
    settings = ValidationSettings(
        validation_prompt=prompts, validation_image=images, validation_height=side, validation_width=side
    )
    return editing_requests(settings, TRAINED, LIMITS)


def names(request):
    return [crop.file.name.removeprefix("--validation_image ").rpartition("/")[2] for crop in request.cond_images]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a square, a wide and a small picture."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path, "a.png", "b,c.png", size=(96, 96))
    write_pictures(tmp_path, "wide.png", size=(900, 300))
    write_pictures(tmp_path, "small.png", size=(96, 60))
    write_pictures(tmp_path, "long.png", size=(64 * 9, 64))
    return tmp_path


def test_without_flags_the_first_pairs_are_asked_for():
    assert requests() == TRAINED[:2]


def test_prompts_without_pictures_edit_those_of_the_training_pairs_in_turn():
    asked = requests(["a", "b", "c", "d"])
    assert [request.prompt for request in asked] == ["a", "b", "c", "d"]
    assert [names(request) for request in asked] == [["0"], ["1"], ["2"], ["0"]]
    assert [request.size for request in asked] == [(64, 64), (64, 80), (64, 96), (64, 64)]


def test_one_picture_is_for_all_prompts_and_several_are_for_one_each(folder):
    asked = requests(["a", "b"], ["a.png"])
    assert [(request.prompt, *names(request)) for request in asked] == [("a", "a.png"), ("b", "a.png")]
    asked = requests(["a", "b"], [str(folder / "wide.png"), "a.png"])
    assert [(request.prompt, *names(request)) for request in asked] == [("a", "wide.png"), ("b", "a.png")]


def test_pictures_without_prompts_are_edited_as_the_training_pairs_are(folder):
    asked = requests(images=["a.png"] * 4)
    assert [request.prompt for request in asked] == ["edit 0", "edit 1", "edit 2", "edit 0"]
    assert {request.size for request in asked} == {(96, 96)}


def test_commas_join_the_pictures_of_one_prompt_unless_they_are_in_a_name(folder):
    (asked,) = requests(["a"], ["wide.png, a.png"])
    assert names(asked) == ["wide.png", "a.png"]
    assert [one.size for one in asked.cond_images] == [asked.size, (96, 96)]
    (asked,) = requests(["a"], ["b,c.png"])
    assert names(asked) == ["b,c.png"]


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((300, 900), 256, (144, 432)),  # at most 256 x 256 pixels
        ((300, 900), 1024, (288, 896)),  # not enlarged: whole tokens
        ((100, 100), 256, (96, 96)),
        ((64, 512), 128, (64, 352)),  # no side below 64
    ],
)
def test_a_result_has_the_shape_of_its_first_picture(tmp_path, size, side, expected):
    Image.new("RGB", size[::-1]).save(tmp_path / "a.png")
    (asked,) = requests(["a"], [str(tmp_path / "a.png")], side)
    assert asked.size == asked.cond_images[0].size == expected


@pytest.mark.parametrize(
    ("prompts", "images", "parts"),
    [
        (["a"], ["gone.png"], ["--validation_image gone.png: there is no such file; check the path"]),
        (["a"], ["a.png,gone.png"], ["--validation_image gone.png: there is no such file"]),
        (["a"], [","], ["--validation_image ,: names nothing beside a comma; remove the comma"]),
        (["a"], ["."], ["--validation_image .: there is no such file"]),
        (["a"], ["x" * 5000], [": there is no such file; check the path"]),
        (["a"], ["a\0b"], ["there is no such file; check the path"]),
        (["a"], ["bad.png"], ["--validation_image bad.png: cannot be read as a picture (unknown format); convert it"]),
        (["a"], ["small.png"], ["--validation_image small.png: 60x96 pixels are too small to edit; use at least 64"]),
        (["a"], ["a.png,long.png"], ["--validation_image long.png: 64x576 pixels are too long and narrow; use an"]),
        (["a", "b"], ["a.png"] * 3, ["--validation_image: got 3 for 2 of --validation_prompt; give one for each, or"]),
    ],
)
def test_pictures_that_cannot_be_edited_are_one_line(folder, prompts, images, parts):
    (folder / "bad.png").write_bytes(b"x")
    assert_names(error_of(requests, prompts, images), *parts)
