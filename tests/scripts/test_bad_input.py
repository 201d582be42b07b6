"""Bad flags and bad data end a run with one line that names them, before any model is loaded."""

import json

import pytest
from PIL import Image

from command_line import LORA_FILE, succeed, weights
from dopsd import command_line
from dopsd.command_line import parse_settings
from dopsd.errors import InputError
from dopsd.history import read_history
from models import ONE_MODEL


# Flags that are refused before any file is read: (changed flags, what the error contains)
BAD_FLAGS = {
    "resolution": ({"resolution": 100}, "--resolution 100"),
    "resolution limit": ({"resolution": 4096}, "--resolution 4096"),
    "bucket": (
        {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "4096,4096"},
        "--aspect_ratio_buckets 4096,4096",
    ),
    "bucket text": (
        {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "64x64"},
        "--aspect_ratio_buckets '64x64': cannot be read",
    ),
    "rank": ({"rank": 0}, "--rank 0: must be a whole number of at least 1"),
    "steps": ({"max_train_steps": 0}, "--max_train_steps 0: must be a whole number of at least 1"),
    "rollout steps": ({"num_rollout_steps": 0}, "--num_rollout_steps 0: must be a whole number of at least 1"),
    "repeats": ({"repeats": 2**63}, f"--repeats {2**63}: must be a whole number from 1 to 10000"),
    "8-bit prodigy": ({"use_8bit_adam": True, "optimizer": "prodigy"}, "--use_8bit_adam: needs --optimizer AdamW"),
    "one retention prompt": ({"retention_prompts": ["one"]}, "--retention_prompts: give at least two"),
    "validation size": ({"validation_height": 100}, "--validation_height 100"),
    "two ways to cache": (
        {"no_context_cache": True, "context_cache_dir": "x"},
        "--no_context_cache: cannot be combined with --context_cache_dir",
    ),
    "preview of nothing": ({"preview_only": True}, "--preview_only: draws the preview, which --validation_steps 0"),
    "seed": ({"seed": -1}, "--seed -1: must be a whole number from 0 to 4294967295"),
    "large seed": ({"seed": 2**32}, "--seed 4294967296: must be a whole number from 0 to 4294967295"),
    "beta": ({"adam_beta1": 1.0}, "--adam_beta1 1.0: must be a number of at least 0 and below 1"),
    "decay": ({"adam_weight_decay": -1}, "--adam_weight_decay -1.0: must be a number of at least 0"),
    "dropout": ({"lora_dropout": 1}, "--lora_dropout 1.0: must be a number of at least 0 and below 1"),
    "not a number": ({"learning_rate": "nan"}, "--learning_rate nan: must be a number above 0"),
    "negative validation steps": ({"validation_steps": -1}, "--validation_steps -1: must be a whole number"),
    "no model named": ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path: is required"),
    "token shown": ({"hub_token": "hf_x", "report_to": "all"}, "--hub_token: cannot be combined with --report_to all"),
    "no teacher captions": (
        {"teacher_context": "caption", "vlm_model_name_or_path": None, "vlm_min_pixels": None, "vlm_max_pixels": None},
        "--teacher_context caption: name the column of the teacher's captions with --teacher_caption_column",
    ),
    "unused teacher captions": (
        {"teacher_caption_column": "long"},
        "--teacher_caption_column: goes with --teacher_context caption",
    ),
    "pixel limits": (
        {"teacher_context": "vlm", "vlm_min_pixels": 9000, "vlm_max_pixels": 8000},
        "--vlm_min_pixels 9000: is above --vlm_max_pixels 8000",
    ),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_one_line_that_names_them(model, arguments, case):
    flags, expected = BAD_FLAGS[case]
    with pytest.raises(InputError) as caught:
        parse_settings(model.script.MODEL, "", arguments(**flags))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@ONE_MODEL
@pytest.mark.parametrize("flag", ["vlm_model_name_or_path", "vlm_min_pixels", "vlm_max_pixels", "vlm_rope"])
def test_flags_of_a_vlm_without_it_are_refused(model, arguments, flag):
    value = "text_encoder" if flag == "vlm_rope" else 4096
    with pytest.raises(InputError, match=f"^--{flag}: goes with --teacher_context vlm; add that, or drop the flag$"):
        parse_settings(model.script.MODEL, "", arguments(**{flag: value}))


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "comet_ml"])
def test_a_tracker_that_is_not_installed_is_one_line(model, arguments, monkeypatch, tracker):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"^--report_to {tracker}: run pip install {tracker} first$"):
        parse_settings(model.script.MODEL, "", arguments(report_to=tracker))


# Flags that a run refuses, most of them because of what they name.
REFUSED_FLAGS = {
    "unknown flag": ({"lerning_rate": 1}, 2, "--lerning_rate 1; did you mean --learning_rate?"),
    "no number": ({"ema_decay": "much"}, 2, "argument --ema_decay: invalid float value: 'much'"),
    "out of range": ({"rank": 0}, 1, "--rank 0: must be a whole number of at least 1"),
    "empty folder name": ({"instance_data_dir": ""}, 1, "--instance_data_dir"),
    "no checkpoint": (
        {"resume_from_checkpoint": "checkpoint-7"},
        1,
        "--resume_from_checkpoint checkpoint-7: there is no such checkpoint",
    ),
    "no model": (
        {"pretrained_model_name_or_path": "nowhere/at-all"},
        1,
        "--pretrained_model_name_or_path nowhere/at-all: there is no such folder",
    ),
    "targets": ({"lora_layers": "to_q,ff.net.0.proj"}, 1, "'ff.net.0.proj' matches no linear module"),
    "fp16 on a CPU": ({"mixed_precision": "fp16"}, 1, "--mixed_precision fp16: has no gradient scaler on a CPU"),
    "no LoRA": ({"init_lora": "nowhere"}, 1, "--init_lora nowhere: no LoRA is found there"),
    "no quantization file": (
        {"bnb_quantization_config_path": "nowhere.json"},
        1,
        "--bnb_quantization_config_path nowhere.json: cannot be used",
    ),
}


@ONE_MODEL
@pytest.mark.parametrize("case", REFUSED_FLAGS)
def test_a_run_with_bad_flags_ends_before_a_model_is_loaded(train, tmp_path, case):
    flags, code, expected = REFUSED_FLAGS[case]
    result = train(**flags)
    assert expected in result.error and result.code == code
    assert "Loading" not in result.log
    assert not (tmp_path / "run" / LORA_FILE).exists()


@ONE_MODEL
def test_a_context_cache_that_cannot_be_written_is_one_line(train, tmp_path):
    (tmp_path / "cache").write_text("a file in the cache's place")
    assert f"--context_cache_dir {tmp_path}/cache" in train(context_cache_dir=tmp_path / "cache").error


@ONE_MODEL
def test_an_output_folder_that_cannot_be_written_is_one_line(train, tmp_path):
    (tmp_path / "run").write_text("a file in the folder's place")
    assert f"--output_dir {tmp_path}/run: cannot be written" in train().error


@ONE_MODEL
def test_an_earlier_run_is_not_overwritten(train, tmp_path):
    succeed(train())
    before, history = (tmp_path / "run" / LORA_FILE).read_bytes(), read_history(tmp_path / "run")
    for wanted in (None, "latest"):
        error = train(instance_prompt="another", resume_from_checkpoint=wanted).error
        assert f"--output_dir {tmp_path}/run: holds a finished run's {LORA_FILE}" in error
    assert (tmp_path / "run" / LORA_FILE).read_bytes() == before and weights(tmp_path / "run")
    assert read_history(tmp_path / "run") == history and len(history) == 2


# Data


def png(folder, name="0.png", content=None):
    folder.mkdir(exist_ok=True)
    if content is None:
        Image.new("RGB", (64, 64)).save(folder / name)
    else:
        (folder / name).write_bytes(content)
    return {"instance_data_dir": folder}


def full_png(folder):
    folder.mkdir(exist_ok=True)
    path = folder.parent / "full.png"
    Image.effect_noise((64, 64), 50).save(path)
    return path


def metadata(folder, row):
    png(folder)
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    return {"instance_data_dir": folder, "caption_column": "text", "instance_prompt": None}


BAD_DATA = {
    "no folder": (lambda f: {"instance_data_dir": f / "nowhere"}, "nowhere"),
    "no picture": (lambda f: png(f, "notes.md", b"x"), "contains no pictures"),
    "unreadable": (lambda f: png(f, "bad.png", b"no picture"), "bad.png"),
    "truncated": (lambda f: png(f, "cut.png", full_png(f).read_bytes()[:60]), "cut.png"),
    "no caption": (lambda f: png(f) | {"instance_prompt": None}, "--instance_prompt"),
    "empty caption": (lambda f: metadata(f, {"file_name": "0.png", "text": " "}), "metadata.jsonl line 1"),
    "number caption": (lambda f: metadata(f, {"file_name": "0.png", "text": 7}), "metadata.jsonl line 1"),
    "unknown column": (lambda f: metadata(f, {"file_name": "0.png", "caption": "x"}), "choose one of 'caption'"),
    "outside": (lambda f: metadata(f, {"file_name": "../0.png", "text": "x"}), "is outside --instance_data_dir"),
    "row without picture": (lambda f: metadata(f, {"file_name": "1.png", "text": "x"}), "1.png"),
    "two sources": (lambda f: png(f) | {"dataset_name": f}, "--dataset_name"),
    "no source": (lambda f: {"instance_data_dir": None}, "--instance_data_dir"),
}


@ONE_MODEL
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_that_names_it(train, tmp_path, case):
    make, expected = BAD_DATA[case]
    result = train(**make(tmp_path / "data"))
    assert expected in result.error
    assert "Loading" not in result.log
    assert not (tmp_path / "run" / LORA_FILE).exists()


def teacher_captions(folder, rows, photos):
    """Flags of the `caption` teacher on pictures with a short and a long caption."""
    folder.mkdir()
    for path in photos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    lines = [json.dumps({"file_name": f"{number}.png"} | row) + "\n" for number, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    flags = {"instance_data_dir": folder, "instance_prompt": None, "caption_column": "short"}
    flags |= {"teacher_context": "caption", "teacher_caption_column": "long"}
    return flags | {"vlm_model_name_or_path": None, "vlm_min_pixels": None, "vlm_max_pixels": None}


@ONE_MODEL
def test_teacher_captions_that_are_missing_are_named(train, photos, tmp_path):
    rows = [{"short": "a ball", "long": f"a ball, number {number}, round and bright"} for number in range(3)]
    flags = teacher_captions(tmp_path / "data", rows, photos)
    assert "--teacher_caption_column detailed" in train(**flags | {"teacher_caption_column": "detailed"}).error
    same = flags | {"teacher_caption_column": "short"}
    assert (
        "--teacher_caption_column short: the teacher would read the same captions as the student"
        in train(**same | {"teacher_prompt_suffix": ""}).error
    )
    rows[1]["long"] = ""
    flags = teacher_captions(tmp_path / "empty", rows, photos)
    assert "metadata.jsonl line 2, column 'long'" in train(**flags).error
    (tmp_path / "empty/metadata.jsonl").unlink()
    assert "needs a metadata.jsonl" in train(**flags | {"caption_column": None, "instance_prompt": "x"}).error
