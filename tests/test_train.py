"""The scripts from their command lines: what it leaves, how it resumes, what it says to bad input."""

import gc
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from huggingface_hub import ModelCard
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from test_publish import TOKEN, Hub, serving
from transformers import AutoConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel, Qwen3VLVisionModel

import train_dopsd_flux2 as script  # for what both scripts share
from command_line import LORA_FILE, Result, same_weights, succeed, weights
from dopsd.roles import StudentTeacherLoRA
from models import MODELS
from tiny_vlm import make_tiny_vlm
from tiny_zimage import tiny_text_config


# Both scripts share all but their section "The model" (test_scripts.py): what does not touch it is tested with one.
ONE_SCRIPT = pytest.mark.parametrize("model", ["flux2"], indirect=True)
WITH_VLM = pytest.mark.parametrize("model", ["flux2-vlm", "zimage"], indirect=True)
ZIMAGE = pytest.mark.parametrize("model", ["zimage"], indirect=True)
EVERY_CONTEXT = pytest.mark.parametrize("model", MODELS, indirect=True)

BUCKETS = {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "64,64;64,128;112,64"}


@pytest.fixture
def train(command, model, photos, tmp_path):
    """A short run. Keyword arguments are flags: True for a switch, None to leave one out, a list for several."""

    def run(folder="run", **flags) -> Result:
        flags = {
            "pretrained_model_name_or_path": model.path,
            "instance_data_dir": photos,
            "instance_prompt": "a ball",
            **model.flags,
            "output_dir": tmp_path / folder,
            "resolution": 64,
            "rank": 4,
            "learning_rate": 1e-2,
            "max_train_steps": 2,
            "seed": 0,
            "report_to": "none",
            "validation_steps": 0,
        } | flags
        arguments = []
        for name, value in flags.items():
            if value is None:
                continue
            arguments.append(f"--{name}")
            if value is not True:
                arguments += value if isinstance(value, list) else [value]
        return command(*arguments)

    return run


# What a run leaves


@pytest.mark.parametrize(
    ("precision", "rank", "alpha", "tolerance"),
    # alpha / rank is folded into lora_B: exact for powers of two, one rounding otherwise.
    [("no", 4, None, 0.0), ("no", 4, 2, 0.0), ("no", 4, 12, 1e-6), ("bf16", 4, None, 1e-2), ("bf16", 4, 12, 1e-2)],
)
def test_stock_pipeline_gives_the_images_of_trainings_student(
    train, model, tmp_path, recwarn, caplog, precision, rank, alpha, tolerance
):
    succeed(train(mixed_precision=precision, rank=rank, lora_alpha=alpha, max_train_steps=10, checkpointing_steps=10))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {dtype}

    state = load_file(tmp_path / "run/checkpoint-10/adapters.safetensors")
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    in_training = model.pipeline(dtype=dtype)
    modules = sorted({name.split(".", 1)[1].rsplit(".lora_", 1)[0] for name in state})
    roles = StudentTeacherLoRA(in_training.transformer, modules, rank=rank, alpha=alpha or 2 * rank)
    roles.load_state_dict(state)

    stock = model.pipeline(dtype=dtype)
    base = model.sample(stock)
    recwarn.clear()
    for name in ("diffusers", "peft"):  # diffusers' logger does not pass on to the root, where caplog listens
        logging.getLogger(name).addHandler(caplog.handler)
    stock.load_lora_weights(tmp_path / "run")
    assert not [str(warning.message) for warning in recwarn.list]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    student, loaded = model.sample(in_training), model.sample(stock)
    assert (student - base).norm() / base.norm() > 0.01
    assert (loaded - student).norm() / student.norm() <= tolerance


def test_a_checkpoint_holds_adapters_and_optimizer_and_never_the_base(train, tmp_path):
    succeed(train(checkpointing_steps=1, max_train_steps=3, checkpoints_total_limit=2))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "README.md",
        "checkpoint-2",
        "checkpoint-3",
        "context_cache",
        "metrics.jsonl",
        LORA_FILE,
    ]
    checkpoint = tmp_path / "run/checkpoint-3"
    expected = ["adapters.safetensors", LORA_FILE, "state.json", "trainer_state.pt"]
    assert sorted(path.name for path in checkpoint.iterdir()) == expected
    names = {name.split(".lora_")[0].split(".", 1)[1] for name in load_file(checkpoint / "adapters.safetensors")}
    assert len(names) == 28
    assert same_weights(checkpoint, tmp_path / "run")
    assert set(torch.load(checkpoint / "trainer_state.pt", weights_only=True)) == {"optimizer", "lr_scheduler"}


@ONE_SCRIPT
def test_the_lora_file_is_the_same_for_the_same_command(train, tmp_path):
    succeed(train("first"))
    succeed(train("second"))
    assert same_weights(tmp_path / "first", tmp_path / "second")
    texts = []
    for name in ("first", "second"):
        with safe_open(tmp_path / name / LORA_FILE, "pt") as opened:
            texts.append(opened.metadata())
    assert texts[0] == texts[1]


@ONE_SCRIPT
def test_upcast_before_saving(train, tmp_path):
    succeed(train(mixed_precision="bf16", upcast_before_saving=True))
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {torch.float32}


def test_gradient_checkpointing_changes_no_weight(train, tmp_path):
    plain = succeed(train("plain", lora_dropout=0.2))
    saving = succeed(train("saving", lora_dropout=0.2, gradient_checkpointing=True))
    assert "gradient checkpointing: off" in plain.log and "gradient checkpointing: on" in saving.log
    first, second = weights(tmp_path / "plain"), weights(tmp_path / "saving")
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-3)


@EVERY_CONTEXT
def test_student_comes_closer_to_what_the_teacher_draws(train, model, photos, tmp_path):
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


def test_what_the_run_says(train, model):
    layers, modules = model.attention
    log = succeed(train(lora_layers=layers, seed=None)).log
    assert modules in log
    assert "--seed " in log and "was drawn" in log
    encoding = "Encoding prompts with pictures" if "with pictures" in model.encodings[0] else "Encoding pictures"
    for bar in ("Reading pictures", "Encoding prompts", encoding, "Steps"):
        assert bar in log
    assert "load_lora_weights" in log


@ONE_SCRIPT
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


def test_an_undistilled_model_gets_a_warning(train, model, tmp_path):
    undistilled = {"is_distilled": False} if model.script is script else {"shift": 6.0}
    base = model.make(tmp_path / "base", **undistilled)
    assert "step-distilled: D-OPSD keeps" in succeed(train(pretrained_model_name_or_path=base)).log
    assert "step-distilled: D-OPSD keeps" not in succeed(train("distilled")).log


EFFECTIVE_FLAGS = [
    {"teacher": "base"},
    {"teacher": "student"},
    {"ema_decay": 0.9},
    {"loss_space": "velocity"},
    {"num_rollout_steps": 2},
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


@ONE_SCRIPT
def test_every_flag_that_should_changes_the_weights(train, tmp_path):
    """Steps enough for base, average and student to part, which agree at the first."""
    common = {"max_train_steps": 4, "ema_decay": 0.5, "context_cache_dir": tmp_path / "cache"}
    ends = {"": tmp_path / "default"}
    succeed(train("default", **common))
    for number, flags in enumerate(EFFECTIVE_FLAGS):
        succeed(train(f"{number}", **common | flags))
        ends[str(flags)] = tmp_path / f"{number}"
    for (name, one), (other_name, other) in itertools.combinations(ends.items(), 2):
        assert not same_weights(one, other), f"{name} and {other_name}"


@ONE_SCRIPT
def test_8_bit_adam_keeps_8_bit_states(train, tmp_path):
    # bitsandbytes leaves tensors of fewer than 4096 elements in 32 bits.
    succeed(train(use_8bit_adam=True, rank=128, checkpointing_steps=2))
    optimizer = torch.load(tmp_path / "run/checkpoint-2/trainer_state.pt", weights_only=True)["optimizer"]

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for inner in value.values():
                yield from tensors(inner)

    assert torch.uint8 in {tensor.dtype for tensor in tensors(optimizer["state"])}


@ONE_SCRIPT
def test_the_learning_rate_follows_its_schedule(train, tmp_path):
    flags = {"lr_scheduler": "linear", "lr_warmup_steps": 2, "max_train_steps": 6, "learning_rate": 0.1}
    succeed(train(**flags))
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.075, 0.05, 0.025])


def test_each_caption_of_several_is_used(train, photos, tmp_path):
    both = with_jsonl(tmp_path / "data", photos) | {"max_train_steps": 6}
    succeed(train("both", **both))
    for column in ("short", "long"):
        succeed(train(column, **both | {"caption_column": column}))
        assert not same_weights(tmp_path / "both", tmp_path / column)


def test_init_lora_is_where_training_starts(train, tmp_path):
    succeed(train("first", lora_alpha=12))
    succeed(train("second", init_lora=tmp_path / "first", lora_alpha=4, learning_rate=1e-12))
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name in first:
        torch.testing.assert_close(first[name], second[name])


# Parts of the loop


def test_every_sample_of_a_step_counts_the_same_whoever_computes_it():
    sizes = [1, 2, 2, 4, 1, 3]  # of the places 6 to 11: step 1 of two processes with three batches each
    seen = []
    for process in range(2):
        run = SimpleNamespace(
            accelerator=SimpleNamespace(num_processes=2, process_index=process),
            args=SimpleNamespace(gradient_accumulation_steps=3),
            order=SimpleNamespace(batch=lambda place: [f"{place}.{i}" for i in range(sizes[place - 6])]),
        )
        seen += script.micro_batches(run, step=1)
    assert sorted(place for place, *_ in seen) == [6, 7, 8, 9, 10, 11]
    # Processes average over themselves and accelerate over the accumulation: each sample ends with 1 / 13.
    for _, samples, weight in seen:
        assert weight / 6 / len(samples) == pytest.approx(1 / 13)


@ONE_SCRIPT
def test_encoders_leave_the_accelerator_and_come_only_where_needed(model, photos, tmp_path, monkeypatch):
    args = script.parse_args(
        ["--pretrained_model_name_or_path", str(model.path), "--instance_data_dir", str(photos), "--seed", "0"]
        + ["--instance_prompt", "a ball", "--resolution", "64", "--max_sequence_length", "80", "--center_crop"]
        + ["--teacher_prompt_suffix", " like this", "--output_dir", str(tmp_path), "--validation_steps", "0"]
        + ["--random_flip"]
    )
    script.check_args(args)
    PartialState()  # the logger asks it which process this is
    accelerator = SimpleNamespace(
        device=torch.device("cpu:0"),  # told apart from "cpu" by its name
        process_index=0,
        num_processes=1,
        is_local_main_process=True,
        wait_for_everyone=lambda: None,
    )
    pictures = script.read_pictures(args)
    examples = script.plan_examples(pictures, [(64, 64)] * 3, args)
    digests = script.picture_digests(pictures)
    config = model.pipeline().transformer.config
    moves = []
    move = torch.nn.Module.to

    def record(module, *where, **kwargs):
        moves.append((type(module).__name__, *map(str, where)))
        return move(module, *where, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", record)
    contexts = script.open_contexts(args, accelerator, pictures, digests, examples, config, torch.float32)
    script.load_contexts(contexts, accelerator)
    assert contexts.pipeline.text_encoder is None
    moves = [entry for entry in moves if "cpu" in entry[1:] or "cpu:0" in entry[1:]]
    assert [where for name, where in moves if name == "Qwen3ForCausalLM"] == ["cpu:0"]
    assert [where for name, where in moves if name == "AutoencoderKLFlux2"] == ["cpu:0", "cpu"]

    student, teacher = contexts.load([script.Sample(example=1, epoch=0, caption=0, flip=True)])
    stock = script.Pipeline.from_pretrained(model.path)
    picture = ImageOps.mirror(script.crop_image(script.read_image(pictures[1]), examples[1], flip=False))
    expected = stock.encode_teacher(["a ball"], [picture], prompt_suffix=" like this", max_sequence_length=80)
    assert torch.equal(student.prompt_embeds, stock.encode_student(["a ball"], max_sequence_length=80).prompt_embeds)
    assert torch.equal(teacher.prompt_embeds, expected.prompt_embeds)
    assert torch.equal(teacher.references[0], expected.references[0])


# The context cache


@EVERY_CONTEXT
def test_a_second_run_encodes_nothing_and_loads_no_encoder(train, model, tmp_path):
    first = succeed(train("first", context_cache_dir=tmp_path / "cache"))
    second = succeed(train("second", context_cache_dir=tmp_path / "cache"))
    everything, nothing = model.encodings
    assert f"Encoding {everything}: " in first.log
    assert f"Encoding {nothing}: 0.0 MB" in second.log
    assert "Loading weights" in first.log and "Encoding prompts" in first.log  # transformers' bar: the text encoder
    assert "Loading weights" not in second.log and "Encoding prompts" not in second.log
    assert same_weights(tmp_path / "first", tmp_path / "second")


@EVERY_CONTEXT
def test_cached_and_uncached_training_give_the_same_weights(train, tmp_path):
    flags = {"random_flip": True, "repeats": 2, "max_train_steps": 5}
    succeed(train("cached", **flags))
    log = succeed(train("uncached", **flags, no_context_cache=True)).log
    assert "Encoding" not in log
    assert not (tmp_path / "uncached/context_cache").exists()
    assert same_weights(tmp_path / "cached", tmp_path / "uncached")


def test_damaged_entries_are_encoded_again(train, tmp_path):
    succeed(train("first"))
    cache = tmp_path / "first/context_cache"
    half, flipped, gone = sorted(cache.glob("*/*.safetensors"))[:3]
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    flipped.write_bytes(flipped.read_bytes()[:-1] + bytes([flipped.read_bytes()[-1] ^ 1]))
    gone.unlink()
    log = succeed(train("second", context_cache_dir=cache)).log
    numbers = re.search(r"Encoding (\d) of \d prompts and (\d) of 3 ", log)
    assert int(numbers[1]) + int(numbers[2]) == 3
    assert same_weights(tmp_path / "first", tmp_path / "second")


@ONE_SCRIPT
@pytest.mark.parametrize(
    "change",
    [{"max_sequence_length": 90}, {"text_encoder_out_layers": ["8", "18", "27"]}, {"mixed_precision": "bf16"}],
    ids=["length", "layers", "precision"],
)
def test_other_settings_use_no_wrong_entry(train, tmp_path, change):
    cache = tmp_path / "cache"
    succeed(train("plain", context_cache_dir=cache))
    succeed(train("warm", context_cache_dir=cache, **change))
    succeed(train("cold", **change))
    assert same_weights(tmp_path / "warm", tmp_path / "cold")
    assert not same_weights(tmp_path / "warm", tmp_path / "plain")


def test_another_text_encoder_or_picture_uses_no_wrong_entry(train, model, photos, tmp_path):
    cache, changed, pictures = tmp_path / "cache", tmp_path / "model", tmp_path / "pictures"
    succeed(train("plain", context_cache_dir=cache))
    shutil.copytree(model.path, changed)
    other = model.make(tmp_path / "other", seed=1)
    shutil.copytree(other / "text_encoder", changed / "text_encoder", dirs_exist_ok=True)
    log = succeed(train("text", context_cache_dir=cache, pretrained_model_name_or_path=changed)).log
    assert f"Encoding {model.encodings[0]}: " in log
    shutil.copytree(photos, pictures)
    Image.new("RGB", (64, 64), "red").save(pictures / "0.png")
    log = succeed(train("picture", context_cache_dir=cache, instance_data_dir=pictures)).log
    assert re.search(r"Encoding 0 of \d prompts and 1 of 3 ", log)


@ONE_SCRIPT
def test_a_disk_without_room_is_one_line(train, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the cache should be")
    assert "--context_cache_dir" in train(context_cache_dir=tmp_path / "cache").error


def test_a_hub_id_is_read_from_the_hub_cache(train, model, tmp_path):
    commit = "0" * 40
    repository = tmp_path / "hub/models--org--tiny"
    shutil.copytree(model.path, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    succeed(train("hub", pretrained_model_name_or_path="org/tiny", cache_dir=tmp_path / "hub"))
    succeed(train("local"))
    assert same_weights(tmp_path / "hub", tmp_path / "local")


# The teacher's contexts


@WITH_VLM
def test_the_vision_tower_leaves_with_the_text_encoder(model, photos, tmp_path):
    flags = {"pretrained_model_name_or_path": model.path, "instance_data_dir": photos, "instance_prompt": "a ball"}
    flags |= {"resolution": 64, "output_dir": tmp_path, "seed": 0, "validation_steps": 0} | model.flags
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    args = model.script.parse_args([*arguments, "--random_flip", "--center_crop"])
    model.script.check_args(args)
    PartialState()
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        process_index=0,
        num_processes=1,
        is_local_main_process=True,
        wait_for_everyone=lambda: None,
    )
    pictures = model.script.read_pictures(args)
    examples = model.script.plan_examples(pictures, [(64, 64)] * 3, args)
    config = model.pipeline().transformer.config
    digests = model.script.picture_digests(pictures)
    contexts = model.script.open_contexts(args, accelerator, pictures, digests, examples, config, torch.float32)
    model.script.load_contexts(contexts, accelerator)
    assert contexts.pipeline.text_encoder is None
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) in (Qwen3VLVisionModel, Qwen3VLTextModel)]

    sample = script.Sample(example=1, epoch=0, caption=0, flip=True)
    _, teacher = contexts.load([model.script.Sample(**vars(sample))])
    picture = ImageOps.mirror(script.crop_image(script.read_image(pictures[1]), examples[1], flip=False))
    expected = model.teacher_context(picture)
    assert all(torch.equal(*pair) for pair in zip(teacher.prompt_embeds, expected.prompt_embeds, strict=True))


@WITH_VLM
@pytest.mark.parametrize(
    "change",
    [
        {"vlm_rope": "text_encoder"},
        {"vlm_max_pixels": 96 * 96, "vlm_min_pixels": 96 * 96},
        {"vlm_min_pixels": 32 * 32},
        {},
    ],
)
def test_another_tower_or_its_settings_use_no_wrong_entry(train, model, tmp_path, change):
    cache = tmp_path / "cache"
    if not change:
        text_config = AutoConfig.from_pretrained(model.path, subfolder="text_encoder")
        change = {"vlm_model_name_or_path": make_tiny_vlm(tmp_path / "vlm", text_config=text_config, seed=2)}
    succeed(train("plain", context_cache_dir=cache))
    log = succeed(train("warm", context_cache_dir=cache, **change)).log
    assert "Encoding 0 of 1 prompts and 3 of 3 prompts with pictures" in log
    succeed(train("cold", **change))
    assert same_weights(tmp_path / "warm", tmp_path / "cold")
    if "vlm_min_pixels" not in change or "vlm_max_pixels" in change:  # the lower limit alone touches no picture here
        assert not same_weights(tmp_path / "warm", tmp_path / "plain")


@EVERY_CONTEXT
def test_two_resolutions_may_share_a_cache(train, tmp_path):
    cache = tmp_path / "cache"
    succeed(train("plain", context_cache_dir=cache))
    succeed(train("warm", context_cache_dir=cache, resolution=96))
    succeed(train("cold", resolution=96))
    assert same_weights(tmp_path / "warm", tmp_path / "cold")


@WITH_VLM
def test_a_run_is_not_resumed_with_another_tower(train, model, tmp_path):
    succeed(train(checkpointing_steps=1))
    text_config = AutoConfig.from_pretrained(model.path, subfolder="text_encoder")
    other = make_tiny_vlm(tmp_path / "vlm", text_config=text_config, seed=2)
    flags = {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    assert "its --vlm_model_name_or_path was" in train(**flags, vlm_model_name_or_path=other).error
    assert "its --vlm_rope was vlm" in train(**flags, vlm_rope="text_encoder").error
    assert "its --vlm_min_pixels was 4096" in train(**flags, vlm_min_pixels=1024).error
    assert "its --vlm_max_pixels was 4096" in train(**flags, vlm_max_pixels=8192).error
    moved = shutil.copytree(model.vlm_path, tmp_path / "moved")
    (moved / "notes.md").write_text("what the tower does not read does not count")
    succeed(train(**flags, vlm_model_name_or_path=moved))


@ZIMAGE
def test_of_a_hub_vlm_only_the_tower_is_needed(train, model, tmp_path):
    commit = "0" * 40
    snapshot = tmp_path / "hub/models--org--vlm/snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(commit)
    shard_of = json.loads((model.vlm_path / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {shard for key, shard in shard_of.items() if ".visual." in key}
    assert shards < set(shard_of.values())
    for name in ("config.json", "preprocessor_config.json", "model.safetensors.index.json", *shards):
        shutil.copy(model.vlm_path / name, snapshot)
    succeed(train("hub", vlm_model_name_or_path="org/vlm", cache_dir=tmp_path / "hub"))
    succeed(train("local"))
    assert same_weights(tmp_path / "hub", tmp_path / "local")
    assert "--vlm_model_name_or_path org/vlm" in train("other", vlm_model_name_or_path="org/vlm").error


@WITH_VLM
def test_a_vlm_that_does_not_fit_is_refused(train, model, tmp_path):
    text_config = tiny_text_config(num_hidden_layers=5)
    other = make_tiny_vlm(tmp_path / "vlm", text_config=text_config)
    error = train(vlm_model_name_or_path=other).error
    layers = AutoConfig.from_pretrained(model.path, subfolder="text_encoder").num_hidden_layers
    assert f"--vlm_model_name_or_path {other}" in error and str(model.path) in error
    assert f"num_hidden_layers 5, not {layers}" in error
    assert "none is known for a text encoder of 32 channels" in train(vlm_model_name_or_path=None).error


@WITH_VLM
def test_a_picture_that_would_be_cut_is_refused(train, model):
    flag = model.script.TEACHER_LENGTH_FLAG
    error = train(**{flag: 64, "vlm_max_pixels": 256 * 256, "vlm_min_pixels": 256 * 256}).error
    assert "0.png, as the teacher reads it: " in error
    assert " tokens with the picture" in error and f"--{flag} is 64" in error
    assert "<|image_pad|>" in train(instance_prompt="<|image_pad|>").error
    huge = train(vlm_max_pixels=10**14, vlm_min_pixels=10**14).error
    assert "0.png, as the teacher reads it: " in huge and "lower --vlm_min_pixels and --vlm_max_pixels" in huge


@ONE_SCRIPT
@pytest.mark.parametrize("flag", ["vlm_model_name_or_path", "vlm_min_pixels", "vlm_max_pixels", "vlm_rope"])
def test_a_vlms_flags_without_it_are_refused(train, flag):
    value = "text_encoder" if flag == "vlm_rope" else 4096
    assert f"--{flag}: goes with --teacher_context vlm" in train(**{flag: value}).error


def with_teacher_captions(folder, photos, *, pictures=True):
    """Three rows with a short and a long caption, with or without a picture."""
    shutil.copytree(photos, folder) if pictures else folder.mkdir()
    rows = [{"short": "a ball", "long": f"a ball, number {n}, round and bright"} for n in range(3)]
    rows = [row | {"file_name": f"{n}.png"} for n, row in enumerate(rows)] if pictures else rows
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"instance_data_dir": folder, "instance_prompt": None, "caption_column": "short"}
    vlm = {"vlm_model_name_or_path": None, "vlm_min_pixels": None, "vlm_max_pixels": None}
    return flags | vlm | {"teacher_context": "caption", "teacher_caption_column": "long"}


def test_a_teacher_that_reads_more_pulls_the_student_there(train, model, photos, tmp_path):
    flags = with_teacher_captions(tmp_path / "data", photos)
    one = {"max_train_steps": 40, "rank": 8, "teacher": "base", "teacher_prompt_suffix": ""}
    log = succeed(train(**flags | one, validation_steps=40, num_validation_images=1)).log
    assert "pictures:" not in log.split("Encoding ")[1].splitlines()[0]  # of pictures nothing is encoded
    stock = model.pipeline()
    teacher = sum(model.sample(stock, f"a ball, number {n}, round and bright") for n in range(3)) / 3
    before = (model.sample(stock) - teacher).norm()
    stock.load_lora_weights(tmp_path / "run")
    assert (model.sample(stock) - teacher).norm() < 0.6 * before
    assert (tmp_path / "run/preview.png").exists()


def test_captions_without_pictures_train_as_with_pictures_that_nobody_sees(train, photos, tmp_path):
    without = with_teacher_captions(tmp_path / "without", photos, pictures=False)
    succeed(train("one", **with_teacher_captions(tmp_path / "with", photos)))
    succeed(train("other", **without))
    assert same_weights(tmp_path / "one", tmp_path / "other")
    log = succeed(train("drawn", **without, validation_steps=2, num_validation_images=1)).log
    assert "failed" not in log and "could not" not in log
    for sheet in ("validation-2.png", "rollout-2.png"):
        assert (tmp_path / "drawn" / sheet).exists()
    with_pictures = with_teacher_captions(tmp_path / "data", photos)
    succeed(train("shown", **with_pictures, validation_steps=2, num_validation_images=1))
    for sheet, side in (("preview.png", 0), ("story.png", 1)):  # no empty cells: a column less, a part less
        sizes = [Image.open(tmp_path / folder / sheet).size for folder in ("drawn", "shown")]
        assert sizes[0][side] < sizes[1][side] - 100
    assert "Encoding 0 of" in succeed(train("again", **without, context_cache_dir=tmp_path / "one/context_cache")).log


@ONE_SCRIPT
def test_a_data_set_without_pictures(train, photos, tmp_path):
    rows = [json.loads(line) for line in open_metadata(with_teacher_captions(tmp_path / "with", photos))]
    table = datasets.Dataset.from_list([{"short": row["short"], "long": row["long"]} for row in rows])
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set/train.parquet")
    flags = with_teacher_captions(tmp_path / "without", photos, pictures=False)
    succeed(train("folder", **flags))
    flags |= {"instance_data_dir": None, "dataset_name": tmp_path / "set", "cache_dir": tmp_path / "datasets"}
    succeed(train("set", **flags | {"output_dir": tmp_path / "run"}))
    assert same_weights(tmp_path / "folder", tmp_path / "run")


def open_metadata(flags):
    return (flags["instance_data_dir"] / "metadata.jsonl").read_text().splitlines()


@ZIMAGE
def test_a_teachers_caption_may_be_longer_than_a_students(train, photos, tmp_path):
    flags = with_teacher_captions(tmp_path / "data", photos)
    succeed(train("long", **flags))
    succeed(train(**flags | {"max_sequence_length": 50}))
    long, short = weights(tmp_path / "long"), weights(tmp_path / "run")
    for name in long:  # nothing is cut: only the padding differs, which no token sees
        torch.testing.assert_close(long[name], short[name], atol=1e-4, rtol=1e-3)
    flags |= {"max_sequence_length": 50}
    error = train("cut", **flags, teacher_max_sequence_length=60).error
    assert "as the teacher reads it" in error and "--teacher_max_sequence_length is 60" in error


SAME = {"teacher_prompt_suffix": ""}


def test_teacher_captions_that_are_missing_are_named(train, photos, tmp_path):
    flags = with_teacher_captions(tmp_path / "data", photos)
    assert "--teacher_caption_column detailed" in train(**flags | {"teacher_caption_column": "detailed"}).error
    assert (
        "the teacher reads what the student reads" in train(**flags | {"teacher_caption_column": "short"} | SAME).error
    )
    metadata = tmp_path / "data/metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("number 1, round and bright", " ").replace("a ball,  ", ""))
    assert "metadata.jsonl line 2, column 'long'" in train(**flags).error
    metadata.unlink()
    assert "needs a metadata.jsonl" in train(**flags | {"caption_column": None, "instance_prompt": "x"}).error


def test_a_run_is_not_resumed_with_other_teacher_captions(train, photos, tmp_path):
    flags = with_teacher_captions(tmp_path / "data", photos)
    succeed(train(**flags, checkpointing_steps=1))
    metadata = tmp_path / "data/metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("number 1", "number 7"))
    error = train(**flags, max_train_steps=3, resume_from_checkpoint="latest").error
    assert "1.png or its caption is new, changed or gone (1 such pictures)" in error


@ZIMAGE
def test_a_text_encoder_that_does_not_fit_is_refused(train, model, tmp_path):
    folder = shutil.copytree(model.path, tmp_path / "model")
    config = folder / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cap_feat_dim": 64}))
    assert "has 32 channels, its transformer takes 64" in train(pretrained_model_name_or_path=folder).error
    assert "--max_sequence_length 1505" in train(max_sequence_length=1505).error
    assert "--teacher_max_sequence_length 1505" in train(teacher_max_sequence_length=1505).error
    axes = {"axes_lens": [200, 512, 512]}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cap_feat_dim": 32} | axes))
    pixels = {"vlm_min_pixels": 480 * 480, "vlm_max_pixels": 480 * 480}  # 225 tokens, of which 1024 would be allowed
    assert "_length is 192" in train(pretrained_model_name_or_path=folder, **pixels).error


# What the user sees

DRAWN = {
    "validation_steps": 2,
    "num_validation_images": 2,
    "max_train_steps": 4,
    "validation_prompt": ["a ball", "a box"],
}


def place(sheet: Path, image: Image.Image, cell_pixels: int = 320) -> tuple[int, int] | None:
    """(top, left) of where a contact sheet shows exactly this picture, enlarged by a whole factor."""
    factor = cell_pixels // max(image.size)
    enlarged = np.asarray(image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST))
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    height, width, _ = enlarged.shape
    corners = (pixels[: -height + 1, : -width + 1] == enlarged[0, 0]).all(axis=2)
    corners &= (pixels[height - 1 :, width - 1 :] == enlarged[-1, -1]).all(axis=2)
    for top, left in np.argwhere(corners):
        if np.array_equal(pixels[top : top + height, left : left + width], enlarged):
            return int(top), int(left)
    return None


def are_in_a_row(sheet: Path, *images: Image.Image) -> bool:
    """Whether all are on the sheet, at one height, from left to right."""
    places = [place(sheet, image) for image in images]
    return None not in places and len({top for top, _ in places}) == 1 and places == sorted(places)


def are_in_a_column(sheet: Path, *images: Image.Image) -> bool:
    """Whether all are on the sheet, below each other from top to bottom."""
    places = [place(sheet, image) for image in images]
    return None not in places and len({left for _, left in places}) == 1 and places == sorted(places)


@EVERY_CONTEXT
def test_the_sheets_show_what_the_stock_pipeline_draws(train, model, photos, tmp_path):
    succeed(train(**DRAWN, center_crop=True, checkpointing_steps=2))
    run = tmp_path / "run"
    stock = model.pipeline()
    retained = ["a lighthouse on a cliff at sunset, oil painting", "a bowl of ramen on a wooden table, top view"]
    asked = [("a ball", 0), ("a ball", 1), ("a box", 0), ("a box", 1)]
    base = {pair: model.draw(stock, *pair) for pair in [*asked, (retained[0], 0), (retained[1], 1)]}
    with Image.open(photos / "1.png") as opened:
        picture = ImageOps.fit(opened.convert("RGB"), (64, 64), Image.Resampling.LANCZOS)
    teacher = model.draw(stock, seed=1, **model.as_teacher(picture))
    assert are_in_a_row(run / "preview.png", base["a ball", 1], teacher, picture)

    told = {}
    for step in (2, 4):
        stock = model.pipeline()
        stock.load_lora_weights(run / f"checkpoint-{step}")
        student = {pair: model.draw(stock, *pair) for pair in base}
        assert all(student[pair] != base[pair] for pair in base)
        validation, retention = run / f"validation-{step}.png", run / f"retention-{step}.png"
        for seed in (0, 1):
            drawn = [images[prompt, seed] for prompt in ("a ball", "a box") for images in (base, student)]
            assert are_in_a_column(validation, *drawn)
            assert are_in_a_column(retention, base[retained[seed], seed], student[retained[seed], seed])
        for images in (base, student):
            assert are_in_a_row(validation, images["a ball", 0], images["a ball", 1])
            assert are_in_a_row(retention, images[retained[0], 0], images[retained[1], 1])
        told[step] = student
    for pair in (("a ball", 0), ("a box", 0), (retained[1], 1)):
        assert are_in_a_row(run / "story.png", base[pair], told[2][pair], told[4][pair])
    assert place(run / "story.png", picture)
    assert (run / "curves.png").stat().st_size > 10_000


@EVERY_CONTEXT
def test_the_rollout_sheet_shows_the_students_x0_above_the_teachers(train, model, photos, tmp_path):
    flags = {"validation_steps": 3, "max_train_steps": 3, "checkpointing_steps": 3, "num_validation_images": 1}
    succeed(train(**flags, center_crop=True, ema_decay=0))  # the teacher's weights are the student's
    pipeline = model.script.Pipeline.from_pretrained(model.path)
    pipeline.load_lora_weights(tmp_path / "run")
    with Image.open(photos / "0.png") as opened:
        picture = opened.convert("RGB")
    student = pipeline.encode_student(["a ball"], max_sequence_length=80)
    teacher = model.teacher_context(picture)
    schedule = pipeline.schedule(64, 64, 4)
    latents = torch.randn(1, *pipeline.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    columns = []
    with torch.no_grad():
        for index, timestep in enumerate(schedule.timesteps):
            sigma = schedule.sigmas[index]
            velocities = [pipeline.predict_velocity(latents, timestep, context) for context in (student, teacher)]
            x0 = [pipeline.decode(pipeline.image_latents(latents - sigma * velocity))[0] for velocity in velocities]
            columns.append(x0)
            latents = latents + (schedule.sigmas[index + 1] - sigma) * velocities[0]
    sheet = tmp_path / "run/rollout-3.png"
    assert all(are_in_a_column(sheet, *column) for column in columns)
    assert are_in_a_row(sheet, *[student_x0 for student_x0, _ in columns])


@ONE_SCRIPT
def test_the_story_of_many_validations_spans_the_run(train, model, tmp_path):
    flags = {"validation_steps": 1, "max_train_steps": 6, "num_validation_images": 1, "checkpointing_steps": 1}
    succeed(train(**flags, final_validation_prompt="a box"))
    images = []
    for step in (1, 6):
        stock = model.pipeline()
        stock.load_lora_weights(tmp_path / f"run/checkpoint-{step}")
        images.append(model.draw(stock, "a ball", 0))
    assert are_in_a_row(tmp_path / "run/story.png", *images)
    last = model.draw(stock, "a box", 0)
    assert place(tmp_path / "run/validation-6.png", last)
    heights = [Image.open(tmp_path / f"run/validation-{step}.png").height for step in (1, 5, 6)]
    assert heights[0] == heights[1] < heights[2]  # the final prompt comes at the end only


def test_the_retention_figure_is_the_distance_of_stock_latents(train, model, tmp_path):
    prompts = ["a red ball", "a blue box", "a green tree"]
    succeed(train(**DRAWN | {"retention_prompts": prompts}))
    history = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in history if "retention" in line] == [2, 4]

    stock = model.pipeline()
    pairs = list(enumerate(prompts))
    base = [model.sample(stock, prompt, seed) for seed, prompt in pairs]
    stock.load_lora_weights(tmp_path / "run")
    student = [model.sample(stock, prompt, seed) for seed, prompt in pairs]
    moved = sum((s - b).norm() for s, b in zip(student, base, strict=True)) / 3
    apart = ((base[0] - base[1]).norm() + (base[0] - base[2]).norm() + (base[1] - base[2]).norm()) / 3
    assert history[-1]["retention"] == pytest.approx((moved / apart).item(), rel=1e-4)
    assert history[-1]["retention"] > 0.01


def test_drawing_changes_no_weight(train, tmp_path):
    flags = {"max_train_steps": 4, "lora_dropout": 0.3, "random_flip": True, "checkpointing_steps": 4}
    succeed(train("blind", **flags))
    succeed(train("seeing", **DRAWN | flags | {"validation_steps": 1}))
    for folder in ("", "checkpoint-4"):
        assert same_weights(tmp_path / "blind" / folder, tmp_path / "seeing" / folder)
    blind, seeing = (load_file(tmp_path / name / "checkpoint-4/adapters.safetensors") for name in ("blind", "seeing"))
    assert all(torch.equal(blind[name], seeing[name]) for name in blind)


@ONE_SCRIPT
def test_preview_only_stops_before_the_first_step(train, tmp_path):
    log = succeed(train(validation_steps=1, preview_only=True)).log
    assert "Steps:" not in log
    assert (tmp_path / "run/preview.png").exists()
    assert not (tmp_path / "run" / LORA_FILE).exists()


@ONE_SCRIPT
@pytest.mark.parametrize("sheet", ["validation-1.png", "preview.png", "story.png"])
def test_a_drawing_that_fails_loses_no_weights(train, tmp_path, sheet):
    (tmp_path / "run" / sheet).mkdir(parents=True)  # cannot be replaced by a picture
    log = succeed(train(**DRAWN | {"validation_steps": 1, "max_train_steps": 2})).log
    assert {
        "validation-1.png": "Validation at step 1 failed; training goes on",
        "preview.png": "The preview failed; training goes on",
        "story.png": "The story could not be drawn; the LoRA is saved",
    }[sheet] in log
    assert (tmp_path / "run/validation-2.png").is_file()
    succeed(train("undisturbed", max_train_steps=2))
    assert same_weights(tmp_path / "run", tmp_path / "undisturbed")


def test_a_resumed_run_has_one_history(train, tmp_path):
    flags = DRAWN | {"checkpointing_steps": 2, "max_train_steps": 5}
    succeed(train(**flags))
    run = tmp_path / "run"
    whole = script.read_history(run)
    # As a kill between checkpoint-4 and its drawing, in the middle of a line, would leave it.
    cut = [json.dumps(line) + "\n" for line in whole if line["step"] < 5 and (line["step"] < 4 or "loss" in line)]
    (run / "metrics.jsonl").write_text("".join(cut) + '{"step": 5, "lo')
    for name in ("retention-4.png", LORA_FILE):
        (run / name).unlink()
    succeed(train(**flags, resume_from_checkpoint="latest"))
    again = script.read_history(run)
    assert [line["step"] for line in again] == [line["step"] for line in whole] == [1, 2, 2, 3, 4, 4, 5, 5]
    assert [line.get("loss") for line in again] == [line.get("loss") for line in whole]
    assert [line.get("retention") for line in again] == [line.get("retention") for line in whole]
    assert (run / "retention-4.png").exists()


@ONE_SCRIPT
def test_the_first_captions_are_validated_where_no_prompt_is_given(train, tmp_path, model):
    succeed(train(validation_steps=2, num_validation_images=1))
    stock = model.pipeline()
    assert place(tmp_path / "run/validation-2.png", model.draw(stock, "a ball", 0))


# Publishing


def test_a_run_that_cannot_publish_keeps_its_weights_and_publishes_later(train, model, tmp_path):
    token = "hf_" + "secretsecret" * 3
    flags = DRAWN | {"report_to": "tensorboard", "checkpointing_steps": 2, "hub_model_id": "someone/ball"}
    result = train(**flags, push_to_hub=True, hub_token=token)  # the tests' environment is offline
    assert "--hub_model_id someone/ball: could not be published" in result.error
    assert "--push_only" in result.error
    run = tmp_path / "run"
    assert weights(run)
    everything = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert token.encode() not in everything + result.log.encode()

    card = ModelCard.load(run / "README.md")
    assert card.data.instance_prompt == "a ball"
    assert [entry["text"] for entry in card.data.widget] == ["a ball", "a box"]
    stock = model.pipeline()
    stock.load_lora_weights(run)
    for entry in card.data.widget:
        with Image.open(run / entry["output"]["url"]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(model.draw(stock, entry["text"], 0)))

    hub = Hub()
    with serving(hub):
        offline = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [
            sys.executable,
            model.script_path,
            "--push_only",
            "--output_dir",
            run,
            "--hub_model_id",
            "someone/ball",
        ]
        command += ["--hub_private_repo", "--hub_token", TOKEN]
        done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Published: {hub.url}/someone/ball" in done.stdout
    repository = hub.repositories["someone/ball"]
    assert repository["private"]
    assert repository["files"][LORA_FILE] == (run / LORA_FILE).read_bytes()
    assert {"README.md", "story.png", "validation-4.png", "images/validation_1.png"} <= set(repository["files"])
    assert not [name for name in repository["files"] if "checkpoint" in name or "cache" in name or "logs" in name]


@ONE_SCRIPT
def test_a_readme_that_is_no_card_is_left_alone(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/README.md").write_text("# my notes")
    assert "README.md is not a card of such a run" in succeed(train()).log
    assert (tmp_path / "run/README.md").read_text() == "# my notes"


# Data


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
        {"picture": [str(photos / f"{n}.png") for n in range(3)], "text": [f"ball {n}" for n in range(3)]}
    ).cast_column("picture", datasets.Image())
    table.to_parquet(folder / "train.parquet")
    flags = {"instance_data_dir": None, "instance_prompt": None, "dataset_name": folder, "caption_column": "text"}
    return flags | {"image_column": "picture", "cache_dir": folder / "cache"}


@pytest.mark.parametrize("form", [with_sidecars, with_jsonl, with_csv, with_parquet])
def test_every_data_form_trains(train, photos, tmp_path, form):
    flags = form(tmp_path / "data", photos)
    log = succeed(train(**flags, random_flip=True, repeats=2, train_batch_size=2, **BUCKETS)).log
    assert "Pictures: 3" in log
    assert weights(tmp_path / "run")


# Resuming


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"mixed_precision": "bf16", "use_8bit_adam": True, "rank": 128},
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "lora_dropout": 0.3, "random_flip": True, "repeats": 2},
        {"gradient_accumulation_steps": 2, "train_batch_size": 2} | BUCKETS,
    ],
    ids=["adamw", "bf16-8bit", "prodigy", "cosine-dropout-flip", "accumulation-buckets"],
)
def test_a_resumed_run_ends_in_the_same_weights(train, photos, tmp_path, flags):
    flags = with_jsonl(tmp_path / "data", photos) | flags | {"checkpointing_steps": 3, "max_train_steps": 7}
    succeed(train("whole", **flags))
    for name in ("latest", "checkpoint-3"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copytree(tmp_path / "whole/checkpoint-3", folder / "checkpoint-3")
        log = succeed(train(name, **flags, resume_from_checkpoint=name)).log
        assert "steps: 3 to 7" in log
        assert same_weights(tmp_path / "whole", folder)
        whole, resumed = (load_file(tmp_path / n / "checkpoint-6/adapters.safetensors") for n in ("whole", name))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@ONE_SCRIPT
def test_resuming_takes_the_drawn_seed(train, tmp_path):
    succeed(train(seed=None, checkpointing_steps=1, max_train_steps=2))
    shutil.copytree(tmp_path / "run/checkpoint-1", tmp_path / "again/checkpoint-1")
    succeed(train("again", seed=None, max_train_steps=2, resume_from_checkpoint="latest"))
    assert same_weights(tmp_path / "run", tmp_path / "again")


@ONE_SCRIPT
def test_latest_without_a_checkpoint_starts_from_the_beginning(train, tmp_path):
    (tmp_path / "run/.checkpoint-1.tmp").mkdir(parents=True)  # a killed run's unfinished one
    assert "steps: 0 to 2" in succeed(train(resume_from_checkpoint="latest")).log


@ONE_SCRIPT
def test_resuming_with_other_settings_is_refused(train):
    succeed(train(checkpointing_steps=1))
    result = train(rank=8, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert "its --rank was 4, now it is 8" in result.error
    assert "its --seed was 0, now it is 5" in train(seed=5, resume_from_checkpoint="latest").error
    assert succeed(train(max_train_steps=3, resume_from_checkpoint="latest"))


def test_results_do_not_depend_on_the_number_of_pictures_at_once(train, tmp_path):
    """Noise, captions and crops belong to a sample's place; the batch is only how many are computed together."""
    succeed(train("one", train_batch_size=1, gradient_accumulation_steps=3, max_train_steps=3))
    succeed(train("three", train_batch_size=3, gradient_accumulation_steps=1, max_train_steps=3))
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    for name in one:
        torch.testing.assert_close(one[name], three[name], atol=1e-4, rtol=1e-3)


# Bad input


def png(folder, name="0.png", content=None):
    folder.mkdir(exist_ok=True)
    if content is None:
        Image.new("RGB", (64, 64)).save(folder / name)
    else:
        (folder / name).write_bytes(content)
    return {"instance_data_dir": folder}


def metadata(folder, row):
    png(folder)
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    return {"instance_data_dir": folder, "caption_column": "text", "instance_prompt": None}


BAD_DATA = {
    "no folder": (lambda f: {"instance_data_dir": f / "nowhere"}, "nowhere"),
    "no picture": (lambda f: png(f, "notes.md", b"x"), "holds no picture"),
    "unreadable": (lambda f: png(f, "bad.png", b"no picture"), "bad.png"),
    "truncated": (lambda f: png(f, "cut.png", (lambda p: p.read_bytes()[:60])(full_png(f))), "cut.png"),
    "no caption": (lambda f: png(f) | {"instance_prompt": None}, "--instance_prompt"),
    "empty caption": (lambda f: metadata(f, {"file_name": "0.png", "text": " "}), "metadata.jsonl line 1"),
    "number caption": (lambda f: metadata(f, {"file_name": "0.png", "text": 7}), "metadata.jsonl line 1"),
    "unknown column": (lambda f: metadata(f, {"file_name": "0.png", "caption": "x"}), "'file_name', 'caption'"),
    "leads out": (lambda f: metadata(f, {"file_name": "../0.png", "text": "x"}), "leads out"),
    "row without picture": (lambda f: metadata(f, {"file_name": "1.png", "text": "x"}), "1.png"),
    "two sources": (lambda f: png(f) | {"dataset_name": f}, "--dataset_name"),
    "no source": (lambda f: {"instance_data_dir": None}, "--instance_data_dir"),
}


def full_png(folder):
    folder.mkdir(exist_ok=True)
    path = folder.parent / "full.png"
    Image.effect_noise((64, 64), 50).save(path)
    return path


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_that_names_it(train, tmp_path, case):
    make, expected = BAD_DATA[case]
    result = train(**make(tmp_path / "data"))
    assert expected in result.error
    assert "Loading" not in result.log  # no model was loaded
    assert not (tmp_path / "run" / LORA_FILE).exists()


BAD_FLAGS = {
    "resolution": ({"resolution": 100}, "--resolution 100"),
    "resolution limit": ({"resolution": 4096}, "--resolution 4096"),
    "bucket": (
        {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "4096,4096"},
        "--aspect_ratio_buckets: 4096,4096",
    ),
    "bucket text": ({"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "64x64"}, "--aspect_ratio_buckets"),
    "rank": ({"rank": 0}, "--rank"),
    "steps": ({"max_train_steps": 0}, "--max_train_steps"),
    "rollout steps": ({"num_rollout_steps": 0}, "--num_rollout_steps"),
    "unknown flag": ({"lerning_rate": 1}, "--lerning_rate 1; did you mean --learning_rate?"),
    "no number": ({"ema_decay": "much"}, "--ema_decay"),
    "no checkpoint": ({"resume_from_checkpoint": "checkpoint-7"}, "--resume_from_checkpoint checkpoint-7"),
    "no model": (
        {"pretrained_model_name_or_path": "nowhere/at-all"},
        "--pretrained_model_name_or_path nowhere/at-all",
    ),
    "targets": ({"lora_layers": "to_q,ff.net.0.proj"}, "'ff.net.0.proj' matches no linear module"),
    "fp16 on a CPU": ({"mixed_precision": "fp16"}, "--mixed_precision fp16"),
    "8-bit prodigy": ({"use_8bit_adam": True, "optimizer": "prodigy"}, "--use_8bit_adam"),
    "one retention prompt": ({"retention_prompts": ["one"]}, "--retention_prompts"),
    "validation size": ({"validation_height": 100}, "--validation_height 100"),
    "two ways to cache": ({"no_context_cache": True, "context_cache_dir": "x"}, "--no_context_cache"),
    "preview of nothing": ({"preview_only": True}, "--preview_only"),
    "seed": ({"seed": -1}, "--seed"),
    "large seed": ({"seed": 2**32}, "--seed"),
    "beta": ({"adam_beta1": 1.0}, "--adam_beta1"),
    "decay": ({"adam_weight_decay": -1}, "--adam_weight_decay"),
    "dropout": ({"lora_dropout": 1}, "--lora_dropout"),
    "empty folder name": ({"instance_data_dir": ""}, "--instance_data_dir"),
    "no tracker": ({"report_to": "wandb"}, "--report_to wandb: run pip install wandb"),
    "negative validation steps": ({"validation_steps": -1}, "--validation_steps -1"),
    "no model named": ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path: is required"),
    "token shown": ({"hub_token": "hf_x", "report_to": "all"}, "--hub_token"),
    "no teacher captions": ({"teacher_context": "caption"}, "with --teacher_caption_column"),
    "unused teacher captions": ({"teacher_caption_column": "long"}, "--teacher_caption_column: goes with"),
    "pixel limits": ({"vlm_min_pixels": 9000, "vlm_max_pixels": 8000}, "--vlm_min_pixels"),
    "no quantization file": (
        {"bnb_quantization_config_path": "nowhere.json"},
        "--bnb_quantization_config_path nowhere",
    ),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_one_line_that_names_them(train, tmp_path, case):
    flags, expected = BAD_FLAGS[case]
    result = train(**flags)
    assert expected in result.error
    assert "Loading" not in result.log
    assert not (tmp_path / "run" / LORA_FILE).exists()


def test_another_model_is_refused(train, model, tmp_path):
    folder = shutil.copytree(model.path, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "FluxPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert f"is a FluxPipeline, not {model.script.MODEL_NAME}" in train(pretrained_model_name_or_path=folder).error


@ONE_SCRIPT
@pytest.mark.parametrize(
    ("first", "second"),
    [({"checkpointing_steps": 1}, {}), ({}, {}), ({}, {"resume_from_checkpoint": "latest"})],
    ids=["checkpoints", "a LoRA alone", "nothing to resume"],
)
def test_an_earlier_run_is_not_overwritten(train, tmp_path, first, second):
    succeed(train(**first))
    before = (tmp_path / "run" / LORA_FILE).read_bytes()
    assert "--output_dir" in train(**second, instance_prompt="another").error
    assert (tmp_path / "run" / LORA_FILE).read_bytes() == before
    assert len(script.read_history(tmp_path / "run")) == 2


@ONE_SCRIPT
def test_the_rotation_keeps_the_newest_and_a_second_branch_is_refused(train, tmp_path):
    succeed(train(checkpointing_steps=1, max_train_steps=3))
    result = train(checkpointing_steps=1, max_train_steps=4, resume_from_checkpoint="checkpoint-1")
    assert "holds newer ones (checkpoint-1, checkpoint-2, checkpoint-3)" in result.error
    flags = {"checkpoints_total_limit": 1, "max_train_steps": 4, "resume_from_checkpoint": "latest"}
    succeed(train(checkpointing_steps=1, **flags))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]


@ONE_SCRIPT
def test_a_damaged_checkpoint_is_one_line(train, tmp_path):
    succeed(train(checkpointing_steps=1))
    (tmp_path / "run/checkpoint-9").mkdir()  # without its files it is none
    adapters = tmp_path / "run/checkpoint-2/adapters.safetensors"
    adapters.write_bytes(adapters.read_bytes()[:100])
    assert "checkpoint-2: is damaged" in train(max_train_steps=3, resume_from_checkpoint="latest").error
    (tmp_path / "run/checkpoint-2/state.json").write_text("{")
    assert "checkpoint-2: state.json is damaged" in train(seed=None, resume_from_checkpoint="latest").error


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_an_incomplete_model_is_one_line(train, model, tmp_path, part):
    folder = shutil.copytree(model.path, tmp_path / "model")
    for weights_file in (folder / part).glob("*.safetensors"):
        weights_file.unlink()
    assert f"--pretrained_model_name_or_path {folder}" in train(pretrained_model_name_or_path=folder).error


@ONE_SCRIPT
def test_a_variant_that_is_not_there_is_one_line(train):
    assert "--variant" in train(variant="fp16").error


def test_other_data_model_or_launch_is_not_resumed(train, model, photos, tmp_path, make_picture):
    data = shutil.copytree(photos, tmp_path / "data")
    flags = {"instance_data_dir": data, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    succeed(train(**flags))
    flags["max_train_steps"] = 3
    assert "--mixed_precision was no, now it is bf16" in train(**flags, mixed_precision="bf16").error
    assert "--gradient_accumulation_steps was 1, now it is 3" in train(**flags, gradient_accumulation_steps=3).error
    make_picture(9).save(data / "9.png")
    assert "9.png or its caption is new, changed or gone (1 such pictures)" in train(**flags).error
    assert "0.png or its caption" in train(**flags, instance_prompt="another").error
    (data / "9.png").unlink()
    other = model.make(tmp_path / "model", seed=1)
    assert "its model was" in train(**flags, pretrained_model_name_or_path=other).error
    shutil.copytree(model.path, other, dirs_exist_ok=True)
    moved = data.rename(tmp_path / "moved")
    succeed(train(**flags | {"instance_data_dir": moved, "pretrained_model_name_or_path": other}))


@ONE_SCRIPT
@pytest.mark.parametrize(
    "flags", [{"text_encoder_out_layers": ["9", "18"]}, {"text_encoder_out_layers": ["9", "18", "40"]}]
)
def test_wrong_text_layers_are_refused(train, flags):
    assert "--text_encoder_out_layers" in train(**flags).error


@EVERY_CONTEXT
def test_a_prompt_that_would_be_cut_is_refused(train):
    assert "0.png: " in train(max_sequence_length=24).error


@ONE_SCRIPT
def test_init_lora_that_is_not_there_is_refused(train, tmp_path):
    assert "--init_lora" in train(init_lora=tmp_path / "nothing").error


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(train, model, tmp_path):
    folder = shutil.copytree(model.path, tmp_path / "broken")
    pipeline = model.stock.from_pretrained(folder)
    with torch.no_grad():
        next(pipeline.transformer.parameters()).fill_(float("nan"))
    pipeline.transformer.save_pretrained(folder / "transformer")
    result = train(pretrained_model_name_or_path=folder)
    assert "at step 1 the loss is nan" in result.error
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / LORA_FILE).exists()


def test_the_last_good_weights_are_kept_when_the_loss_breaks(train, tmp_path):
    result = train(learning_rate=1e30, max_train_steps=5)
    assert "at step 2 the loss is" in result.error
    assert "checkpoint-1" in result.error
    state = load_file(tmp_path / "run/checkpoint-1/adapters.safetensors")
    assert all(weight.isfinite().all() for weight in state.values())


# The launchers


@pytest.fixture
def launch_arguments(model, photos, tmp_path):
    def arguments(folder, *more):
        return [
            *(model.script_path, "--pretrained_model_name_or_path", model.path, "--instance_data_dir", photos),
            *itertools.chain(*[(f"--{name}", str(value)) for name, value in model.flags.items()]),
            *(
                "--instance_prompt",
                "a ball",
                "--resolution",
                "64",
                "--rank",
                "4",
                "--learning_rate",
                "1e-3",
                "--max_train_steps",
                "3",
            ),
            *("--seed", "0", "--report_to", "none", "--lora_dropout", "0.1", "--output_dir", str(tmp_path / folder)),
            *more,
        ]

    return arguments


@pytest.mark.slow
def test_two_processes_give_the_lora_of_one_with_twice_the_accumulation(launch_arguments, tmp_path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    bin_folder = Path(sys.executable).parent
    one = [bin_folder / "accelerate", "launch", "--cpu", "--num_processes", "1"]
    two = [bin_folder / "torchrun", "--nproc-per-node", "2", "--master_addr", "127.0.0.1", "--master_port", "29541"]
    for launcher, folder, accumulation in ((one, "one", "4"), (two, "two", "2")):
        arguments = launch_arguments(folder, "--gradient_accumulation_steps", accumulation)
        subprocess.run([*launcher, *arguments], check=True, env=environment, cwd=tmp_path)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-3)
