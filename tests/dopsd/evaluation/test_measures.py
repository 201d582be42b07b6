"""Measuring a comparison with tiny random models: which figures there are, and that each is of the right pictures."""

import math

import pytest
import torch

from dopsd.evaluation import measures
from dopsd.evaluation.comparison import Contender
from dopsd.evaluation.features import open_feature_models
from dopsd.evaluation.measures import measure


CPU = torch.device("cpu")


@pytest.fixture
def models(feature_models):
    return open_feature_models(str(feature_models["clip"]), str(feature_models["dino"]))


@pytest.fixture
def training(make_picture):
    return [make_picture(number, 72) for number in range(100, 105)]


def measured(prompts, drawn, training, models, **options):
    return measure(prompts, drawn, training, models, device=CPU, settings={"seed": 0}, **options)


def test_every_figure_is_there_and_only_what_was_drawn_is_measured(make_comparison, training, models):
    prompts, drawn = make_comparison()
    comparison = measured(prompts, drawn, training, models)
    keys = [column.key for column in comparison.columns]
    assert keys == [
        *("likeness/dino", "likeness/clip", "closeness/dino", "copies"),
        *("following/clip", "sharpness", "detail", "diversity/dino"),
        *("retention/dino", "following_unrelated/clip", "sharpness_unrelated", "detail_unrelated"),
        *("leakage_neighbours/dino", "leakage_neighbours/clip", "leakage_words/dino", "leakage_words/clip"),
    ]
    assert list(comparison.figures["same"]) and set(comparison.figures["same"]) == {*keys}
    assert set(comparison.figures["same x0.5"]) == {key for key in keys if not key.startswith("leakage")}
    assert set(comparison.figures) == {contender.name for contender in drawn}
    assert comparison.reference.keys() == {"likeness/dino", "likeness/clip", "closeness/dino"}
    models_of = {column.key: column.model for column in comparison.columns}
    assert models_of["likeness/dino"] == "dino" and models_of["likeness/clip"] == "clip" and not models_of["sharpness"]
    counts = {key: figure.count for key, figure in comparison.figures["same"].items()}
    assert counts["likeness/dino"] == 4 and counts["diversity/dino"] == 2 and counts["retention/dino"] == 2


def test_a_lora_that_changes_nothing_has_the_bases_figures(make_comparison, training, models):
    prompts, drawn = make_comparison()
    figures = measured(prompts, drawn, training, models).figures
    for key, figure in figures["base"].items():
        assert figures["same"][key].mean == pytest.approx(figure.mean, abs=1e-5), key
    assert figures["same"]["retention/dino"].mean == pytest.approx(1) and figures["base"]["sharpness"].mean == 1
    assert figures["same"]["leakage_words/clip"].mean == pytest.approx(0, abs=1e-6)
    assert figures["other"]["retention/dino"].mean < 0.9999
    for key in ("sharpness", "sharpness_unrelated", "detail", "detail_unrelated"):
        assert figures["same"][key].mean == pytest.approx(1) != figures["other"][key].mean
    assert figures["other"]["leakage_words/clip"].mean != 0


def test_figures_are_those_of_the_models_features(make_comparison, training, models):
    prompts, drawn = make_comparison()
    other = next(contender for contender in drawn if contender.name == "other")
    figure = measured(prompts, drawn, training, models).figures["other"]
    concept, unrelated = prompts[:2], prompts[2]

    def features(model, paths):
        rows = model.features([measures.opened(path) for path in paths], CPU)
        return torch.nn.functional.normalize(rows, dim=1)

    mine = features(models.dino, [path for prompt in concept for path in drawn[other][prompt]])
    pictures = torch.nn.functional.normalize(models.dino.features(training, CPU), dim=1)
    assert figure["likeness/dino"].mean == pytest.approx(float((mine @ pictures.T).mean()), abs=1e-5)
    assert figure["closeness/dino"].mean == pytest.approx(float((mine @ pictures.T).amax(1).mean()), abs=1e-5)
    after, before = (features(models.dino, drawn[one][unrelated]) for one in (other, Contender()))
    assert figure["retention/dino"].mean == pytest.approx(float((after * before).sum(1).mean()), abs=1e-5)
    seen = features(models.clip, [path for prompt in concept for path in drawn[other][prompt]])
    read = models.clip.text_features([prompt.plain for prompt in concept for _ in range(2)], CPU)
    read = torch.nn.functional.normalize(read, dim=1)
    assert figure["following/clip"].mean == pytest.approx(float((seen * read).sum(1).mean()), abs=1e-5)


def test_drawings_that_are_training_pictures_are_copies(make_comparison, models, training):
    prompts, drawn = make_comparison()
    other = next(contender for contender in drawn if contender.name == "other")
    for number, path in enumerate(path for prompt in prompts[:2] for path in drawn[other][prompt]):
        training[number % 2].save(path)
    figures = measured(prompts, drawn, training, models).figures
    assert figures["other"]["copies"].mean == 1 and figures["base"]["copies"].mean == 0
    assert figures["other"]["closeness/dino"].mean == pytest.approx(1, abs=1e-5)


def test_one_seed_has_no_diversity_and_one_picture_no_reference(make_comparison, models, training):
    prompts, drawn = make_comparison(num_seeds=1)
    comparison = measured(prompts, drawn, training[:1], models)
    keys = {column.key for column in comparison.columns}
    assert "diversity/dino" not in keys and {"copies", "detail", "likeness/dino"} <= keys
    assert not comparison.reference
    assert comparison.figures["base"]["likeness/dino"].over_seeds is None
    assert "Only one training picture is known" in comparison.notes[0]


def test_the_spread_of_diversity_over_seeds_needs_three_of_them(make_comparison, models, training):
    two, three = (measured(*make_comparison(num_seeds), training, models).figures["base"] for num_seeds in (2, 3))
    assert two["diversity/dino"].over_seeds is None and two["diversity/dino"].over_prompts is not None
    assert three["diversity/dino"].over_seeds > 0 and two["likeness/dino"].over_seeds > 0


def test_masked_figures_are_of_the_pictures_with_a_subject(feature_models, make_comparison, training, monkeypatch):
    prompts, drawn = make_comparison()
    models = open_feature_models(*map(str, feature_models.values()))
    # Unrelated prompts and neighbours are not masked: they are not to show it.
    num_pictures = len(training) + sum(
        len(by_prompt[prompt]) for by_prompt in drawn.values() for prompt in prompts[:2]
    )
    shown = torch.zeros(8, 8)
    shown[2:5, 2:5] = 0.9

    def certainties(images, subject, device):
        assert subject == "dog" and sum(1 for _ in images) == num_pictures
        # The first training picture and the base's first drawing show no subject.
        return [torch.zeros(8, 8) if index in (0, len(training)) else shown for index in range(num_pictures)]

    monkeypatch.setattr(models.mask, "certainties", certainties)
    comparison = measured(prompts, drawn, training, models, subject="dog")
    masked = [column.key for column in comparison.columns if "subject" in column.key or "masked" in column.key]
    assert masked == ["likeness_masked/dino", "likeness_masked/clip"]
    figures = comparison.figures
    assert figures["base"]["likeness_masked/dino"].count == 3 and figures["other"]["likeness_masked/dino"].count == 4
    assert figures["base"]["likeness_masked/dino"].mean != figures["base"]["likeness/dino"].mean
    assert math.isfinite(figures["base"]["likeness_masked/clip"].mean)
    assert comparison.reference["likeness_masked/dino"].count == len(training) - 1
    assert f"separated in 4 of 5 training pictures and {num_pictures - 6} of {num_pictures - 5}" in comparison.notes[0]
    monkeypatch.setattr(models.mask, "certainties", lambda images, *_: [torch.zeros(8, 8) for _ in images])
    assert "likeness_masked/dino" not in {column.key for column in measured(prompts, drawn, training, models).columns}


def test_an_editor_is_also_compared_with_the_pictures_to_edit(make_comparison, models, training, make_picture):
    prompts, drawn = make_comparison(image=0)
    comparison = measured(prompts, drawn, training, models, to_edit=[make_picture(0)])
    assert comparison.figures["base"]["kept/dino"].mean > comparison.figures["other"]["kept/dino"].mean


class FixedJudge:
    """A judge that knows what it thinks of each file."""

    name = "/models/vlm"

    def __init__(self, known):
        self.known = known

    def scores(self, pairs, device):
        self.pairs = pairs
        return {path: self.known(path) for path in pairs if self.known(path) is not None}


def test_the_judges_scores_and_what_it_did_not_grade(make_comparison, models, training):
    prompts, drawn = make_comparison()
    unclear = drawn[Contender()][prompts[0]][0]
    judge = FixedJudge(lambda path: None if path == unclear else 4.0 if path.name.startswith("other") else 1.0)
    comparison = measured(prompts, drawn, training, models, judge=judge)
    scores = {name: figures["score/judge"] for name, figures in comparison.figures.items()}
    assert (scores["other"].mean, scores["same"].mean, scores["base"].count) == (4, 1, 3)
    assert "Answers of the judge that name no grade and are left out: 1." in comparison.notes
    column = next(column for column in comparison.columns if column.key == "score/judge")
    assert column.model == "vlm"
    # A prompt and seed is compared with the same picture for all contenders, and not always with the first one.
    first, second = prompts[:2]
    for number, prompt in enumerate((first, second)):
        for seed in range(2):
            assert all(judge.pairs[drawn[one][prompt][seed]] is training[number + seed] for one in drawn)
