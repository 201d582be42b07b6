"""Runs whose teacher sees another picture of the subject: `--teacher_picture other`."""

import shutil

import pytest
import torch
from PIL import Image

from command_line import assert_close_weights, same_weights, succeed
from dopsd.context_cache import ContextCache
from models import EVERY_CONTEXT, ONE_MODEL, both_models
from short_runs import one_process, same_tensors


OTHER = {"teacher_picture": "other"}


@EVERY_CONTEXT
def test_the_teacher_sees_the_partners_picture_with_the_targets_caption(prepare, tmp_path):
    target, other = (prepare(**flags, center_crop=True) for flags in ({}, OTHER))
    for run in (target, other):
        run.fill_cache(tmp_path / "cache", one_process())
    assert {path.name for path in (tmp_path / "cache").glob("*/*")} >= {
        path.name for path in map(ContextCache(tmp_path / "cache").path, map(other.contexts.key, encodings(other)))
    }
    for index in range(3):
        for sample in other.data.order.variants(index):
            crop = other.data.teacher_crop(sample)
            assert crop != other.data.crop(sample) == target.data.crop(next(target.data.order.variants(index)))
            student, teacher = other.contexts.load([sample])
            (its_own,) = target.data.order.variants(sample.partner)
            assert same_tensors(tensors(student), tensors(target.contexts.load([its_own])[0]))  # captions are equal
            assert same_tensors(tensors(teacher), tensors(target.contexts.teacher([its_own])))


def encodings(run):
    return [encoding for _, encoding in run.contexts.all_teacher_encodings()]


def tensors(context) -> list[torch.Tensor]:
    return [
        tensor for value in vars(context).values() for tensor in ([value] if torch.is_tensor(value) else value or ())
    ]


@EVERY_CONTEXT
def test_a_picture_is_encoded_once_whatever_the_number_of_pairs(prepare, model, photos, tmp_path):
    data = shutil.copytree(photos, tmp_path / "data")
    for number in range(3):
        (data / f"{number}.txt").write_text(f"ball {number}")
    flags = {"instance_data_dir": data, "instance_prompt": None}
    target, other = (
        {(one.encoder.name, one.prompt, one.pictures) for one in encodings(prepare(**flags, **own))}
        for own in ({}, OTHER)
    )
    reads_both = "vlm_model_name_or_path" in model.flags  # picture and caption together: two partners instead of one
    assert len(other) == (2 * len(target) if reads_both else len(target)) and (reads_both or other == target)


@ONE_MODEL
def test_the_preview_shows_each_group(prepare, photos, tmp_path):
    data = tmp_path / "data"
    for group in ("a", "b"):
        shutil.copytree(photos, data / group)
    run = prepare(**OTHER, instance_data_dir=data)
    names = [run.data.picture(sample).name for sample in run.data.shown(4)]
    assert names == ["a/0.png", "b/0.png", "a/1.png", "b/1.png"]
    names = [run.data.picture(sample).name for sample in prepare(instance_data_dir=data).data.shown(4)]
    assert names == ["a/0.png", "a/1.png", "a/2.png", "b/0.png"]


@both_models(quick="zimage")
def test_a_run_is_resumed_bit_for_bit(train, tmp_path):
    flags = {**OTHER, "max_train_steps": 4, "checkpointing_steps": 2, "random_flip": True, "teacher_prompt_suffix": ""}
    succeed(train("whole", **flags))
    succeed(train("parts", **flags | {"max_train_steps": 2}))
    succeed(train("parts", **flags, resume_from_checkpoint="latest"))
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    error = train("parts", **flags | {"teacher_picture": None}, resume_from_checkpoint="latest").error
    assert "its --teacher_picture was other, now it is target; pass the same" in error
    succeed(train("target", **flags | {"teacher_picture": None}))
    assert not same_weights(tmp_path / "whole", tmp_path / "target")


@ONE_MODEL
def test_the_preview_shows_what_the_teacher_sees(train, photos, tmp_path):
    flags = {"validation_steps": 2, "preview_only": True}
    for name, own in (("target", {}), ("other", OTHER)):
        succeed(train(name, **flags, **own))
    widths = [Image.open(tmp_path / name / "preview.png").width for name in ("target", "other")]
    assert widths[0] < widths[1]  # a column more


@ONE_MODEL
def test_a_group_of_one_is_one_line(train, photos, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    (data / "alone").mkdir()
    (data / "2.png").rename(data / "alone/2.png")
    error = train(**OTHER, instance_data_dir=data).error
    assert "--teacher_picture other: alone/2.png is the only picture in the group 'alone', copies of it" in error
    assert not (tmp_path / "run/context_cache").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"group_column": "who"}, "--group_column: goes with --teacher_picture other; add that, or drop the flag"),
        (
            {**OTHER, "cond_image_column": "source"},
            "--teacher_picture other: cannot be combined with --cond_image_column, whose teacher must see the result "
            "of the edit; drop one of them",
        ),
        (
            {**OTHER, "teacher_context": "caption", "teacher_caption_column": "long"},
            "--teacher_picture other: the teacher of --teacher_context caption sees no picture; drop one of them",
        ),
    ],
)
@ONE_MODEL
def test_flags_that_do_not_go_together_are_one_line(train, flags, line):
    assert train(**flags).error.endswith(f"error: {line}")


@pytest.mark.exhaustive
@both_models(quick="flux2")
def test_two_processes_give_the_lora_of_one(torchrun, command, arguments, tmp_path):
    flags = {**OTHER, "learning_rate": 1e-3, "max_train_steps": 3, "train_batch_size": 2}
    flags |= {"context_cache_dir": tmp_path / "cache"}
    process, log = torchrun(arguments("two", **flags))
    assert process.wait(timeout=240) == 0, log.read_text()
    succeed(command(*arguments("one", **flags, gradient_accumulation_steps=2)))
    assert_close_weights(tmp_path / "one", tmp_path / "two", atol=1e-5, rtol=1e-3)
