"""A smaller reference for klein's edit teacher: what is encoded, kept apart in the cache, trained and resumed."""

import pytest

from command_line import LORA_FILE, succeed
from dopsd.context_cache import content_key
from dopsd.contexts import ENCODING_FORMAT
from dopsd.data.order import Sample
from models import ONE_MODEL
from short_runs import one_process


BUCKETS = {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "128,128;112,192;192,112"}


def encode(prepare, folder, **flags):
    """A run with its cache filled, and how much that added to it."""
    run, before = prepare(**flags), {*folder.rglob("*.safetensors")}
    run.fill_cache(folder, one_process())
    return run, len({*folder.rglob("*.safetensors")} - before)


@ONE_MODEL
@pytest.mark.parametrize(
    ("flags", "resolution", "before", "after"),
    [
        ({"resolution": 128}, 64, [(8, 8)] * 3, [(4, 4)] * 3),
        (BUCKETS, 96, [(8, 8), (7, 12), (12, 7)], [(6, 6), (4, 7), (7, 4)]),
    ],
)
def test_the_reference_has_fewer_tokens_and_an_entry_of_its_own(prepare, tmp_path, flags, resolution, before, after):
    plain, added = encode(prepare, tmp_path / "cache", **flags)
    smaller, added_again = encode(prepare, tmp_path / "cache", **flags, teacher_resolution=resolution)
    assert (added, added_again) == (2 + 3, 3)  # two prompts and three pictures, then the pictures alone
    for run, sizes in ((plain, before), (smaller, after)):
        samples = [Sample(example, 0, 0, flip=False) for example in range(3)]
        student, teacher = run.contexts.load(samples[:1])
        assert student.references == () and len(teacher.references) == 1
        references = [run.contexts.teacher([sample]).references[0] for sample in samples]
        assert [tuple(tensor.shape[2:]) for tensor in references] == sizes
        encodings = [run.contexts.teacher_encodings(sample)[-1] for sample in samples]
        assert run.contexts.num_bytes(encodings) == sum(tensor.nbytes for tensor in references)


@ONE_MODEL
def test_without_it_the_keys_of_existing_entries_stay_as_they_were(prepare, tmp_path):
    run, _ = encode(prepare, tmp_path / "cache")
    contexts = run.contexts
    encoding = contexts.teacher_encodings(Sample(1, 0, 0, flip=False))[-1]
    example = run.data.examples[1]
    place = [run.data.digests[example.picture], *example.bucket, *example.centering, False]
    parts = [ENCODING_FORMAT, "vae", contexts.fingerprints["vae"], "torch.float32", *place]
    assert contexts.key(encoding) == content_key(*parts)


@ONE_MODEL
def test_a_run_trains_draws_and_resumes_with_it_only(train, tmp_path):
    flags = {"resolution": 128, "teacher_resolution": 64, "checkpointing_steps": 1}
    drawing = {"validation_steps": 2, "num_validation_images": 1, "retention_prompts": ["a", "b"]}
    succeed(train(**flags, **drawing))
    assert (tmp_path / "run" / LORA_FILE).exists() and (tmp_path / "run/preview.png").exists()
    latest = {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    for other in (96, None):
        error = train(**flags | latest | {"teacher_resolution": other}).error
        assert f"its --teacher_resolution was 64, now it is {other}; pass the same" in error
    assert "steps: 2 to 3" in succeed(train(**flags | latest)).log
