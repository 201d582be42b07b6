import shutil

import pytest

from dopsd.command_line import parse_settings
from dopsd.planner.plan import Planner
from dopsd.planner.reading import read_run
from short_runs import as_arguments, short_run


# Plans of short runs


@pytest.fixture
def without_weights(model, tmp_path):
    """The tiny checkpoint's small files."""
    folder = tmp_path / "configs"
    shutil.copytree(model.path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def planned_settings(model, photos, without_weights, tmp_path):
    """Makes resolved settings of a short run: flag -> value."""

    def make(**flags):
        flags = short_run(model, photos, tmp_path / "run") | {"pretrained_model_name_or_path": without_weights} | flags
        given = parse_settings(model.script.MODEL, "", as_arguments(flags))
        return given.replace(mixed_precision=given.training.mixed_precision or "no")

    return make


@pytest.fixture
def planner(model, planned_settings):
    """Makes a planner for a GPU: flag -> value."""
    return lambda **flags: Planner(read_run(planned_settings(**flags), model.script.MODEL), on_gpu=True)
