import numpy as np
import pytest
import torch

from benchmarks.miniature import world
from benchmarks.miniature.rows import Rows


@pytest.fixture
def draw(row_source, monkeypatch):
    """Draws rows; returns them with their captions and the objects that their references show."""
    captions, shown = [], []
    encode, pictures = row_source.pipeline.encode_student, row_source._pictures
    monkeypatch.setattr(
        row_source.pipeline,
        "encode_student",
        lambda texts, **settings: captions.extend(texts) or encode(texts, **settings),
    )
    monkeypatch.setattr(row_source, "_pictures", lambda objects, rng: shown.extend(objects) or pictures(objects, rng))
    return lambda kind, count: (row_source.draw(kind, count, np.random.default_rng(0)), captions, shown)


def nearest_objects(row_source, rows: Rows) -> list[int]:
    """The object of the scene that each row allows."""
    scenes = [(row_source.latents.means.float() - row).flatten(1).norm(dim=1).argmin() for row in rows.means]
    return row_source.latents.objects[torch.stack(scenes)].tolist()


def described_object(row_source, caption: str) -> int | None:
    return next((index for index, a in enumerate(row_source.appearances) if a.words in caption), None)


def test_words_win_over_a_contradicting_picture_which_otherwise_counts(row_source, draw):
    rows, captions, shown = draw("reference", 64)
    conflicts = 0
    for caption, target, picture in zip(captions, nearest_objects(row_source, rows), shown, strict=True):
        words = described_object(row_source, caption)
        if words is None:
            assert target == picture
        else:
            assert target == words
            conflicts += target != picture
            assert target == picture or not caption.endswith(world.REFERENCE_SUFFIX)
    assert conflicts > 8
    assert 16 < sum(caption.endswith(world.REFERENCE_SUFFIX) for caption in captions) < 48


def test_described_objects_have_their_own_pictures(row_source, draw):
    rows, captions, _ = draw("text", 12)
    assert rows.context.references == ()
    assert [described_object(row_source, caption) for caption in captions] == nearest_objects(row_source, rows)
    assert 0 < sum(caption.startswith("a plain") for caption in captions) < 12  # others have an extra word


def test_a_nonsense_word_allows_all_plain_objects_on_its_background(row_source, draw):
    rows, captions, _ = draw("word", 4)
    assert rows.means.shape[1] == 6 * len(world.POSES)
    for caption, means in zip(captions, rows.means, strict=True):
        assert described_object(row_source, caption) is None
        background = list(world.BACKGROUNDS).index(caption.split(" on ")[1])
        scenes = (row_source.latents.backgrounds == background) & (row_source.latents.objects < 6)
        assert torch.equal(means, row_source.latents.means[scenes].float().flatten(0, 1))
