from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2

from benchmarks.miniature import teacher, world, zimage_parts
from benchmarks.miniature.editor import assemble_editor
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.making import save_stock_pipeline
from benchmarks.miniature.metrics import PictureReader
from benchmarks.miniature.parts import make_pipeline, make_transformer, make_vae
from benchmarks.miniature.rows import RowSource
from benchmarks.miniature.zimage import VLM_FOLDER, ZIMAGE
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


@pytest.fixture(scope="session")
def zimage_folder(tmp_path_factory):
    """A miniature Z-Image-Turbo in its folder, with klein's VAE and untrained weights. Do not write to it."""
    folder = tmp_path_factory.mktemp("miniature") / "zimage"
    torch.manual_seed(0)
    klein_vae = AutoencoderKLFlux2.from_pretrained(MODEL, subfolder="vae")
    pipeline = zimage_parts.make_pipeline(zimage_parts.make_vae(klein_vae), zimage_parts.make_transformer())
    save_stock_pipeline(pipeline, folder)
    config = zimage_parts.miniature_vlm_config(pipeline.text_encoder.config)
    tower = zimage_parts.make_tower(config, seed=0)
    zimage_parts.write_vlm(folder / VLM_FOLDER, pipeline.text_encoder, pipeline.tokenizer, tower)
    return folder


@pytest.fixture(scope="session")
def zimage(zimage_folder):
    """The untrained miniature Z-Image-Turbo with its vision encoder. Do not change it."""
    return ZIMAGE.load(zimage_folder)
