"""Plans of `--train_mode full`."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import train_dopsd_flux2
from docs import make_memory
from dopsd.command_line import parse_settings
from dopsd.optimizers import build_optimizer
from dopsd.planner.advice import suggestions, training_suggestions, transformer_changes
from dopsd.planner.allocations import AllocationTracker, pinned_bytes
from dopsd.planner.cards import RESERVED_BYTES, Card
from dopsd.planner.dry_run import plan_text
from dopsd.planner.frozen import placement
from dopsd.planner.trained import ROUNDING_BYTES, STEP_BYTES, TORCHAO_BYTES
from dopsd.weight_bytes import EIGHT_BIT_STATES, ROOM_FOR_ACTIVATIONS, weight_bytes
from models import ONE_MODEL
from short_runs import as_arguments


WHOLE = {"train_mode": "full", "rank": None, "mixed_precision": "bf16", "num_trained_states": 1}
ROUNDED = {"bf16_update": "stochastic_rounding"}


def training(plan):
    return next(phase for phase in plan.phases if phase.name == "training")


def count(planner):
    return sum(weight.numel() for weight in planner.run.transformer.parameters())


# Bytes


@ONE_MODEL
def test_parts_are_so_many_bytes_per_weight(planner):
    planner = planner(**WHOLE)
    for flags, sizes in (
        ({}, {"weights": 2, "master weights": 4, "EMA, base": 4, "optimizer": 8}),
        ({"with_prior_preservation": True}, {"weights": 2, "master weights": 4, "EMA, base": 6, "optimizer": 8}),
        ({"teacher": "base"}, {"weights": 2, "master weights": 4, "EMA, base": 2, "optimizer": 8}),
        (ROUNDED, {"weights": 2, "EMA, base": 4, "optimizer": 8}),
        (ROUNDED | {"use_8bit_adam": True}, {"weights": 2, "EMA, base": 4, "optimizer": EIGHT_BIT_STATES}),
        ({"mixed_precision": "no"}, {"weights": 4, "EMA, base": 4, "optimizer": 8}),
        ({"ema_device": "cpu"}, {"weights": 2, "master weights": 4, "optimizer": 8}),
    ):
        parts = training(planner.plan(**flags)).parts
        parts.pop("gradients, activations")
        assert parts == {name: pytest.approx(size * count(planner), rel=1e-3) for name, size in sizes.items()}
    parts = training(planner.plan(offload_transformer=True)).parts
    assert {*parts} == {"weights", "gradients, activations"} and parts["weights"] < 2 * count(planner)


@ONE_MODEL
def test_gradients_are_there_with_the_activations_and_in_the_optimizers_step(planner):
    planner = planner(**WHOLE, gradient_checkpointing=True)
    masters, rounded = planner.plan(), planner.plan(**ROUNDED)
    for plan, size in ((masters, 4), (rounded, 2)):
        working = training(plan).parts["gradients, activations"]
        assert size * count(planner) < working < size * count(planner) + training(rounded).peak / 4
    assert masters.mean_flops == rounded.mean_flops


@ONE_MODEL
def test_some_modules_take_less(planner):
    whole, some = planner(**WHOLE), planner(**WHOLE, trainable_modules="to_q,to_k")
    names = some.run.trained_names
    assert names and all(".to_q." in name or ".to_k." in name for name in names)
    trained = sum(dict(some.run.transformer.named_parameters())[name].numel() for name in names)
    parts = training(some.plan()).parts
    assert (parts["weights"], parts["optimizer"]) == (training(whole.plan()).parts["weights"], 8 * trained)
    assert some.plan().checkpoint < whole.plan().checkpoint
    assert some.plan().mean_flops < whole.plan().mean_flops
    assert some.plan().product == whole.plan().product == 2 * count(whole)


@ONE_MODEL
def test_copies_in_host_memory_are_pinned_and_move(planner):
    planner = planner(**WHOLE, with_prior_preservation=True)
    here, away = planner.plan(), planner.plan(ema_device="cpu")
    weights = [weight.numel() for weight in planner.run.transformer.parameters()]
    # The base model, which is in host memory if it is drawn only, is needed here.
    pinned = sum(pinned_bytes(4 * one) + pinned_bytes(2 * one) for one in weights)
    assert away.in_host - here.in_host == pinned
    # The teacher, the base model, and the average to the accelerator and back.
    assert here.moved == 0 and away.moved == (4 + 2 + 8) * sum(weights)
    # Each role is asked once about several states, after the student has walked them.
    here, away = (planner.plan(num_trained_states=3, ema_device=device) for device in ("cuda", "cpu"))
    assert away.moved == (4 + 2 + 8) * sum(weights) and away.mean_flops > here.mean_flops


@ONE_MODEL
def test_gradients_wait_for_a_role_that_comes_after_a_backward_pass(planner):
    planner = planner(**WHOLE, ema_device="cpu", gradient_checkpointing=True)
    step = replace(planner.step(planner.settings, planner.run.batch(planner.settings), torch.bfloat16), peak=0)
    planner.step = lambda *arguments: replace(step, teacher_work=10**9)
    gradients = 4 * count(planner)
    once = training(planner.plan()).parts["gradients, activations"]
    # One call for two states, before the first backward pass; a second micro-batch finds the first one's gradients.
    states = training(planner.plan(num_trained_states=2)).parts["gradients, activations"]
    batches = training(planner.plan(gradient_accumulation_steps=2)).parts["gradients, activations"]
    assert states - once == 10**9 and batches - once == gradients
    resident = planner.with_settings(ema_device="cuda")
    once, states = (training(resident.plan(num_trained_states=n)).parts["gradients, activations"] for n in (1, 2))
    assert states - once == gradients


@ONE_MODEL
def test_auto_goes_by_what_the_run_goes_by(planner):
    planner = planner(**WHOLE)
    each = weight_bytes(planner.settings, torch.bfloat16, has_prior=False)
    kept = 2 * count(planner) + (4 + 4 + 8 + 4) * count(planner) + RESERVED_BYTES
    for size, is_here in ((1.001, True), (0.999, False)):
        card = Card("a card", size * kept / (1 - ROOM_FOR_ACTIVATIONS) / 1e9, None)
        free = card.memory_gb * 1e9 - RESERVED_BYTES - 2 * count(planner)
        assert each.copies_fit(count(planner), free, card.memory_gb * 1e9) == is_here
        assert ("EMA, base" in training(planner.on(card).plan()).parts) == is_here


# Several processes


@ONE_MODEL
def test_processes_share_all_that_is_kept(planner):
    one, shared = planner(**WHOLE), planner(**WHOLE, fsdp=True)
    plans = {number: shared.on(num_processes=number).plan() for number in (2, 8)}
    whole = training(one.plan()).parts
    for number, plan in plans.items():
        parts = training(plan).parts
        for name in ("master weights", "EMA, base", "optimizer"):
            assert parts[name] == pytest.approx(whole[name] / number, rel=1e-3)
        assert whole["weights"] / number < parts["weights"] < whole["weights"] * (1 + 1 / number)
        assert (plan.checkpoint, plan.product) == (one.plan().checkpoint, one.plan().product)
    assert training(plans[8]).peak < training(plans[2]).peak < training(one.plan()).peak


def test_weights_that_are_trained_are_shared_by_all_machines(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    arguments = {"pretrained_model_name_or_path": "a/model", "fsdp": True}
    shards = [
        placement(parse_settings(train_dopsd_flux2.MODEL, "", as_arguments(arguments | flags)), 16).num_shards
        for flags in ({}, {"train_mode": "full"})
    ]
    assert shards == [8, 16]


# The optimizer's step


@pytest.mark.parametrize(
    ("flags", "dtype", "size"),
    [
        ({}, torch.float32, STEP_BYTES),
        ({"use_8bit_adam": True}, torch.float32, TORCHAO_BYTES),
        (ROUNDED, torch.bfloat16, ROUNDING_BYTES),
        (ROUNDED | {"use_8bit_adam": True}, torch.bfloat16, ROUNDING_BYTES),
    ],
    ids=["adamw", "8 bits", "rounded", "rounded, 8 bits"],
)
def test_a_step_allocates_what_is_planned(flags, dtype, size):
    arguments = {"pretrained_model_name_or_path": "a/model", "train_mode": "full"} | flags
    settings = parse_settings(train_dopsd_flux2.MODEL, "", as_arguments(arguments))
    weight = nn.Parameter(torch.randn(256, 1024, dtype=dtype))
    weight.grad = torch.randn_like(weight)
    optimizer = build_optimizer(settings.optimizer, [weight], 1, is_full=True)
    optimizer.step()
    with AllocationTracker() as tracker:
        optimizer.step()
    assert tracker.peak / weight.numel() == pytest.approx(size, rel=0.02)


# Advice


@ONE_MODEL
def test_advice_for_whole_models_fits_as_it_says(planner):
    planner = planner(**WHOLE)
    peak = training(planner.plan()).peak
    card = Card("a card", (1.051 * 0.6 * peak + 0.8e9) / 1e9, 1.0)
    planner = planner.on(card)
    found = {one.flags: training(one.plan).peak for one in training_suggestions(planner, card)}
    assert all(size <= card.usable_bytes for size in found.values())
    assert {flags.split()[0] for flags in found} >= {"--fsdp", "--offload_transformer"}
    assert any(flags.startswith("--bf16_update stochastic_rounding") for flags in found)
    assert any(flags.endswith(" GPUs") for flags in found)
    # A LoRA is no smaller here: it is of rank 64.
    assert "--train_mode lora" in {change.flags for change in transformer_changes(planner.settings)}
    assert not any("--quantize" in flags or "--rank" in flags for flags in found)


@ONE_MODEL
def test_processes_that_share_a_model_are_not_told_to_offload_it(planner):
    ways = {change.flags for change in transformer_changes(planner(**WHOLE, fsdp=True).settings)}
    assert "--ema_device cpu" in ways and "--offload_transformer" not in ways


@ONE_MODEL
def test_the_text_says_what_moves_and_what_is_saved(planned_settings, model):
    settings = planned_settings(**WHOLE, dry_run=True, card="rtx-4090", ema_device="cpu", max_train_steps=600)
    text = plan_text(settings, model.script.MODEL)
    assert "master weights" in text and "Weights that a step moves between host memory and the card: " in text
    assert ", transformer " in text and "It fits" in text


@pytest.mark.exhaustive
def test_the_page_of_whole_models_is_up_to_date():
    page, lines = make_memory.PAGE.read_text(encoding="utf-8"), [*make_memory.whole_rows(("klein-4b",))]
    assert all(f"\n| {' | '.join(line)} |\n" in page for line in lines), "run python -m docs.make_memory"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", make_memory.SHAPES)
def test_the_configuration_for_80_gb_fits(name):
    card = Card("a card", 80, None)
    default, path = make_memory.default_settings(name).flat(), make_memory.ROOT / "configs/full_80gb.yaml"
    flags = make_memory.default_settings(name, "--config", str(path)).flat()
    changed = {flag: value for flag, value in flags.items() if value != default[flag] and flag != "config"}
    planner = make_memory.planner(name).on(card).with_settings(**changed)
    plan = planner.plan()
    assert not suggestions(planner, plan, card)
    assert f"{make_memory.NAMES[name]} {make_memory.peak(plan) / 1e9:.1f} GB" in path.read_text()
