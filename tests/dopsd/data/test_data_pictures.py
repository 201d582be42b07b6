import pytest

from data_helpers import captions_of, read_folder, write_pictures
from dopsd.data.pictures import is_picture


def test_pictures_are_found_in_subfolders_in_order_and_hidden_ones_are_skipped(tmp_path):
    names = ["B.JPG", "a-b/x.png", "a/b/c.webp", "a/z.jpeg", "train.png", "my_test_1.png", "val/validation.bmp"]
    names += ["__original__.png", "__hatsune_miku__drawn_by_someone.jpg", "__new/a.png"]
    write_pictures(tmp_path, *names, ".git/x.png", "__MACOSX/x.png", "a/.x.png", "a/__pycache__/x.png")
    pictures = read_folder(tmp_path, instance_prompt="a dog")
    assert [picture.name for picture in pictures] == sorted(names)
    assert all(picture.captions == ("a dog",) for picture in pictures)
    assert [picture.source for picture in pictures] == [tmp_path / name for name in sorted(names)]


def test_the_folder_itself_may_be_in_a_hidden_folder(tmp_path):
    write_pictures(tmp_path, ".cache/pictures/a.png")
    assert len(read_folder(tmp_path / ".cache/pictures", instance_prompt="x")) == 1


def test_links_are_followed_and_a_loop_ends(tmp_path):
    write_pictures(tmp_path, "outside/a.png", "folder/b.png")
    (tmp_path / "folder/link").symlink_to(tmp_path / "outside")
    (tmp_path / "folder/loop").symlink_to(tmp_path / "folder")
    (tmp_path / "outside/back").symlink_to(tmp_path / "folder")
    assert list(captions_of(read_folder(tmp_path / "folder", instance_prompt="x"))) == ["b.png", "link/a.png"]


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.JPEG", "a.TGA", "a.ICNS", "a.avif", "a.MPO", "a.heic", "a.pict", "a.svg"]
)
def test_names_of_pictures(name):
    assert is_picture(name)


@pytest.mark.parametrize("name", ["a.txt", "a.mp4", "a.mpeg", "a.pdf", "a.hdf", "a.palm", "a.jpg.json", "png", "a"])
def test_names_of_other_files(name):
    assert not is_picture(name)
