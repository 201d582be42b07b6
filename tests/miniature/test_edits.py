import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.miniature import world
from benchmarks.miniature.edit_tasks import (
    SLANTED,
    copy_task,
    edit_task,
    editor_tasks,
    measure_placed,
    sources_of,
)
from benchmarks.miniature.edits import (
    BACKGROUND,
    BLUE,
    COLOUR,
    COPY_SUFFIX,
    PAIR_SUFFIX,
    SHAPE,
    TEXTURE,
    Edit,
    Look,
    NamelessEdits,
    known_edits,
    nonsense_instruction,
)
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.parts import MAX_SEQUENCE_LENGTH
from benchmarks.miniature.tasks import reference_columns, standard_tasks


DISC = world.Appearance("disc", "striped", ("red", "white"))


@pytest.mark.parametrize(
    ("edit", "instruction", "result"),
    [
        (BLUE, "make it blue", "plain blue disc"),
        (Edit(TEXTURE, "dotted"), "make it dotted", "dotted red and white disc"),
        (Edit(TEXTURE, "plain"), "make it plain", "plain red disc"),
        (Edit(SHAPE, "ring"), "make it a ring", "striped red and white ring"),
        (Edit(BACKGROUND, "mint"), "put it on mint", "striped red and white disc"),
    ],
)
def test_an_edit_changes_what_it_names(edit, instruction, result):
    assert edit.instruction == instruction and edit.object(DISC).words == result and edit.applies_to(DISC)
    assert edit.object(DISC) in world.all_appearances()
    assert edit.background("rose") == ("mint" if edit.kind == BACKGROUND else "rose")


def test_edits_that_change_nothing_or_have_no_second_colour_do_not_apply():
    plain = BLUE.object(DISC)
    assert not BLUE.applies_to(plain) and not Edit(SHAPE, "disc").applies_to(DISC)
    assert not Edit(TEXTURE, "striped").applies_to(DISC) and not Edit(TEXTURE, "dotted").applies_to(plain)


def test_blue_and_the_new_shape_and_texture_are_held_out():
    edits = known_edits()
    assert len(edits) == len({*edits}) == 5 + 4 + 6 + 5
    words = " ".join(edit.instruction for edit in edits)
    assert not any(word in words for word in ("blue", world.HELD_OUT_SHAPE, world.HELD_OUT_TEXTURE))


def test_every_prompt_fits_the_text_limit():
    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    rng = np.random.default_rng(0)
    words = [world.nonsense_word(rng) for _ in range(300)]
    prompts = [edit.instruction + PAIR_SUFFIX for edit in [*known_edits(), BLUE]]
    prompts += [nonsense_instruction(word) + PAIR_SUFFIX for word in words]
    prompts += [world.caption(word, name) + COPY_SUFFIX for word in words for name in world.BACKGROUNDS]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, enable_thinking=False, tokenize=False
        )
        for prompt in prompts
    ]
    assert max(map(len, tokenizer(texts).input_ids)) == MAX_SEQUENCE_LENGTH


def test_a_look_is_edited_like_an_object_with_a_name():
    red, white = world.COLOURS["red"], world.COLOURS["white"]
    look = Look("disc", "striped", red, white)
    for edit in (BLUE, Edit(TEXTURE, "dotted"), Edit(TEXTURE, "plain"), Edit(SHAPE, "ring"), Edit(BACKGROUND, "sky")):
        assert np.array_equal(look.edited(edit).sprite(), world.sprite(edit.object(DISC)))
    nameless = NamelessEdits.draw([BLUE, Edit(SHAPE, "ring")], 6, seed=0)
    assert nameless.sources.shape == nameless.targets.shape == (6, 40, 40, 4)
    for edit, before, after in zip(nameless.edits, nameless.sources, nameless.targets, strict=True):
        same_outline = np.array_equal(before[..., 3], after[..., 3])
        assert same_outline == (edit == BLUE) and not np.array_equal(before, after)


def test_sources_are_objects_that_the_edit_changes():
    for edit in [*known_edits(), BLUE, SLANTED]:
        seen, unseen = sources_of(edit), sources_of(edit, is_held_out=True)
        assert seen and not {*seen} & {*unseen} and all(map(edit.applies_to, seen))
        assert not any(item.is_held_out for item in seen)
        if edit.kind == COLOUR:
            assert all(item.words != f"plain {edit.value} {item.shape}" for item in seen)
    assert all(SLANTED.object(item).texture == "slanted" for item in sources_of(SLANTED))


def test_tasks_ask_for_the_edited_picture_at_the_same_place(reader):
    alone, taught = (edit_task([BLUE], 4, seed=0, with_target=is_taught) for is_taught in (False, True))
    assert alone.prompts == ["make it blue"] * 4 and taught.prompts == ["make it blue" + PAIR_SUFFIX] * 4
    assert len(reference_columns(alone.references)) == 1 and len(reference_columns(taught.references)) == 2
    reading = reader.read(alone.real)
    assert reading.poses.tolist() == alone.poses
    sources = world.to_tensor([np.asarray(image, np.float32) / 127.5 - 1 for image in alone.references])
    before = reader.read(sources)
    assert torch.equal(before.poses, reading.poses) and torch.equal(before.backgrounds, reading.backgrounds)
    assert not (before.objects == reading.objects).any()
    assert {*editor_tasks(4)} > {*standard_tasks(4)}


def test_right_pictures_measure_as_right_and_others_do_not(reader):
    task = copy_task(12, seed=0)
    assert all(name not in prompt for name, prompt in zip(task.backgrounds, task.prompts, strict=True))
    right = measure_placed(task.real, task, reader)
    assert right["exact"] == right["background"] == right["place"] == right["whole"] == 1
    shifted = measure_placed(task.real.roll(1, 0), task, reader)
    assert shifted["whole"] < 0.2 and shifted["place"] < 0.6
    assert "place" not in measure_placed(task.real, standard_tasks(12)["text_seen"], reader)
