"""What a checkpoint says of itself, and what is refused before anything is loaded."""

import json
import shutil

import pytest

from dopsd.errors import InputError
from dopsd.pretrained import read_configs


@pytest.fixture
def read(model):
    def call(folder):
        return read_configs(folder, model.stock, model=model.script.MODEL_NAME, example="org/example")

    return call


@pytest.fixture
def changed(model, tmp_path):
    """The checkpoint with one JSON file changed."""

    def change(file, **values):
        folder = shutil.copytree(model.path, tmp_path / "other")
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | values))
        return folder

    return change


def test_the_index_and_the_scheduler_are_read(read, model):
    index, scheduler = read(model.path)
    assert index["_class_name"] == model.stock.__name__
    assert scheduler["shift"] == 3.0


def test_another_model_is_refused(read, changed, model):
    name = model.script.MODEL_NAME
    with pytest.raises(InputError, match=f"--pretrained_model_name_or_path .* is a FluxPipeline, not {name}; pass .*"):
        read(changed("model_index.json", _class_name="FluxPipeline"))


def test_another_scheduler_is_refused(read, changed):
    with pytest.raises(InputError, match="--pretrained_model_name_or_path .* scheduler"):
        read(changed("scheduler/scheduler_config.json", stochastic_sampling=True))


def test_no_checkpoint_is_refused_in_one_line(read, tmp_path):
    with pytest.raises(InputError, match="--pretrained_model_name_or_path .* no folder of a diffusers") as caught:
        read(str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="org/name: there is no such folder, and the Hub did not give it"):
        read("org/name")
