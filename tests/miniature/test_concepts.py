import numpy as np
import pytest
import torch

from benchmarks.miniature import world
from benchmarks.miniature.concepts import (
    CONCEPTS,
    NUM_PICTURES,
    concept_task,
    old_task,
    training_pictures,
    write_pictures,
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
