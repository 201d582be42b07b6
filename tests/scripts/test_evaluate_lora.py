"""Whole comparisons from the command line, on tiny checkpoints and tiny feature models."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file

from command_line import ROOT, Command, succeed
from lora_files import KLEIN, Z_IMAGE, a_and_b, adapter_metadata
from models import ONE_MODEL, SLOW, ZIMAGE, both_models
from tiny_features import make_tiny_clip, make_tiny_clipseg, make_tiny_dino
from waiting import wait_until


FEATURES = {"clip": make_tiny_clip, "dino": make_tiny_dino, "clipseg": make_tiny_clipseg}


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Tiny feature models: name -> folder."""
    folder = tmp_path_factory.mktemp("features")
    return {name: make(folder / name) for name, make in FEATURES.items()}


@pytest.fixture
def command(forkserver):
    return Command(forkserver, ROOT / "evaluate_lora.py")


@pytest.fixture
def loras(model, tmp_path):
    """Two LoRAs of the model."""
    shapes = Z_IMAGE if "zimage" in model.script.__name__ else KLEIN
    weights = a_and_b(shapes, "transformer.")
    paths = [tmp_path / name for name in ("first.safetensors", "second.safetensors")]
    for number, path in enumerate(paths):
        own = {name: weight.roll(number) for name, weight in weights.items()}
        save_file(own, path, adapter_metadata(shapes, "transformer."))
    return paths


@pytest.fixture
def flags(model, photos, features, tmp_path):
    """The command line of a small comparison of these LoRAs, with other flags after it."""

    def make(loras: list, *others) -> list:
        return [
            *("--pretrained_model_name_or_path", model.path, "--instance_data_dir", photos, "--lora", *loras),
            *("--clip_model", features["clip"], "--dino_model", features["dino"], "--output_dir", tmp_path / "out"),
            *("--kind", "pet", "--trigger_word", "sks", "--class_word", "dog", "--num_prompts", 2, "--num_seeds", 2),
            *("--resolution", 64, "--max_sequence_length", 80, "--strengths", 1, *others),
        ]

    return make


def drawn(folder: Path) -> dict[Path, int]:
    """Each picture, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("pictures/*/*.png")}


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@both_models(quick="flux2")
def test_a_comparison_and_another_with_one_more_lora(command, flags, loras, tmp_path):
    out = tmp_path / "out"
    log = succeed(command(*flags(loras[:1]))).log
    # 2 prompts for the subject, 8 unrelated, 2 neighbours, 2 with other words; 2 seeds each.
    assert "Drew 56 of 56 pictures" in log and len(drawn(out)) == 56
    assert "\nfirst " in log and "\nbase " in log
    assert results(out)["figures"].keys() == {"base", "first"}
    page = (out / "comparison.html").read_text()
    assert "first" in page and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    before = drawn(out)
    log = succeed(command(*flags([*loras, f"again={loras[0]}"], "--together_with", loras[1]))).log
    # The second LoRA, and both together on 10 prompts. The first under another name is there already.
    assert f"Drew {28 + 20} of {28 * 4 + 20 * 2} pictures" in log
    after = drawn(out)
    assert {path: after[path] for path in before} == before and len(after) == 56 + 48
    figures = results(out)["figures"]
    assert list(figures) == ["base", "first", "second", "again", "first + second", "again + second"]
    assert figures["again"] == figures["first"] != figures["second"]
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows[1:]] == [*figures, "(training pictures)"]


@ONE_MODEL
def test_an_editor_is_compared_on_pictures_to_edit(command, flags, loras, make_picture, tmp_path):
    for number, size in enumerate([(96, 64), (64, 64)]):
        make_picture(number, *size).save(tmp_path / f"{number}.png")
    images = ["--validation_image", tmp_path / "0.png", tmp_path / "1.png", "--resolution", 80]
    log = succeed(command(*flags(loras[:1], "--kind", "edit", "--class_word", "oil painting", *images))).log
    assert "Drew 56 of 56 pictures" in log
    content = results(tmp_path / "out")
    assert {prompt["image"] for prompt in content["prompts"]} == {0, 1}
    sizes = {Image.open(path).size for path in drawn(tmp_path / "out")}
    assert sizes == {(96, 64), (64, 64)}


@ONE_MODEL
@SLOW
def test_a_killed_run_goes_on_and_draws_no_picture_twice(command, flags, loras, tmp_path):
    out = tmp_path / "out"
    arguments = flags(loras, "--batch_size", 1)
    process, log = command.start(*arguments)
    wait_until(lambda: len(drawn(out)) > 5, process, log)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = drawn(out)
    damaged = min(kept)
    damaged.write_bytes(damaged.read_bytes()[:50])
    log = succeed(command(*arguments)).log
    missing = 84 - len(kept) + 1
    assert f"Drew {missing} of 84 pictures" in log
    after = drawn(out)
    assert len(after) == 84 and all(after[path] == kept[path] for path in kept if path != damaged)
    assert not list(out.glob("pictures/*/.*"))


@ONE_MODEL
def test_a_mask_and_strengths_add_columns_and_rows(command, flags, loras, features, tmp_path):
    others = ["--mask_background", "--mask_model", features["clipseg"], "--strengths", 0.5, 1.5]
    succeed(command(*flags(loras[:1], *others)))
    content = results(tmp_path / "out")
    assert list(content["figures"]) == ["base", "first", "first x0.5", "first x1.5"]


# Mistakes, each of which is one line and draws nothing


@ONE_MODEL
@pytest.mark.parametrize(
    "others, problem",
    [
        (["--lora", "none.safetensors"], "--lora none.safetensors: no LoRA is found there"),
        (["--clip_model", "{dino}"], "--clip_model {dino}: "),
        (["--dino_model", "{photos}"], "--dino_model {photos}: "),
        (["--instance_data_dir", "{one}"], "--instance_data_dir {one}: holds only 1 training picture"),
        (["--prompts", "none.txt"], "--prompts none.txt: cannot be read"),
        (["--resolution", "65"], "--resolution 65: not divisible into image tokens"),
        (["--pretrained_model_name_or_path", "{photos}"], "--pretrained_model_name_or_path {photos}: this is not"),
        (["--judge", "--vlm_name_or_path", "{dino}"], "--vlm_name_or_path {dino}: "),
        (["--max_sequence_length", "100000"], "--max_sequence_length 100000: must be a whole number from 1 to 4096"),
        (["--num_seed", "3"], "unrecognized arguments: --num_seed 3; did you mean --num_seeds?"),
    ],
)
def test_a_mistake_is_one_line(command, flags, loras, features, photos, tmp_path, others, problem):
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(photos / "0.png", one)
    places = {"dino": features["dino"], "photos": photos, "one": one}
    result = command(*flags(loras[:1], *(text.format(**places) for text in others)))
    assert problem.format(**places) in result.error
    assert not drawn(tmp_path / "out")


@ONE_MODEL
def test_a_prompt_that_is_too_long_can_be_shortened_in_a_file(command, flags, loras, tmp_path):
    saved = tmp_path / "out/prompts.json"
    error = command(*flags(loras[:1], "--max_sequence_length", "20")).error
    assert "--max_sequence_length 20: 'a photo of sks dog' is " in error and f"shorten it in {saved} and" in error
    assert saved.is_file() and not drawn(tmp_path / "out")


@ZIMAGE
@pytest.mark.parametrize(
    "others, problem",
    [
        (["--mixed_precision", "fp16"], "--mixed_precision fp16: Z-Image draws nothing in it"),
        (["--kind", "edit", "--validation_image", "a.png"], "--validation_image: Z-Image takes no pictures to edit"),
    ],
)
def test_what_a_model_cannot_do_is_one_line(command, flags, loras, others, problem):
    assert problem in command(*flags(loras[:1], *others)).error


@ONE_MODEL
def test_an_output_folder_that_is_in_use_is_not_written(command, flags, loras, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        assert "another run is writing to it" in command(*flags(loras[:1])).error


def test_help_says_how_the_models_are_deployed(command):
    text = " ".join(succeed(command("--help")).log.split())
    assert "--together_with" in text and "4 for FLUX.2-klein and 8 for Z-Image" in text and "{d" not in text
