"""Tiny Qwen3-VL checkpoints and the text encoder that they fit."""

import shutil

import pytest

from tiny_vlm import make_tiny_vlm
from vlm_helpers import make_text_config, make_text_encoder


@pytest.fixture(scope="session")
def vlm_paths(tmp_path_factory):
    """Tiny VLMs for `make_text_encoder`, by whether their embeddings are tied."""
    folder = tmp_path_factory.mktemp("vlm")
    return {
        tied: make_tiny_vlm(folder / str(tied), text_config=make_text_config(), tie_word_embeddings=tied)
        for tied in (True, False)
    }


@pytest.fixture(scope="session")
def vlm_path(vlm_paths):
    return vlm_paths[True]


@pytest.fixture
def vlm_copy(vlm_path, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(vlm_path, tmp_path / "vlm")


@pytest.fixture
def text_encoder():
    return make_text_encoder()
