"""What is encoded at a time, and the size of the cache."""

import json
import shutil
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from dopsd.context_cache import ContextCache
from dopsd.contexts import Encoding, announce, batches, in_units
from models import EVERY_CONTEXT, ONE_MODEL, WITH_VLM, ZIMAGE
from short_runs import one_process


# Batches


def many_captions(photos, folder, count):
    """Flags for a folder whose pictures have that many captions of different lengths."""
    shutil.copytree(photos, folder)
    columns = [f"text{number}" for number in range(count)]
    rows = [
        {"file_name": f"{n}.png"} | {column: f"{n} {column} " + "b" * (5 * k) for k, column in enumerate(columns)}
        for n in range(3)
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"instance_data_dir": folder, "instance_prompt": None, "caption_column": columns}


def caption_teacher(model, photos, folder):
    """Flags for a teacher whose captions have different lengths, some beyond the student's limit if it has its own."""
    flags = many_captions(photos, folder, 4) | {"teacher_context": "caption", "teacher_caption_column": "text3"}
    vlm = dict.fromkeys(name for name in model.flags if name.startswith("vlm"))
    limit = {"max_sequence_length": 60} if "zimage" in model.script.__name__ else {}
    return flags | vlm | limit | {"teacher_prompt_suffix": " and more of this"}


@EVERY_CONTEXT
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_batches_give_what_single_encoding_gives(model, prepare, photos, tmp_path, precision):
    """Bit for bit, on a CPU."""
    flags = caption_teacher(model, photos, tmp_path / "data") | {"mixed_precision": precision}
    run = prepare(**flags)
    sizes = []
    encode_batch = run.contexts.encode_batch
    run.contexts.encode_batch = lambda batch: sizes.append(len(batch)) or encode_batch(batch)
    run.fill_cache(tmp_path / "cache", one_process())
    assert max(sizes) >= 8
    single = prepare(**flags).encode_without_cache()
    for encoding in dict.fromkeys(single.contexts.all_encodings([])):
        cached = run.contexts.cache.load(run.contexts.key(encoding))
        assert torch.equal(cached, single.contexts.encode(encoding))


@ONE_MODEL
def test_a_batch_has_no_more_tokens_than_8_prompts_of_the_default_length(prepare):
    run = prepare()
    (encoder,) = run.conditioning.student
    for length, expected in [(512, 8), (1024, 4), (8192, 1)]:
        encoder.padded_length = length
        found = list(batches([Encoding(encoder, str(number)) for number in range(17)]))
        assert {len(batch) for batch in found[:-1]} == {expected}
        assert [encoding.prompt for batch in found for encoding in batch] == list(map(str, range(17)))


@ZIMAGE
def test_prompts_are_encoded_with_others_of_their_padded_length(prepare):
    """So that none is padded because of another."""
    run = prepare()
    (encoder,) = run.conditioning.student
    long, longer = "b" * 100, "b" * 101
    found = batches([Encoding(encoder, prompt) for prompt in ("a", long, "aa", longer, long + "")])
    assert [[encoding.prompt for encoding in batch] for batch in found] == [["a", "aa"], [long, long], [longer]]


@WITH_VLM
def test_prompts_with_pictures_are_encoded_one_at_a_time(prepare):
    found = batches(encoding for _, encoding in prepare().contexts.all_teacher_encodings())
    assert [len(batch) for batch in found] == [1, 1, 1]


@EVERY_CONTEXT
def test_a_prompt_is_tokenized_once(prepare, photos, tmp_path, monkeypatch):
    run = prepare(**many_captions(photos, tmp_path / "data", 3))
    counted = []

    def recorded(encoder):
        count = encoder.pipeline.chat_token_count
        return cache(lambda text: counted.append((encoder, text)) or count(text))

    for encoder in run.conditioning.encoders:
        if encoder.reads_prompt:
            monkeypatch.setattr(encoder, "count_tokens", recorded(encoder))
    run.resolve_prompts()
    run.fill_cache(tmp_path / "cache", one_process())
    assert counted and len(counted) == len({*counted})


# Its size


@pytest.mark.parametrize(("number", "text"), [(0, "0.0 MB"), (999_999_999, "1,000.0 MB"), (79 * 10**9, "79.0 GB")])
def test_sizes_are_in_megabytes_or_gigabytes(number, text):
    assert in_units(number) == text


@EVERY_CONTEXT
def test_the_predicted_size_is_the_size_of_the_encodings(prepare, photos, tmp_path, caplog, model):
    caplog.set_level("INFO")
    run = prepare(**many_captions(photos, tmp_path / "data", 3))
    run.fill_cache(tmp_path / "cache", one_process())
    tensors = [load_file(path)["tensor"] for path in (tmp_path / "cache").glob("*/*.safetensors")]
    assert sum(tensor.nbytes for tensor in tensors) == run.contexts.num_bytes(
        dict.fromkeys(run.contexts.all_encodings([]))
    )
    (line,) = [record.getMessage() for record in caplog.records if "Encoding " in record.getMessage()]
    size = in_units(sum(tensor.nbytes for tensor in tensors))
    assert f": {size} of {size} in {tmp_path / 'cache'}" in line
    assert not [record for record in caplog.records if "more in" in record.getMessage()]


@EVERY_CONTEXT
def test_a_large_cache_is_announced_with_what_makes_it_smaller(model, prepare, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("dopsd.contexts.LARGE_BYTES", 1000)

    def warning(**flags):
        caplog.clear()
        run = prepare(**flags)
        run.contexts.cache = ContextCache(tmp_path / "cache")
        needed = dict.fromkeys(run.contexts.all_encodings([]))
        announce(run.contexts, needed, needed, run.contexts.num_bytes(needed))
        (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
        return record.getMessage()

    message = warning()
    assert f"more in {tmp_path / 'cache'}: " in message and "fewer captions" in message
    assert "--no_context_cache does without it" in message
    with_suffix = '--teacher_prompt_suffix ""' in message
    assert with_suffix == ("vlm_model_name_or_path" not in model.flags)
    assert ("--max_sequence_length" in message) == ("flux2" in model.script.__name__)
    assert ("--vlm_max_pixels" in message) == ("zimage" in model.script.__name__)
    assert '--teacher_prompt_suffix ""' not in warning(teacher_prompt_suffix="")


@ONE_MODEL
def test_a_large_cache_is_announced_with_the_share_of_prior_preservation(prepare, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("dopsd.contexts.LARGE_BYTES", 1000)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a house\na tree\na car\n", encoding="utf-8")

    def warning(**flags):
        caplog.clear()
        prepare(**flags).fill_cache(tmp_path / "cache", one_process())
        return "".join(one.getMessage() for one in caplog.records if "context cache needs" in one.getMessage())

    held = {"with_prior_preservation": True, "prior_prompts": prompts}
    size = in_units(2 * 80 * 96 * 4)  # two prompts of 80 tokens, 96 channels in float32
    assert warning(**held).endswith(
        f"; prior preservation's prompts take {size} of it: give a shorter list with --prior_prompts, or switch it "
        "off with --with_prior_preservation false"
    )
    more = {"instance_prompt": "a cube"}
    assert warning(**more) and "prior" not in warning(**more, teacher_prompt_suffix=" again")
    assert "prior" not in warning(**held, instance_prompt="a cone")  # they are in the cache already


@ONE_MODEL
def test_without_a_suffix_one_encoding_of_a_caption_serves_student_and_teacher(prepare):
    sizes = [len({*prepare(teacher_prompt_suffix=suffix).contexts.all_encodings([])}) for suffix in (" like this", "")]
    assert sizes == [5, 4]
