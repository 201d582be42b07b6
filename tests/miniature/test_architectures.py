import inspect
from pathlib import Path

import pytest
import torch

import train_dopsd_flux2
import train_dopsd_zimage
from benchmarks.miniature import world
from benchmarks.miniature.architectures import ARCHITECTURES, architecture_in, architecture_of
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.zimage import ZIMAGE
from dopsd.command_line import parse_settings
from pipelines.flux2_klein import KleinContext
from pipelines.z_image import ZImageContext
from short_runs import as_arguments


def klein_context(*values: float, num_pictures: int) -> KleinContext:
    """A sample for each value: its embeddings have it, and its pictures 100 or 200 more."""
    column = torch.tensor(values)[:, None, None]
    return KleinContext(column.expand(-1, 3, 2), tuple(column[..., None] + 100 * n + 100 for n in range(num_pictures)))


def zimage_context(*values: float) -> ZImageContext:
    """A sample for each value, of as many tokens."""
    return ZImageContext(tuple(torch.full((int(value), 2), value) for value in values))


@pytest.mark.parametrize("num_pictures", [0, 1, 2])
def test_kleins_contexts_are_joined_and_selected(num_pictures):
    parts = (klein_context(*values, num_pictures=num_pictures) for values in ([1.0, 2.0], [3.0]))
    joined = KLEIN.join(list(parts))
    assert joined.prompt_embeds[:, 0, 0].tolist() == [1, 2, 3]
    assert [grid.flatten().tolist() for grid in joined.references] == [[101, 102, 103], [201, 202, 203]][:num_pictures]
    chosen = KLEIN.select(joined, torch.tensor([2, 0, 2]))
    assert chosen.prompt_embeds[:, 0, 0].tolist() == [3, 1, 3]
    assert [grid.flatten().tolist() for grid in chosen.references] == [[103, 101, 103], [203, 201, 203]][:num_pictures]


def test_z_images_contexts_are_joined_and_selected():
    joined = ZIMAGE.join([zimage_context(1.0, 2.0), zimage_context(3.0)])
    assert [embeds.shape for embeds in joined.prompt_embeds] == [(1, 2), (2, 2), (3, 2)]
    chosen = ZIMAGE.select(joined, torch.tensor([2, 0, 2]))
    assert [embeds[:, 0].tolist() for embeds in chosen.prompt_embeds] == [[3, 3, 3], [1], [3, 3, 3]]


def test_an_architecture_is_found_by_pipeline_context_and_folder(miniature, zimage, zimage_folder):
    for name, pipeline, folder in (("klein", miniature, MODEL), ("zimage", zimage, zimage_folder)):
        architecture = ARCHITECTURES[name]
        assert architecture.name == name
        assert architecture_of(pipeline) is architecture_in(folder) is architecture
        assert architecture_of(architecture.text_context(pipeline, ["a zofu on sand"])) is architecture
        made, loaded = architecture.make_transformer().state_dict(), pipeline.transformer.state_dict()
        assert {key: weight.shape for key, weight in made.items()} == {key: t.shape for key, t in loaded.items()}


@pytest.mark.parametrize("model", [train_dopsd_flux2.MODEL, train_dopsd_zimage.MODEL])
def test_the_scripts_know_the_flags_that_their_miniature_needs(model, zimage_folder):
    (architecture,) = (item for item in ARCHITECTURES.values() if item.script == Path(inspect.getfile(type(model))))
    flags = architecture.script_flags(zimage_folder)
    required = {"pretrained_model_name_or_path": zimage_folder, "instance_data_dir": ".", "instance_prompt": "a zofu"}
    settings = parse_settings(model, "", as_arguments(required | flags))
    assert settings.model.max_sequence_length == architecture.max_sequence_length
    if architecture is ZIMAGE:
        assert settings.teacher.vlm_min_pixels == settings.teacher.vlm_max_pixels == world.SIDE**2
