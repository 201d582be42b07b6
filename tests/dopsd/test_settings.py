from argparse import SUPPRESS
from dataclasses import dataclass, fields

import pytest

import train_dopsd_flux2
import train_dopsd_zimage
from dopsd.command_line import build_parser, parse_settings
from dopsd.errors import InputError
from dopsd.flag_types import MAY_DIFFER, MUST_MATCH, MayDiffer, MustMatch, annotations, check_ranges, flag
from dopsd.settings import Settings


MODELS = (train_dopsd_flux2.MODEL, train_dopsd_zimage.MODEL)


def groups(model) -> list[type]:
    return [model.settings_class, *(group.type for group in fields(Settings)[1:])]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_setting_declares_whether_a_resumed_run_must_keep_it(model):
    for group in groups(model):
        for name, markers in annotations(group).items():
            assert len({MUST_MATCH, MAY_DIFFER} & {*map(str, markers)}) == 1, (
                f"{group.__name__}.{name} declares nothing"
            )


def test_a_setting_that_declares_nothing_is_found():
    @dataclass(frozen=True)
    class Group:
        declared: MustMatch[int | None] = flag(1, "")
        forgotten: int = flag(1, "")

    assert annotations(Group) == {"declared": [MUST_MATCH], "forgotten": []}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_no_flag_is_in_two_groups(model):
    names = [item.name for group in groups(model) for item in fields(group)]
    assert len(names) == len({*names})


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_line_of_help_states_a_default(model):
    parser = build_parser(model, "")
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.dest not in ("help", "config", "preset") and action.help != SUPPRESS:
            text = formatter._expand_help(action)
            assert "Default: " in text or "(default: " in text, f"--{action.dest}: {text}"
            assert "None" not in text, f"--{action.dest}: {text}"


def test_settings_are_frozen_and_replaced_by_flag():
    settings = parse_settings(MODELS[0], "", ["--pretrained_model_name_or_path", "a/model", "--rank", "8"])
    assert settings.lora.rank == 8 and settings.lora.lora_alpha == 16
    changed = settings.replace(rank=4, seed=7)
    assert (changed.lora.rank, changed.training.seed, changed.lora.lora_alpha) == (4, 7, 16)
    assert (settings.lora.rank, settings.training.seed) == (8, None)
    with pytest.raises(AttributeError):
        settings.lora.rank = 3
    with pytest.raises(AssertionError):
        settings.replace(ranc=3)


def test_must_match_holds_what_changes_the_weights_and_nothing_else():
    settings = parse_settings(MODELS[0], "", ["--pretrained_model_name_or_path", "a/model", "--rank", "8"])
    kept = settings.must_match()
    assert kept["--rank"] == 8 and kept["--text_encoder_out_layers"] == [9, 18, 27]
    for name in ("output_dir", "max_train_steps", "gradient_checkpointing", "hub_token", "instance_data_dir"):
        assert f"--{name}" not in kept


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        ("rank", [1, 64], [0, -1]),
        ("seed", [0, 2**32 - 1, None], [-1, 2**32]),
        ("ema_decay", [0.0, 1.0, 0.9999], [-0.1, 1.1, float("nan")]),
        ("lora_dropout", [0.0, 0.5], [1.0, -0.1]),
        ("learning_rate", [1e-9, 1.0], [0.0, -1.0, float("inf"), float("nan")]),
        ("adam_weight_decay", [0.0, 10.0], [-1e-9, float("inf")]),
        ("lr_warmup_steps", [0, 10], [-1]),
        ("vlm_max_pixels", [1, None], [0]),
    ],
)
def test_ranges(hint, good, bad):
    settings = parse_settings(MODELS[0], "", ["--pretrained_model_name_or_path", "a/model"])
    group = next(name for name in (item.name for item in fields(Settings)) if hasattr(getattr(settings, name), hint))
    for value in good:
        check_ranges(getattr(settings.replace(**{hint: value}), group))
    for value in bad:
        with pytest.raises(InputError, match=rf"^--{hint} .*: must be "):
            check_ranges(getattr(settings.replace(**{hint: value}), group))


def test_a_marker_survives_beside_a_range():
    assert MUST_MATCH in annotations(type(parse_settings(MODELS[0], "", ["--push_only"]).lora))["lora_alpha"]
    assert str(MayDiffer[int]) != str(MustMatch[int])
