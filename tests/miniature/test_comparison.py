"""Features beside the exact reader: the parts of the comparison, and its committed results."""

import json

import numpy as np
import pytest
import torch

from benchmarks.miniature import feature_models as feature_models_module
from benchmarks.miniature import mask_model as mask_model_module
from benchmarks.miniature import world
from benchmarks.miniature.comparison import NUM_PROMPTS, Settings, evaluate_flags, exact_figures
from benchmarks.miniature.comparison_report import (
    PAIRS,
    SHARE,
    Pair,
    exact_table,
    figure_table,
    is_other_strength,
    quality_table,
    rank_table,
    ranking,
    ranks,
    short_table,
    spearman,
    spread_out,
)
from benchmarks.miniature.concepts import CONCEPTS
from benchmarks.miniature.exact_figures import ExactReader, asked_prompts, files_of, read_pictures
from benchmarks.miniature.feature_models import (
    CLIP,
    DINO,
    is_withheld,
    loose_caption,
    make_feature_models,
    make_tokenizer,
    shown_appearances,
    withheld_appearances,
)
from benchmarks.miniature.files import MODEL, REPOSITORY
from benchmarks.miniature.known_loras import ANOTHER, BARE_PICTURE, BLURRED, ONE_PICTURE, SEED, SUBJECT, known_runs
from benchmarks.miniature.mask_model import ANYTHING, MASK, ask, make_mask_model, scenes
from dopsd.errors import InputError
from dopsd.evaluation.comparison import Contender, LoRA
from dopsd.evaluation.features import open_feature_models
from dopsd.evaluation.pictures import slug
from dopsd.evaluation.prompts import folded
from dopsd.evaluation.settings import parse_settings


STEPS = {CLIP: 2, DINO: 2}


@pytest.fixture
def tiny_training(monkeypatch):
    """Small batches, few objects without a name."""
    monkeypatch.setattr(feature_models_module, "BATCH_SIZE", 4)
    monkeypatch.setattr(mask_model_module, "BATCH_SIZE", 4)
    monkeypatch.setattr(feature_models_module, "NUM_UNNAMED", 2)
    monkeypatch.setattr(feature_models_module, "STEPS_PER_SAVE", 1)


# Feature models


def test_the_concepts_are_withheld_from_the_feature_models():
    assert all(is_withheld(concept.appearance) for concept in CONCEPTS)
    shown, withheld = shown_appearances(), withheld_appearances()
    assert not {*shown} & {*withheld} and len(shown) + len(withheld) == len(world.all_appearances())
    for part in ("shape", "texture", "colours"):  # only combinations are new
        assert {getattr(item, part) for item in withheld} <= {getattr(item, part) for item in shown}


def test_a_caption_has_a_few_tokens_and_any_text_ends_once():
    tokenizer = make_tokenizer()
    words = "a dotted yellow and blue heart on mint"
    assert len(tokenizer(words).input_ids) <= len(words.split()) + 4
    ids = tokenizer("Ein Photo! 12").input_ids
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ein photo ! 1 2"


def test_a_loose_caption_names_the_shape_and_nothing_that_is_not_shown():
    heart, rng = CONCEPTS[0].appearance, np.random.default_rng(0)
    captions = {loose_caption(heart, "mint", rng) for _ in range(200)}
    assert "on" not in {word for _ in range(50) for word in loose_caption(heart, None, rng).split()}
    assert {"a dotted yellow and blue heart on mint", "a heart"} <= captions and len(captions) == 8
    assert all("heart" in caption and not {*caption.split()} & {"sand", "red"} for caption in captions)


def test_feature_models_are_read_by_the_flags_and_a_stopped_training_goes_on(tmp_path, tiny_training, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    make_feature_models(whole, num_steps=STEPS)
    make_mask_model(whole, num_steps=1)

    class Stopped(Exception):
        pass

    def stop(state, path):
        save_state(state, path)
        raise Stopped

    save_state = feature_models_module.save_state
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(feature_models_module, "save_state", stop)
        make_feature_models(stopped, num_steps=STEPS)
    quality = make_feature_models(stopped, num_steps=STEPS)
    for name in (CLIP, DINO):
        weights = "model.safetensors"
        assert (whole / name / weights).read_bytes() == (stopped / name / weights).read_bytes(), name
        assert 0 <= min(quality[name].values()) and max(quality[name].values()) <= 1

    models = open_feature_models(str(whole / CLIP), str(whole / DINO), str(whole / MASK))
    images, cpu = SUBJECT.pictures(SEED)[0], torch.device("cpu")
    texts = models.clip.text_features(["a heart", "a disc on mint"], cpu)
    assert models.clip.features(images, cpu).shape == (4, texts.shape[1]) and len(texts) == 2
    assert models.dino.features(images, cpu).shape == (4, feature_models_module.WIDTH)
    assert models.mask.certainties(images, ANYTHING, cpu)[0].shape == (world.SIDE, world.SIDE)
    with pytest.raises(InputError, match="num_steps"):
        make_feature_models(whole, num_steps={CLIP: 3, DINO: 2})


def test_masks_are_where_the_pictures_have_an_object():
    rng = np.random.default_rng(0)
    pictures, masks = scenes([world.Appearance("square", "plain", ("black",))] * 3, rng)
    for picture, mask in zip(pictures, masks, strict=True):
        inside, outside = picture[:, mask > 0], picture[:, mask == 0]
        assert 0.2 < mask.mean() < 0.5 and inside.mean() < -0.3 < 0 < outside.mean()


def test_texts_of_masks_fit_as_they_say():
    heart, others, rng = CONCEPTS[0].appearance, shown_appearances(), np.random.default_rng(0)
    asked = {ask(heart, others, rng) for _ in range(300)}
    fitting = {text for text, fits in asked if fits}
    assert fitting == {ANYTHING, "heart", heart.words}
    assert {"disc", "square"} <= {text for text, fits in asked if not fits}


# What is compared


def test_the_known_loras_differ_as_their_names_say():
    runs = known_runs()
    assert len({run.folder for run in runs.values()}) == len(runs) == 7
    assert {name for name, run in runs.items() if run.concept == SUBJECT} == {"sft", "dopsd", "dopsd-prior", "adapter"}
    assert runs["wrong"].concept == ANOTHER and runs["wrong"].method == runs["dopsd-prior"].method
    (picture, *_), (caption, *_) = SUBJECT.pictures(SEED)
    for lesson, wanted in ((ONE_PICTURE, caption), (BARE_PICTURE, "a zofu")):
        images, captions = lesson.pictures(SEED)
        assert {image.tobytes() for image in images} == {picture.tobytes()} and {*captions} == {wanted}


def test_prompts_are_no_captions_and_have_files_of_their_own():
    asked = asked_prompts(SUBJECT, NUM_PROMPTS)
    counts = {role: sum(one.prompt.role == role for one in asked) for role in NUM_PROMPTS}
    assert counts == NUM_PROMPTS
    captions = {folded(caption) for caption in SUBJECT.pictures(SEED)[1]}
    assert not captions & {folded(one.prompt.text) for one in asked}
    assert len({slug(one.prompt.text) for one in asked}) == len(asked)
    for one in asked:
        assert one.prompt.plain == world.caption(one.wanted.words, one.background)
        has_word = SUBJECT.word in one.prompt.text.split()
        assert has_word == (one.prompt.role == "concept")


def test_the_flags_are_those_of_evaluate_lora(tmp_path):
    flags = evaluate_flags(tmp_path, {"a": tmp_path / "a.safetensors"}, tmp_path, Settings(NUM_PROMPTS, 3))
    settings = parse_settings({"default_vlm": "", "deployed_steps": ""}, "", flags)
    assert settings.lora == [f"a={tmp_path / 'a.safetensors'}"] and settings.num_seeds == 3
    assert settings.mask_background and settings.class_word == ANYTHING and settings.height == world.SIDE


# The exact reader


def picture(appearance: world.Appearance, background: str, place: int = 0) -> np.ndarray:
    return world.draw(world.sprite(appearance), world.POSES[place], background, np.random.default_rng(place))


@pytest.fixture
def drawings(tmp_path):
    """A comparison's pictures: the base draws what is asked for, a LoRA the same training picture everywhere."""
    asked = asked_prompts(SUBJECT, {"concept": 1, "unrelated": 1, "neighbour": 1, "other_word": 1})
    (known, *_), _ = SUBJECT.pictures(SEED)
    another = world.Appearance("square", "plain", ("red",))
    for one in asked:
        is_known = one.prompt.role in ("unrelated", "neighbour")
        for seed in range(2):
            base = picture(one.wanted if is_known else another, one.background, seed)
            for name, image in (("base", world.to_image(base)), ("copier", known)):
                (tmp_path / name).mkdir(exist_ok=True)
                image.save(tmp_path / name / f"{slug(one.prompt.text)}-seed{seed}-0123456789abcdef0123.png")
    return tmp_path, asked


def test_exact_figures_of_pictures_whose_content_is_known(drawings):
    folder, asked = drawings
    found = exact_figures(folder, ["copier"], asked, Settings({}, 2, strengths=(1.0,)))
    base, copier = found["base"], found["copier"]
    assert base == {
        "subject": 0,
        "as asked": 0,
        "copies": 0,
        "detail": 1,
        "changing": 1,
        "old detail": 1,
        "old right": 1,
        "old same": 1,
        "neighbours": 0,
        "other words": 0,
    }
    assert copier["subject"] == copier["copies"] == copier["neighbours"] == copier["other words"] == 1
    assert copier["as asked"] == copier["changing"] == copier["old right"] == copier["old same"] == 0
    assert 0.8 < copier["detail"] < 1.25


def test_blurred_drawings_have_less_detail(drawings):
    folder, asked = drawings
    reader = ExactReader(SUBJECT, SUBJECT.pictures(SEED)[0])
    sharp = [
        reader.see(one, read_pictures(files_of(folder, Contender(), one.prompt, 2)))
        for one in asked
        if one.prompt.role == "concept"
    ]
    blurred = [
        reader.see(one.asked, torch.nn.functional.avg_pool2d(one.pictures, 3, stride=1, padding=1)) for one in sharp
    ]
    found = reader.figures(blurred, sharp)
    assert 0.1 < found["detail"] < 0.8 and "old right" not in found


def test_files_are_found_by_contender_prompt_and_seed(drawings):
    folder, asked = drawings
    lora = LoRA("copier", folder / "x", "")
    first, second = files_of(folder, Contender((lora,)), asked[0].prompt, 2)
    assert first.parent.name == "copier" and "-seed0-" in first.name and "-seed1-" in second.name
    with pytest.raises(InputError, match="has 0 drawings"):
        files_of(folder, Contender((lora,), 0.5), asked[0].prompt, 1)


# Rankings


def test_rank_correlation_by_hand():
    assert [*ranks([3, 1, 1, 2])] == [4, 1.5, 1.5, 3]
    assert spearman([1, 2, 3, 4], [10, 20, 30, 90]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_names_are_far_enough_apart_to_be_read():
    assert spread_out([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread_out([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])


def test_swapped_pairs_are_those_that_the_reader_tells_apart():
    pair = Pair("likeness/dino", "subject", SHARE)
    exact = {"base": 0.0, "good": 0.9, "nearly": 0.85, "bad": 0.2}
    figures = {"base": 0.1, "good": 0.5, "nearly": 0.6, "bad": 0.7}
    found = {
        "columns": {pair.column: "likeness (DINO)"},
        "figures": {name: {pair.column: value} for name, value in figures.items()} | {"other": {}},
        "exact": {name: {pair.exact: value} for name, value in exact.items()} | {"other": {pair.exact: 1}},
    }
    ranked = ranking(found, pair)
    # good and nearly are too close; the five other pairs are not.
    assert ranked.num_apart == 5 and ranked.swaps == [("good", "bad"), ("nearly", "bad")]
    assert "bad (0.20) above good (0.90)" in rank_table(found) and "2 of 5" in rank_table(found)
    assert ranking(found, pair._replace(column="closeness/dino")) is None


# The committed results

RESULTS = MODEL.parent / "results"


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "comparison.json").read_text())


def test_the_committed_tables_are_those_of_the_committed_figures(committed):
    text = (RESULTS / "comparison.md").read_text()
    at_one = [name for name in committed["exact"] if not is_other_strength(name)]
    for table in (
        rank_table(committed),
        exact_table(committed),
        figure_table(committed, [*committed["figures"]]),
        quality_table(committed["feature_models"]),
        short_table(committed, at_one),
    ):
        assert table in text


def test_the_committed_comparison_is_complete(committed):
    names = {f"{name}{strength}" for name in (*known_runs(), BLURRED) for strength in ("", " x0.5", " x1.5")} | {
        "base"
    }
    assert committed["exact"].keys() == committed["figures"].keys() == names
    assert all(ranking(committed, pair) is not None for pair in PAIRS)
    assert committed["settings"]["num_prompts"] == NUM_PROMPTS


def test_the_page_shows_the_committed_rankings(committed):
    page = (REPOSITORY / "docs/evaluation.md").read_text()
    at_one = [name for name in committed["exact"] if not is_other_strength(name)]
    assert rank_table(committed) in page and short_table(committed, at_one) in page
    assert "results/comparison.png" in page
