import json
import shutil

import pytest
import torch

from dopsd.command_line import parse_settings
from dopsd.errors import InputError
from dopsd.init_lora import read_init_lora
from dopsd.lora_roles import adapter_options
from dopsd.pretrained import (
    check_pretrained,
    load_skeleton,
    load_text_encoder,
    load_transformer,
    model_identity,
    open_pipeline,
    read_configs,
)
from short_runs import as_arguments


@pytest.fixture
def read(model):
    def call(folder):
        kind = model.script.MODEL
        return read_configs(folder, kind.stock_pipeline_class, model=kind.name, example="org/example")

    return call


@pytest.fixture
def changed(model, tmp_path):
    """A copy of the checkpoint with one JSON file changed."""

    def change(file, **values):
        folder = shutil.copytree(model.path, tmp_path / "other")
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | values))
        return folder

    return change


@pytest.fixture
def settings(model):
    """Settings of the model with its checkpoint or other flags."""

    def make(path=model.path, **flags):
        flags = {"pretrained_model_name_or_path": path, "report_to": "none"} | flags
        return parse_settings(model.script.MODEL, "", as_arguments(flags))

    return make


# Configurations


def test_the_index_and_the_scheduler_are_read(read, model):
    index, scheduler = read(model.path)
    assert index["_class_name"] == model.stock.__name__
    assert scheduler["shift"] == 3.0


def test_another_model_is_refused(read, changed, model):
    name = model.script.MODEL.name
    with pytest.raises(InputError, match=f"--pretrained_model_name_or_path .* is a FluxPipeline, not {name}; pass .*"):
        read(changed("model_index.json", _class_name="FluxPipeline"))


def test_another_scheduler_is_refused(read, changed):
    with pytest.raises(InputError, match="--pretrained_model_name_or_path .* scheduler"):
        read(changed("scheduler/scheduler_config.json", stochastic_sampling=True))


def test_no_checkpoint_is_refused_in_one_line(read, tmp_path):
    with pytest.raises(
        InputError, match="--pretrained_model_name_or_path .* not the folder of a diffusers checkpoint"
    ) as caught:
        read(str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)
    with pytest.raises(
        InputError, match="org/name: there is no such folder, and it could not be read from the Hub"
    ) as caught:
        read("org/name")
    assert "\n" not in str(caught.value)


def test_an_undistilled_model_gets_a_warning(model, settings, tmp_path, caplog):
    check_pretrained(model.script.MODEL, settings().model)
    assert not caplog.records
    undistilled = {"is_distilled": False} if "flux2" in model.script.__name__ else {"shift": 6.0}
    base = model.make(tmp_path / "base", **undistilled)
    check_pretrained(model.script.MODEL, settings(base).model)
    (record,) = caplog.records
    assert f"{base} does not look step-distilled: D-OPSD preserves" in record.getMessage()


# Loading


def load_all(kind, settings) -> None:
    """Loads every component as a run does."""
    pipeline, folder, _ = open_pipeline(kind, settings, torch.float32)
    pipeline.text_encoder = load_text_encoder(kind, settings, folder, torch.float32)
    pipeline.transformer = load_transformer(kind, settings, torch.float32)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_an_incomplete_checkpoint_is_one_line(model, settings, tmp_path, part):
    folder = shutil.copytree(model.path, tmp_path / "model")
    load_all(model.script.MODEL, settings(folder).model)
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match="^--pretrained_model_name_or_path .*; check its files and") as caught:
        load_all(model.script.MODEL, settings(folder).model)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_damaged_checkpoint_is_one_line(model, settings, tmp_path, part):
    folder = shutil.copytree(model.path, tmp_path / "model")
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="^--pretrained_model_name_or_path .*; check its files and") as caught:
        load_all(model.script.MODEL, settings(folder).model)
    assert "\n" not in str(caught.value)


def test_a_variant_that_is_not_there_is_one_line(model, settings):
    with pytest.raises(InputError, match="^--pretrained_model_name_or_path .*--variant"):
        load_all(model.script.MODEL, settings(variant="fp16").model)


def test_a_checkpoint_is_identified_by_its_content(model, settings, tmp_path):
    identity = model_identity(settings().model)
    moved = shutil.copytree(model.path, tmp_path / "moved")
    (moved / "README.md").write_text("not a part of the model")
    assert model_identity(settings(moved).model) == identity
    assert model_identity(settings(model.make(tmp_path / "other", seed=1)).model) != identity
    assert model_identity(settings("org/name").model) == "org/name@main"
    assert model_identity(settings("org/name", revision="v2").model) == "org/name@v2"


# Flags that name files


@pytest.fixture
def init_lora(model, settings):
    def read(name_or_path, **flags):
        chosen = settings(**flags)
        skeleton = load_skeleton(model.script.MODEL, chosen.model)
        options = adapter_options(chosen.lora, skeleton)
        return read_init_lora(model.script.MODEL, name_or_path, skeleton, options)

    return read


def test_init_lora_that_is_not_there_is_refused(init_lora, tmp_path):
    assert init_lora(None) is None
    with pytest.raises(InputError, match=f"^--init_lora {tmp_path}/nothing: no LoRA is found there .*; give a"):
        init_lora(str(tmp_path / "nothing"))
