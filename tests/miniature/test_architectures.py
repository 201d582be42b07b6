import pytest
import torch

from benchmarks.miniature.architectures import ARCHITECTURES, architecture_of
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.zimage import ZIMAGE
from pipelines.flux2_klein import KleinContext
from pipelines.z_image import ZImageContext


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


def test_a_pipelines_architecture_is_found_and_loads_its_folder(miniature, zimage):
    assert architecture_of(miniature) is ARCHITECTURES["klein"]
    assert architecture_of(zimage) is ARCHITECTURES["zimage"]
    for architecture, pipeline in ((KLEIN, miniature), (ZIMAGE, zimage)):
        assert isinstance(pipeline, architecture.stock_pipeline_class)
        made = architecture.make_transformer()
        assert {name: weight.shape for name, weight in made.state_dict().items()} == {
            name: weight.shape for name, weight in pipeline.transformer.state_dict().items()
        }
