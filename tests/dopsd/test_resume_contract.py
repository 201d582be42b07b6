"""What a resumed run must share with its checkpoint, on tiny models."""

import json
import shutil

import pytest
from transformers import AutoConfig

from dopsd.errors import InputError
from dopsd.resuming import check_resumable
from models import WITH_VLM
from short_runs import PUBLISHED
from tiny_vlm import make_tiny_vlm


@pytest.fixture
def refused(tmp_path):
    """The message that refuses to resume a run with other settings, without what names the checkpoint."""

    def message(run, num_processes: int = 1) -> str:
        with pytest.raises(InputError) as caught:
            check_resumable(tmp_path / "checkpoint-2", run.resume_contract(num_processes), max_train_steps=2)
        text = str(caught.value)
        assert text.startswith("--resume_from_checkpoint checkpoint-2: ") and text.endswith("another --output_dir")
        return text.removeprefix("--resume_from_checkpoint checkpoint-2: ")

    return message


def changed(name: str, count: int) -> str:
    """How the message begins that refuses other pictures or captions."""
    return f"{name} or its caption was added, changed or removed (pictures affected: {count}); "


@pytest.fixture
def save(tmp_path):
    """Writes the part of a checkpoint that holds its settings."""

    def write(settings) -> None:
        (tmp_path / "checkpoint-2").mkdir()
        (tmp_path / "checkpoint-2/state.json").write_text(json.dumps({"step": 2, "settings": settings}))

    return write


def test_a_run_is_not_resumed_with_other_flags_data_or_weights(
    prepare, save, refused, model, photos, tmp_path, make_picture
):
    data = shutil.copytree(photos, tmp_path / "data")
    flags = {"instance_data_dir": data, "mixed_precision": "no"}
    save(prepare(**flags).resume_contract())
    assert refused(prepare(**flags, rank=8)).startswith("its --rank was 4, now it is 8; ")
    assert refused(prepare(**flags, seed=5)).startswith("its --seed was 0, now it is 5; ")
    assert refused(prepare(**flags, quantize="int8")).startswith("its --quantize was None, now it is int8; ")
    assert refused(prepare(**flags | {"mixed_precision": "bf16"})).startswith(
        "its --mixed_precision was no, now it is bf16"
    )
    accumulated = prepare(**flags, gradient_accumulation_steps=3)
    assert "--gradient_accumulation_steps was 1, now it is 3; " in refused(accumulated)
    assert "--gradient_accumulation_steps was 1, now it is 6; " in refused(accumulated, num_processes=2)
    make_picture(9).save(data / "9.png")
    assert refused(prepare(**flags)).startswith(
        "9.png or its caption was added, changed or removed (pictures affected: 1); "
    )
    (data / "9.png").unlink()
    assert refused(prepare(**flags, instance_prompt="another")).startswith(changed("0.png", 3))
    (data / "2.png").rename(data / "3.png")
    assert refused(prepare(**flags)).startswith(
        "2.png or its caption was added, changed or removed (pictures affected: 2); "
    )
    (data / "3.png").rename(data / "2.png")
    other = model.make(tmp_path / "model", seed=1)
    assert refused(prepare(**flags, pretrained_model_name_or_path=other)).startswith("its model was ")

    shutil.copytree(model.path, other, dirs_exist_ok=True)
    moved = data.rename(tmp_path / "moved")
    run = prepare(**flags | {"instance_data_dir": moved}, pretrained_model_name_or_path=other, max_train_steps=9)
    check_resumable(tmp_path / "checkpoint-2", run.resume_contract(), max_train_steps=2)


def test_the_same_micro_batches_may_be_shared_by_more_processes(prepare, save, tmp_path):
    save(prepare(gradient_accumulation_steps=4).resume_contract(num_processes=1))
    check_resumable(
        tmp_path / "checkpoint-2",
        prepare(gradient_accumulation_steps=2).resume_contract(num_processes=2),
        max_train_steps=2,
    )


@WITH_VLM
def test_a_run_is_not_resumed_with_another_vision_tower(prepare, save, refused, model, tmp_path):
    save(prepare().resume_contract())
    text_config = AutoConfig.from_pretrained(model.path, subfolder="text_encoder")
    other = make_tiny_vlm(tmp_path / "vlm", text_config=text_config, seed=2)
    assert refused(prepare(vlm_model_name_or_path=other)).startswith("its --vlm_model_name_or_path was ")
    assert refused(prepare(vlm_rope="text_encoder")).startswith("its --vlm_rope was vlm, now it is text_encoder; ")
    assert refused(prepare(vlm_min_pixels=1024)).startswith("its --vlm_min_pixels was 4096, now it is 1024; ")
    assert refused(prepare(vlm_max_pixels=8192)).startswith("its --vlm_max_pixels was 4096, now it is 8192; ")
    moved = shutil.copytree(model.vlm_path, tmp_path / "moved")
    (moved / "notes.md").write_text("not one of the files that are read")
    check_resumable(
        tmp_path / "checkpoint-2", prepare(vlm_model_name_or_path=moved).resume_contract(), max_train_steps=2
    )


def test_a_run_is_not_resumed_with_other_teacher_captions(prepare, save, refused, photos, tmp_path):
    data = shutil.copytree(photos, tmp_path / "data")
    rows = [{"file_name": f"{n}.png", "short": "a ball", "long": f"a ball, number {n}"} for n in range(3)]
    metadata = data / "metadata.jsonl"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"instance_data_dir": data, "instance_prompt": None, "caption_column": "short"}
    flags |= {"teacher_context": "caption", "teacher_caption_column": "long"}
    flags |= {"vlm_model_name_or_path": None, "vlm_min_pixels": None, "vlm_max_pixels": None}
    save(prepare(**flags).resume_contract())
    metadata.write_text(metadata.read_text().replace("number 1", "number 7"))
    assert refused(prepare(**flags)).startswith(
        "1.png or its caption was added, changed or removed (pictures affected: 1); "
    )


# What checkpoints held before settings became dataclasses, for the flags of `short_runs.short_run`. The identities of
# files are compared in other tests.
OLD_SETTINGS = {
    "--variant": None,
    "--bnb_quantization_config_path": None,
    "--repeats": 1,
    "--resolution": 64,
    "--use_aspect_ratio_buckets": False,
    "--aspect_ratio_buckets": None,
    "--center_crop": False,
    "--random_flip": False,
    "--teacher_prompt_suffix": " like this",
    "--teacher": "ema",
    "--ema_decay": 0.9999,
    "--num_rollout_steps": 4,
    "--loss_space": "x0",
    "--rank": 4,
    "--lora_alpha": 8,
    "--lora_dropout": 0.0,
    "--init_lora": None,
    "--seed": 0,
    "--train_batch_size": 1,
    "--mixed_precision": "no",
    "--optimizer": "adamw",
    "--use_8bit_adam": False,
    "--learning_rate": 0.01,
    "--scale_lr": False,
    "--lr_scheduler": "constant",
    "--lr_warmup_steps": 0,
    "--lr_num_cycles": 1,
    "--lr_power": 1.0,
    "--max_grad_norm": 1.0,
    "--adam_beta1": 0.9,
    "--adam_beta2": 0.999,
    "--adam_weight_decay": 0.0,
    "--adam_epsilon": 1e-08,
    "--prodigy_beta3": None,
    "--prodigy_decouple": True,
    "--prodigy_use_bias_correction": True,
    "--prodigy_safeguard_warmup": True,
    "--max_sequence_length": 80,
    "processes x --gradient_accumulation_steps": 1,
}
OLD_SETTINGS_OF_MODEL = {
    "train_dopsd_flux2": {
        "--teacher_context": "edit",
        "--vlm_min_pixels": None,
        "--vlm_max_pixels": None,
        "--vlm_rope": None,
        "--lora_layers": (
            r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
            r"|(ff|ff_context)\.linear_(in|out))|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
        ),
        "--text_encoder_out_layers": [9, 18, 27],
    },
    "train_dopsd_zimage": {
        "--teacher_context": "vlm",
        "--vlm_min_pixels": 4096,
        "--vlm_max_pixels": 4096,
        "--vlm_rope": "vlm",
        "--lora_layers": (
            r"(layers|noise_refiner|context_refiner)\.\d+\."
            r"(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"
        ),
    },
}
LATER_SETTINGS = {
    "--num_trained_states",
    "--teacher_picture",
    "--teacher_resolution",
    "prior preservation",
    "--quantize",
    "--quantize_text_encoder",
    "--train_mode",
    "--trainable_modules",
    "--bf16_update",
}
IDENTITIES = {"model", "--vlm_model_name_or_path", "pictures and captions"}


def test_a_checkpoint_from_before_the_settings_were_dataclasses_is_resumed(prepare, save, model, tmp_path):
    now = prepare().resume_contract()
    old = OLD_SETTINGS | OLD_SETTINGS_OF_MODEL[model.script.__name__]
    assert now.keys() == old.keys() | IDENTITIES | LATER_SETTINGS
    assert {name: now[name] for name in old} == old
    assert (now["--vlm_model_name_or_path"] == "") == ("vlm_model_name_or_path" not in model.flags)
    save(old | {name: now[name] for name in IDENTITIES})
    check_resumable(tmp_path / "checkpoint-2", now, max_train_steps=2)
    defaults = prepare(**dict.fromkeys(PUBLISHED)).resume_contract()
    with pytest.raises(
        InputError, match="--num_trained_states was 4, .*--with_prior_preservation false.; pass the same"
    ):
        check_resumable(tmp_path / "checkpoint-2", defaults, max_train_steps=2)
