"""Whole runs from the command line: what they leave, and what they do with their flags."""

import itertools
import json
import logging
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from command_line import LORA_FILE, assert_close_weights, same_weights, succeed, weights
from dopsd.history import read_history
from dopsd.lora_roles import StudentTeacherLoRA
from models import ONE_MODEL, SLOW, both_models, every_context


# What a run leaves


@pytest.mark.parametrize(
    ("precision", "alpha", "tolerance"),
    # alpha / rank is folded into lora_B: exact for powers of two, one rounding otherwise.
    [
        ("no", None, 0.0),
        pytest.param("no", 2, 0.0, marks=SLOW),
        pytest.param("no", 12, 1e-6, marks=SLOW),
        ("bf16", None, 1e-2),
        pytest.param("bf16", 12, 1e-2, marks=SLOW),
    ],
)
def test_the_stock_pipeline_draws_what_the_trained_student_draws(
    train, model, tmp_path, recwarn, caplog, precision, alpha, tolerance
):
    succeed(train(mixed_precision=precision, lora_alpha=alpha, max_train_steps=6, checkpointing_steps=6))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {dtype}

    state = load_file(tmp_path / "run/checkpoint-6/adapters.safetensors")
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    in_training = model.pipeline(dtype=dtype)
    modules = sorted({name.split(".", 1)[1].rsplit(".lora_", 1)[0] for name in state})
    roles = StudentTeacherLoRA(in_training.transformer, modules, rank=4, alpha=alpha or 8)
    roles.load_state_dict(state)

    stock = model.pipeline(dtype=dtype)
    base = model.sample(stock)
    recwarn.clear()
    # diffusers' logger does not pass records on to the root, where caplog listens.
    listened = [logging.getLogger(name) for name in ("diffusers", "peft")]
    for logger in listened:
        logger.addHandler(caplog.handler)
    try:
        stock.load_lora_weights(tmp_path / "run")
    finally:
        for logger in listened:
            logger.removeHandler(caplog.handler)
    assert not [str(warning.message) for warning in recwarn.list]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    student, loaded = model.sample(in_training), model.sample(stock)
    assert (student - base).norm() / base.norm() > 0.01
    assert (loaded - student).norm() / student.norm() <= tolerance


def test_a_checkpoint_holds_adapters_and_optimizer_and_never_the_base_model(train, tmp_path):
    succeed(train(checkpointing_steps=1, max_train_steps=3, checkpoints_total_limit=2))
    assert sorted(path.name for path in (tmp_path / "run").glob("[!.]*")) == [
        "README.md",
        "checkpoint-2",
        "checkpoint-3",
        "context_cache",
        "curves.png",
        "metrics.jsonl",
        LORA_FILE,
        "report.html",
    ]
    checkpoint = tmp_path / "run/checkpoint-3"
    expected = ["adapters.safetensors", LORA_FILE, "state.json", "trainer_state.pt"]
    assert sorted(path.name for path in checkpoint.iterdir()) == expected
    names = {name.split(".lora_")[0].split(".", 1)[1] for name in load_file(checkpoint / "adapters.safetensors")}
    assert len(names) == 28
    assert same_weights(checkpoint, tmp_path / "run")
    assert set(torch.load(checkpoint / "trainer_state.pt", weights_only=True)) == {"optimizer", "lr_scheduler"}
    card = ModelCard.load(tmp_path / "run/README.md")
    assert card.data.instance_prompt == "a ball" and "num_inference_steps" in card.text


@ONE_MODEL
@SLOW
def test_the_same_command_leaves_the_same_lora_file(train, tmp_path):
    texts = []
    for name in ("first", "second"):
        succeed(train(name))
        with safe_open(tmp_path / name / LORA_FILE, "pt") as opened:
            texts.append(opened.metadata())
    assert same_weights(tmp_path / "first", tmp_path / "second")
    assert texts[0] == texts[1]


@ONE_MODEL
@SLOW
def test_upcast_before_saving_saves_float32(train, tmp_path):
    succeed(train(mixed_precision="bf16", upcast_before_saving=True))
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {torch.float32}


def test_the_log_says_what_is_trained(train, model):
    layers, modules = model.attention
    log = succeed(train(lora_layers=layers, seed=None)).log
    assert modules in log
    assert "No --seed was given; using --seed " in log
    encoding = "Encoding prompts with pictures" if "with pictures" in model.encodings[0] else "Encoding pictures"
    for bar in ("Reading pictures", "Encoding prompts", encoding, "Steps"):
        assert bar in log
    assert "load_lora_weights" in log


@ONE_MODEL
@SLOW
def test_tensorboard_files_hold_the_scalars_and_the_pictures(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    succeed(train(report_to="tensorboard", validation_steps=2, num_validation_images=1))
    file = next((tmp_path / "run/logs").glob("*/events*"))
    events = EventAccumulator(str(file))
    events.Reload()
    per_state = {f"{name}/state_{k}" for name in ("loss", "cosine", "norm_ratio") for k in (1, 2, 3, 4)}
    others = {"loss", "lr", "grad_norm", "seconds_per_step", "peak_memory_gb", "retention"}
    assert per_state | others <= set(events.Tags()["scalars"])
    assert {"preview", "validation", "rollout", "retention", "story"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.step for event in events.Scalars("retention")] == [2]


@SLOW
def test_an_undistilled_model_gets_a_warning(train, model, tmp_path):
    undistilled = {"is_distilled": False} if "flux2" in model.script.__name__ else {"shift": 6.0}
    base = model.make(tmp_path / "base", **undistilled)
    assert "step-distilled: D-OPSD preserves" in succeed(train(pretrained_model_name_or_path=base)).log


@SLOW
def test_a_hub_id_is_read_from_the_hub_cache(train, model, tmp_path):
    commit = "0" * 40
    repository = tmp_path / "hub/models--org--tiny"
    shutil.copytree(model.path, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    succeed(train("hub", pretrained_model_name_or_path="org/tiny", cache_dir=tmp_path / "hub"))
    succeed(train("local"))
    assert same_weights(tmp_path / "hub", tmp_path / "local")


# What training does


@every_context(quick="flux2-vlm")
def test_the_student_comes_closer_to_what_the_teacher_draws(train, model, photos, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(photos / "0.png", one)
    succeed(train(instance_data_dir=one, max_train_steps=60, teacher="base", rank=8))
    stock = model.pipeline()
    with Image.open(one / "0.png") as picture:
        teacher = model.sample(stock, **model.as_teacher(picture.convert("RGB")))
    before = (model.sample(stock) - teacher).norm()
    stock.load_lora_weights(tmp_path / "run")
    after = (model.sample(stock) - teacher).norm()
    assert after < 0.6 * before


EFFECTIVE_FLAGS = [
    {"teacher": "base"},
    {"teacher": "student"},
    {"ema_decay": 0.9},
    {"loss_space": "velocity"},
    {"num_rollout_steps": 2, "num_trained_states": 2},
    {"num_trained_states": 1},
    {"with_prior_preservation": True},
    {"teacher_prompt_suffix": " otherwise"},
    {"lora_dropout": 0.3},
    {"optimizer": "prodigy"},
    {"lr_scheduler": "cosine"},
    {"lr_warmup_steps": 2, "lr_scheduler": "constant_with_warmup"},
    {"max_grad_norm": 1e-6},
    {"scale_lr": True, "gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 2},
    {"adam_weight_decay": 0.5},
    {"adam_beta1": 0.5},
    {"random_flip": True},
    {"center_crop": True},
    {"repeats": 2},
    {"seed": 1},
]


@ONE_MODEL
@SLOW
def test_each_effective_flag_changes_the_weights(train, tmp_path):
    """After a few steps: the teachers agree at the first."""
    common = {"max_train_steps": 4, "ema_decay": 0.5, "context_cache_dir": tmp_path / "cache"}
    ends = {"": tmp_path / "default"}
    succeed(train("default", **common))
    for number, flags in enumerate(EFFECTIVE_FLAGS):
        succeed(train(f"{number}", **common | flags))
        ends[str(flags)] = tmp_path / f"{number}"
    for (name, one), (other_name, other) in itertools.combinations(ends.items(), 2):
        assert not same_weights(one, other), f"{name} and {other_name}"


@SLOW
def test_gradient_checkpointing_changes_no_weight(train, tmp_path):
    plain = succeed(train("plain", lora_dropout=0.2))
    saving = succeed(train("saving", lora_dropout=0.2, gradient_checkpointing=True))
    assert "gradient checkpointing: off" in plain.log and "gradient checkpointing: on" in saving.log
    assert_close_weights(tmp_path / "plain", tmp_path / "saving", atol=1e-5, rtol=1e-3)


@SLOW
def test_batch_size_does_not_change_the_weights(train, tmp_path):
    """Noise, captions and crops belong to a sample's place; the batch only says how many are computed together."""
    succeed(train("one", train_batch_size=1, gradient_accumulation_steps=3, max_train_steps=3))
    succeed(train("three", train_batch_size=3, gradient_accumulation_steps=1, max_train_steps=3))
    assert_close_weights(tmp_path / "one", tmp_path / "three", atol=1e-4, rtol=1e-3)


@ONE_MODEL
@SLOW
def test_the_learning_rate_follows_its_schedule(train, tmp_path):
    succeed(train(lr_scheduler="linear", lr_warmup_steps=2, max_train_steps=6, learning_rate=0.1))
    rates = [line["lr"] for line in read_history(tmp_path / "run")]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.075, 0.05, 0.025])


@both_models(quick="flux2")
def test_init_lora_is_where_training_starts(train, tmp_path):
    succeed(train("first", lora_alpha=12))
    log = succeed(train("second", init_lora=tmp_path / "first", lora_alpha=4, learning_rate=1e-12)).log
    assert_close_weights(tmp_path / "first", tmp_path / "second")
    assert "--init_lora:" not in log


@ONE_MODEL
@SLOW
def test_modules_that_init_lora_lacks_start_at_zero_with_a_warning(train, model, tmp_path):
    layers, _ = model.attention
    succeed(train("first", lora_layers=layers))
    log = succeed(train("second", init_lora=tmp_path / "first", learning_rate=1e-12)).log
    assert "--init_lora: 20 of the trained modules are not in it and start at zero" in log
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name])
    new = [weight for name, weight in second.items() if name not in first and ".lora_B." in name]
    assert len(new) == 20 and all(weight.abs().max() < 1e-9 for weight in new)


# A loss that is not finite


@ONE_MODEL
def test_a_loss_that_is_not_finite_at_the_first_step_leaves_nothing(train, model, tmp_path):
    folder = shutil.copytree(model.path, tmp_path / "broken")
    pipeline = model.stock.from_pretrained(folder)
    with torch.no_grad():
        next(pipeline.transformer.parameters()).fill_(float("nan"))
    pipeline.transformer.save_pretrained(folder / "transformer")
    result = train(pretrained_model_name_or_path=folder)
    assert "at step 1 the loss is nan" in result.error
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / LORA_FILE).exists()


@both_models(quick="zimage")
def test_the_last_finite_weights_are_kept_when_the_loss_diverges(train, tmp_path):
    result = train(learning_rate=1e30, max_train_steps=5)
    assert "at step 2 the loss is" in result.error
    assert "the weights before it are in checkpoint-1" in result.error
    state = load_file(tmp_path / "run/checkpoint-1/adapters.safetensors")
    assert state and all(weight.isfinite().all() for weight in state.values())


# The context cache


@every_context(quick="flux2")
def test_a_second_run_encodes_nothing_and_loads_no_encoder(train, model, tmp_path):
    first = succeed(train("first", context_cache_dir=tmp_path / "cache"))
    second = succeed(train("second", context_cache_dir=tmp_path / "cache"))
    everything, nothing = model.encodings
    assert f"Encoding {everything}: " in first.log
    assert f"Encoding {nothing}: 0.0 MB" in second.log
    assert "Loading weights" in first.log and "Encoding prompts" in first.log  # transformers' bar: the text encoder
    assert "Loading weights" not in second.log and "Encoding prompts" not in second.log
    assert same_weights(tmp_path / "first", tmp_path / "second")


@every_context(quick="flux2-vlm")
def test_training_without_the_cache_gives_the_same_weights(train, tmp_path):
    flags = {"random_flip": True, "repeats": 2, "max_train_steps": 5}
    succeed(train("cached", **flags))
    log = succeed(train("uncached", **flags, no_context_cache=True)).log
    assert "Encoding" not in log
    assert not (tmp_path / "uncached/context_cache").exists()
    assert same_weights(tmp_path / "cached", tmp_path / "uncached")


def test_the_history_has_every_step(train, tmp_path):
    succeed(train(max_train_steps=3))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["loss"] > 0 for line in lines)
