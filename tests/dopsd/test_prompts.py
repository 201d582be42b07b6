"""Which prompts are drawn, and texts that would be cut."""

import re

import pytest

from dopsd.errors import InputError
from dopsd.prior import PriorPrompts
from dopsd.prompts import drawn_prompts
from dopsd.settings import RETENTION_PROMPTS, ValidationSettings
from models import EVERY_CONTEXT, ONE_MODEL, WITH_VLM


def test_nothing_is_drawn_without_validation():
    settings = {"validation_prompt": ["a"], "retention_prompts": ["b", "c"]}
    assert drawn_prompts(ValidationSettings(**settings, validation_steps=0), PriorPrompts(held_out="x")) == []
    assert drawn_prompts(ValidationSettings(**settings), PriorPrompts()) == ["a", "b", "c"]
    assert drawn_prompts(
        ValidationSettings(**settings, final_validation_prompt="d"), PriorPrompts(held_out="h", no_word="n")
    ) == ["a", "d", "b", "c", "h", "n"]
    without_retention = ValidationSettings(validation_prompt=["a"], retention_prompts=[])
    assert drawn_prompts(without_retention, PriorPrompts(held_out="h")) == ["a"]


# Prompts that would be cut


def problem_of(run) -> str:
    with pytest.raises(InputError) as caught:
        run.resolve_prompts()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@EVERY_CONTEXT
def test_a_caption_that_would_be_cut_is_refused(prepare):
    message = problem_of(prepare(max_sequence_length=24))
    assert re.fullmatch(
        r"0\.png: 'a ball' is \d\d tokens long with the chat template; the limit is 24 \(--max_sequence_length\): "
        "shorten the caption",
        message,
    )


@ONE_MODEL
@pytest.mark.parametrize("flag", ["validation_prompt", "final_validation_prompt", "retention_prompts"])
def test_a_prompt_that_would_be_cut_is_refused_with_its_flag(prepare, flag):
    flags = {flag: "b" * 100 if "final" in flag else ["a ball", "b" * 100]}
    message = problem_of(prepare(validation_steps=1, **flags))
    assert message.startswith(f"--{flag}: 'bbb") and message.endswith("(--max_sequence_length): shorten it")
    prepare(validation_steps=0, **flags).resolve_prompts()  # nothing is drawn


@ONE_MODEL
def test_a_default_suffix_that_would_be_cut_is_named_with_the_flag_that_replaces_it(prepare):
    message = problem_of(prepare(teacher_prompt_suffix=None))
    assert message.startswith("0.png, the teacher's prompt: 'a ball Repro") and message.endswith(
        "(--max_sequence_length): replace the default suffix with a shorter --teacher_prompt_suffix, or shorten the "
        "caption"
    )


@ONE_MODEL
@pytest.mark.parametrize(("length", "num_left_out"), [(80, 0), (71, 2), (70, 4)])
def test_default_retention_prompts_that_would_be_cut_are_left_out_with_a_line(prepare, caplog, length, num_left_out):
    """They are not the user's, so they do not stop a run. At 70 tokens one fits, and retention needs two."""
    run = prepare(validation_steps=1, max_sequence_length=length, teacher_prompt_suffix="")
    settings = run.resolve_prompts()
    fitting = [prompt for prompt in RETENTION_PROMPTS if run.contexts.fits(prompt)]
    assert settings.validation.retention_prompts == (fitting if num_left_out < 4 else [])
    assert len(fitting) == {0: 4, 2: 2, 4: 1}[num_left_out]
    expected = {
        0: [],
        2: [
            f"2 of the 4 default prompts are too long for --max_sequence_length {length} and left out; give your own "
            "to replace them"
        ],
        4: [
            f"the default prompts are too long for --max_sequence_length {length}, so retention is not measured; give "
            "at least two prompts that fit"
        ],
    }
    lines = [record.getMessage() for record in caplog.records if "--retention_prompts" in record.getMessage()]
    assert [line.partition("--retention_prompts: ")[2] for line in lines] == expected[num_left_out]


@ONE_MODEL
def test_a_teachers_prompt_that_would_be_cut_is_refused(prepare):
    message = problem_of(prepare(teacher_prompt_suffix="b" * 100))
    assert message.startswith("0.png, the teacher's prompt: 'a ballb")
    assert message.endswith("(--max_sequence_length): shorten the caption or --teacher_prompt_suffix")


@WITH_VLM
@pytest.mark.parametrize("pixels", [256 * 256, 10**14])
def test_a_picture_that_would_be_cut_is_refused(model, prepare, pixels):
    flag = "teacher_max_sequence_length" if "zimage" in model.script.__name__ else "max_sequence_length"
    message = problem_of(prepare(**{flag: 64, "vlm_max_pixels": pixels, "vlm_min_pixels": pixels}))
    assert message.startswith("0.png, the teacher's prompt: 'a ball like this' is ")
    assert f" tokens long with the picture and the chat template; the limit is 64 (--{flag}): " in message
    assert message.endswith("or lower --vlm_min_pixels and --vlm_max_pixels")


@WITH_VLM
def test_a_caption_with_a_pictures_placeholder_is_refused(prepare):
    assert "<|image_pad|>" in problem_of(prepare(instance_prompt="<|image_pad|>"))
