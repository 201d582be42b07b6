from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train_dopsd_flux2
import train_dopsd_zimage
from docs import make_memory
from dopsd.command_line import PRESETS, parse_settings, preset_names
from dopsd.data.order import trained_states
from dopsd.errors import InputError
from dopsd.optimizers import build_optimizer
from dopsd.planner.advice import (
    suggestions,
    text_encoder_changes,
    training_changes,
    training_suggestions,
    transformer_changes,
)
from dopsd.planner.allocations import module_bytes, pinned_bytes, storage_bytes
from dopsd.planner.cards import CARDS, Card, rate
from dopsd.planner.dry_run import plan_text
from dopsd.planner.frozen import Placement, frozen_bytes, placement, transformer_bytes
from dopsd.planner.operators import FlopCounter
from dopsd.planner.plan import max_passed_states, mean_passed_states
from dopsd.planner.report import report
from dopsd.planner.trained import optimizer_bytes
from dopsd.sharding import repeated_blocks
from editing_pairs import write_pairs
from models import ONE_MODEL, every_context
from pipelines.published_shapes import KLEIN_9B
from short_runs import as_arguments


MODELS = (train_dopsd_flux2.MODEL, train_dopsd_zimage.MODEL)


def phase(plan, name):
    return next(phase for phase in plan.phases if phase.name == name)


# The command


@every_context(quick="flux2")
def test_a_plan_needs_no_weights_and_writes_nothing(model, planned_settings, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    text = plan_text(
        planned_settings(dry_run=True, card="rtx-4090", validation_steps=2, max_train_steps=600), model.script.MODEL
    )
    assert sorted(tmp_path.rglob("*")) == before or not (tmp_path / "run").exists()
    for line in ("encoding: text encoder", "training", "drawing", "host memory", "It fits: of 24 GB"):
        assert f"\n{line}" in text
    assert "hours for 600 steps" in text and "1 checkpoint of" in text


@ONE_MODEL
def test_the_script_prints_the_plan_and_stops(train, tmp_path):
    result = train(dry_run=True, card="rtx-3060-12gb")
    assert result.code == 0
    assert 0 <= result.log.find("Planning; this takes up to a minute") < result.log.find("on RTX 3060, 12 GB")
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
@ONE_MODEL
def test_processes_plan_for_as_many_gpus(torchrun, arguments, tmp_path):
    process, log = torchrun(arguments("two", dry_run=True, card="24gb", fsdp=True))
    assert process.wait(timeout=120) == 0, log.read_text()
    assert log.read_text().count("on any card, 24 GB") == 1
    assert not (tmp_path / "two").exists()


@ONE_MODEL
def test_a_plan_refuses_what_the_run_refuses(model, planned_settings):
    with pytest.raises(InputError, match="--lora_layers"):
        plan_text(planned_settings(lora_layers="nothing"), model.script.MODEL)
    with pytest.raises(InputError, match="--bnb_quantization_config_path nowhere.json: cannot be used"):
        plan_text(planned_settings(bnb_quantization_config_path="nowhere.json"), model.script.MODEL)


# Bytes


@ONE_MODEL
def test_what_lowers_memory_lowers_the_plan(planner):
    planner = planner(num_trained_states=1)
    base = planner.plan()
    parts = phase(base, "training").parts
    checkpointed = planner.plan(gradient_checkpointing=True)
    activations = "gradients, activations"
    assert phase(checkpointed, "training").parts[activations] < parts[activations]
    in_host = planner.plan(gradient_checkpointing=True, offload_activations=True)
    assert phase(in_host, "training").peak < phase(checkpointed, "training").peak
    assert in_host.host > checkpointed.host
    offloaded = planner.plan(offload_transformer=True)
    assert phase(offloaded, "training").parts["weights"] < parts["weights"]
    assert phase(planner.plan(rank=2), "training").peak < phase(base, "training").peak
    assert [one.name for one in planner.plan(encode_only=True).phases] == ["encoding: text encoder", "encoding: VAE"]


@ONE_MODEL
def test_encoders_stay_without_the_cache(planner):
    plan = planner(no_context_cache=True).plan()
    assert "encoders" in phase(plan, "training").parts and plan.cache == 0


@pytest.mark.parametrize(
    "flags",
    [{}, {"use_8bit_adam": True}, {"optimizer": "prodigy", "learning_rate": 1.0}],
    ids=["adamw", "8 bits", "prodigy"],
)
def test_the_optimizers_states_take_what_is_planned(flags):
    arguments = {"pretrained_model_name_or_path": "a/model"} | flags
    settings = parse_settings(MODELS[0], "", as_arguments(arguments))
    weight = nn.Parameter(torch.randn(256, 1024))
    optimizer = build_optimizer(settings.optimizer, [weight], 1)
    if not flags.get("use_8bit_adam"):  # its kernels may lack this CPU
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    else:
        optimizer.init_state(optimizer.param_groups[0], weight, 0, 0)
    states = [value for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.numel() > 256]
    own = [state for state in states if state.data_ptr() not in _code_tables(optimizer)]
    assert storage_bytes(own) / weight.nbytes == pytest.approx(optimizer_bytes(settings, False).states, rel=0.02)


def _code_tables(optimizer) -> set[int]:
    """Of bitsandbytes, which all parameters share."""
    return {table.data_ptr() for table in getattr(optimizer, "name2qmap", {}).values()}


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.516 / 2), ("int8", 0.5), ("float8", 0.5)])
def test_quantized_weights(kind, share):
    with torch.device("meta"):
        model = MODELS[0].transformer_class(**KLEIN_9B.transformer).to(torch.bfloat16)
    whole, quantized = frozen_bytes(model, None), frozen_bytes(model, kind)
    assert whole.device == pytest.approx(18.16e9, rel=0.001) and whole.dequantized == 0
    assert share < quantized.device / whole.device < share + 0.05
    assert quantized.dequantized == 4096 * 36864 * 2


def test_offloaded_and_shared_weights():
    with torch.device("meta"):
        model = MODELS[0].transformer_class(**KLEIN_9B.transformer).to(torch.bfloat16)
    whole = frozen_bytes(model, None).device
    offloaded = transformer_bytes(model, Placement(offload_transformer=True))
    shared = transformer_bytes(model, Placement(num_shards=4))
    blocks = repeated_blocks(model)
    largest = max(module_bytes(block) for block in blocks)
    outside = whole - sum(module_bytes(block) for block in blocks)
    assert offloaded.device == outside + largest and offloaded.moved == whole - outside
    assert offloaded.host == sum(pinned_bytes(weight.nbytes) for block in blocks for weight in block.parameters())
    assert offloaded.moved < offloaded.host < 2 * offloaded.moved
    assert shared.device == outside + 2 * largest + (whole - outside) // 4 and shared.host == shared.moved == 0
    assert offloaded.read == shared.read == whole
    both = transformer_bytes(model, Placement(offload_transformer=True, num_shards=4))
    assert both.moved == offloaded.moved // 4 and both.device == outside + 2 * largest


def test_pinned_memory_comes_in_powers_of_two():
    assert [pinned_bytes(size) for size in (0, 1, 512, 513, 3 << 20)] == [0, 1, 512, 1024, 4 << 20]


@pytest.mark.parametrize("flag", ["--fsdp", "--offload_transformer"])
def test_weights_are_shared_within_a_machine(flag, monkeypatch):
    settings = parse_settings(MODELS[0], "", ["--pretrained_model_name_or_path", "a/model", flag])
    assert placement(settings, 8).num_shards == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert placement(settings, 8).num_shards == 4
    assert placement(settings.replace(fsdp=False, offload_transformer=False), 8).num_shards == 1


@ONE_MODEL
def test_moving_weights_takes_time(planner):
    planner, card = planner(num_trained_states=2, num_rollout_steps=2, gradient_accumulation_steps=3), CARDS["l4"]
    kept, offloaded = planner.plan(), planner.plan(offload_transformer=True)
    blocks = repeated_blocks(planner.module(planner.run.build_transformer, torch.float32))
    assert kept.moved == 0 and "moves to the card" not in report(kept, card, {}, "a model")
    # Two trained states with three passes each in three micro-batches.
    assert offloaded.moved == 18 * sum(module_bytes(block) for block in blocks)
    with_prior = planner.plan(offload_transformer=True, with_prior_preservation=True, prior_every=2)
    assert with_prior.moved == 1.5 * offloaded.moved
    seconds = offloaded.seconds_per_step(card) - kept.seconds_per_step(card)
    assert seconds == pytest.approx(offloaded.moved / 25e9)
    assert "GB/s (PCIe 4.0 x16), added to the time" in report(offloaded, card, {}, "a model")
    overlapping = replace(offloaded, overlaps=True)
    assert overlapping.seconds_per_step(card) == max(kept.seconds_per_step(card), offloaded.moving_seconds)


# Editing pairs


@ONE_MODEL
def test_a_plan_counts_the_pictures_to_edit_of_student_and_teacher(planner, make_picture, tmp_path):
    flags = {"resolution": 128, "num_trained_states": 1, "validation_steps": 2}
    sizes = [((128, 128), [(128, 128)]), ((128, 128), [(128, 128), (64, 96)])]
    pairs = write_pairs(tmp_path / "pairs", make_picture, *sizes)
    edited, plain = planner(**pairs, **flags).plan(), planner(**flags).plan()
    assert [shape[-2:] for shape in edited.batch.student[1:]] == [(8, 8), (4, 6)]
    assert [shape[-2:] for shape in edited.batch.teacher[1:]] == [(8, 8), (4, 6), (8, 8)]
    assert edited.mean_flops > 1.5 * plain.mean_flops
    assert phase(edited, "training").peak > phase(plain, "training").peak
    held = planner(**pairs, **flags, with_prior_preservation=True).run
    assert held.batch(held.settings).prior == edited.batch.student


@ONE_MODEL
def test_a_large_picture_to_edit_is_planned_at_the_size_that_it_is_shrunk_to(planner, make_picture, tmp_path):
    flags = [write_pairs(tmp_path / str(side), make_picture, ((64, 64), [(side, side // 2)])) for side in (1440, 2000)]
    runs = [planner(**one).run for one in flags]
    sizes = [{run.encoded_size(one) for one in run.encodings if one.encoder.name == "cond"} for run in runs]
    assert sizes == [{(1440, 720)}, {(1440, 720)}]
    plans = [planner(**one).plan() for one in flags]
    assert phase(plans[0], "encoding: VAE").peak == phase(plans[1], "encoding: VAE").peak
    assert runs[0].num_tokens(runs[0].largest_sample) == runs[1].num_tokens(runs[1].largest_sample)


# Operations


def test_flops_are_those_of_torchs_counter():
    block = nn.TransformerEncoderLayer(32, 4, batch_first=True)
    tokens = torch.randn(2, 8, 32)
    own, torchs = FlopCounter(), FlopCounterMode(display=False)
    for counter in (own, torchs):
        with counter:
            block(tokens).sum().backward()
    # torch's does not know attention on a CPU: two products forward, five backward.
    attention = 2 * 4 * 7 * 8 * 8 * 8 * 2
    assert own.total == torchs.get_total_flops() + attention or own.total == torchs.get_total_flops()


def test_passed_states_are_those_that_training_draws():
    for num_trained in (1, 2, 4):
        drawn = [
            max(trained_states(0, "states", place, num_states=4, num_trained=num_trained)) + 1 - num_trained
            for place in range(4000)
        ]
        assert sum(drawn) / len(drawn) == pytest.approx(mean_passed_states(4, num_trained), abs=0.05)
        assert max(drawn) == max_passed_states(4, num_trained)
        every = [max(states) + 1 - num_trained for states in combinations(range(4), num_trained)]
        assert sum(every) / len(every) == pytest.approx(mean_passed_states(4, num_trained))


# Advice


@ONE_MODEL
def test_every_suggestion_fits_as_it_says(planner):
    planner = planner(num_trained_states=1)
    plan, checkpointed = planner.plan(), planner.plan(gradient_checkpointing=True)
    needed = phase(checkpointed, "training").peak
    assert needed < phase(plan, "training").peak
    card = Card("a card", (1.051 * needed + 0.8e9) / 1e9, 1.0)
    found = {one.flags: one.plan for one in training_suggestions(planner, card)}
    assert found["--gradient_checkpointing"].phases == checkpointed.phases
    assert "--gradient_checkpointing --offload_activations" not in found
    assert "--use_8bit_adam" not in found and any(flags.startswith("--quantize nf4") for flags in found)
    assert all(phase(one, "training").peak <= card.usable_bytes for one in found.values())
    smaller = Card("a card", (1.051 * needed * 0.6 + 0.8e9) / 1e9, 1.0)
    together = training_suggestions(planner, smaller)
    assert together and all(phase(one.plan, "training").peak <= smaller.usable_bytes for one in together)
    assert all(one.flags.count("--") > 1 for one in together)
    assert not training_suggestions(planner, Card("a card", 0.8001, 1.0))


@ONE_MODEL
def test_quantized_weights_may_take_fewer_bits_or_host_memory(planner):
    planner = planner(num_trained_states=1, gradient_checkpointing=True)
    planner = planner.with_settings(quantize="int8", quantize_text_encoder="int8")
    kept = {change.flags for change in transformer_changes(planner.settings)}
    assert kept == {"--quantize nf4", "--quantize none --offload_transformer"}
    assert [change.flags for change in text_encoder_changes(planner.settings)] == ["--quantize_text_encoder nf4"]
    assert "--offload_activations" in {change.flags for change in training_changes(planner.settings)}


@ONE_MODEL
def test_each_phase_that_nothing_makes_fit_is_named(planner):
    planner = planner()
    plan, card = planner.plan(), Card("a card", 0.8001, None)
    found = suggestions(planner, plan, card)
    assert found == {"encoding": [], "training": []}
    text = report(plan, card, found, "a model")
    assert "No flags make encoding fit; take a larger card\nOr encode on" in text
    assert "No flags make training fit; take a larger card" in text


@pytest.mark.exhaustive
@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("name", make_memory.SHAPES)
def test_advice_for_a_preset_makes_each_phase_fit(name, preset):
    card = Card("a card", int(preset.removesuffix("gb")), None)
    planner = make_memory.preset_planner(name, preset, resolution=512)
    plan = planner.plan()
    found = suggestions(planner, plan, card)
    expected = {one.name.partition(":")[0] for one in plan.too_large(card)}
    assert {*found} == (expected - {"drawing"} if "training" in expected else expected)
    for part, ways in found.items():
        for way in ways:
            left = {one.name for one in way.plan.too_large(card)}
            assert not {phase for phase in left if phase.startswith("encoding") == (part == "encoding")}
        # With four bits, the text encoder of the largest model still takes 8.7 GB.
        assert ways or (name, preset, part) == ("klein-9b", "8gb", "encoding")
        assert (f"No flags make {part} fit" in report(plan, card, found, name)) == (not ways)


def test_cards_are_within_their_names():
    for name, card in CARDS.items():
        if name.endswith("gb"):
            assert name.split("-")[-1] == f"{card.memory_gb:.0f}gb"
        assert 0 < card.usable_bytes < card.memory_gb * 1e9
        assert card.tflops is None if name[0].isdigit() else card.tflops > 20


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx-4070-ti-super-16gb"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4070 Ti", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA Graphics Device", None),
        ("NVIDIA GeForce GPU", None),
    ],
)
def test_a_rate_is_that_of_the_card_of_exactly_that_name(name, card):
    assert rate(name) == (None if card is None else CARDS[card].tflops)


@ONE_MODEL
def test_a_memory_size_has_no_speed(planner):
    plan = planner().plan()
    text = report(plan, CARDS["12gb"], {}, "a model")
    assert "on any card, 12 GB" in text and "s per step" not in text


# Presets


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("name", preset_names())
def test_a_preset_sets_flags_and_the_command_line_wins(model, name, tmp_path):
    needed = ["--pretrained_model_name_or_path", "a/model", "--preset", name]
    assert parse_settings(model, "", needed).training.mixed_precision == "bf16"
    config = tmp_path / "run.yaml"
    config.write_text("mixed_precision: fp16\nrank: 8\n")
    settings = parse_settings(model, "", [*needed, "--config", str(config)])
    assert (settings.training.mixed_precision, settings.lora.rank) == ("fp16", 8)
    settings = parse_settings(model, "", [*needed, "--config", str(config), "--mixed_precision", "no"])
    assert (settings.training.mixed_precision, settings.lora.rank) == ("no", 8)


def test_a_wrong_preset_is_answered_with_their_names():
    with pytest.raises(InputError, match="--preset 10gb: there is no such preset; pass one of 8gb, 12gb, 16gb, "):
        parse_settings(MODELS[0], "", ["--pretrained_model_name_or_path", "a/model", "--preset", "10gb"])
    assert all((PRESETS / f"{name}.yaml").is_file() for name in preset_names())


@pytest.mark.slow
def test_the_page_of_memory_is_up_to_date():
    check_rows(make_memory.training_rows(("klein-4b",), (512,)))


@pytest.mark.exhaustive
def test_the_advice_on_the_page_of_memory_is_up_to_date():
    check_rows(make_memory.advice_rows(["12gb"]))


def check_rows(rows):
    page = make_memory.PAGE.read_text(encoding="utf-8")
    for row in rows:
        assert f"\n| {' | '.join(row)} |\n" in page, "run python -m docs.make_memory"


@pytest.mark.slow
def test_a_preset_fits_its_card():
    plan = make_memory.preset_planner("klein-4b", "8gb").plan()
    num_bytes, usable = max(phase.peak for phase in plan.phases), Card("", 8, None).usable_bytes
    assert num_bytes < usable
    assert f"{num_bytes / 1e9:.1f} GB of the {usable / 1e9:.1f} GB" in (PRESETS / "8gb.yaml").read_text()
