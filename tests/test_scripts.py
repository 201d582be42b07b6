"""The two training scripts are one, but for their section "The model": a fix in one is a fix in both."""

import ast
import inspect
import re

import pytest

import train_dopsd_flux2
import train_dopsd_zimage


SCRIPTS = (train_dopsd_flux2, train_dopsd_zimage)
SECTION = re.compile(r"^# ([A-Z][^\n]*)\n\n\n", re.MULTILINE)


def sections(script) -> dict[str, str]:
    """Text by heading; what stands before the first heading is called ""."""
    parts = SECTION.split(inspect.getsource(script))
    rest = parts[1:]
    return {"": parts[0]} | dict(zip(rest[::2], rest[1::2], strict=True))


def test_all_sections_but_the_model_are_the_same():
    flux2, zimage = map(sections, SCRIPTS)
    assert list(flux2) == list(zimage)
    assert {"The model", "Arguments", "Data: order", "Contexts", "Training", "Main"} <= set(flux2)
    assert [name for name in flux2 if flux2[name] != zimage[name]] == ["", "The model"]


def test_before_the_sections_only_the_docstring_and_the_models_imports_differ():
    heads = []
    for script in SCRIPTS:
        body = ast.parse(sections(script)[""]).body[1:]  # without the docstring
        heads.append({ast.unparse(node) for node in body})
    names = " ".join(heads[0] ^ heads[1])
    differing = {ast.parse(text).body[0].module for text in heads[0] ^ heads[1]}
    models = {"diffusers", "diffusers.models.transformers.transformer_z_image", "transformers"}
    assert differing == models | {"pipelines.flux2_klein", "pipelines.z_image"}, names


def test_the_model_sections_define_the_same_names():
    names = []
    for script in SCRIPTS:
        found = set()
        for node in ast.parse(sections(script)["The model"]).body:
            if isinstance(node, ast.FunctionDef):
                found.add((node.name, ast.unparse(node.args), ast.unparse(node.returns)))
            else:
                stored = [n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
                found |= {name.id for name in stored}
        names.append(found)
    assert names[0] | {"DEFAULT_TEACHER_MAX_SEQUENCE_LENGTH"} == names[1]


def flags(script) -> dict[str, tuple]:
    return {
        action.dest: (action.option_strings, action.default, action.nargs, action.choices and list(action.choices))
        for action in script.build_parser()._actions
    }


def test_the_flags_differ_where_the_models_do():
    flux2, zimage = map(flags, SCRIPTS)
    assert set(flux2) ^ set(zimage) == {"text_encoder_out_layers", "teacher_max_sequence_length"}
    differing = {name for name in flux2.keys() & zimage.keys() if flux2[name] != zimage[name]}
    assert differing == {
        "teacher_context",
        "lora_layers",
        "learning_rate",
        "num_inference_steps",
        "output_dir",
    }


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            train_dopsd_flux2,
            {
                "teacher_context": "edit",
                "learning_rate": 2e-5,
                "num_inference_steps": 4,
                "num_rollout_steps": 4,
                "max_sequence_length": 512,
                "text_encoder_out_layers": [9, 18, 27],
                "vlm_min_pixels": 512**2,
                "vlm_max_pixels": 512**2,
                "vlm_rope": "vlm",
                "rank": 64,
                "lora_alpha": 128,
            },
        ),
        (
            train_dopsd_zimage,
            {
                "teacher_context": "vlm",
                "teacher_prompt_suffix": "",
                "learning_rate": 1e-4,
                "num_inference_steps": 8,
                "num_rollout_steps": 4,
                "max_sequence_length": 512,
                "vlm_min_pixels": 512**2,
                "vlm_max_pixels": 768**2,
                "vlm_rope": "vlm",
                "rank": 64,
                "lora_alpha": 128,
            },
        ),
    ],
)
def test_defaults(script, expected):
    args = script.parse_args([] if expected["teacher_context"] == "vlm" else ["--teacher_context", "vlm"])
    args.pretrained_model_name_or_path = "a/model"
    script.check_args(args)
    args = vars(args) | {"teacher_context": script.parse_args([]).teacher_context}
    assert {name: args[name] for name in expected} == expected


def test_the_suffix_follows_the_context():
    edit = train_dopsd_flux2.parse_args([]).teacher_prompt_suffix
    assert edit.startswith(" Reproduce the reference image")
    assert train_dopsd_flux2.parse_args(["--teacher_context", "vlm"]).teacher_prompt_suffix == ""
    given = ["--teacher_context", "vlm", "--teacher_prompt_suffix", " so"]
    assert train_dopsd_flux2.parse_args(given).teacher_prompt_suffix == " so"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_can_be_printed(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    assert "--teacher_context" in capsys.readouterr().out
