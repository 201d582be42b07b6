"""The flags and defaults of both scripts, and what each model refuses."""

import json
import shutil
from types import SimpleNamespace

import pytest

import train_dopsd_flux2
import train_dopsd_zimage
from dopsd.command_line import build_parser, parse_settings
from dopsd.data.training_data import resolve_data_defaults
from dopsd.errors import InputError
from models import ONE_MODEL, ZIMAGE


KLEIN, ZIMAGE_TURBO = train_dopsd_flux2.MODEL, train_dopsd_zimage.MODEL
BOTH = pytest.mark.parametrize("kind", [KLEIN, ZIMAGE_TURBO], ids=["flux2", "zimage"])


def parse(kind, *arguments):
    return parse_settings(kind, "", ["--pretrained_model_name_or_path", "a/model", *arguments])


# Flags


def flags(kind) -> dict[str, tuple]:
    return {
        action.dest: (action.option_strings, action.default, action.nargs, action.choices and list(action.choices))
        for action in build_parser(kind, "")._actions
    }


def test_the_flags_differ_where_the_models_do():
    flux2, zimage = flags(KLEIN), flags(ZIMAGE_TURBO)
    assert set(flux2) ^ set(zimage) == {"text_encoder_out_layers", "teacher_max_sequence_length"}
    differing = {name for name in flux2.keys() & zimage.keys() if flux2[name] != zimage[name]}
    assert differing == {
        "teacher_context",
        "lora_layers",
        "learning_rate",
        "num_inference_steps",
        "output_dir",
    }


COMMON_DEFAULTS = {
    "num_rollout_steps": 4,
    "num_trained_states": 1,
    "with_prior_preservation": True,
    "max_sequence_length": 512,
    "vlm_min_pixels": 512**2,
    "vlm_rope": "vlm",
    "rank": 64,
    "lora_alpha": 128,
}
DEFAULTS = {
    KLEIN: {
        "teacher_context": "edit",
        "learning_rate": 2e-5,
        "max_train_steps": 3000,
        "num_inference_steps": 4,
        "text_encoder_out_layers": [9, 18, 27],
        "vlm_max_pixels": 512**2,
    },
    ZIMAGE_TURBO: {
        "teacher_context": "vlm",
        "teacher_prompt_suffix": "",
        "learning_rate": 1e-4,
        "max_train_steps": 2000,
        "num_inference_steps": 8,
        "vlm_max_pixels": 768**2,
    },
}


@BOTH
def test_defaults(kind):
    expected = COMMON_DEFAULTS | DEFAULTS[kind]
    values = parse(kind, "--teacher_context", "vlm").flat()
    values["teacher_context"] = parse(kind).teacher.teacher_context
    assert {name: values[name] for name in expected} == expected


def test_the_suffix_follows_the_context():
    assert parse(KLEIN).teacher.teacher_prompt_suffix.startswith(" Reproduce the reference image")
    assert parse(KLEIN, "--teacher_context", "vlm").teacher.teacher_prompt_suffix == ""
    given = ["--teacher_context", "vlm", "--teacher_prompt_suffix", " so"]
    assert parse(KLEIN, *given).teacher.teacher_prompt_suffix == " so"


@BOTH
def test_the_number_of_steps_is_the_published_runs_unless_another_or_epochs_are_given(kind, capsys):
    """It must not follow from the number of pictures: four of them would be four steps."""

    def steps(*arguments):
        settings = parse(kind, *arguments)
        data = SimpleNamespace(order=SimpleNamespace(num_batches=5), captions=["a ball"], editing_requests=[])
        return resolve_data_defaults(settings, data, num_processes=2).training.max_train_steps

    published = DEFAULTS[kind]["max_train_steps"]
    assert steps() == published
    assert steps("--num_train_epochs", "3") == 8  # 15 batches, 2 at a time
    assert steps("--max_train_steps", "7") == steps("--max_train_steps", "7", "--num_train_epochs", "3") == 7
    assert steps("--num_train_epochs", "3", "--max_train_steps", str(published)) == published
    with pytest.raises(SystemExit):
        parse(kind, "--help")
    assert f"as many as that takes. Default: {published}." in " ".join(capsys.readouterr().out.split())


# What a model refuses


@ONE_MODEL
@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ([9, 18], "the transformer takes 3 layers of 32 channels"),
        ([9, 18, 40], "the text encoder has layers 0 to 28"),
        ([-1, 18, 27], "the text encoder has layers 0 to 28"),
    ],
)
def test_text_encoder_layers_that_do_not_fit_are_refused(prepare, layers, problem):
    with pytest.raises(InputError) as caught:
        prepare(text_encoder_out_layers=layers)
    assert str(caught.value) == f"--text_encoder_out_layers {layers}: {problem}"


@ZIMAGE
def test_a_text_encoder_that_does_not_fit_the_transformer_is_refused(prepare, model, tmp_path):
    folder = shutil.copytree(model.path, tmp_path / "model")
    config = folder / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cap_feat_dim": 64}))
    with pytest.raises(
        InputError, match=f"^--pretrained_model_name_or_path {folder}: its text encoder has 32 channels, "
    ):
        prepare(pretrained_model_name_or_path=folder)


@ZIMAGE
@pytest.mark.parametrize("flag", ["max_sequence_length", "teacher_max_sequence_length"])
def test_texts_beyond_the_transformers_positions_are_refused(prepare, flag):
    assert prepare(**{flag: 1504}).settings.flat()[flag] == 1504
    with pytest.raises(InputError, match=f"^--{flag} 1505: the transformer has 1536 positions .*; pass at most 1504$"):
        prepare(**{flag: 1505})


@ZIMAGE
@pytest.mark.parametrize(("positions", "length"), [(200, 192), (1536, 1024)])
def test_the_teachers_default_length_fits_the_transformer(prepare, model, tmp_path, positions, length):
    folder = shutil.copytree(model.path, tmp_path / "model")
    config = folder / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"axes_lens": [positions, 512, 512]}))
    run = prepare(pretrained_model_name_or_path=folder)
    assert run.settings.model.teacher_max_sequence_length == length
    assert run.conditioning.teacher_limit.tokens == length
    assert run.conditioning.student_limit.tokens == 80
