"""Whole runs on editing pairs: sheets, card, resuming, two processes, and bad input from the command line."""

import html
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from command_line import LORA_FILE, assert_close_weights, same_weights, succeed
from dopsd.history import read_history
from dopsd.sheets import CELLS_OF_FIVE
from editing_pairs import opened, read_rows, write_pairs, write_rows
from models import ONE_MODEL, SLOW, SUFFIX, ZIMAGE
from reading_sheets import are_in_a_column, are_in_a_row


@ONE_MODEL
def test_sheets_and_card_show_what_the_stock_pipeline_draws(train, model, make_picture, tmp_path, monkeypatch):
    flags = write_pairs(tmp_path / "pairs", make_picture, ((64, 64), [(64, 64)]), prompt="make it blue")
    others = [tmp_path / name for name in ("to_edit_1.png", "to_edit_2.png")]
    make_picture(9, 64, 80).save(others[0])
    make_picture(7, 96, 64).save(others[1])
    flags |= {"validation_prompt": ["erase it"], "validation_image": [f"{others[0]},{others[1]}"]}
    flags |= {"validation_steps": 2, "num_validation_images": 1, "retention_prompts": ["a", "b"]}
    flags |= {"validation_height": 96, "validation_width": 96}
    log = succeed(train(**flags, final_validation_prompt="paint it")).log
    assert " failed (" not in log
    run, stock = tmp_path / "run", model.pipeline()
    source, result = (opened(tmp_path / f"pairs/{name}.png") for name in ("0-0", "0"))
    lesson = {"prompt": "make it blue 0", "image": [source]}
    base = model.draw(stock, seed=0, **lesson)
    teacher = model.draw(stock, "make it blue 0" + SUFFIX, 0, image=[source, result])
    assert are_in_a_row(run / "preview.png", source, base, teacher, result)

    asked = {"image": [*map(opened, others)], "height": 80, "width": 64}
    base_asked = model.draw(stock, "erase it", 0, **asked)
    stock.load_lora_weights(run)
    student = model.draw(stock, seed=0, **lesson)
    assert are_in_a_row(run / "lessons-2.png", source, base, teacher, student, result, cell_pixels=CELLS_OF_FIVE)
    drawn = {prompt: model.draw(stock, prompt, 0, **asked) for prompt in ("erase it", "paint it")}
    assert are_in_a_column(run / "validation-2.png", base_asked, *drawn.values())
    for number, image in enumerate(drawn.values()):
        shown = opened(run / f"images/validation_{number}.png")
        assert shown.size == (64 + 8 + 120 + 8 + 64, 80)  # side by side, all 80 pixels high
        assert shown.crop((200, 0, 264, 80)) == image and shown.crop((0, 0, 64, 80)) == opened(others[0])

    for name in ("README.md", "report.html"):
        assert "image=[load_image(" in html.unescape((run / name).read_text())
    card = ModelCard.load(run / "README.md")
    assert card.data.pipeline_tag == "image-to-image" and str(tmp_path) not in card.text
    monkeypatch.chdir(tmp_path)
    code = card.text.partition("```python\n")[2].partition("```")[0]
    names = {'"cuda"': '"cpu"', f'"path/to/{model.path.name}"': repr(str(model.path)), '"ACCOUNT/run"': repr(str(run))}
    for old, new in {**names, "bfloat16": "float32", ").images[0]": "generator=generator).images[0]"}.items():
        assert old in code
        code = code.replace(old, new)
    exec(code, {"generator": torch.Generator().manual_seed(0)})
    assert opened(tmp_path / "image.png") == drawn["erase it"]


@ONE_MODEL
@SLOW
def test_a_resumed_run_ends_with_the_same_weights_and_encodes_nothing(train, make_picture, tmp_path):
    pairs = [((64, 64), [(64, 96)]), ((64, 64), [(64, 64)]), ((80, 64), [(160, 128), (64, 64)])]
    flags = write_pairs(tmp_path / "pairs", make_picture, *pairs)
    flags |= {"random_flip": True, "train_batch_size": 2, "checkpointing_steps": 2, "max_train_steps": 4}
    flags |= {"with_prior_preservation": True, "class_prompt": ["erase it", "make it red"]}
    flags |= {"context_cache_dir": tmp_path / "cache"}
    succeed(train("whole", **flags))
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    log = succeed(train("resumed", **flags, resume_from_checkpoint="latest")).log
    assert "steps: 2 to 4" in log and "Loading weights" not in log
    assert same_weights(tmp_path / "whole", tmp_path / "resumed")
    uncached = flags | {"context_cache_dir": None, "no_context_cache": True}
    succeed(train("uncached", **uncached))
    assert_close_weights(tmp_path / "whole", tmp_path / "uncached", atol=1e-5, rtol=1e-3)

    rows = read_rows(tmp_path / "pairs")
    rows[1]["source"] = ["0-0.png"] + rows[1]["source"]
    write_rows(tmp_path / "pairs", rows)
    error = train("resumed", **flags | {"max_train_steps": 5}, resume_from_checkpoint="latest").error
    assert "checkpoint-4: 1.png has other pictures to edit than before (pictures affected: 1); undo that" in error


@ONE_MODEL
@pytest.mark.exhaustive
def test_two_processes_give_the_editor_of_one_with_twice_the_accumulation(
    torchrun, command, arguments, make_picture, tmp_path
):
    sizes = [(64, 96), (64, 64), (64, 96), (96, 64)]
    flags = write_pairs(tmp_path / "pairs", make_picture, *[((64, 64), [size]) for size in sizes])
    flags |= {"learning_rate": 1e-3, "max_train_steps": 3, "train_batch_size": 2}
    flags |= {"with_prior_preservation": True, "class_prompt": ["erase it", "make it red"]}
    process, log = torchrun(arguments("two", **flags, gradient_accumulation_steps=2))
    succeed(command(*arguments("one", **flags, gradient_accumulation_steps=4)))
    assert process.wait(timeout=240) == 0, log.read_text()
    assert_close_weights(tmp_path / "one", tmp_path / "two", atol=1e-5, rtol=1e-3)
    one, two = ([line["prior_loss"] for line in read_history(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-3, abs=1e-9) and one[-1] > 0


# Bad input


def with_source(folder, source):
    rows = read_rows(folder)
    write_rows(folder, [rows[0], rows[1] | {"source": source}])


def damaged(folder):
    (folder / "1-0.png").write_bytes((folder / "1-0.png").read_bytes()[:80])


def replaced_by(size):
    return lambda folder: Image.new("RGB", size).save(folder / "1-0.png")


DRAWN = {"validation_steps": 2, "validation_prompt": ["a", "b"]}

# Name -> (what happens to the folder, changed flags, what the error contains)
BAD_PAIRS = {
    "missing source": (
        lambda f: with_source(f, ["gone.png"]),
        {},
        "metadata.jsonl line 2, column 'source', item 1 of 1: there",
    ),
    "no list": (lambda f: with_source(f, [["1-0.png"]]), {}, "metadata.jsonl line 2, column 'source'"),
    "empty list": (lambda f: with_source(f, []), {}, "metadata.jsonl line 2, column 'source'"),
    "damaged source": (damaged, {}, "1-0.png: cannot be read as a picture"),
    "small source": (replaced_by((64, 63)), {}, "1-0.png: 63x64 pixels are too small to edit"),
    "long source": (replaced_by((640, 64)), {}, "1-0.png: 64x640 pixels are too long and narrow"),
    "no column": (None, {"cond_image_column": "before"}, "--cond_image_column before: metadata.jsonl has no such"),
    "cut text": (None, {"teacher_prompt_suffix": "s" * 60}, "0.png, the teacher's prompt: 'edit 0ss"),
    "other": (None, {"teacher_picture": "other"}, "--teacher_picture other: cannot be combined with --cond_image"),
    "no pairs": (
        None,
        {"cond_image_column": None, "validation_image": "a.png"},
        "--validation_image: goes with --cond_image_column; add that, or drop the flag",
    ),
    "missing image": (None, DRAWN | {"validation_image": ["gone.png"]}, "--validation_image gone.png: there is no"),
    "wrong number": (None, DRAWN | {"validation_image": ["0.png"] * 3}, "--validation_image: got 3 for 2 of --valid"),
}


@ONE_MODEL
@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs_are_one_line_that_names_them(train, make_picture, tmp_path, name):
    change, flags, expected = BAD_PAIRS[name]
    pairs = write_pairs(tmp_path / "pairs", make_picture, *[((64, 64), [(64, 64)])] * 2)
    if change is not None:
        change(tmp_path / "pairs")
    result = train(**pairs | flags)
    assert expected in result.error and "Loading weights" not in result.log
    assert not (tmp_path / "run" / LORA_FILE).exists()


@ZIMAGE
@pytest.mark.parametrize("flag", ["cond_image_column", "validation_image"])
def test_a_model_that_takes_no_pictures_refuses_them(train, flag):
    assert f"--{flag}: Z-Image-Turbo takes no pictures to edit; drop the flag" in train(**{flag: "source"}).error
