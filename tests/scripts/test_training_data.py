"""Whole runs on every form of training data, and with teachers that read captions."""

import json
import shutil

import datasets
import pytest
from PIL import Image

from command_line import assert_close_weights, same_weights, succeed, weights
from models import ONE_MODEL, SLOW, ZIMAGE


# Forms of data


def with_sidecars(folder, photos):
    shutil.copytree(photos, folder)
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"ball {number}")
    return {"instance_data_dir": folder, "instance_prompt": None}


def with_jsonl(folder, photos):
    shutil.copytree(photos, folder)
    rows = [{"file_name": f"{n}.png", "short": f"ball {n}", "long": f"ball {n}, round"} for n in range(3)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"instance_data_dir": folder, "instance_prompt": None, "caption_column": ["short", "long"]}


def with_csv(folder, photos):
    shutil.copytree(photos, folder)
    (folder / "metadata.csv").write_text('file_name,text\n0.png,None\n1.png,1984\n2.png,"a, b"\n')
    return {"instance_data_dir": folder, "instance_prompt": None, "caption_column": "text"}


def with_parquet(folder, photos):
    folder.mkdir()
    table = datasets.Dataset.from_dict(
        {
            "picture": [{"bytes": (photos / f"{n}.png").read_bytes(), "path": None} for n in range(3)],
            "text": [f"ball {n}" for n in range(3)],
        }
    ).cast_column("picture", datasets.Image())
    table.to_parquet(folder / "train.parquet")
    flags = {"instance_data_dir": None, "instance_prompt": None, "dataset_name": folder, "caption_column": "text"}
    return flags | {"image_column": "picture", "cache_dir": folder / "cache"}


@pytest.mark.parametrize(
    ("form", "model"),
    [(with_sidecars, "flux2"), (with_jsonl, "zimage"), (with_csv, "flux2"), (with_parquet, "zimage")],
    indirect=["model"],
)
def test_every_form_of_data_trains(train, photos, tmp_path, form):
    flags = form(tmp_path / "data", photos) | {"random_flip": True, "repeats": 2, "train_batch_size": 2}
    flags |= {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "64,64;64,128;112,64"}
    log = succeed(train(**flags)).log
    assert "Pictures: 3" in log
    assert weights(tmp_path / "run")


@ONE_MODEL
@SLOW
def test_each_of_several_captions_is_used(train, photos, tmp_path):
    flags = with_jsonl(tmp_path / "data", photos) | {"max_train_steps": 6}
    succeed(train("both", **flags))
    for column in ("short", "long"):
        succeed(train(column, **flags | {"caption_column": column}))
        assert not same_weights(tmp_path / "both", tmp_path / column)


# Teachers that read captions


def with_teacher_captions(folder, photos, *, pictures=True):
    """Three rows with a short and a long caption, with or without a picture."""
    shutil.copytree(photos, folder) if pictures else folder.mkdir()
    rows = [{"short": "a ball", "long": f"a ball, number {n}, round and bright"} for n in range(3)]
    rows = [row | {"file_name": f"{n}.png"} for n, row in enumerate(rows)] if pictures else rows
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"instance_data_dir": folder, "instance_prompt": None, "caption_column": "short"}
    vlm = {"vlm_model_name_or_path": None, "vlm_min_pixels": None, "vlm_max_pixels": None}
    return flags | vlm | {"teacher_context": "caption", "teacher_caption_column": "long"}


@SLOW
def test_the_student_comes_closer_to_a_teacher_that_reads_more(train, model, photos, tmp_path):
    flags = with_teacher_captions(tmp_path / "data", photos)
    flags |= {"max_train_steps": 40, "rank": 8, "teacher": "base", "teacher_prompt_suffix": ""}
    log = succeed(train(**flags)).log
    assert "pictures:" not in log.split("Encoding ")[1].splitlines()[0]  # no picture is encoded
    stock = model.pipeline()
    teacher = sum(model.sample(stock, f"a ball, number {n}, round and bright") for n in range(3)) / 3
    before = (model.sample(stock) - teacher).norm()
    stock.load_lora_weights(tmp_path / "run")
    assert (model.sample(stock) - teacher).norm() < 0.6 * before


@SLOW
def test_captions_without_pictures_train_like_captions_with_pictures(train, photos, tmp_path):
    without = with_teacher_captions(tmp_path / "without", photos, pictures=False)
    succeed(train("one", **with_teacher_captions(tmp_path / "with", photos)))
    succeed(train("other", **without))
    assert same_weights(tmp_path / "one", tmp_path / "other")
    assert "Encoding 0 of" in succeed(train("again", **without, context_cache_dir=tmp_path / "one/context_cache")).log


@SLOW
def test_captions_without_pictures_leave_no_empty_cells_on_the_sheets(train, photos, tmp_path):
    for name, pictures in (("without", False), ("with", True)):
        flags = with_teacher_captions(tmp_path / f"{name}-data", photos, pictures=pictures)
        log = succeed(
            train(name, **flags, validation_steps=2, num_validation_images=1, retention_prompts=["a", "b"])
        ).log
        assert "failed" not in log and "could not" not in log
        for sheet in ("validation-2.png", "rollout-2.png"):
            assert (tmp_path / name / sheet).exists()
    for sheet, side in (("preview.png", 0), ("story.png", 1)):  # a column less, a part less
        sizes = [Image.open(tmp_path / name / sheet).size for name in ("without", "with")]
        assert sizes[0][side] < sizes[1][side] - 100


@ONE_MODEL
@SLOW
def test_a_data_set_without_pictures_trains_like_a_folder(train, photos, tmp_path):
    flags = with_teacher_captions(tmp_path / "without", photos, pictures=False)
    rows = [json.loads(line) for line in (tmp_path / "without/metadata.jsonl").read_text().splitlines()]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set/train.parquet")
    succeed(train("folder", **flags))
    flags |= {"instance_data_dir": None, "dataset_name": tmp_path / "set", "cache_dir": tmp_path / "datasets"}
    succeed(train("set-run", **flags))
    assert same_weights(tmp_path / "folder", tmp_path / "set-run")


@ZIMAGE
@SLOW
def test_a_teachers_caption_may_be_longer_than_a_students(train, photos, tmp_path):
    flags = with_teacher_captions(tmp_path / "data", photos)
    succeed(train("long", **flags))
    succeed(train(**flags | {"max_sequence_length": 50}))
    # Nothing is cut: only the padding differs, which no token sees.
    assert_close_weights(tmp_path / "long", tmp_path / "run", atol=1e-4, rtol=1e-3)
    error = train("cut", **flags | {"max_sequence_length": 50}, teacher_max_sequence_length=60).error
    assert "the teacher's prompt: " in error and "the limit is 60 (--teacher_max_sequence_length)" in error
