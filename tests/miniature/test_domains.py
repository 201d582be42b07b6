import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

import train_dopsd_flux2
from benchmarks.miniature import world
from benchmarks.miniature.concepts import MAX_EVAL_COUNT, prior_prompts
from benchmarks.miniature.domain_base import held_contexts, styled_contexts, train_base
from benchmarks.miniature.domain_runs import FULL, LORA, RECIPES, DomainComparison, best_rate, recipe_in_mode
from benchmarks.miniature.domains import DOMAIN, NEON, NUM_DOMAIN_PICTURES
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.lesson_runs import LessonExperiment
from benchmarks.miniature.methods import Run
from benchmarks.miniature.runs import dopsd_flags
from dopsd.command_line import parse_settings


def read(pictures: torch.Tensor) -> tuple[list[world.Appearance], list[world.Style]]:
    objects = DOMAIN.reader.read(pictures).objects.tolist()
    return [DOMAIN.reader.appearances[index] for index in objects], [DOMAIN.reader.styles[index] for index in objects]


def test_training_pictures_have_the_domains_look_and_show_what_no_task_asks_for():
    images, captions = DOMAIN.pictures(1)
    objects, styles = read(world.to_tensor([np.asarray(image, np.float32) / 127.5 - 1 for image in images]))
    assert len({*objects}) == len(captions) == NUM_DOMAIN_PICTURES and {*styles} == {NEON}
    assert all(text.startswith(f"a zofu {item.words} on ") for text, item in zip(captions, objects, strict=True))
    tasks = DOMAIN.tasks(MAX_EVAL_COUNT, 1)
    assert not {*objects} & {*tasks["new"].wanted}
    assert captions != DOMAIN.pictures(2)[1]
    assert not {*prior_prompts()} & {*tasks["old"].prompts}


def test_tasks_differ_by_the_word_only():
    tasks = DOMAIN.tasks(24, 0)
    new, old, wrong = (tasks[name] for name in ("new", "old", "wrong_words"))
    assert [prompt.replace("zofu ", "") for prompt in new.prompts] == old.prompts
    words = [prompt.split()[1] for prompt in wrong.prompts]
    assert "zofu" not in words and len({*words}) > 20
    assert [" ".join(["a", *prompt.split()[2:]]) for prompt in wrong.prompts] == old.prompts
    (taught,) = DOMAIN.teacher_tasks(4, 0, world.REFERENCE_SUFFIX).values()
    assert (
        taught.prompts == [prompt + world.REFERENCE_SUFFIX for prompt in new.prompts[:4]]
        and len(taught.references) == 4
    )


def test_object_and_look_are_measured_apart(reader):
    tasks = DOMAIN.tasks(48, 0)
    of_domain = DOMAIN.measure(tasks["new"].real, tasks["new"], 0, reader)
    assert of_domain["whole"] == of_domain["look"] == of_domain["exact"] == 1 and of_domain["ordinary"] == 0
    as_before = DOMAIN.measure(tasks["old"].real, tasks["new"], 0, reader)
    assert as_before["ordinary"] == as_before["exact"] == 1 and as_before["whole"] == as_before["look"] == 0
    same = DOMAIN.measure(DOMAIN.new_task(48, seed=1).real, tasks["new"], 0, reader)
    blurred = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(tasks["new"].real, 4), scale_factor=4)
    softened = DOMAIN.measure(blurred, tasks["new"], 0, reader)
    for other in (as_before, softened):
        assert other["latent_fd"] > 5 * same["latent_fd"]
    assert softened["look"] == 1 and softened["detail"] < 0.8
    others = DOMAIN.measure(tasks["new"].real.roll(1, 0), tasks["new"], 0, reader)
    assert others["look"] == 1 and others["whole"] < 0.2


def test_rates_are_chosen_by_what_is_learned_and_kept():
    def result(new: float, old: float) -> dict:
        return {"new": {"whole": new}, "old": {"ordinary": old}}

    assert best_rate({1e-4: result(0.1, 1.0), 1e-3: result(0.9, 0.5), 1e-2: result(1.0, 0.2)}) == 1e-3
    assert best_rate({1e-4: result(0.6, 0.8), 1e-3: result(0.8, 0.6), 1e-2: result(0.8, 0.6)}) == 1e-3

    def result_of(run: Run) -> dict:
        return result(float(run.method.flags["learning_rate"] == 1e-3), 1.0)

    comparison = DomainComparison(result_of, (FULL, LORA), (0, 1))
    assert {*comparison.chosen_rates.values()} == {1e-3} and {run.seed for run in comparison.grid_runs} == {3}
    folders = [run.folder for run in (*comparison.grid_runs, *comparison.runs)]
    assert len({*folders}) == len(folders) and len(comparison.runs) == 1 + 2 + 2 * 2 * (len(RECIPES) + 1)
    assert all(run.method.flags["learning_rate"] == 1e-3 for run in comparison.runs if run.method.is_trained)


def test_the_script_takes_the_flags_of_whole_models(tmp_path):
    method = recipe_in_mode(RECIPES[-1], FULL, 1e-4)
    flags = dopsd_flags(
        MODEL,
        tmp_path,
        tmp_path / "out",
        seed=1,
        num_steps=2,
        retention_prompts=["a ball", "a box"],
        **DOMAIN.training_flags | method.flags,
    )
    settings = parse_settings(train_dopsd_flux2.MODEL, "", sum(flags, []))
    assert settings.full.is_full and settings.optimizer.learning_rate == 1e-4
    assert recipe_in_mode(RECIPES[0], FULL, 1e-4).settings.learning_rate == 1e-4
    assert not recipe_in_mode(RECIPES[0], LORA, 1e-4).is_full


def test_a_whole_baseline_trains_every_weight_and_its_pipeline_is_loaded(miniature, tmp_path, monkeypatch):
    pictures = [Image.new("RGB", (64, 64))], ["a zofu on sand"]
    monkeypatch.setattr(type(DOMAIN), "pictures", lambda self, seed: pictures)
    before = {name: weight.clone() for name, weight in miniature.transformer.named_parameters()}
    experiment = LessonExperiment(MODEL, tmp_path, num_train_steps=2, steps_per_evaluation=2, eval_count=16)
    monkeypatch.setattr(experiment.evaluator, "load", lambda *loras: miniature)
    run = Run(DOMAIN, 0, recipe_in_mode(RECIPES[0], FULL, 1e-3))
    assert experiment.train_baseline(run) == {"steps": 2}
    loaded = dict(experiment.load(run).transformer.named_parameters())
    same = [name for name, weight in loaded.items() if torch.equal(weight, before[name])]
    assert not same
    assert all(torch.equal(weight, loaded[name]) for name, weight in miniature.transformer.named_parameters())


def test_the_base_learns_from_words_without_meaning_and_holds_the_rest(miniature):
    before = [weight.clone() for weight in miniature.transformer.parameters()]
    student, teacher = styled_contexts(miniature, np.random.default_rng(0))
    assert torch.equal(student.references[0], teacher.references[0])
    assert not torch.equal(student.prompt_embeds, teacher.prompt_embeds)
    held, base = held_contexts(miniature, np.random.default_rng(0))
    assert held is base
    train_base(miniature, 1)
    assert not any(map(torch.equal, before, miniature.transformer.parameters()))


@pytest.mark.exhaustive
def test_the_script_trains_a_whole_model_that_the_stock_pipeline_loads(tmp_path):
    experiment = LessonExperiment(MODEL, tmp_path, num_train_steps=2, steps_per_evaluation=2, eval_count=16)
    run = Run(DOMAIN, 0, recipe_in_mode(RECIPES[-1], FULL, 1e-3))
    trained = experiment.train_dopsd(run, ignore_exam=True)
    assert trained["steps"] == 2 and trained["retention_logged"] > 0
    stock = Flux2KleinPipeline.from_pretrained(tmp_path / run.folder).transformer.state_dict()
    pipelines = experiment.load(run), experiment.evaluator.load()
    loaded, base = (pipeline.transformer.state_dict() for pipeline in pipelines)
    assert all(torch.equal(stock[name], weight) for name, weight in loaded.items())
    assert not any(torch.equal(base[name], weight) for name, weight in loaded.items())
