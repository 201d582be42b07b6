import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from diffusers.optimization import SchedulerType

import train_dopsd_flux2
import train_dopsd_zimage
from dopsd.command_line import parse_settings
from dopsd.errors import InputError
from dopsd.flag_types import MayDiffer, flag
from dopsd.model_flags import TeacherContext
from dopsd.settings import SCHEDULERS, ModelSettings


ROOT = Path(train_dopsd_flux2.__file__).parent
KLEIN, ZIMAGE = train_dopsd_flux2.MODEL, train_dopsd_zimage.MODEL
NEEDED = ["--pretrained_model_name_or_path", "a/model"]


def parse(*arguments, model=KLEIN):
    return parse_settings(model, "", [*NEEDED, *map(str, arguments)])


@pytest.fixture
def config(tmp_path):
    """Writes a configuration file and returns its flag."""

    def write(text) -> list[str]:
        path = tmp_path / "run.yaml"
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text, allow_unicode=True), encoding="utf-8")
        return ["--config", str(path)]

    return write


def test_a_config_sets_any_flag(config):
    flags = {
        "pretrained_model_name_or_path": "another/model",
        "rank": 16,
        "learning_rate": 3e-5,
        "center_crop": True,
        "random_flip": False,
        "prodigy_decouple": False,
        "caption_column": ["short", "long"],
        "instance_prompt": "-- 100% größe: a 'dog'",
        "seed": 0,
        "optimizer": "AdamW",
        "variant": None,
    }
    settings = parse_settings(KLEIN, "", config(flags))
    expected = flags | {"optimizer": "adamw"}
    assert {name: settings.flat()[name] for name in flags} == expected


def test_values_in_a_config_mean_what_they_mean_on_the_command_line(config):
    text = (
        "mixed_precision: no\nlearning_rate: 1e-5\ninstance_prompt: 007\ncenter_crop: yes\n"
        "variant: null\nrevision:\nteacher_prompt_suffix: ''\nvalidation_prompt: ['null', no]\n"
    )
    settings = parse(*config(text)).flat()
    assert settings["teacher_prompt_suffix"] == "" and settings["validation_prompt"] == ["null", "no"]
    assert (settings["mixed_precision"], settings["learning_rate"]) == ("no", 1e-5)
    assert (settings["instance_prompt"], settings["center_crop"]) == ("007", True)
    assert settings["variant"] is None and settings["revision"] is None


def test_the_command_line_wins_over_the_config(config):
    flags = config({"rank": 16, "center_crop": True, "caption_column": ["a", "b"], "seed": 3})
    settings = parse("--rank", 4, *flags, "--center_crop", "false", "--caption_column", "c")
    assert settings.lora.rank == 4
    assert settings.data.center_crop is False and settings.data.caption_column == ["c"]
    assert settings.training.seed == 3


def test_a_config_gives_the_same_settings_as_its_flags(config):
    flags = {"rank": 16, "teacher_context": "vlm", "vlm_min_pixels": 4096, "use_aspect_ratio_buckets": True}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    assert parse(*config(flags)) == parse(*arguments)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ({"ranc": 16}, ["run.yaml", "'ranc'", "did you mean rank?"]),
        ({"config": "x"}, ["run.yaml", "'config'"]),
        ({"rank": {"a": 1}}, ["run.yaml", "rank", "a value or a list"]),
        ({"validation_prompt": [["a"], "b"]}, ["run.yaml", "validation_prompt", "a value or a list"]),
        ({"validation_prompt": ["a", {"b": 1}]}, ["run.yaml", "validation_prompt", "a value or a list"]),
        ("- rank\n- 16\n", ["run.yaml", "flag: value"]),
        ("rank: [16\n", ["run.yaml", "YAML"]),
        ({"rank": 0}, ["--rank 0", "at least 1"]),
    ],
)
def test_a_bad_config_is_one_line_that_names_it(config, text, parts):
    with pytest.raises(InputError) as error:
        parse(*config(text))
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_a_config_that_is_not_there_is_named():
    with pytest.raises(InputError, match="--config missing.yaml: .*No such file"):
        parse("--config", "missing.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranc", "3"], "unrecognized arguments: --ranc 3; did you mean --rank?"),
        (["--rank", "x"], "argument --rank: invalid int value: 'x'"),
        (["--teacher_context", "x"], "argument --teacher_context: invalid choice: 'x' (choose from "),
        (["--learning_rate", "1e"], "argument --learning_rate: invalid float value: '1e'"),
    ],
)
def test_what_argparse_reports_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (["--optimizer", "prodigy"], "prodigyopt"),
        (["--use_8bit_adam"], "bitsandbytes"),
        (["--quantize", "nf4"], "bitsandbytes"),
        (["--quantize", "int8"], "torchao"),
        (["--quantize_text_encoder", "float8"], "torchao"),
        (["--report_to", "wandb"], "wandb"),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_is_read(monkeypatch, arguments, package):
    monkeypatch.setattr("dopsd.command_line.find_spec", lambda name: None if name == package else True)
    with pytest.raises(InputError, match=f"{arguments[0]}.*: run pip install {package} first"):
        parse(*arguments)


def test_the_short_form_and_the_file_of_a_quantization_exclude_each_other():
    with pytest.raises(InputError, match="^--quantize: cannot be combined with --bnb_quantization_config_path; drop"):
        parse("--quantize", "int8", "--bnb_quantization_config_path", "bnb.json")


@pytest.mark.parametrize("flag", ["--fsdp", "--offload_transformer"])
def test_quantized_weights_are_not_sharded(flag):
    refused = f"{flag}: cannot be combined with --quantize int8; drop one of them (--quantize none if a preset or "
    with pytest.raises(InputError, match=f"^{re.escape(refused)}"):
        parse("--preset", "12gb", flag)
    undone = parse("--preset", "12gb", "--quantize", "none", "--quantize_text_encoder", "none", flag)
    assert undone.performance.is_sharded
    assert (undone.model.quantize, undone.model.quantize_text_encoder) == (None, None)
    assert parse("--quantize_text_encoder", "int8", flag).performance.is_sharded


def test_a_card_is_only_planned_for():
    with pytest.raises(InputError, match="^--card: goes with --dry_run; add that, or drop the flag$"):
        parse("--card", "rtx-4090")
    assert parse("--card", "rtx-4090", "--dry_run").performance.card == "rtx-4090"


def test_a_list_for_a_flag_that_takes_one_value_is_one_line(config, capsys):
    with pytest.raises(SystemExit):
        parse(*config({"rank": [4, 5]}))
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: 5\n")


def test_publishing_needs_none_of_the_settings_of_the_run():
    arguments = ["--push_only", "--hub_token", "x", "--report_to", "all", "--resolution", "7"]
    settings = parse_settings(KLEIN, "", arguments)
    assert settings.publishing.push_only and settings.model.pretrained_model_name_or_path is None


@dataclass(frozen=True)
class MaskSettings(ModelSettings):
    mask_threshold: MayDiffer[float | None] = flag(None, "Default: none.")


class Masked(type(KLEIN)):
    """A model whose script adds a teacher context with a flag of its own."""

    settings_class = MaskSettings
    teacher_contexts = KLEIN.teacher_contexts | {
        "mask": TeacherContext("it sees a mask", encoders=("text",), flags={"mask_threshold": 0.5})
    }


def test_a_script_may_add_a_teacher_context_with_its_own_flag():
    assert parse("--teacher_context", "mask", model=Masked()).model.mask_threshold == 0.5
    assert parse("--teacher_context", "mask", "--mask_threshold", 0.2, model=Masked()).model.mask_threshold == 0.2
    with pytest.raises(InputError, match="^--mask_threshold: goes with --teacher_context mask; add that"):
        parse("--mask_threshold", 0.2, model=Masked())


def test_a_flag_that_no_teacher_context_uses_is_refused():
    class OnlyEdit(type(KLEIN)):
        teacher_contexts = {"edit": KLEIN.teacher_contexts["edit"]}

    for name, value in (("vlm_rope", "vlm"), ("teacher_caption_column", "long")):
        with pytest.raises(InputError, match=f"^--{name}: drop it$"):
            parse(f"--{name}", value, model=OnlyEdit())
        with pytest.raises(InputError, match=f"^--{name}: goes with --teacher_context "):
            parse(f"--{name}", value)


def test_the_teachers_resolution_is_one_that_the_model_can_see(capsys):
    assert parse("--teacher_resolution", 512).teacher.teacher_resolution == 512
    assert parse().teacher.teacher_resolution is None
    for value, problem in (
        (48, "too small; use at least 64 pixels per side"),
        (500, "not divisible into image tokens; use multiples of 16 pixels"),
        (2048, r"too large \(16384 image tokens, the limit is 4300\); use at most 1040x1040 pixels"),
    ):
        with pytest.raises(InputError, match=f"^--teacher_resolution {value}: {problem}$"):
            parse("--teacher_resolution", value)
    with pytest.raises(InputError, match="^--teacher_resolution: goes with --teacher_context edit; add that"):
        parse("--teacher_resolution", 512, "--teacher_context", "vlm")
    with pytest.raises(InputError, match="^--teacher_resolution: drop it$"):
        parse("--teacher_resolution", 512, model=ZIMAGE)
    for model, is_shown in ((KLEIN, True), (ZIMAGE, False)):
        with pytest.raises(SystemExit):
            parse("--help", model=model)
        assert ("--teacher_resolution" in capsys.readouterr().out) == is_shown


def test_flags_may_be_spelled_with_hyphens_and_booleans_with_values():
    settings = parse("--center-crop", "--random_flip", "true", "--prodigy_decouple", "no", "--lora-alpha", 3)
    assert settings.data.center_crop and settings.data.random_flip
    assert not settings.optimizer.prodigy_decouple and settings.lora.lora_alpha == 3.0


def test_prior_preservation_is_switched_off_on_the_command_line_and_in_a_config(config):
    assert parse().prior.with_prior_preservation and parse("--with_prior_preservation").prior.with_prior_preservation
    for off in ("false", False, "no"):
        assert not parse("--with_prior_preservation", off).prior.with_prior_preservation
        assert not parse(*config({"with_prior_preservation": off})).prior.with_prior_preservation
    given = [*config({"with_prior_preservation": False}), "--with_prior_preservation", "true"]
    assert parse(*given).prior.with_prior_preservation


def test_help_says_how_to_train_as_published(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--with_prior_preservation [true|false]" in text and "--no_with" not in text
    assert "Default: true; false switches it off, as in the published runs." in text
    assert "The published runs train on all: as many as --num_rollout_steps. (default: 1)" in text


def test_the_defaults_follow_the_model_and_the_teacher_context():
    klein, zimage = parse(), parse(model=ZIMAGE)
    assert (klein.teacher.teacher_context, zimage.teacher.teacher_context) == ("edit", "vlm")
    assert (klein.optimizer.learning_rate, zimage.optimizer.learning_rate) == (2e-5, 1e-4)
    assert klein.teacher.teacher_prompt_suffix.startswith(" Reproduce") and klein.teacher.vlm_max_pixels is None
    assert zimage.teacher.teacher_prompt_suffix == "" and zimage.teacher.vlm_max_pixels == 768**2
    vlm = parse("--teacher_context", "vlm").teacher
    assert (vlm.teacher_prompt_suffix, vlm.vlm_min_pixels, vlm.vlm_rope) == ("", 512**2, "vlm")


# As a user runs a script. Libraries that take seconds to import make a script's answer to a mistake slow.
SLOW_IMPORTS = {"torch", "diffusers", "accelerate", "datasets", "peft", "matplotlib"}


def run_as_user(script: str, *arguments: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """The finished process, and those of the slow imports that it made."""
    command = [sys.executable, "-X", "importtime", ROOT / script, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return finished, SLOW_IMPORTS & set(re.findall(r"\| +([\w.]+)$", finished.stderr, re.MULTILINE))


@pytest.mark.parametrize("script", ["train_dopsd_flux2.py", "train_dopsd_zimage.py"])
def test_help_and_mistakes_are_answered_before_the_slow_imports(script):
    finished, imported = run_as_user(script, "--help")
    assert finished.returncode == 0 and "--teacher_context" in finished.stdout and not imported
    finished, imported = run_as_user(script, "--rnk", "4")
    assert finished.returncode == 2 and finished.stderr.endswith("--rnk 4; did you mean --rank?\n") and not imported
    finished, imported = run_as_user(script, "--rank", "0")
    assert finished.returncode == 1 and not imported
    assert finished.stderr.endswith(f"{script}: error: --rank 0: must be a whole number of at least 1\n")


def test_the_schedules_are_those_of_diffusers():
    known = {kind.value for kind in SchedulerType}
    assert {*SCHEDULERS} == known - {"piecewise_constant"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hub_tokn", "hf_abcdefghijklmnop"],
        ["--hub_token", "hf_abcdefghijklmnop", "hf_qrstuvwxyz"],
        ["--rank", "hf_abcdefghijklmnop"],
        ["--hub_tokn=secret-without-prefix"],
        ["hf_abcdefghijklmnop"],
    ],
)
def test_no_error_prints_a_token(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and not re.search("hf_|secret", error), error


@pytest.mark.parametrize("argument", ["", " ", "\n", "a\nb", "é", "-", "--"])
def test_odd_arguments_are_one_line(capsys, argument):
    with pytest.raises(SystemExit) as end:
        parse(argument, "stray")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "unrecognized arguments" in error


@pytest.mark.parametrize("tracker", ["wandb", "comet_ml", "all"])
def test_a_token_on_the_command_line_is_refused_with_trackers_that_store_it(tracker):
    with pytest.raises(InputError) as caught:
        parse("--hub_token", "hf_secret", "--report_to", tracker)
    assert f"--hub_token: cannot be combined with --report_to {tracker}, which stores the command line" in str(
        caught.value
    )
    assert "hf_secret" not in str(caught.value)


def test_a_token_is_refused_under_a_launcher_that_prints_the_command_line(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert parse("--hub_token", "hf_secret").publishing.hub_token == "hf_secret"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(InputError, match="^--hub_token: accelerate launch prints the command line if a run fails; "):
        parse("--hub_token", "hf_secret")


def test_nothing_is_encoded_only_without_a_cache():
    with pytest.raises(InputError, match="^--encode_only: fills the cache, which --no_context_cache turns off"):
        parse("--encode_only", "--no_context_cache")


@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "large"])
def test_a_configuration_without_end_is_one_line(tmp_path, target):
    path = tmp_path / "run.yaml"
    if target == "pipe":
        os.mkfifo(path)
    elif target == "large":
        path.write_text("# " + "x" * 2_000_000)
    else:
        path.symlink_to(target)
    with pytest.raises(InputError, match=f"^--config {path}: cannot be read as YAML") as caught:
        parse("--config", path)
    assert "\n" not in str(caught.value)


def test_a_deeply_nested_configuration_is_one_line(config):
    with pytest.raises(InputError, match="cannot be read as YAML"):
        parse(*config("rank: " + "[" * 100_000))
