from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.miniature import teacher, world
from benchmarks.miniature.edit_rows import EDIT_KINDS, EditorRowSource, make_editor_buffers
from benchmarks.miniature.edits import BLUE, COPY_SUFFIX, PAIR_SUFFIX, NamelessEdits, known_edits
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.parts import make_pipeline, make_transformer, make_vae
from benchmarks.miniature.teacher import PosteriorTeacher


@pytest.fixture(scope="module")
def source():
    """Rows for a small world with untrained models."""
    torch.manual_seed(0)
    pipeline = make_pipeline(make_vae().eval(), make_transformer())
    textures = ("plain", "striped", "dotted", "checked")
    appearances = [a for a in world.known_appearances() if a.texture in textures and a.shape in ("disc", "ring")]
    rng = np.random.default_rng(0)
    sprites = np.stack([*(world.sprite(a) for a in appearances), *(world.random_sprite(rng) for _ in range(4))])
    scenes = [(index, index % 5) for index in range(len(sprites))]
    nameless = NamelessEdits.draw([*known_edits(), BLUE], 20, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "NUM_GRAIN_PICTURES", 64)
        patch.setattr(world, "POSES", world.POSES[:2])
        latent_world = teacher.encode_world(partial(KLEIN.encode, pipeline.vae), sprites, scenes, log=print)
    return EditorRowSource(pipeline, sprites, latent_world, appearances, nameless=nameless)


def test_an_edit_keeps_place_and_background_and_nothing_becomes_blue(source):
    rng = np.random.default_rng(1)
    unchanged = blue = 0
    for _ in range(200):
        prompt, (before,), after = source._edit(rng)
        assert before.pose == after.pose
        is_moved = prompt.startswith("put it on ")
        assert after.background == (prompt.removeprefix("put it on ") if is_moved else before.background)
        is_same = np.array_equal(before.sprite, after.sprite)
        meaningless = prompt not in {edit.instruction for edit in known_edits()}
        assert is_same or not meaningless
        unchanged += meaningless
        blue += prompt == BLUE.instruction
        if is_moved:
            assert is_same and before.background != after.background
    assert 5 < unchanged < 40 and 2 < blue < unchanged


def test_the_last_picture_of_a_pair_is_the_result_whatever_the_instruction_says(source):
    rng = np.random.default_rng(2)
    prompts, moved = [], 0
    for _ in range(200):
        prompt, (before, last), after = source._pair(rng)
        assert last is after and prompt.endswith(PAIR_SUFFIX)
        moved += before.pose != after.pose
        prompts.append(prompt)
    assert "make it blue" + PAIR_SUFFIX in prompts and 5 < moved < 60


def test_a_copy_is_its_own_result_whatever_background_the_caption_names(source):
    rows = [source._copy(np.random.default_rng(seed)) for seed in range(30)]
    assert all(scene is after and prompt.endswith(COPY_SUFFIX) for prompt, (scene,), after in rows)
    assert any(after.background not in prompt for prompt, _, after in rows)


@pytest.mark.parametrize(("kind", "num_references"), [("edit", 1), ("pair", 2), ("copy", 1), ("reference", 1)])
def test_rows_have_their_references_and_what_they_allow(source, kind, num_references):
    rows = source.draw(kind, 3, np.random.default_rng(0))
    assert [grid.shape for grid in rows.context.references] == [(3, 64, 8, 8)] * num_references
    if kind in EDIT_KINDS:
        assert rows.means.shape == (3, 1, 8, 8, 64)
    if kind in ("pair", "copy"):  # the last picture is the result, but for its grain
        last = KLEIN.tokens(rows.context.references[-1])
        assert (last - rows.means[:, 0]).square().mean() < rows.means.var()


def test_references_are_at_their_positions_in_order(source):
    """The velocity is the pipeline's for the same references."""
    rows = source.draw("pair", 2, np.random.default_rng(0))
    sigmas = torch.tensor([1.0, 0.5])
    with torch.no_grad():
        both = KLEIN.velocity(source.pipeline, rows.states, sigmas, rows.context)
        flipped = rows.context.with_references(*rows.context.references[::-1])
        swapped = KLEIN.velocity(source.pipeline, rows.states, sigmas, flipped)
        last = KLEIN.select(rows.context, torch.tensor([1]))
        alone = KLEIN.velocity(source.pipeline, rows.states[1:], sigmas[1:], last)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both, swapped, atol=1e-4)


def test_kinds_share_a_forward_pass_if_they_have_equally_many_references(source):
    sigmas = source.pipeline.schedule(64, 64, 4).sigmas
    teacher_of_all = PosteriorTeacher(source.latents, sigmas, num_directions=1, num_substeps=6)
    rows = {kind: 1 for kind in ("text", "word", "reference", *EDIT_KINDS)}
    groups = make_editor_buffers(source, teacher_of_all, sigmas, rows)
    assert [[buffer.kind for buffer in group] for group in groups] == [
        ["text", "word"],
        ["reference", "edit", "copy"],
        ["pair"],
    ]
