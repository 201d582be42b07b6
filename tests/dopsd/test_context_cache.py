"""Keys, fingerprints of checkpoints, and a cache on disk that notices all damage."""

import errno
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from dopsd.context_cache import (
    FINGERPRINT_STRIDE,
    MIB,
    RESERVE_BYTES,
    ContextCache,
    checkpoint_fingerprint,
    content_key,
)
from dopsd.errors import InputError, OutputError


KEY = content_key("a key")
TENSOR = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4).to(torch.bfloat16)


@pytest.fixture
def cache(tmp_path):
    return ContextCache(tmp_path / "cache")


def assert_same(loaded, saved):
    assert loaded.dtype == saved.dtype
    assert loaded.shape == saved.shape
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (loaded, saved)]
    assert torch.equal(*flat)


def temporary_files(cache):
    return [path for path in cache.folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]


# Keys


def test_a_key_is_stable():
    assert len(KEY) == 64
    # If this changes, no run finds the entries that are already on users' disks.
    assert content_key("a", 1, 0.5, None, b"\0", [True], {"b": "c"}) == (
        "1bd10c2495221a1c1fe5a8bdc6dd3cde27cf2e6fa49ba88c0573e7f2b16a3917"
    )


def test_different_parts_have_different_keys():
    rows = [
        *((), ("",), ("", ""), (None,), ([],), ({},), (b"",)),
        *(("ab", "c"), ("a", "bc"), ("abc",), (["ab", "c"],), (["ab"], "c"), (["ab", ["c"]],)),
        *((1,), (1.0,), ("1",), (True,), (b"1",), ("true",), (0,), (False,), (0.0,), (-0.0,), ("null",)),
        *((float("nan"),), (float("inf"),), (1, 2), (12,), (2, 1)),
        *(("é",), ("e\u0301",), ("\\u00e9",), ("é".encode(),)),
        *(({"a": 1},), ({"a": "1"},), ({"a": 1, "b": 2},), ({"a": 2, "b": 1},), (["a", 1],), ([["a", 1]],)),
        *(({1: "a"},), ({"1": "a"},), ({"bytes": "00"},), ({b"bytes": "00"},)),
        # Parts that contain the serialisation of another part.
        *(('json:3:"a"',), ("a",), (b'json:3:"a"',), (['json:3:"a"'],)),
    ]
    assert len({content_key(*row) for row in rows}) == len(rows)


def test_equal_parts_have_equal_keys():
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": (2,), "a": 1})
    assert content_key((9, 18, 27)) == content_key([9, 18, 27])


@pytest.mark.parametrize("part", [torch.zeros(1), {1, 2}, [object()]])
def test_parts_of_other_types_are_refused(part):
    with pytest.raises(TypeError, match="a key cannot be made of"):
        content_key(part)


# Checkpoints


def write_checkpoint(folder: Path) -> Path:
    files = {
        "text_encoder/config.json": b'{"layers": 2}',
        "text_encoder/model.safetensors": bytes(range(256)) * (3 * MIB // 256),
        "text_encoder/empty": b"",
        "tokenizer/deep/vocab.json": b"{}",
        "transformer/config.json": b"{}",
        "model_index.json": b"{}",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def change_byte(path: Path, offset: int, mask: int = 0xFF):
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def fingerprint(folder):
    return checkpoint_fingerprint(folder, ("text_encoder", "tokenizer"))


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")


def test_copies_and_links_have_the_same_fingerprint(checkpoint, tmp_path):
    expected = fingerprint(checkpoint)
    assert fingerprint(shutil.copytree(checkpoint, tmp_path / "copy")) == expected
    assert checkpoint_fingerprint(checkpoint, ["tokenizer", "text_encoder"]) == expected

    # As in the hub cache, where the files of a snapshot are links to blobs.
    for number, path in enumerate(sorted(checkpoint.rglob("*.*"))):
        blob = tmp_path / "blobs" / str(number)
        link = tmp_path / "snapshot" / path.relative_to(checkpoint)
        for file in (blob, link):
            file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (tmp_path / "snapshot/text_encoder/empty").touch()
    assert fingerprint(tmp_path / "snapshot") == expected

    # A checkpoint with links to the folders of its components.
    (tmp_path / "linked").mkdir()
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / "linked" / name).symlink_to(checkpoint / name)
    assert fingerprint(tmp_path / "linked") == expected


def test_only_the_named_components_matter(checkpoint):
    before = fingerprint(checkpoint)
    change_byte(checkpoint / "transformer/config.json", 0)
    change_byte(checkpoint / "model_index.json", 0)
    assert fingerprint(checkpoint) == before
    assert checkpoint_fingerprint(checkpoint, ["text_encoder"]) != before


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("text_encoder/config.json", 5),
        ("tokenizer/deep/vocab.json", 1),
        *(("text_encoder/model.safetensors", offset) for offset in (0, MIB - 1, 2 * MIB, 3 * MIB - 1)),
    ],
)
def test_one_changed_byte_changes_the_fingerprint(checkpoint, name, offset):
    before = fingerprint(checkpoint)
    change_byte(checkpoint / name, offset)
    assert fingerprint(checkpoint) != before


def test_the_middle_of_large_files_is_sampled(checkpoint):
    weights = checkpoint / "text_encoder/model.safetensors"
    os.truncate(weights, 2 * FINGERPRINT_STRIDE + 3 * MIB)  # sparse, takes no space
    seen = {fingerprint(checkpoint)}
    for offset in (FINGERPRINT_STRIDE, FINGERPRINT_STRIDE + MIB - 1, 2 * FINGERPRINT_STRIDE):
        change_byte(weights, offset)
        seen.add(fingerprint(checkpoint))
    assert len(seen) == 4


def test_renamed_added_and_truncated_files_change_the_fingerprint(checkpoint):
    seen = [fingerprint(checkpoint)]
    (checkpoint / "text_encoder/config.json").rename(checkpoint / "text_encoder/other.json")
    seen.append(fingerprint(checkpoint))
    (checkpoint / "text_encoder/other.json").rename(checkpoint / "tokenizer/other.json")
    seen.append(fingerprint(checkpoint))
    (checkpoint / "tokenizer/empty").touch()
    seen.append(fingerprint(checkpoint))
    weights = checkpoint / "text_encoder/model.safetensors"
    weights.write_bytes(bytes(4 * MIB))
    seen.append(fingerprint(checkpoint))
    # The sampled bytes stay the same, so only the size is different.
    os.truncate(weights, 4 * MIB - 1)
    seen.append(fingerprint(checkpoint))
    assert len(set(seen)) == len(seen)


def test_a_missing_component_is_named(checkpoint):
    with pytest.raises(InputError, match="--pretrained_model_name_or_path .*checkpoint: it has no folder vae"):
        checkpoint_fingerprint(checkpoint, ["text_encoder", "vae"])


# The cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (), (0, 7)])
def test_a_loaded_tensor_equals_the_saved_one(cache, dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    assert not cache.is_valid(KEY)
    cache.save(KEY, tensor)
    assert cache.is_valid(KEY)
    assert_same(cache.load(KEY), tensor)
    assert cache.path(KEY) == cache.folder / KEY[:2] / f"{KEY}.safetensors"
    assert [path for path in cache.folder.rglob("*") if path.is_file()] == [cache.path(KEY)]


def test_views_graphs_and_special_values_are_saved_correctly(cache):
    batch = torch.tensor([[float("nan"), -0.0, float("inf")], [1.0, 2.0, 3.0]], requires_grad=True)
    for tensor in (batch, batch[0], batch[:, 1], batch.T):
        cache.save(KEY, tensor)
        assert_same(cache.load(KEY), tensor.detach())
        assert not cache.load(KEY).requires_grad
    # The entry of a row does not contain the whole batch.
    cache.save(KEY, torch.zeros(100, 1000)[3])
    assert cache.path(KEY).stat().st_size < 5000


def test_a_second_save_replaces_the_first(cache):
    cache.save(KEY, TENSOR)
    cache.save(KEY, TENSOR + 1)
    assert_same(cache.load(KEY), TENSOR + 1)


def test_a_loaded_tensor_does_not_depend_on_its_file(cache):
    cache.save(KEY, TENSOR)
    loaded = cache.load(KEY)
    path = cache.path(KEY)
    change_byte(path, path.stat().st_size - 1)
    assert_same(loaded, TENSOR)


def assert_damaged_and_repairable(cache):
    assert not cache.is_valid(KEY)
    assert cache.missing([KEY]) == [KEY]
    with pytest.raises(InputError, match="delete the file and resume with --resume_from_checkpoint latest") as caught:
        cache.load(KEY)
    assert str(caught.value).startswith(f"{cache.path(KEY)}: ")
    assert "\n" not in str(caught.value)
    cache.save(KEY, TENSOR)
    assert_same(cache.load(KEY), TENSOR)
    assert not temporary_files(cache)


def test_a_missing_entry_is_missing(cache):
    assert_damaged_and_repairable(cache)


def test_every_truncation_is_noticed(cache):
    cache.save(KEY, TENSOR)
    whole = cache.path(KEY).read_bytes()
    for length in (*range(0, len(whole), 5), len(whole) - 1):
        cache.path(KEY).write_bytes(whole[:length])
        assert_damaged_and_repairable(cache)
    cache.path(KEY).write_bytes(whole + b"\0")
    assert_damaged_and_repairable(cache)


def test_every_flipped_bit_is_noticed(cache):
    cache.save(KEY, TENSOR)
    whole = cache.path(KEY).read_bytes()
    for position in range(0, 8 * len(whole)):
        change_byte(cache.path(KEY), position // 8, 1 << position % 8)
        assert not cache.is_valid(KEY), f"bit {position % 8} of byte {position // 8}: {whole!r}"
        cache.path(KEY).write_bytes(whole)
    for position in range(0, len(whole), 37):
        change_byte(cache.path(KEY), position)
        assert_damaged_and_repairable(cache)


@pytest.mark.parametrize(
    "content",
    [
        b"GIF89a, not an encoding",
        safetensors.torch.save({"tensor": TENSOR}),
        safetensors.torch.save({"tensor": TENSOR}, {"sha256": "0" * 64}),
        safetensors.torch.save({"other": TENSOR}, {"sha256": "0" * 64}),
    ],
)
def test_other_files_are_noticed(cache, content):
    cache.path(KEY).parent.mkdir(parents=True)
    cache.path(KEY).write_bytes(content)
    assert_damaged_and_repairable(cache)


@pytest.mark.parametrize("changed", [TENSOR.view(torch.float16), TENSOR.reshape(3, 2, 4), TENSOR + 1])
def test_an_entry_with_another_tensor_is_noticed(cache, changed):
    cache.save(KEY, TENSOR)
    with safetensors.safe_open(cache.path(KEY), framework="pt") as entry:
        metadata = entry.metadata()
    cache.path(KEY).write_bytes(safetensors.torch.save({"tensor": changed}, metadata))
    assert_damaged_and_repairable(cache)


def test_an_entry_of_another_key_is_noticed(cache):
    other = content_key("another key")
    cache.save(other, TENSOR)
    cache.path(KEY).parent.mkdir(parents=True, exist_ok=True)
    cache.path(other).rename(cache.path(KEY))
    assert_damaged_and_repairable(cache)


def test_a_folder_with_the_name_of_an_entry_is_reported(cache):
    cache.path(KEY).mkdir(parents=True)
    assert not cache.is_valid(KEY)
    with pytest.raises(OutputError, match=f"{KEY}.safetensors .*directory"):
        cache.save(KEY, TENSOR)
    assert not temporary_files(cache)


def test_a_file_with_the_name_of_the_folder_is_reported(cache):
    cache.folder.write_text("a file")
    assert not ContextCache(cache.folder).is_valid(KEY)
    with pytest.raises(OutputError, match="--context_cache_dir .*cache: cannot write"):
        cache.save(KEY, TENSOR)


def half_written(path, data):
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def interrupted(path, data):
    path.touch()
    raise KeyboardInterrupt


def test_a_full_disk_is_reported_and_no_partial_file_is_left(cache, monkeypatch):
    cache.save(KEY, TENSOR)
    monkeypatch.setattr(Path, "write_bytes", half_written)
    for key in (KEY, content_key("new")):
        with pytest.raises(OutputError, match="--context_cache_dir .*cache: .*No space left on device") as caught:
            cache.save(key, TENSOR + 1)
        assert "\n" not in str(caught.value)
        assert not temporary_files(cache)
    # The old entry is still there.
    assert_same(cache.load(KEY), TENSOR)
    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.save(KEY, TENSOR + 1)
    assert not temporary_files(cache)


def test_a_failed_replacement_leaves_no_file(cache, monkeypatch):
    def replace(source, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source))

    monkeypatch.setattr("dopsd.context_cache.os.replace", replace)
    with pytest.raises(OutputError, match="--context_cache_dir .*Permission denied"):
        cache.save(KEY, TENSOR)
    assert not temporary_files(cache)
    assert not cache.is_valid(KEY)


def test_an_entry_is_never_visible_half_written(cache, monkeypatch):
    cache.save(KEY, TENSOR)
    seen = []
    original = Path.write_bytes

    def read_midway(path, data):
        original(path, data[: len(data) // 2])
        seen.append(cache.load(KEY))
        assert temporary_files(cache) == [path]
        return original(path, data)

    monkeypatch.setattr(Path, "write_bytes", read_midway)
    cache.save(KEY, TENSOR + 1)
    assert_same(seen[0], TENSOR)
    assert_same(cache.load(KEY), TENSOR + 1)


def test_the_same_key_may_be_saved_twice_at_the_same_time(cache, monkeypatch):
    both_wrote = threading.Barrier(2, timeout=20)
    original = os.replace
    failed = []

    def replace(source, target):
        both_wrote.wait()
        original(source, target)

    def save():
        try:
            ContextCache(cache.folder).save(KEY, TENSOR)
        except Exception as error:
            failed.append(error)

    monkeypatch.setattr("dopsd.context_cache.os.replace", replace)
    threads = [threading.Thread(target=save) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert_same(cache.load(KEY), TENSOR)
    assert not temporary_files(cache)


def test_only_old_temporary_files_are_removed(cache, monkeypatch):
    written = []
    original = Path.write_bytes

    def write_bytes(path, data):
        written.append(path)
        return original(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    for _ in range(2):
        cache.save(KEY, TENSOR)
    # As if both runs had been killed before they replaced the entry.
    old, new = written
    old.touch()
    new.touch()
    other = cache.folder / "notes.tmp"
    other.touch()
    for path in (old, other, cache.path(KEY)):
        os.utime(path, (0, 0))
    assert_same(cache.load(KEY), TENSOR)
    ContextCache(cache.folder)
    assert set(temporary_files(cache)) == {new, other}
    assert cache.is_valid(KEY)


def test_missing_keeps_the_order_and_drops_duplicates(cache):
    keys = [content_key(number) for number in range(5)]
    cache.save(keys[1], TENSOR)
    cache.save(keys[3], TENSOR)
    change_byte(cache.path(keys[3]), cache.path(keys[3]).stat().st_size - 1)
    asked = [keys[4], keys[1], keys[3], keys[4], keys[0], keys[1], keys[0]]
    shown = []

    def progress(read):
        shown.extend(read)
        return iter(read)

    assert cache.missing(iter(asked), progress) == [keys[4], keys[3], keys[0]]
    assert shown == [keys[1], keys[3]]
    assert cache.missing([]) == []


def test_a_disk_that_is_too_small_is_reported(cache, monkeypatch):
    asked = []
    free = 2 * 10**9

    def disk_usage(folder):
        asked.append(folder)
        return SimpleNamespace(free=free)

    monkeypatch.setattr("dopsd.context_cache.shutil.disk_usage", disk_usage)
    cache.check_space(free - RESERVE_BYTES)
    with pytest.raises(OutputError, match=r"--context_cache_dir .*cache: .* need 2\.60 GB, .* has only 2\.00 GB free"):
        cache.check_space(2_100_000_000)
    with pytest.raises(OutputError, match="choose a folder on a larger disk; encode less$"):
        cache.check_space(2_100_000_000, ["encode less"])
    with pytest.raises(OutputError, match="--context_cache_dir"):
        cache.check_space(free - RESERVE_BYTES + 1)
    # While the folder does not exist, its nearest parent is asked.
    assert set(asked) == {cache.folder.parent}
    cache.folder.mkdir()
    cache.check_space(1)
    assert asked[-1] == cache.folder


def test_a_full_disk_is_accepted_if_nothing_has_to_be_written(cache, monkeypatch):
    monkeypatch.setattr("dopsd.context_cache.shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    cache.check_space(0)


def test_space_is_checked_for_a_relative_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ContextCache(Path("a/b/c")).check_space(1)


@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_an_entry_that_is_a_pipe_or_a_device_is_missing(tmp_path, target):
    cache = ContextCache(tmp_path)
    key = content_key("a")
    cache.path(key).parent.mkdir()
    os.mkfifo(cache.path(key)) if target == "pipe" else cache.path(key).symlink_to(target)
    assert cache.missing([key]) == [key]
    cache.save(key, torch.ones(2))
    assert cache.missing([key]) == []
