import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.miniature import costs as costs_module
from benchmarks.miniature import once as once_module
from benchmarks.miniature import rival_report as rival_report_module
from benchmarks.miniature import rival_runs as rival_runs_module
from benchmarks.miniature import rivals as rivals_module
from benchmarks.miniature.baselines import (
    BaselineTraining,
    draw_prior_pictures,
    encode_pictures,
    off_policy_losses,
)
from benchmarks.miniature.concepts import CONCEPTS, MAX_EVAL_COUNT, old_task
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.methods import SharedSettings
from benchmarks.miniature.once import ADAPTER, LORA, REPAIR, UNDISTILLED, Once, OnceSettings, adapted
from benchmarks.miniature.rival_methods import (
    DOPSD_ALL,
    DOPSD_ONE_PRIOR,
    GRID_CONCEPT,
    INDIFFERENCE,
    OFF_POLICY,
    OFF_POLICY_PRIOR,
    RECIPES,
    REPORTED_CONCEPTS,
    SFT,
    SFT_PRIOR,
    TEACHER_RIVAL,
    Rival,
    RivalPlan,
    RivalRun,
    choice,
)
from benchmarks.miniature.rival_plots import cost_and_mean, front, kept_and_learned
from benchmarks.miniature.rival_runs import RivalExperiment
from benchmarks.miniature.rival_study import CONDITIONS, study
from benchmarks.miniature.rival_training import DeltaTraining, ManyStepChange, record
from benchmarks.miniature.rivals import MOST_PICTURES
from benchmarks.miniature.runs import make_roles, save_baseline
from benchmarks.miniature.world import REFERENCE_SUFFIX
from dopsd.rollout import seeded_noise


OBJECT = CONCEPTS[0]
SHAPE = KLEIN.load(MODEL).latent_shape(64, 64)
TINY_ONCE = OnceSettings(num_pictures=32, batch_size=2, adapter_steps=2, undistilled_steps=2, repair_steps=2)


def write_lora(folder, seed: int) -> None:
    """A LoRA that changes the model visibly."""
    pipeline = KLEIN.load(MODEL)
    roles = make_roles(LORA, pipeline)
    generator = torch.Generator().manual_seed(seed)
    for parameter in roles.student_parameters:
        parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    save_baseline(roles, pipeline, folder)


@pytest.fixture
def experiment(tmp_path):
    """Two training steps; an adapter that was trained once."""
    experiment = RivalExperiment(
        MODEL, tmp_path, num_train_steps=2, steps_per_evaluation=2, eval_count=16, once_settings=TINY_ONCE
    )
    write_lora(experiment.once.folder / ADAPTER, 0)
    return experiment


def weights_of(pipeline) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}


def test_an_adapter_is_frozen_in_training_and_absent_from_prior_pictures_and_afterwards(experiment, monkeypatch):
    seen = []
    train = BaselineTraining.train

    def spy(self, num_steps):
        names = ("base_layer.", "")
        own = {k.replace(*names): v for k, v in weights_of(self.pipeline).items() if ".lora_" not in k}
        taken = train(self, num_steps)
        after = {k.replace(*names): v for k, v in weights_of(self.pipeline).items() if ".lora_" not in k}
        seen.append((own, after, self))
        return taken

    monkeypatch.setattr(BaselineTraining, "train", spy)
    run = RivalRun(OBJECT, 0, replace(SFT_PRIOR, trained_on=ADAPTER))
    assert experiment.train_rival(run) == {"steps": 2}
    ((before, after, training),) = seen
    assert training.num_draws == 1 and training.shift == pytest.approx(7.02, abs=0.01)
    drawn = draw_prior_pictures(
        KLEIN.load(MODEL), experiment._held_prompts(run), KLEIN.load(MODEL).schedule(64, 64, 4), seed=0
    )
    assert len(drawn.x0) == 4 and torch.equal(training.prior.x0, drawn.x0)  # two steps of two pictures
    merged = weights_of(adapted(KLEIN.load(MODEL), experiment.once.folder / ADAPTER))
    base = weights_of(KLEIN.load(MODEL))
    assert set(before) == set(merged) == set(base)
    for name, weight in merged.items():
        assert torch.equal(before[name], weight) and torch.equal(after[name], weight)
    assert any(not torch.allclose(merged[name], base[name]) for name in base)

    loaded = experiment.load(run)
    (adapter,) = loaded.transformer.peft_config
    own = {k.replace("base_layer.", ""): v for k, v in weights_of(loaded).items() if ".lora_" not in k}
    assert adapter == "lora_0" and all(torch.equal(own[name], base[name]) for name in base)


def test_a_repaired_lora_is_the_trained_one_with_the_repair_at_its_scale(experiment):
    source = RivalRun(OBJECT, 0, SFT)
    run, weak = (replace(source, method=Rival("", "repair", source=SFT, scale=scale)) for scale in (1.0, 0.7))
    write_lora(experiment.folder / source.folder, 1)
    write_lora(experiment.once.folder / REPAIR, 2)
    half, both = experiment.load(run, strength=0.5), experiment.load(run)
    layer = half.transformer.transformer_blocks[0].attn.to_q
    assert set(layer.lora_A) == {"lora_0", "lora_1"}
    assert layer.scaling["lora_0"] == 0.5 and layer.scaling["lora_1"] == 1.0
    assert both.transformer.transformer_blocks[0].attn.to_q.scaling == {"lora_0": 1.0, "lora_1": 1.0}
    assert experiment.load(weak).transformer.transformer_blocks[0].attn.to_q.scaling == {"lora_0": 1.0, "lora_1": 0.7}
    assert len({run.folder, source.folder, weak.folder}) == 3
    (experiment.folder / source.folder / "trained.json").write_text('{"steps": 7}')
    assert experiment._train(run) == {"steps": 7}  # not trained again


def test_cached_trajectories_train_like_those_that_are_made_at_each_step(miniature):
    pictures = encode_pictures(miniature, *OBJECT.pictures(0), prompt_suffix=" so").select(torch.tensor([0, 1]))
    schedule = miniature.schedule(64, 64, 4)
    noise, order = seeded_noise(SHAPE, [0, 1, 2]), torch.tensor([1, 0, 0])

    def teacher_of(indices):
        return partial(miniature.predict_velocity, context=KLEIN.select(pictures.teacher, order[indices]))

    cached = record(teacher_of, noise, schedule, pictures.student, order)
    chosen = torch.tensor([2, 0])
    student = partial(miniature.predict_velocity, context=KLEIN.select(pictures.student, order[chosen]))
    expected = [*off_policy_losses(student, torch.no_grad()(teacher_of(chosen)), noise[chosen], schedule)]
    losses = [*cached.losses(KLEIN, miniature, schedule, chosen, range(4))]
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-4, atol=1e-7)
    (last,) = cached.losses(KLEIN, miniature, schedule, chosen, [3])
    assert last.item() == pytest.approx(expected[3].item(), rel=1e-4) and expected[3] != expected[2]


def test_cached_trajectories_are_the_bases_with_the_picture_where_it_teaches(experiment, miniature):
    run = RivalRun(OBJECT, 0, Rival("", OFF_POLICY_PRIOR))
    schedule = miniature.schedule(64, 64, 4)
    pictures = experiment._encoded_pictures(run, miniature)
    taught = experiment._taught_trajectories(run, miniature, pictures, schedule)
    held = experiment._held_trajectories(run, miniature, schedule)
    images, captions = OBJECT.pictures(0)
    suffixed = [caption + REFERENCE_SUFFIX for caption in captions]
    contexts = {
        "taught": KLEIN.reference_context(miniature, suffixed, images),
        "held": KLEIN.text_context(miniature, experiment._held_prompts(run)),
    }
    for name, trajectories in (("taught", taught), ("held", held)):
        assert len(trajectories.states) == 4  # all that two steps of two pictures draw from
        for index in (0, 3):
            states, timestep = trajectories.states[:, index], schedule.timesteps[index]
            expected = miniature.predict_velocity(states, timestep, contexts[name])
            torch.testing.assert_close(trajectories.velocities[:, index], expected, rtol=1e-3, atol=1e-4)
    assert not taught.contexts.references  # the student sees no picture


class Linear:
    """A model whose velocity is a multiple of its state."""

    def __init__(self, factor: float):
        self.factor = torch.tensor(factor, requires_grad=True)

    def predict_velocity(self, latents, timestep, context):
        assert context == "the prompt"
        return self.factor * latents


def test_delta_transfer_adds_the_many_step_models_change_to_the_base():
    latents = torch.randn(2, 3, 4, 4)
    change = ManyStepChange(before=Linear(0.5), after=Linear(0.8), scale=2)
    target = change.target(lambda latents, timestep: 2 * latents, "the prompt")(latents, torch.tensor(500.0))
    torch.testing.assert_close(target, (2 + 2 * (0.8 - 0.5)) * latents)
    assert not target.requires_grad


@pytest.mark.parametrize(("factors", "is_learned"), [((0.3, 0.3), False), ((0.3, 0.7), True)])
def test_delta_transfer_teaches_nothing_where_nothing_changed(miniature, factors, is_learned):
    roles = make_roles(LORA, miniature)
    pictures = encode_pictures(miniature, *OBJECT.pictures(0), prompt_suffix=" so").select(torch.tensor([0]))
    before, after = (
        SimpleNamespace(predict_velocity=lambda latents, timestep, context, factor=factor: factor * latents)
        for factor in factors
    )
    held = KLEIN.text_context(miniature, ["a plain red disc on sky"])
    training = DeltaTraining(
        *(KLEIN, ManyStepChange(before, after), held, miniature, roles, pictures, miniature.schedule(64, 64, 4)),
        *(SharedSettings(),),
        seed=0,
        num_held=1,
    )
    training.backpropagate(pictures)
    norm = torch.stack([parameter.grad.norm() for parameter in roles.student_parameters]).norm()
    assert norm > 1e-2 if is_learned else norm < 1e-4


def test_costs_are_counted_in_the_students_forward_passes():
    costs = KLEIN.costs
    both, base = costs.forward_and_backward, costs.base
    prior = 120 * 4 * base  # of 200 pictures, those that 60 steps of two draw from
    assert SFT.cost(60, KLEIN) == pytest.approx(60 * 2 * both)
    assert replace(SFT, trained_on=ADAPTER).cost(60, KLEIN) == SFT.cost(60, KLEIN)
    repaired = RECIPES["SFT + prior pictures, repaired"].at(1e-3, 60)
    assert repaired.cost(60, KLEIN) == pytest.approx(prior + 60 * 2 * 2 * both)
    assert repaired.cost(240, KLEIN) == pytest.approx(200 * 4 * base + 240 * 2 * 2 * both)
    cached = 64 * 4 * costs.base_teacher + prior
    assert Rival("", "off_policy_prior").cost(60, KLEIN) == pytest.approx(cached + 60 * 2 * 8 * both)
    assert Rival("", "off_policy_one_prior").cost(60, KLEIN) == pytest.approx(cached + 60 * 2 * 2 * both)
    # Of the K = 4 states one is trained; the student walks 1.5 states to it on average.
    source = RECIPES["training adapter"].at(1e-3, 240)
    delta = RECIPES["delta of the adapter"].at(1e-3, 60, source=source)
    assert delta.cost(60, KLEIN) == pytest.approx(source.cost(240, KLEIN) + 60 * 2 * (1.5 + 3 * base + both))
    held = replace(delta, kind="delta_prior").cost(60, KLEIN) - delta.cost(60, KLEIN)
    assert held == pytest.approx(60 * 2 * (1.5 + base + both))


def make_plan(best_of: dict[str, tuple[float, int]], seeds=(0, 1, 2), **changed) -> RivalPlan:
    """A plan whose grids are best at the given learning rates and numbers of steps, at the smallest scale."""

    def short_result(run):
        method = run.method
        rate, steps = method.flags["learning_rate"], round(120 * method.relative_steps)
        assert (run.concept, run.seed) == (OBJECT, 3)
        new = 0.9 if (rate, steps) == best_of[method.name] and method.scale <= 1 else 0.5
        return {"new": {"exact": new}, "old": {"exact": 0.8}, "forwards": steps}

    def many_step_result(run):
        """Best at other settings than the few-step model."""
        rate, steps = run.method.flags["learning_rate"], round(120 * run.method.relative_steps)
        return {"new": {"exact": float((rate, steps) == (2e-2, 120))}, "old": {"exact": 0.8}, "forwards": steps}

    return RivalPlan(short_result, many_step_result, tuple(best_of), CONCEPTS[1:], seeds, grid_seed=3, **changed)


def test_what_a_grid_chooses_is_reported_on_other_concepts_and_seeds():
    source, delta = "training adapter + prior pictures", "delta of the adapter + prior"
    plan = make_plan({source: (3e-3, 240), delta: (1e-2, 240)})
    trained, transferred = plan.tuned
    assert (trained.flags["learning_rate"], trained.relative_steps) == (3e-3, 2)
    assert (transferred.flags["learning_rate"], transferred.relative_steps, transferred.scale) == (1e-2, 2, 1)
    # The source is chosen by what its many-step model draws.
    assert plan.sources == [RECIPES[source]]
    assert (transferred.source.flags["learning_rate"], transferred.source.relative_steps) == (2e-2, 1)
    assert transferred.source.trained_on == ADAPTER
    assert [RECIPES[name].mark for name in (source, delta, "SFT, repaired", "SFT")] == [" + A", " + A", " + R", ""]
    grids = [run for recipe in map(RECIPES.get, plan.names) for run in plan.grid(recipe)]
    assert len({run.folder for run in grids}) == 12 + 8
    runs = plan.reported[delta]
    assert OBJECT not in plan.concepts and plan.grid_seed not in plan.seeds
    assert {(run.concept, run.seed) for run in runs} == {(concept, s) for concept in CONCEPTS[1:] for s in (0, 1, 2)}
    assert not {run.folder for run in runs} & {run.folder for run in grids}
    assert len(plan.reported["base"]) == 2 and len(plan.reported[TEACHER_RIVAL.name]) == 6


def scored(new: float, forwards: int) -> dict:
    return {"new": {"exact": new}, "old": {"exact": 0.9}, "forwards": forwards}


def test_the_best_setting_is_chosen_and_of_equals_the_cheapest():
    rivals = [replace(SFT, flags={"learning_rate": rate}) for rate in (1e-3, 2e-3, 3e-3)]
    results = [scored(0.9, 500), scored(0.9, 400), scored(0.89, 300)]
    assert choice([*zip(rivals, results, strict=True)]) == rivals[1]


def test_the_cheapest_of_nearly_equal_settings():
    rivals = [replace(SFT, flags={"learning_rate": rate}) for rate in (1e-3, 2e-3, 3e-3, 4e-3)]
    results = [scored(0.90, 500), scored(0.87, 400), scored(0.86, 300), scored(0.88, 400)]
    assert choice([*zip(rivals, results, strict=True)], INDIFFERENCE) == rivals[3]
    assert choice([*zip(rivals[::2], results[::2], strict=True)], INDIFFERENCE) == rivals[0]


def test_a_cheaper_setting_is_a_row_of_its_own_where_it_is_nearly_as_good():
    name = "SFT + prior pictures"

    def result(run: RivalRun) -> dict:
        steps = run.method.num_steps(120)
        return scored(0.92 if steps == 480 else 0.9 if steps == 120 else 0.1, steps)

    plan = RivalPlan(result, result, (name,), REPORTED_CONCEPTS, (0,), 3)
    best, cheaper = plan.tuned
    assert (best.name, best.num_steps(120)) == (name, 480)
    assert (cheaper.name, cheaper.num_steps(120)) == (f"{name}, cheaper", 120)
    assert [*plan.reported][2:] == [best.name, cheaper.name]


@pytest.mark.parametrize("count", [16, MOST_PICTURES])
def test_grids_are_measured_on_other_prompts_and_noise_than_reports(tmp_path, count):
    experiment = RivalExperiment(MODEL, tmp_path, 120, 120, count)
    grid, report = experiment.grid_evaluator, experiment.evaluator
    pairs = [(grid.old, report.old), (grid.task_of(OBJECT), report.task_of(OBJECT))]
    for chosen_by, reported in pairs:
        assert len(chosen_by.prompts) == len(chosen_by.real) == min(48, count) and len(reported.prompts) == count
        assert not {*chosen_by.seeds} & {*reported.seeds}
    assert not {*grid.old.prompts} & {*report.old.prompts}
    assert all(item.words in prompt for item, prompt in zip(grid.old.wanted, grid.old.prompts, strict=True))
    assert not {GRID_CONCEPT} & {*REPORTED_CONCEPTS}


def test_the_quick_and_the_whole_plan(tmp_path):
    experiment = RivalExperiment(MODEL, tmp_path, 120, 120, 64)
    quick, whole = (rivals_module.make_plan(experiment, is_quick=is_quick) for is_quick in (True, False))
    free = [recipe for recipe in RECIPES.values() if recipe.source is None]
    assert {name: len(whole.grid(RECIPES[name])) for name in ("SFT", "SFT, repaired", DOPSD_ALL)} == {
        "SFT": 12,
        "SFT, repaired": 24,
        DOPSD_ALL: 9,
    }
    assert [run.method.num_steps(120) for run in quick.grid(RECIPES["SFT + prior pictures"])] == [120]
    assert [run.method.num_steps(120) for run in quick.grid(RECIPES["D-OPSD, 1 state + prior"])] == [120]
    assert whole.names == (*RECIPES,) and len(quick.names) == 7 and not quick.study_seeds
    folders = [run.folder for recipe in free for run in whole.grid(recipe)]
    assert len({*folders}) == len(folders)


def test_the_study_trains_both_of_a_pair_alike_and_off_policy_at_its_own_setting():
    best = {name: (3e-3, 120) for name in RECIPES if RECIPES[name].source is None}
    table = study(make_plan(best | {OFF_POLICY: (1e-3, 60)}, study_seeds=(0,)))
    assert list(table) == list(CONDITIONS) and len(table) == 5
    runs = [run for by_method in table.values() for runs in by_method.values() for run in runs]
    assert len(runs) == len({run.folder for run in runs}) == 4 * 5 + 2 * 5 + 3
    for condition, by_method in table.items():
        held, (dopsd,), (off_policy,) = by_method[DOPSD_ONE_PRIOR], by_method[DOPSD_ALL], by_method[OFF_POLICY]
        is_repeated = condition == "one picture of four shows another object"
        assert [run.seed for run in held] == ([0, 1, 2, 4, 5] if is_repeated else [0])
        assert dopsd.method.relative_steps == off_policy.method.relative_steps
        assert dopsd.method.flags["learning_rate"] == off_policy.method.flags["learning_rate"]
        assert dopsd.concept == off_policy.concept
    (long,), (fast,) = table["480 steps"][DOPSD_ALL], table["learning rate x 3"][DOPSD_ALL]
    assert long.method.relative_steps == 4 and fast.method.flags["learning_rate"] == pytest.approx(9e-3)
    (own,) = table["as chosen"]["off-policy, its own setting"]
    assert (own.method.flags["learning_rate"], own.method.relative_steps) == (1e-3, 0.5)


def test_faulty_lessons_have_one_picture_or_a_wrong_one():
    images, captions = OBJECT.pictures(0)
    right = [np.asarray(image) for image in images]
    repeated, its_captions = CONDITIONS["one training picture"].concept.pictures(0)
    assert all(np.array_equal(image, right[0]) for image in repeated) and its_captions == captions[:1] * 4
    wrong = [*map(np.asarray, CONDITIONS["one picture of four shows another object"].concept.pictures(0)[0])]
    assert [np.array_equal(*pair) for pair in zip(wrong, right, strict=True)] == [True, True, True, False]


def test_what_is_trained_once_sees_nothing_that_a_task_asks_for(tmp_path):
    prompts = Once(KLEIN, MODEL, tmp_path, OnceSettings(), 16).prompts
    objects = {prompt.split(" on ")[0].removeprefix("a ") for prompt in prompts}
    asked = {*old_task(MAX_EVAL_COUNT).wanted, *(item for concept in CONCEPTS for item in concept.neighbours)}
    assert len(prompts) == 1024 and len(objects) > 100 and not objects & {item.words for item in asked}
    made_up = [prompt.split()[1] for prompt in prompts if len(prompt.split(" on ")[0].split()) == 2]
    assert len(made_up) == 256 and len({*made_up}) > 200 and not {*made_up} & {concept.word for concept in CONCEPTS}


def test_points_of_the_plot():
    entry = {"steps": 60, "result": {"new": {"exact": 0.9}, "old": {"exact": 0.5}, "forwards": 700}}
    assert kept_and_learned(entry) == (0.5, 0.9) and cost_and_mean(entry) == (700, pytest.approx(0.7))


def test_a_front_has_the_points_that_no_other_beats():
    points = [(0.2, 0.9), (0.5, 0.5), (0.4, 0.7), (0.3, 0.6), (0.9, 0.1)]
    assert front(points, is_small_x_better=False) == [(0.2, 0.9), (0.4, 0.7), (0.5, 0.5), (0.9, 0.1)]
    assert front(points, is_small_x_better=True) == [(0.2, 0.9)]


@pytest.mark.exhaustive
def test_the_command_trains_measures_and_reports(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # `main` changes it; this restores it
    monkeypatch.setattr(rivals_module, "QUICK_ONCE", TINY_ONCE)
    monkeypatch.setattr(once_module, "MANY_STEPS", 5)
    monkeypatch.setattr(costs_module, "NUM_PRIOR_PICTURES", 3)
    monkeypatch.setattr(rival_runs_module, "STRENGTHS", (0.5,))
    monkeypatch.setattr(rival_report_module, "STRENGTHS", (0.5,))
    names = ("SFT, repaired", "delta of undistilled + prior")
    monkeypatch.setattr(rivals_module, "QUICK_NAMES", names)
    # In this process, where what is patched counts.
    monkeypatch.setattr(rivals_module, "run_in_waves", run_here)
    arguments = ["--quick", "--output_dir", tmp_path, "--num_train_steps", 2, "--eval_count", 16, "--num_workers", 1]
    monkeypatch.setattr(sys, "argv", ["rivals.py", *map(str, arguments)])
    rivals_module.main()
    results = json.loads((tmp_path / "rivals_klein.json").read_text())
    assert set(results["once"]) == {"samples", ADAPTER, UNDISTILLED, REPAIR} and set(results["grid"]) == {*names}
    # Two steps of two samples, with the gradients of all weights.
    assert results["once"][UNDISTILLED]["forwards"] == round(2 * 2 * 3 * KLEIN.costs.base)
    assert {*results["once"][ADAPTER]["loss"]} == {*results["once"]["samples"]["loss"]}
    assert results["chosen"]["SFT, repaired"] == {"learning_rate": 1e-3, "steps": 120, "scale": 0.5}
    ((_, delta),) = results["reported"]["delta of undistilled + prior"].items()
    assert delta["steps"] == 4 and 0 <= delta["at_0.5"]["old"]["exact"] <= 1 and 0 <= delta["followed"]["new"]["exact"]
    text = (tmp_path / "rivals_klein.md").read_text()
    assert text.count("| SFT, repaired |") == 4 and "base with adapter and repair LoRA" in text
    assert "U: pictures and undistilled model, " in text and " + U |" in text and " + R |" in text
    for name in ("rivals_klein.png", "rivals_klein_sheet.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / name).convert("RGB")).reshape(-1, 3), axis=0)) > 50

    monkeypatch.setattr(RivalExperiment, "_train", lambda self, run: pytest.fail("trained again"))
    monkeypatch.setattr(Once, "_train", lambda self, *arguments: pytest.fail("trained again"))
    rivals_module.main()


def run_here(waves, num_workers, *, initializer, initargs) -> None:
    initializer(*initargs)
    for function, arguments in waves:
        for argument in arguments:
            function(argument)
