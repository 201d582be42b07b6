"""The judge and the writer of prompts: what is asked, how answers are read, and that none is asked for twice."""

from contextlib import contextmanager

import pytest
import torch

from dopsd.errors import InputError
from dopsd.evaluation.judge import ANSWERS_FILE, INSTANCE_GRADES, STYLE_GRADES, Judge, grade
from dopsd.evaluation.prompt_writing import MAX_ROUNDS, usable, write_prompts


CPU = torch.device("cpu")


class Scripted:
    """A model that gives the answers of a list, in turn, and keeps what it was asked."""

    name = "a/vlm"

    def __init__(self, *answers: str):
        self.answers, self.asked, self.num_loaded = list(answers), [], 0

    @contextmanager
    def loaded(self, device):
        self.num_loaded += 1
        yield self.ask

    def ask(self, question, images, max_new_tokens):
        self.asked.append((question, images, max_new_tokens))
        return self.answers[(len(self.asked) - 1) % len(self.answers)]


class Unloadable(Scripted):
    @contextmanager
    def loaded(self, device):
        raise InputError("a/vlm: its weights cannot be loaded")
        yield


# The judge


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("same instance", 4),
        ("Mostly same.", 3),
        ('"partly  similar"', 2),
        ("**different instance**\n", 1),
        ("4", None),
        ("", None),
        ("It is the same instance", None),
        ("not same instance", None),
        ("highly consistent", None),
    ],
)
def test_an_answer_is_a_grade_or_nothing(answer, expected):
    assert grade(answer, INSTANCE_GRADES) == expected


@pytest.fixture
def pairs(tmp_path, make_picture):
    """Three drawings, each with its training picture."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        make_picture(number).save(path)
    return {path: make_picture(10 + number) for number, path in enumerate(paths)}


def test_the_judge_is_shown_the_training_picture_and_the_drawing(pairs, tmp_path, make_picture):
    chat = Scripted("same instance", "who knows", "different instance")
    judge = Judge(chat, "pet", "dog", tmp_path)
    first, _, third = pairs
    assert judge.scores(pairs, CPU) == {first: 4.0, third: 1.0}
    question, images, _ = chat.asked[0]
    assert all(text in question for text in ("this one", "dog", *INSTANCE_GRADES)) and "{" not in question
    assert [image.tobytes() for image in images] == [make_picture(10).tobytes(), make_picture(0).tobytes()]
    style = Judge(chat, "style", "", tmp_path).question
    assert all(text in style for text in STYLE_GRADES) and "dog" not in style
    edit = Judge(chat, "edit", "an oil painting", tmp_path).question
    assert all(text in edit for text in STYLE_GRADES) and "edit, called 'an oil painting'" in edit
    assert "a certain subject" in Judge(chat, None, "", tmp_path).question


def test_no_question_is_asked_twice(pairs, tmp_path, make_picture):
    chat = Scripted("mostly same")
    scores = Judge(chat, "pet", "dog", tmp_path).scores(pairs, CPU)
    assert Judge(chat, "pet", "dog", tmp_path).scores(pairs, CPU) == scores
    assert (len(chat.asked), chat.num_loaded) == (3, 1)
    # Another drawing in the same file, another reference and another question are.
    changed = dict(pairs)
    first, second, _ = pairs
    make_picture(20).save(first)
    changed[second] = make_picture(21)
    Judge(chat, "pet", "dog", tmp_path).scores(changed, CPU)
    assert len(chat.asked) == 5
    Judge(chat, "pet", "cat", tmp_path).scores(changed, CPU)
    assert len(chat.asked) == 8


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_a_damaged_file_of_answers_is_replaced(content, pairs, tmp_path):
    (tmp_path / ANSWERS_FILE).write_text(content)
    assert len(Judge(Scripted("mostly same"), "pet", "dog", tmp_path).scores(pairs, CPU)) == 3
    assert (tmp_path / ANSWERS_FILE).read_text().count("mostly same") == 3


def test_answers_before_a_stop_are_kept(pairs, tmp_path):
    class Failing(Scripted):
        def ask(self, *question):
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().ask(*question)

    with pytest.raises(KeyboardInterrupt):
        Judge(Failing("mostly same"), "pet", "dog", tmp_path).scores(pairs, CPU)
    chat = Scripted("mostly same")
    assert len(Judge(chat, "pet", "dog", tmp_path).scores(pairs, CPU)) == 3 and len(chat.asked) == 1


def test_a_model_that_cannot_be_loaded_names_the_flag(pairs, tmp_path, make_picture):
    with pytest.raises(InputError, match="^--vlm_name_or_path a/vlm: its weights cannot be loaded"):
        Judge(Unloadable(), "pet", "dog", tmp_path).scores(pairs, CPU)
    with pytest.raises(InputError, match="^--vlm_name_or_path a/vlm: its weights cannot be loaded"):
        write_prompts(Unloadable(), [make_picture(0)], 1, kind="pet", subject="sks dog", device=CPU)


# Prompts


def test_lines_that_name_the_subject_are_prompts():
    answer = """Here are the prompts:
1. A sks dog on a beach.
2) "sks dog in a boat"
- SKS DOG in a boat
* a sks doghouse

a dog in a car
sks dog 2 at night"""
    assert usable(answer, "sks dog") == ["A sks dog on a beach", "sks dog in a boat", "sks dog 2 at night"]
    assert usable("sks dog " + "very " * 60 + "fast", "sks dog") == []


def test_missing_prompts_are_asked_for_again_with_other_pictures(make_picture):
    pictures = [make_picture(number) for number in range(6)]
    chat = Scripted("sks dog on a beach\nno dog", "sks dog on a beach\nsks dog in snow\nsks dog at sea\nsks dog")
    found = write_prompts(chat, pictures, 3, kind="pet", subject="sks dog", device=CPU)
    assert found == ["sks dog on a beach", "sks dog in snow", "sks dog at sea"]
    (first, shown, _), (second, others, _) = chat.asked
    assert "Write 3 prompts" in first and "Write 2 prompts" in second and "sks dog on a beach" in second
    assert shown == pictures[:4] and others == [pictures[4], pictures[5], pictures[0], pictures[1]]


@pytest.mark.parametrize(
    "kind, said", [("style", "share a style"), ("edit", "The edit is called"), ("pet", "show {}")]
)
def test_the_question_fits_the_kind(kind, said, make_picture):
    chat = Scripted("a boat in sks style")
    assert write_prompts(chat, [make_picture(0)], 1, kind=kind, subject="in sks style", device=CPU)
    assert said.format("in sks style") in chat.asked[0][0] and len(chat.asked[0][1]) == 1


def test_a_model_that_does_not_write_prompts_ends_in_one_line(make_picture):
    chat = Scripted("I cannot do that")
    with pytest.raises(InputError, match="--write_prompts: a/vlm wrote 0 of 2 prompts that name 'sks dog'; pass your"):
        write_prompts(chat, [make_picture(0)], 2, kind="pet", subject="sks dog", device=CPU)
    assert len(chat.asked) == MAX_ROUNDS
