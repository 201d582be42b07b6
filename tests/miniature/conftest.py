from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.miniature import teacher, world
from benchmarks.miniature.editor import assemble_editor
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.metrics import PictureReader
from benchmarks.miniature.parts import make_pipeline, make_transformer, make_vae
from benchmarks.miniature.rows import RowSource
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline


@pytest.fixture(scope="session")
def reader():
    return PictureReader(world.all_appearances())


@pytest.fixture(scope="session")
def row_source():
    """Rows for a small world, six plain objects and two without a name, with untrained models."""
    torch.manual_seed(0)
    pipeline = make_pipeline(make_vae().eval(), make_transformer())
    appearances = [a for a in world.all_appearances() if a.texture == "plain" and a.colours == ("red",)][:6]
    rng = np.random.default_rng(0)
    sprites = np.stack([*(world.sprite(a) for a in appearances), *(world.random_sprite(rng) for _ in range(2))])
    scenes = [(index, background) for index in range(6) for background in range(len(world.BACKGROUNDS))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "NUM_GRAIN_PICTURES", 64)
        encode = partial(KLEIN.encode, pipeline.vae)
        latent_world = teacher.encode_world(encode, sprites, [*scenes, (6, 0), (7, 1)], log=print)
    return RowSource(KLEIN, pipeline, sprites, latent_world, appearances)


@pytest.fixture
def miniature():
    """The shipped miniature, fresh for each test."""
    return Flux2KleinDOPSDPipeline.from_pretrained(MODEL)


@pytest.fixture(scope="session")
def editor_folder(tmp_path_factory):
    """The shipped editor as a pipeline's folder. Do not write to it."""
    return assemble_editor(tmp_path_factory.mktemp("miniature") / "editor")
