import random
from collections import Counter

import pytest

from dopsd.errors import InputError
from dopsd.prior import (
    REAL_WORDS,
    PriorPrompts,
    TriggerWord,
    made_up_words,
    package_prompts,
    prior_prompts,
    read_prompts,
    replaced,
)
from dopsd.settings import RETENTION_PROMPTS
from short_runs import default_settings, one_process


CAPTIONS = ["a photo of sks corgi", "Sks corgi asleep, a sks photo", "a sksy dog"]


def make(captions=CAPTIONS, longest=200, **flags) -> PriorPrompts:
    settings = default_settings(**{"seed": 0} | flags)
    return prior_prompts(settings, captions, lambda prompt: len(prompt) <= longest, one_process())


# The new word


@pytest.mark.parametrize(
    ("words", "caption", "without", "other"),
    [
        (["sks"], "a photo of sks corgi", "a photo of corgi", "a photo of kebidu corgi"),
        (["sks=a"], "a photo of sks corgi", "a photo of a corgi", "a photo of kebidu corgi"),
        (["sks corgi=a dog"], "Sks corgi asleep", "a dog asleep", "kebidu asleep"),
        (["sks"], "sks-like, SKS! sksy", "like,! sksy", "kebidu-like, kebidu! sksy"),
        (["<s1>"], "a <s1> cat", "a cat", "a kebidu cat"),
        ([r"a\b=c\d"], r"x a\b", r"x c\d", "x kebidu"),
        (["sks"], "a photo of sks.", "a photo of", "a photo of kebidu."),
        (["sks"], "sks", "", "kebidu"),
        (["sks"], "sks, 3", "", "kebidu, 3"),
        (["sks"], "一张sks柯基的照片", "一张柯基的照片", "一张kebidu柯基的照片"),
        (["小柯=狗"], "一张小柯的照片", "一张狗的照片", "一张kebidu的照片"),
        (["café"], "un café, cafés", "un, cafés", "un kebidu, cafés"),
        # Several words: each has its own replacement, and the longer one comes first.
        (["sks=a zwx", "zwx=cat"], "sks and zwx", "a zwx and cat", "kebidu and lumofa"),
        (["sks", "sks corgi=dog"], "sks corgi, sks", "dog,", "lumofa, kebidu"),
    ],
)
def test_a_trigger_word_is_replaced_by_its_class_or_by_another_word(words, caption, without, other):
    words = [TriggerWord.parse(word) for word in words]
    assert replaced(caption, words, None) == without.strip(" ,")
    assert replaced(caption, words, ["kebidu", "lumofa"][: len(words)]) == other.rstrip(".")


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("zzz", "--trigger_word zzz: no caption has this word; write it as in the captions"),
        ("=dog", "--trigger_word '=dog': is blank; give the new word"),
        ("sks=sks toy", "--trigger_word 'sks=sks toy': the class must not contain the new word"),
    ],
)
def test_a_trigger_word_that_cannot_be_used_is_one_line(argument, problem):
    with pytest.raises(InputError) as caught:
        make(trigger_word=["sks", argument])
    assert str(caught.value).startswith(problem) and "\n" not in str(caught.value)


def test_made_up_words_are_distinct_and_neither_real_nor_in_the_captions():
    words = made_up_words(random.Random(0), 2000, {"kebidu"})
    assert len({*words}) == 2000 and not {*words} & {"kebidu", *REAL_WORDS}
    # Every word of the list could be drawn, so it must be there.
    assert all(len(word) == 6 for word in REAL_WORDS)


# The prompts of a run


def test_the_three_kinds_of_prompts():
    prompts = make(trigger_word=["sks=a"], class_prompt=["a dog house", "a cat", " "])
    assert prompts.unrelated[:2] == ("a dog house", "a cat") and len(prompts.unrelated) > 90
    plain = {"a photo of a corgi", "a corgi asleep, a a photo"}
    assert {*prompts.without_word, prompts.no_word} == plain and prompts.no_word not in prompts.trained
    assert len(prompts.other_words) > 20 and not any("sks" in prompt.lower() for prompt in prompts.other_words)
    assert all(prompt.endswith("corgi") or "corgi asleep, a" in prompt for prompt in prompts.other_words)
    assert not {prompts.wrong_word, prompts.held_out} & {*prompts.trained}
    assert list(prompts.drawn) == ["held_out", "wrong_word", "no_word"]
    assert prompts == make(trigger_word=["sks=a"], class_prompt=["a dog house", "a cat", " "])
    assert prompts != make(trigger_word=["sks=a"], class_prompt=["a dog house", "a cat", " "], seed=1)


def test_half_of_the_draws_have_other_words():
    prompts = make(trigger_word=["sks"])
    drawn = [prompt for place in range(500) for prompt in prompts.draw(0, place, 2)]
    shares = [sum(prompt in kind for prompt in drawn) / 1000 for kind in (prompts.unrelated, prompts.other_words)]
    assert shares == pytest.approx([0.25, 0.5], abs=0.05)
    assert prompts.draw(0, 7, 3) == prompts.draw(0, 7, 3) != prompts.draw(1, 7, 3)


def test_captions_of_the_word_alone_have_no_prompt_without_it():
    prompts = make(captions=["sks", "SKS!"], trigger_word=["sks"])
    assert prompts.without_word == () and prompts.no_word is None and prompts.other_words


def test_without_a_trigger_word_only_unrelated_prompts_are_held_and_a_hint_says_so(caplog):
    prompts = make()
    assert prompts.trained == list(prompts.unrelated) and prompts.wrong_word is None
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "--trigger_word: not given; if the captions have a new word, name it, or every other unknown word may draw "
        "what is learned"
    )


def test_a_lora_to_start_from_is_not_held(caplog):
    make(trigger_word=["sks"], init_lora="somewhere")
    (record,) = caplog.records
    assert "--init_lora: on the prompts that prior preservation holds" in record.getMessage()
    assert "pass --with_prior_preservation false" in record.getMessage()


def test_without_prior_preservation_nothing_is_held():
    assert make(with_prior_preservation=False) == PriorPrompts() and PriorPrompts().trained == []
    drawn = make(with_prior_preservation=False, trigger_word=["sks"])
    assert drawn.trained == [] and list(drawn.drawn) == ["wrong_word", "no_word"]


def test_what_is_to_be_learned_is_not_held(caplog):
    captions = ["a photo of sks dog", "a photo of a dog", "sks dog asleep"]
    prompts = make(captions, trigger_word=["sks=a"], class_prompt=["a photo of sks dog", "A photo of a dog", "a cat"])
    assert not {prompt.lower() for prompt in prompts.trained} & {caption.lower() for caption in captions}
    assert "a cat" in prompts.trained and "is what is to be learned, so it is not held" in caplog.text


def test_a_retention_prompt_that_is_held_is_a_warning(caplog):
    make(trigger_word=["sks"], class_prompt=[RETENTION_PROMPTS[1]])
    assert "--retention_prompts: the default prompt 'a bowl of" in caplog.text
    assert "is held by prior preservation (--class_prompt), so" in caplog.text
    assert "give others (prompts affected: 1)" in caplog.text
    caplog.clear()
    make(retention_prompts=["a cat", "a dog"], class_prompt=["a cat"])
    assert "--retention_prompts: 'a cat' is held by prior preservation" in caplog.text


def test_a_default_prompt_that_is_to_be_learned_is_named_with_the_flag_that_replaces_it(caplog, tmp_path):
    own = read_prompts(None)[0]
    make([own], trigger_word=None)
    assert f"--prior_prompts, one of the default prompts: {own[:9]!r}"[:-1] in caplog.text
    caplog.clear()
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na fish")
    make(["a cat"], prior_prompts=str(tmp_path / "prompts.txt"))
    assert "--prior_prompts: 'a cat' is what is to be learned, so it is not held" in caplog.text


def test_own_prompts_that_are_too_long_are_left_out_and_the_users_refused(tmp_path, caplog):
    caplog.set_level("INFO")
    prompts = make(trigger_word=["sks"], longest=20)
    num_left_out = sum(len(prompt) > 20 for prompt in read_prompts(None))
    assert f"--prior_prompts: {num_left_out} of the 102 default prompts are longer than the text limit" in caplog.text
    assert prompts.unrelated and all(len(prompt) <= 20 for prompt in prompts.trained)
    path = tmp_path / "prompts.txt"
    path.write_text("a house\n" + "b" * 30)
    with pytest.raises(
        InputError, match=f"^--prior_prompts {path}: 'bbb.*' is longer than the text limit; shorten it$"
    ):
        make(prior_prompts=str(path), longest=20)
    with pytest.raises(InputError, match="^--class_prompt: 'bbb"):
        make(class_prompt=["b" * 30], longest=20)
    with pytest.raises(
        InputError, match="^--with_prior_preservation: no prompt is left .* --with_prior_preservation false$"
    ):
        make(longest=1)


# Files and flags


def test_the_default_prompts_are_not_the_retention_prompts():
    prompts = read_prompts(None)
    assert len(prompts) == len({*prompts}) > 95 and not {*prompts} & {*RETENTION_PROMPTS}


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\n\n  # another\n a house \na tree\na house\n", encoding="utf-8")
    assert read_prompts(str(path)) == ["a house", "a tree"]
    assert make(prior_prompts=str(path)).trained == ["a house"] and make(prior_prompts=str(path)).held_out == "a tree"
    both = make(prior_prompts=str(path), class_prompt=["a tree"])
    assert both.held_out == "a house" and both.trained == ["a tree"]


@pytest.mark.parametrize("content", [b"", b"# only a comment", b"\xff", b"a\0b"])
def test_a_file_without_usable_prompts_is_one_line(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^--prior_prompts {path}") as caught:
        read_prompts(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "value"), [("class_data_dir", "x"), ("num_class_images", 100), ("prior_generation_precision", "bf16")]
)
def test_flags_that_upstream_needs_are_accepted_with_a_line(caplog, flag, value):
    make(trigger_word=["sks"], **{flag: value})
    assert f"--{flag}: is not needed" in caplog.text


@pytest.mark.parametrize(
    ("flag", "value"),
    [("class_prompt", ["a dog"]), ("prior_prompts", "x"), ("prior_loss_weight", 2.0), ("prior_every", 2)],
)
def test_flags_of_prior_preservation_that_is_off_have_no_effect_and_say_so(caplog, flag, value):
    assert make(with_prior_preservation=False, **{flag: value}) == PriorPrompts()
    assert f"--{flag}: has no effect with --with_prior_preservation false" in caplog.text


def test_a_caption_is_not_drawn_as_a_prompt_that_should_stay():
    captions = ["a photo of a corgi", "a photo of sks corgi", "sks corgi on grass"]
    for seed in range(6):
        assert make(captions, seed=seed, trigger_word=["sks=a"]).no_word == "a corgi on grass"


def test_made_up_words_that_make_a_caption_too_long_are_reported(caplog):
    prompts = make(["a photo of sks"], longest=len("a photo of sks"), trigger_word=["sks"])
    assert prompts.other_words == () and prompts.wrong_word is None
    assert "captions with made-up words are longer than the text limit and not held" in caplog.text


def test_a_held_out_prompt_with_the_trigger_word_is_not_drawn(tmp_path, caplog):
    path = tmp_path / "prompts.txt"
    path.write_text("a lake\na sks at home\n")
    prompts = make(trigger_word=["sks"], prior_prompts=str(path))
    assert prompts.held_out is None and prompts.unrelated == ("a lake",)
    assert "--prior_prompts: 'a sks at home' is what is to be learned" in caplog.text


def test_retention_prompts_that_are_not_drawn_may_be_held(caplog):
    make(trigger_word=["sks"], class_prompt=[RETENTION_PROMPTS[0]], validation_steps=0)
    assert "is held by prior preservation" not in caplog.text


# Editing


def test_an_editors_micro_batch_holds_prompts_of_one_kind():
    kinds = {
        "unrelated": ("a", "b"),
        "without_word": ("c", "d"),
        "other_words": ("e", "f"),
        "instructions": ("g", "h"),
    }
    prompts, drawn = PriorPrompts(**kinds), Counter()
    for place in range(400):
        batch = {*prompts.draw(0, place, 4, have_one_kind=True)}
        drawn += Counter(name for name, kind in kinds.items() if batch <= {*kind})
        mixed = prompts.draw(0, place, 4)
        assert len(batch) <= 2 and len(mixed) == 4
    assert sum(drawn.values()) == 400 and 160 < drawn.pop("other_words") < 240
    assert all(40 < count < 100 for count in drawn.values()) and len(drawn) == 3


@pytest.mark.parametrize("is_editing", [False, True])
def test_class_prompts_of_an_editor_are_instructions(is_editing, caplog):
    flags = {
        "class_prompt": ["erase it", "make it sks", "paint it"],
        "cond_image_column": ["source"] * is_editing or None,
    }
    prompts = make(["sks it", "paint it"], trigger_word=["sks"], **flags)
    assert prompts.instructions == (("erase it",) if is_editing else ())
    assert ("erase it" in prompts.unrelated) != is_editing and "erase it" in prompts.trained
    assert not {"make it sks", "paint it"} & {*prompts.trained}
    assert (
        "--class_prompt: 'make it sks' is what is to be learned, so it is not held (prompts affected: 2)"
        in caplog.text
    )


def test_an_editor_is_held_on_instructions_of_the_package_by_default(caplog):
    default = package_prompts("prior_instructions.txt")
    assert len(default) > 30 and len({*default}) == len(default)
    editing = {"cond_image_column": ["source"]}
    prompts = make(["sks it"], trigger_word=["sks"], **editing)
    assert (
        prompts.instructions == (*default[:-1],) and prompts.other_edit == prompts.drawn["other_edit"] == default[-1]
    )
    assert default[-1] not in prompts.trained and not {*default} & {*prompts.unrelated}
    own = make(["sks it"], trigger_word=["sks"], class_prompt=["erase it"], **editing)
    assert own.instructions == ("erase it",) and own.other_edit == default[-1]
    clashing = make(["add fog"], **editing)
    assert "add fog" not in clashing.instructions
    assert "--class_prompt, one of the default instructions: 'add fog' is what is to be learned" in caplog.text
    assert make(["sks it"], with_prior_preservation=False, **editing).drawn == {"other_edit": default[-1]}
    assert make([default[-1]], **editing).other_edit is None
    plain = make(["sks it"], trigger_word=["sks"])
    assert plain.instructions == () and plain.other_edit is None
