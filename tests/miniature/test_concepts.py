import json

import numpy as np
import pytest
import torch

from benchmarks.miniature import world
from benchmarks.miniature.concepts import (
    CONCEPTS,
    MAX_EVAL_COUNT,
    NUM_PICTURES,
    NUM_RENAMED,
    RENAMING,
    concept_task,
    neighbour_task,
    old_task,
    prior_prompts,
    training_pictures,
    write_pictures,
    wrong_word_task,
)


def test_concepts_are_new_objects_under_unknown_words():
    assert len({concept.word for concept in CONCEPTS}) == 3
    known = {word for appearance in world.all_appearances() for word in appearance.words.split()}
    for concept in CONCEPTS:
        assert concept.appearance in world.held_out_appearances()
        assert concept.word not in known
        assert len(concept.other_backgrounds) == 3


@pytest.mark.parametrize("concept", CONCEPTS, ids=lambda concept: concept.name)
def test_training_pictures_show_the_concept_at_different_places(reader, concept):
    for seed in range(3):
        images, captions = training_pictures(concept, seed)
        pixels = world.to_tensor([np.asarray(image) / 127.5 - 1 for image in images])
        reading = reader.read(pixels.float())
        assert [reader.appearances[index] for index in reading.objects] == [concept.appearance] * NUM_PICTURES
        assert len({*reading.poses.tolist()}) == NUM_PICTURES
        assert {caption.split(" on ")[1] for caption in captions} == {*concept.backgrounds}


def test_pictures_are_written_with_their_captions_and_without_earlier_files(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "9.png").touch()
    images, captions = training_pictures(CONCEPTS[0], 0)
    write_pictures(tmp_path / "pictures", images, captions)
    assert sorted(path.name for path in (tmp_path / "pictures").glob("*.png")) == ["0.png", "1.png", "2.png", "3.png"]
    assert (tmp_path / "pictures" / "3.txt").read_text() == captions[3]


def test_the_task_asks_for_backgrounds_that_no_training_picture_shows():
    concept = CONCEPTS[0]
    images, _ = training_pictures(concept, 0)
    alone, taught = concept_task(concept, 5), concept_task(concept, 5, references=images)
    assert not {*alone.backgrounds} & {*concept.backgrounds}
    assert alone.prompts[0] == f"a zofu on {alone.backgrounds[0]}" and alone.references == []
    assert taught.prompts == [prompt + world.REFERENCE_SUFFIX for prompt in alone.prompts]
    assert taught.references == [*images, images[0]]


def test_a_larger_task_begins_with_the_prompts_of_a_smaller_one():
    small, large = old_task(3), old_task(5)
    assert large.prompts[:3] == small.prompts and torch.equal(large.real[:3], small.real)
    assert not any(appearance.is_held_out for appearance in large.wanted)


def test_neighbours_are_known_objects_that_differ_in_one_part():
    for concept in CONCEPTS:
        assert len(concept.neighbours) >= 3
        for known in concept.neighbours:
            parts = [(getattr(known, name), getattr(concept.appearance, name)) for name in vars(known)]
            assert sum(first != second for first, second in parts) == 1 and not known.is_held_out
    task = neighbour_task(CONCEPTS[0], 20)
    assert {*task.wanted} <= {*CONCEPTS[0].neighbours} and task.prompts[0].startswith("a dotted yellow and blue ")


def test_wrong_words_are_made_up_and_not_taught():
    task = wrong_word_task(CONCEPTS[1], 30)
    words = [prompt.split()[1] for prompt in task.prompts]
    known = {word for appearance in world.all_appearances() for word in appearance.words.split()}
    assert len({*words}) > 25 and not {*words} & (known | {concept.word for concept in CONCEPTS})
    assert task.wanted == [CONCEPTS[1].appearance] * 30 and {*task.backgrounds} == {*world.BACKGROUNDS}


def test_prior_prompts_ask_for_nothing_that_is_measured():
    prompts = prior_prompts()
    assert len({*prompts}) == len(prompts) == 50
    words = {prompt.removeprefix("a ").split(" on ")[0] for prompt in prompts}
    assert not words & {appearance.words for appearance in old_task(MAX_EVAL_COUNT).wanted}
    assert not words & {appearance.words for concept in CONCEPTS for appearance in concept.neighbours}
    assert words <= {appearance.words for appearance in world.known_appearances()}
    some = prior_prompts(("dotted", "ring"))
    assert len(some) == 50 and not any("dotted" in prompt or "ring" in prompt for prompt in some)


def test_a_renaming_is_taught_by_captions_and_asked_for_other_objects(tmp_path):
    RENAMING.write_training_data(tmp_path / "data", 0)
    rows = [json.loads(line) for line in (tmp_path / "data" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == NUM_RENAMED
    for row in rows:
        assert row["short"].replace("dotted", "checked") == row["long"] != row["short"]
    task = RENAMING.task(40)
    assert not {*task.prompts} & {row["short"] for row in rows}
    trained = {row["short"].split(" on ")[0] for row in rows}
    for prompt, wanted in zip(task.prompts, task.wanted, strict=True):
        assert prompt.split(" on ")[0] not in trained
        assert wanted.texture == "checked" and not wanted.is_held_out
        assert prompt.startswith("a " + wanted.words.replace("checked", "dotted"))
    assert all("dotted" not in prompt for prompt in neighbour_task(RENAMING, 20).prompts)
