"""The check of all pictures, and what is remembered of it."""

import gc
import tracemalloc

import datasets
import pytest
from PIL import Image

from data_helpers import BLUE, LIMITS, RED, as_picture, error_of, read_folder, read_pictures, write_pictures
from dopsd import findings
from dopsd.data import checking
from dopsd.data.buckets import plan_examples
from dopsd.data.checking import check_pictures
from dopsd.data.order import SampleOrder
from dopsd.data.pictures import Picture
from dopsd.data.training_data import TrainingData
from dopsd.errors import InputError
from dopsd.findings import Findings
from dopsd.settings import DataSettings


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(findings, "SETTLED_NANOSECONDS", 0)


@pytest.fixture
def decoded(monkeypatch):
    """Names of the pictures that are decoded."""
    names, decode = [], checking.decode
    monkeypatch.setattr(checking, "decode", lambda picture: names.append(picture.name) or decode(picture))
    return names


def check(pictures, folder):
    return check_pictures(pictures, resolution=64, disable_progress=True, findings=Findings(folder))


def test_only_new_and_changed_pictures_are_decoded_again(tmp_path, settled, decoded):
    write_pictures(tmp_path, "a.png", "b.png", size=(8, 16))
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    pictures = [as_picture(tmp_path / name) for name in ("b.png", "c.png")] + [Picture("row", ("x",), None)]
    first = check(pictures, tmp_path / "kept")
    assert sorted(decoded) == ["b.png", "c.png"]
    assert [one.size for one in first] == [(16, 8), (16, 8), (64, 64)]
    decoded.clear()
    assert check(pictures, tmp_path / "kept") == first and decoded == []
    write_pictures(tmp_path, "a.png")
    Image.new("RGB", (800, 16), BLUE).save(tmp_path / "c.png")
    again = check([as_picture(tmp_path / "a.png"), *pictures], tmp_path / "kept")
    assert sorted(decoded) == ["a.png", "c.png"]
    assert again[1] == first[0] and again[2].digest != first[1].digest


def test_what_was_known_before_a_bad_picture_stays_known(tmp_path, settled, decoded):
    names = [f"{number:03}.png" for number in range(20)]
    write_pictures(tmp_path, *names)
    (tmp_path / names[-1]).write_bytes(b"no picture")
    pictures = [as_picture(tmp_path / name) for name in names]
    for _ in range(2):
        message = error_of(check_pictures, pictures, resolution=64, disable_progress=True, findings=Findings(tmp_path))
        assert message.startswith(f"{names[-1]}: cannot be read as a picture")
    assert sorted(decoded) == sorted([*names, names[-1]])


def test_a_picture_that_changes_while_it_is_read_is_not_remembered(tmp_path, settled, monkeypatch):
    write_pictures(tmp_path, "a.png")
    decode = checking.decode

    def replace_after(picture):
        result = decode(picture)
        Image.new("RGB", (32, 8), RED).save(picture.source)
        return result

    monkeypatch.setattr(checking, "decode", replace_after)
    assert check([as_picture(tmp_path / "a.png")], tmp_path / "kept")[0].size == (8, 8)
    monkeypatch.setattr(checking, "decode", decode)
    assert check([as_picture(tmp_path / "a.png")], tmp_path / "kept")[0].size == (8, 32)


@pytest.mark.parametrize("finding", ["null", "3", '[[8], "x", null]', '[[8, 8], "x"]', '[[8, "8"], "x", null]'])
def test_a_finding_of_another_form_is_not_known(tmp_path, settled, decoded, finding):
    write_pictures(tmp_path, "a.png")
    pictures = [as_picture(tmp_path / "a.png")]
    first = check(pictures, tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()
    path.write_text(f"{path.read_text().partition(' ')[0]} {finding}\n")
    assert check(pictures, tmp_path / "kept") == first and decoded == ["a.png"] * 2


def test_a_picture_that_was_just_written_is_not_remembered(tmp_path, decoded):
    write_pictures(tmp_path, "a.png")
    for _ in range(2):
        check([as_picture(tmp_path / "a.png")], tmp_path / "kept")
    assert decoded == ["a.png"] * 2


def test_pictures_in_a_data_set_are_remembered(tmp_path, decoded):
    write_pictures(tmp_path, "a.png", "b.png")
    cells = [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in ("a.png", "b.png")]
    for folder, rows in (("first", cells), ("second", cells[:1])):
        features = datasets.Features({"image": datasets.Image()})
        (tmp_path / folder).mkdir()
        datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(tmp_path / folder / "train.parquet")
    flags = {"instance_prompt": "x", "cache_dir": str(tmp_path / "cache")}
    first = check(read_pictures(dataset_name=str(tmp_path / "first"), **flags), tmp_path / "kept")
    assert len(decoded) == 2
    assert check(read_pictures(dataset_name=str(tmp_path / "first"), **flags), tmp_path / "kept") == first
    assert len(decoded) == 2
    check(read_pictures(dataset_name=str(tmp_path / "second"), **flags), tmp_path / "kept")
    assert len(decoded) == 3


def test_a_picture_that_is_another_one_than_at_the_start_ends_the_run(tmp_path):
    write_pictures(tmp_path, "a.png", size=(64, 64))
    data = load(tmp_path, instance_prompt="x")
    (sample,) = data.shown(1)
    Image.new("RGB", (64, 64), BLUE).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="a.png: has changed since it was checked; save it again, then start again"):
        data.pixels(data.crop(sample))


def load(folder, **flags):
    pictures = read_folder(folder, **flags)
    checked = check_pictures(pictures, resolution=64, disable_progress=True)
    examples = plan_examples(pictures, [one.size for one in checked], DataSettings(resolution=64), LIMITS, seed=0)
    order = SampleOrder(pictures, examples, batch_size=1, random_flip=False, seed=0)
    return TrainingData(pictures, [one.digest for one in checked], examples, order)


def test_memory_per_picture_is_bounded(tmp_path):
    def memory(count):
        folder = tmp_path / str(count)
        folder.mkdir()
        Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "0.jpg")
        for number in range(1, count):
            (folder / f"{number}.jpg").hardlink_to(folder / "0.jpg")
            (folder / f"{number}.txt").write_text(f"a photo of thing number {number}")
        (folder / "0.txt").write_text("a photo of a thing")
        tracemalloc.start()
        data = load(folder)
        gc.collect()
        now, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(data.pictures) == count
        return now, peak

    memory(10)  # what is imported and cached at the first time
    (few_now, few_peak), (many_now, many_peak) = memory(600), memory(1600)
    assert (many_now - few_now) / 1000 < 1200
    assert (many_peak - few_peak) / 1000 < 1500
