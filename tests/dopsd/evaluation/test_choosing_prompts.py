"""Which prompts are drawn: built-in ones, files, what is left out, what a feature model reads."""

import json

import pytest

from dopsd.errors import InputError
from dopsd.evaluation import settings as evaluation
from dopsd.evaluation.comparison import Prompt
from dopsd.evaluation.prompts import (
    PROMPTS_FILE,
    built_in_prompts,
    choose_prompts,
    make_prompts,
    plain_text,
    templates,
)


TEXTS = {"default_vlm": "", "deployed_steps": ""}


@pytest.fixture
def settings(tmp_path):
    """Makes settings from a command line."""

    def make(*flags: str) -> evaluation.EvaluationSettings:
        required = ["--pretrained_model_name_or_path", "m", "--lora", "l", "--instance_data_dir", "d"]
        return evaluation.parse_settings(TEXTS, "", [*required, "--output_dir", str(tmp_path), *flags])

    return make


def by_role(prompts: list[Prompt]) -> dict[str, list[str]]:
    found = {}
    for prompt in prompts:
        found.setdefault(prompt.role, []).append(prompt.text)
    return found


def test_every_kind_has_enough_distinct_prompts():
    for kind, texts in templates().items():
        assert len(set(texts)) == len(texts) >= (8 if kind.startswith("unrelated") else 12)
        assert all(("{subject}" in text) == (kind in ("person", "pet", "object", "edit")) for text in texts)


def test_a_subject_is_drawn_with_its_word_without_it_and_with_other_words(settings):
    chosen = settings("--kind", "pet", "--trigger_word", "sks", "--class_word", "owl", "--num_prompts", "6")
    prompts = make_prompts(chosen, built_in_prompts(chosen), [])
    found = by_role(prompts)
    assert found["concept"][:2] == ["a photo of sks owl", "sks owl running across a meadow"]
    assert len(found["concept"]) == 6 and len(found["unrelated"]) == 8
    assert found["neighbour"][:2] == ["a photo of an owl", "an owl running across a meadow"]
    assert len({text.split()[-2] for text in found["other_word"][:1]} | {"sks"}) == 2
    assert all("sks" not in text and "owl" in text for text in found["other_word"])
    assert all("sks" not in prompt.plain for prompt in prompts)
    # Each made-up word stands in a prompt of its own, whose plain words are those of the prompt it came from.
    plain = {prompt.plain for prompt in prompts if prompt.role == "other_word"}
    assert plain == {*found["neighbour"]} and len(plain) == 4


def test_without_a_new_word_there_is_none_to_leave_out(settings):
    chosen = settings("--kind", "person", "--num_prompts", "2")
    found = by_role(make_prompts(chosen, built_in_prompts(chosen), []))
    assert found.keys() == {"concept", "unrelated"} and found["concept"][0] == "a photo of a person"


def test_a_style_is_named_after_the_scene(settings):
    chosen = settings("--kind", "style", "--trigger_word", "sks=oil painting", "--num_prompts", "1")
    (prompt, *_) = make_prompts(chosen, built_in_prompts(chosen), [])
    assert prompt.text == "a lighthouse on a cliff, in sks style, oil painting"
    assert prompt.plain == "a lighthouse on a cliff, oil painting"
    chosen = settings("--kind", "style", "--num_prompts", "1")
    assert built_in_prompts(chosen) == ["a lighthouse on a cliff"]


@pytest.mark.parametrize(
    "text, kind, plain",
    [
        ("a photo of sks dog in the snow", "pet", "a photo of a dog in the snow"),
        ("A SKS in the snow", "pet", "a dog in the snow"),
        ("the sks dog, from behind", "pet", "the dog, from behind"),
        ("sksy in the snow", "pet", "sksy in the snow"),
        ("a boat in the style of sks", "style", "a boat, dog"),
        ("sks style, a boat", "style", "a boat, dog"),
    ],
)
def test_plain_words_name_the_class(text, kind, plain):
    assert plain_text(text, "sks", "dog", kind) == plain


def test_plain_words_without_a_class_leave_the_word_out():
    assert plain_text("a photo of sks in the snow", "sks", "", None) == "a photo of in the snow"
    assert plain_text("sks", "sks", "", None) == "sks"  # nothing else would be left


def test_edits_use_the_pictures_in_turn_and_every_picture(settings):
    words = ("--kind", "edit", "--trigger_word", "sks", "--class_word", "oil painting")
    chosen = settings(*words, "--validation_image", "a", "b", "c", "--num_prompts", "2")
    prompts = make_prompts(chosen, built_in_prompts(chosen), [])
    concept = [(prompt.text, prompt.image) for prompt in prompts if prompt.role == "concept"]
    assert concept == [("turn it into sks", 0), ("make it look like sks", 1), ("turn it into sks", 2)]
    assert [prompt.image for prompt in prompts if prompt.role == "unrelated"][:4] == [0, 1, 2, 0]
    assert prompts[0].plain == "turn it into an oil painting"


def test_captions_are_not_drawn(settings, caplog):
    chosen = settings("--kind", "pet", "--trigger_word", "sks", "--class_word", "dog", "--num_prompts", "2")
    prompts = make_prompts(
        chosen, built_in_prompts(chosen), ["A photo of  sks dog.", "a hot air balloon above a desert"]
    )
    found = by_role(prompts)
    assert found["concept"] == ["sks dog running across a meadow"] and len(found["unrelated"]) == 7
    assert "2 prompts are captions of training pictures" in caplog.text
    with pytest.raises(InputError, match="^--prompts: all prompts for the subject are captions"):
        make_prompts(chosen, ["a sks"], ["a sks"])


def test_a_word_that_no_prompt_has_is_said(settings):
    chosen = settings("--kind", "pet", "--trigger_word", "sks")
    with pytest.raises(InputError, match="^--trigger_word sks: no prompt for the subject has this word"):
        make_prompts(chosen, ["a dog"], [])


# Files


def test_the_lines_of_a_file_are_prompts_for_the_subject(settings, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\nsks at sea\n\nsks in a tree\n")
    prompts = choose_prompts(settings("--prompts", str(path), "--trigger_word", "sks=cat"), [], None, [])
    assert by_role(prompts)["concept"] == ["sks at sea", "sks in a tree"] and prompts[0].plain == "a cat at sea"
    # Another comparison draws what this one has saved.
    again = settings("--prompts", str(tmp_path / PROMPTS_FILE))
    assert choose_prompts(again, [], None, []) == prompts


def test_written_prompts_are_written_once(settings):
    chosen = settings("--kind", "pet", "--trigger_word", "sks", "--write_prompts")
    calls = []

    def write() -> list[str]:
        calls.append(1)
        return ["sks on stage"]

    first = choose_prompts(chosen, ["x"], write, ["a picture"])
    assert choose_prompts(chosen, ["x"], write, ["a picture"]) == first and len(calls) == 1
    choose_prompts(chosen, ["x"], write, ["another picture"])
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["{", "[]", '{"made_from": null}'])
def test_damaged_saved_prompts_are_made_again(settings, tmp_path, damage):
    chosen = settings("--kind", "pet")
    first = choose_prompts(chosen, [], None, [])
    (tmp_path / PROMPTS_FILE).write_text(damage)
    assert choose_prompts(chosen, [], None, []) == first
    assert json.loads((tmp_path / PROMPTS_FILE).read_text())["prompts"]


ENTRY = {"text": "a", "plain": "a", "role": "concept", "image": None}


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("p.txt", "", "holds no prompts; write one per line"),
        ("p.txt", "a\0b", "contains a zero byte"),
        ("p.json", "{}", "is not the prompts.json of a comparison"),
        ("p.json", '{"prompts": [{}]}', "is not the prompts.json of a comparison"),
        ("p.json", json.dumps({"prompts": [ENTRY | {"role": "x"}]}), "there is no role 'x'"),
        ("p.json", json.dumps({"prompts": [ENTRY | {"role": "unrelated"}]}), "holds no prompt for the subject"),
        ("p.json", json.dumps({"prompts": [ENTRY | {"image": 0}]}), "but --validation_image gives 0"),
        ("p.json", json.dumps({"prompts": [ENTRY | {"text": " "}]}), "a prompt is blank"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(settings, tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=f"^--prompts {path}: .*{problem}") as caught:
        choose_prompts(settings("--prompts", str(path)), [], None, [])
    assert "\n" not in str(caught.value)


# Flags


@pytest.mark.parametrize(
    "flags, problem",
    [
        ("", "--kind: is required without --prompts"),
        ("--kind edit", "--kind edit: needs pictures to edit"),
        ("--kind pet --validation_image a", "--validation_image: goes with --kind edit"),
        ("--kind edit --validation_image a", "--kind edit: the built-in instructions need --trigger_word"),
        ("--kind style --mask_background", "--mask_background: --kind style has no subject"),
        ("--prompts a --mask_background", "--mask_background: name what is to be separated"),
        ("--prompts a --write_prompts", "--write_prompts: cannot be combined with --prompts"),
        ("--prompts a --judge", "--judge: asks about a --kind"),
        ("--kind style --write_prompts", "--write_prompts: say what to write about"),
        ("--kind pet --trigger_word dog=dog", "--trigger_word 'dog=dog': the class must not contain"),
        ("--kind pet --trigger_word sks --class_word sks", "--class_word sks: contains the new word"),
        ("--kind pet --strengths 0", "--strengths 0.0: must be a number above 0"),
        ("--kind pet --instance_data_dir a --output_dir a/b", "--output_dir a/b: is in --instance_data_dir"),
        ("--kind pet --num_seeds 0", "--num_seeds 0: must be a whole number from 1 to 64"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(settings, flags, problem):
    with pytest.raises(InputError, match=f"^{problem}"):
        settings(*flags.split())


def test_unknown_flags_are_one_line(settings, capsys):
    with pytest.raises(SystemExit):
        settings("--kind", "pet", "--num_seed", "3")
    assert "did you mean --num_seeds?" in capsys.readouterr().err


@pytest.mark.parametrize("word, class_word", [("sks=a", "animal"), ("sks=its own", "animal"), ("sks=a dog", "a dog")])
def test_a_determiner_is_no_class(settings, word, class_word):
    chosen = settings("--kind", "pet", "--trigger_word", word)
    assert (chosen.trigger_word, chosen.class_word) == ("sks", class_word)
    bare = {"animal": "sks", "a dog": "sks dog"}[class_word]
    assert built_in_prompts(chosen)[0] == f"a photo of {bare}"


def test_strength_1_is_always_drawn(settings):
    assert settings("--kind", "pet", "--strengths", "0.8", "0.8").strengths == [0.8, 1.0]
