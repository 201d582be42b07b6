"""Runs of whole models from the command line: what they leave, kills and full disks, and what they refuse."""

import errno
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from command_line import run_as_main, run_with_small_files, succeed
from dopsd import products
from dopsd.command_line import parse_settings
from dopsd.errors import InputError
from dopsd.history import read_history
from dopsd.output import checkpoint_step, extracted_lora, list_checkpoints
from dopsd.resuming import damage
from models import ONE_MODEL, SLOW, both_models
from waiting import wait_until


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FULL = {"train_mode": "full", "rank": None, "learning_rate": 1e-3}


@pytest.fixture
def train_full(train, tmp_path):
    def run(folder: str = "run", **flags):
        return train(folder, **FULL | {"context_cache_dir": tmp_path / "cache"} | flags)

    return run


def same_transformers(first, second) -> bool:
    first, second = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What a run leaves

DRAWN = {"validation_steps": 2, "validation_prompt": ["a ball", "a box"], "num_validation_images": 1}


@both_models(quick="zimage")
@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=SLOW)])
def test_the_stock_pipeline_draws_what_the_trained_student_draws(train_full, model, tmp_path, precision):
    before = (model.path / WEIGHTS).read_bytes()
    log = succeed(train_full(mixed_precision=precision, checkpointing_steps=2, extract_lora=4, **DRAWN)).log
    run, dtype = tmp_path / "run", torch.bfloat16 if precision == "bf16" else torch.float32
    assert (model.path / WEIGHTS).read_bytes() == before
    stock = model.stock.from_pretrained(run, dtype=dtype)
    stock.set_progress_bar_config(disable=True)
    assert {weight.dtype for weight in load_file(run / WEIGHTS).values()} == {dtype}
    card = ModelCard.load(run / "README.md")
    assert [entry["text"] for entry in card.data.widget] == ["a ball", "a box"]
    for entry in card.data.widget:
        with Image.open(run / entry["output"]["url"]) as image:
            drawn = np.asarray(image)
        assert np.array_equal(drawn, np.asarray(model.draw(stock, entry["text"], 0)))
        assert not np.array_equal(drawn, np.asarray(model.draw(model.pipeline(dtype=dtype), entry["text"], 0)))

    transformer = model.script.MODEL.transformer_class.from_pretrained(
        run / "checkpoint-2", subfolder="transformer", dtype=dtype
    )
    expected = stock.transformer.state_dict()
    assert all(torch.equal(expected[name], weight) for name, weight in transformer.state_dict().items())

    share = extracted_lora(run).share
    assert (
        0.1 < share < 1
        and f"holds {share:.1%} of the change; " in log
        and f"**{share:.1%}** of the change" in card.text
    )
    assert f"The model is {run}; load it: {model.stock.__name__}.from_pretrained(" in log
    code = re.search("```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert f'{model.stock.__name__}.from_pretrained("ACCOUNT/run", dtype=' in code and "lora" not in code
    page = (run / "report.html").read_text()
    assert "All weights of the transformer of" in page and "The model is the folder of this page." in page
    assert "--rank" not in card.text + page and "--ema_device" in card.text


@ONE_MODEL
def test_a_finished_model_can_be_trained_further_and_is_not_overwritten(train_full, train, tmp_path):
    flags = {"trainable_modules": "to_out"}
    succeed(train_full("first", **flags))
    first, before = tmp_path / "first", (tmp_path / "first" / WEIGHTS).read_bytes()
    for wanted in (None, "latest"):
        error = train_full("first", **flags, instance_prompt="another", resume_from_checkpoint=wanted).error
        assert f"--output_dir {first}: holds a finished run's transformer and no checkpoint" in error
    for place in (first, first / "more"):
        error = train_full(**flags, pretrained_model_name_or_path=first, output_dir=place).error
        assert f"--output_dir {place}: is in the folder of --pretrained_model_name_or_path" in error
    succeed(train_full("second", **flags, pretrained_model_name_or_path=first, save_transformer_only=True))
    assert (first / WEIGHTS).read_bytes() == before and not (tmp_path / "second/model_index.json").exists()
    second, first = load_file(tmp_path / "second" / WEIGHTS), load_file(first / WEIGHTS)
    changed = {name.rsplit(".", 1)[0] for name, weight in second.items() if not torch.equal(weight, first[name])}
    assert changed and all(".to_out" in name for name in changed)
    card = ModelCard.load(tmp_path / "second/README.md").text
    assert "with the modules to" in card and 'AutoModel.from_pretrained("ACCOUNT/second", subfolder=' in card


# Stop, resume, survive


@ONE_MODEL
def test_a_stopped_run_saves_and_ends_with_the_same_model(command, arguments, train_full, tmp_path):
    flags = FULL | {"max_train_steps": 12, "lr_scheduler": "cosine", "context_cache_dir": tmp_path / "cache"}
    succeed(train_full("undisturbed", **flags))
    process, log = command.start(*arguments("stopped", **flags))
    wait_until(lambda: read_history(tmp_path / "stopped"), process, log)
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=60)
    assert process.exitcode == 128 + signal.SIGTERM
    (checkpoint,) = list_checkpoints(tmp_path / "stopped")
    step = checkpoint_step(checkpoint)
    assert 0 < step < 12 and f"checkpoint-{step} is saved" in log.read_text(errors="replace")
    page = (tmp_path / "stopped/report.html").read_text()
    assert f"The newest model is that of checkpoint-{step}." in page and "AutoModel" in page

    latest = {"resume_from_checkpoint": "latest"}
    as_lora = FULL | {"train_mode": None, "learning_rate": None}
    assert (
        "its --train_mode was full, now it is lora; pass the same"
        in train_full("stopped", **flags | as_lora | latest).error
    )
    succeed(train_full("stopped", **flags | latest))
    assert same_transformers(tmp_path / "undisturbed", tmp_path / "stopped")

    shutil.copytree(tmp_path / "stopped", tmp_path / "longer")
    succeed(train_full("longer", **flags | latest | {"max_train_steps": 13, "lr_scheduler": "cosine"}))
    assert not same_transformers(tmp_path / "stopped", tmp_path / "longer")
    assert (tmp_path / "longer/model_index.json").is_file()


@ONE_MODEL
@pytest.mark.exhaustive
def test_kills_while_checkpoints_are_written_change_no_weight(command, arguments, train_full, tmp_path):
    flags = FULL | {"max_train_steps": 20, "resume_from_checkpoint": "latest", "context_cache_dir": tmp_path / "cache"}
    succeed(train_full("undisturbed", **flags))
    folder, num_unfinished = tmp_path / "killed", 0
    for number in range(4):
        process, log = command.start(*arguments("killed", **flags | {"checkpointing_steps": 1}))
        wait_until(lambda number=number: len(list_checkpoints(folder)) >= 4 * number, process, log)
        wait_until(lambda: list(folder.glob(".checkpoint-*.tmp")), process, log)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        num_unfinished += bool(list(folder.glob(".checkpoint-*.tmp")))
        assert not [problem for path in list_checkpoints(folder) if (problem := damage(path))]
    succeed(train_full("killed", **flags))
    assert num_unfinished > 0 and same_transformers(tmp_path / "undisturbed", folder)
    assert [row["step"] for row in read_history(folder)] == list(range(1, 21))


@ONE_MODEL
@pytest.mark.exhaustive
def test_a_lora_is_not_resumed_as_a_whole_model(train, tmp_path):
    succeed(train(checkpointing_steps=1))
    error = train(**FULL | {"learning_rate": 1e-2, "resume_from_checkpoint": "latest"}).error
    assert "its --train_mode was lora, now it is full; pass the same, or start in another --output_dir" in error


@ONE_MODEL
@pytest.mark.exhaustive
def test_the_last_finite_weights_are_kept_when_the_loss_diverges(train_full, tmp_path):
    error = train_full(learning_rate=1e30, max_train_steps=5).error
    assert "the weights before it are in checkpoint-1; start in another --output_dir with a lower" in error
    assert "init_lora" not in error
    state = load_file(tmp_path / "run/checkpoint-1" / WEIGHTS)
    assert state and all(weight.isfinite().all() for weight in state.values())


@ONE_MODEL
@SLOW
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones_and_one_line(
    forkserver, train_full, model, arguments, tmp_path
):
    flags = {"checkpointing_steps": 2, "resume_from_checkpoint": "latest", "context_cache_dir": tmp_path / "cache"}
    succeed(train_full(**flags))
    first = tmp_path / "run/checkpoint-2"
    before = (first / WEIGHTS).read_bytes()
    largest = max(path.stat().st_size for path in first.rglob("*") if path.is_file())
    for num_bytes in (8 * 1024, len(before) // 2, largest - 1):
        pipe = tmp_path / f"{num_bytes}.log"  # a pipe has no size
        os.mkfifo(pipe)
        with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), errors="replace") as log:
            texts = arguments("run", **FULL | flags | {"max_train_steps": 6})
            process = forkserver.start(run_with_small_files, str(model.script_path), texts, str(pipe), num_bytes)
            process.join(timeout=120)
            text = log.read()
        errors = [line for line in text.splitlines() if line.startswith(model.script_path.name + ": error: ")]
        assert process.exitcode == 1 and "Traceback" not in text, text
        assert len(errors) == 1 and "checkpoint-4 could not be written" in errors[0], text
        assert "checkpoint-2 is complete" in errors[0]
        assert list_checkpoints(tmp_path / "run") == [first] and (first / WEIGHTS).read_bytes() == before
        assert not list((tmp_path / "run").glob(".checkpoint-*"))
    succeed(train_full(**flags | {"max_train_steps": 6}))
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path / "run")] == [2, 4, 6]


def run_without_room(script: str, arguments: list[str], log: str, folder: str) -> None:
    """Runs the script as on a disk on which the folder's transformer has no room."""
    replace = products.replace_folder

    def fail(new: Path, old: Path) -> None:
        if old == Path(folder, "transformer"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(new, old)

    products.replace_folder = fail
    run_as_main(script, arguments, log)


@ONE_MODEL
@SLOW
def test_a_model_that_cannot_be_written_at_the_end_is_saved_elsewhere(
    forkserver, train_full, model, arguments, tmp_path
):
    succeed(train_full("undisturbed"))
    log, run = forkserver.new_log(), tmp_path / "run"
    process = forkserver.start(run_without_room, str(model.script_path), arguments("run", **FULL), str(log), str(run))
    process.join(timeout=120)
    text = log.read_text(errors="replace")
    assert process.exitcode == 1 and "Traceback" not in text, text
    found = re.search(
        r"transformer could not be written \(.*: make room.*; the model is in (.*), move it to a safe", text
    )
    assert same_transformers(tmp_path / "undisturbed", Path(found[1]))
    assert not list(run.glob(".transformer*"))
    shutil.rmtree(found[1])


@ONE_MODEL
def test_a_file_in_the_place_of_the_transformer_is_one_line(train_full, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/transformer").write_text("mine")
    assert f"--output_dir {tmp_path}/run: its transformer is not a folder; remove it" in train_full().error


# What is refused

REFUSED = {
    "rank": (
        FULL | {"rank": 8},
        "--rank: goes with --train_mode lora; pass that, or drop the flag; --extract_lora saves a LoRA of that rank "
        "beside a whole model",
    ),
    "lora layers": (
        FULL | {"lora_layers": "to_q"},
        "--lora_layers: goes with --train_mode lora; .*; --trainable_modules",
    ),
    "init lora": (FULL | {"init_lora": "x"}, "--init_lora: goes with --train_mode lora; pass that, or drop the flag"),
    "alpha": (FULL | {"lora_alpha": 8}, "--lora_alpha: goes with --train_mode lora; pass that, or drop the flag"),
    "dropout": (
        FULL | {"lora_dropout": 0.1},
        "--lora_dropout: goes with --train_mode lora; pass that, or drop the flag",
    ),
    **{
        name: ({name: value}, f"--{name}: goes with --train_mode full; pass that, or drop the flag")
        for name, value in {
            "trainable_modules": "to_q",
            "bf16_update": "stochastic_rounding",
            "ema_device": "cpu",
            "save_transformer_only": True,
            "extract_lora": 4,
        }.items()
    },
    "extracted rank": (FULL | {"extract_lora": 0}, "--extract_lora 0: must be a whole number of at least 1"),
    "quantized": (
        FULL | {"quantize": "nf4"},
        r"--train_mode full: cannot be combined with --quantize nf4; drop one of them \(--quantize none if a",
    ),
    "preset": (
        FULL | {"preset": "8gb"},
        "--train_mode full: cannot be combined with --quantize nf4; drop one of them",
    ),
    "bitsandbytes": (
        FULL | {"bnb_quantization_config_path": "x.json"},
        "--train_mode full: cannot be combined with --bnb_quantization_config_path; drop one of them$",
    ),
    "fp16": (FULL | {"mixed_precision": "fp16"}, "--train_mode full: cannot be combined with --mixed_precision fp16"),
    "prodigy": (
        FULL | {"optimizer": "prodigy"},
        "--train_mode full: needs --optimizer AdamW; drop --optimizer prod",
    ),
    "two places": (
        FULL | {"ema_device": "cuda", "offload_transformer": True},
        "--ema_device cuda: cannot be combined with --offload_transformer",
    ),
}


@ONE_MODEL
@pytest.mark.parametrize("case", REFUSED)
def test_flags_that_do_not_go_together_are_one_line(model, arguments, case):
    flags, expected = REFUSED[case]
    with pytest.raises(InputError, match=f"^{expected}") as caught:
        parse_settings(model.script.MODEL, "", arguments(**{"rank": None} | flags))
    assert "\n" not in str(caught.value)


@ONE_MODEL
def test_a_preset_without_its_quantization_goes_with_whole_models(model, arguments, caplog):
    settings = parse_settings(model.script.MODEL, "", arguments(**FULL, preset="8gb", quantize="none"))
    assert settings.model.quantize is None and settings.model.quantize_text_encoder == "nf4"
    assert "--preset 8gb: is for a LoRA, and a whole model takes several times the memory; try --config" in caplog.text


@ONE_MODEL
@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        ("nothing", "'nothing' matches no module; some of the modules are "),
        ("nothing.*", "the expression matches no module; some of the modules are "),
        ("attn.(", "not a valid regular expression"),
        ("pos_embed", "the modules have no weights; name others"),
    ],
)
def test_modules_that_cannot_be_trained_are_named(train_full, modules, problem):
    result = train_full(trainable_modules=modules)
    assert f"--trainable_modules {modules}: {problem}" in result.error and "Loading" not in result.log
