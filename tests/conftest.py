"""Fixtures that several files share. Heavy imports are inside them: pytest-xdist's controller reads this file too."""

import gc
import os
import subprocess
import sys
from pathlib import Path


# Before any library reads them: no hub, no telemetry, and one thread, since tiny models gain nothing from more.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
from PIL import Image, ImageDraw


def pytest_collection_finish():
    # Everything imported so far stays: without this, each collection of garbage walks it for a second.
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def accelerate_state():
    """accelerate's loggers ask it which process this is."""
    from accelerate import PartialState

    PartialState()


@pytest.fixture(scope="session")
def klein_path(tmp_path_factory):
    """A tiny FLUX.2-klein checkpoint."""
    from tiny_klein import make_tiny_klein

    return make_tiny_klein(tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="session")
def zimage_path(tmp_path_factory):
    """A tiny Z-Image-Turbo checkpoint."""
    from tiny_zimage import make_tiny_zimage

    return make_tiny_zimage(tmp_path_factory.mktemp("zimage"))


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory):
    """Folder for the tiny vision-language models, which are made when they are needed."""
    return tmp_path_factory.mktemp("vlm")


@pytest.fixture(params=["flux2", "zimage"])
def model(request, klein_path, zimage_path, vlm_folder):
    """Each script with its tiny checkpoint; the marks in models.py choose others."""
    from models import make_model

    return make_model(request.param, klein_path, zimage_path, vlm_folder)


@pytest.fixture
def pipeline(klein_path):
    """The tiny FLUX.2-klein in float32, new for each test."""
    import torch

    from pipelines.flux2_klein import Flux2KleinDOPSDPipeline

    pipeline = Flux2KleinDOPSDPipeline.from_pretrained(klein_path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def make_picture():
    """Draws a disc on a gradient, different for each number."""

    def draw(number: int, width: int = 64, height: int = 64) -> Image.Image:
        image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
        left = 4 + 5 * number % (width // 2)
        ImageDraw.Draw(image).ellipse((left, 8, left + 30, 38), fill=(40 * number % 256, 90, 200 - 30 * number % 200))
        return image

    return draw


@pytest.fixture(scope="session")
def photos(tmp_path_factory, make_picture):
    """A folder of three pictures of different shapes, without captions."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (width, height) in enumerate([(64, 64), (128, 72), (70, 110)]):
        make_picture(number, width, height).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def forkserver(tmp_path_factory):
    from command_line import Forkserver

    return Forkserver(tmp_path_factory.mktemp("logs"))


@pytest.fixture
def command(forkserver, model):
    """The model's script."""
    from command_line import Command

    return Command(forkserver, model.script_path)


@pytest.fixture
def arguments(model, photos, tmp_path):
    """Makes the command line of a short run: (output folder's name, **flags), see `short_runs.as_arguments`."""
    from short_runs import as_arguments, short_run

    def make(folder: str = "run", **flags) -> list[str]:
        return as_arguments(short_run(model, photos, tmp_path / folder) | flags)

    return make


@pytest.fixture
def train(command, arguments):
    """Runs the script: (output folder's name, **flags) -> `command_line.Result`."""

    def run(folder: str = "run", **flags):
        return command(*arguments(folder, **flags))

    return run


@pytest.fixture
def prepare(arguments, model):
    """Prepares a short run in this process: (output folder's name, **flags) -> `short_runs.PreparedRun`."""
    from short_runs import prepare_run

    def make(folder: str = "run", **flags):
        return prepare_run(model.script.MODEL, arguments(folder, **flags))

    return make


@pytest.fixture
def torchrun(model, tmp_path):
    """Starts the script as processes on a free port; returns torchrun's process and the file with its output."""

    def start(
        arguments: list[str], script: Path = model.script_path, num_processes: int = 2
    ) -> tuple[subprocess.Popen, Path]:
        launcher = [Path(sys.executable).parent / "torchrun", "--standalone", "--local-addr", "127.0.0.1"]
        launcher += ["--nproc-per-node", str(num_processes)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        log = tmp_path / "torchrun.log"
        with open(log, "wb") as file:
            process = subprocess.Popen([*launcher, script, *arguments], stdout=file, stderr=file, env=environment)
        return process, log

    return start
