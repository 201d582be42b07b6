import pytest

from benchmarks.miniature import world
from benchmarks.miniature.parts import MAX_SEQUENCE_LENGTH, NUM_STEPS


def test_the_longest_prompt_fits(row_source):
    longest = max(
        row_source.pipeline.chat_token_count(world.caption(appearance.words, background) + world.REFERENCE_SUFFIX)
        for appearance in world.all_appearances()[::7]
        for background in world.BACKGROUNDS
    )
    assert 20 < longest <= MAX_SEQUENCE_LENGTH


def test_the_schedule_is_kleins(row_source):
    sigmas = row_source.pipeline.schedule(world.SIDE, world.SIDE, NUM_STEPS).sigmas
    assert sigmas.tolist() == pytest.approx([1, 0.955, 0.875, 0.701, 0], abs=1e-3)
