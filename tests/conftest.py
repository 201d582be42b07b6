import os


# Before any library reads them: no hub, no telemetry, and one thread, since tiny models gain nothing from more.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import diffusers
import pytest
import torch
from PIL import Image, ImageDraw

from command_line import Command, Forkserver
from models import make_model
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline
from tiny_klein import make_tiny_klein
from tiny_zimage import make_tiny_zimage


diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def klein_path(tmp_path_factory):
    """A tiny FLUX.2-klein checkpoint."""
    return make_tiny_klein(tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="session")
def zimage_path(tmp_path_factory):
    """A tiny Z-Image-Turbo checkpoint."""
    return make_tiny_zimage(tmp_path_factory.mktemp("zimage"))


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory):
    """Where the tiny VLMs lie once they are made."""
    return tmp_path_factory.mktemp("vlm")


@pytest.fixture(params=["flux2", "zimage"])
def model(request, klein_path, zimage_path, vlm_folder):
    """Each script with its tiny checkpoint."""
    return make_model(request.param, klein_path, zimage_path, vlm_folder)


@pytest.fixture
def pipeline(klein_path):
    """Its pipeline in float32, fresh for each test."""
    pipeline = Flux2KleinDOPSDPipeline.from_pretrained(klein_path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def make_picture():
    """A picture with structure: a disc on a gradient, different for each number."""

    def draw(number: int, width: int = 64, height: int = 64) -> Image.Image:
        image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
        left = 4 + 5 * number % (width // 2)
        ImageDraw.Draw(image).ellipse((left, 8, left + 30, 38), fill=(40 * number % 256, 90, 200 - 30 * number % 200))
        return image

    return draw


@pytest.fixture(scope="session")
def forkserver(tmp_path_factory):
    return Forkserver(tmp_path_factory.mktemp("logs"))


@pytest.fixture
def command(forkserver, model):
    """The model's script."""
    return Command(forkserver, model.script_path)


@pytest.fixture(scope="session")
def photos(tmp_path_factory, make_picture):
    """Three pictures of different shapes, without captions."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (width, height) in enumerate([(64, 64), (128, 72), (70, 110)]):
        make_picture(number, width, height).save(folder / f"{number}.png")
    return folder
