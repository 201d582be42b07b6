"""Which entries of the context cache are read at the start of a run."""

import time

import pytest
import torch

from dopsd.context_cache import ContextCache, content_key


@pytest.fixture
def cache(tmp_path):
    return ContextCache(tmp_path / "cache")


def damage(path):
    """Changes the last byte, but not the size."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 0xFF]))


def test_what_has_been_verified_is_read_again_only_if_it_changes(cache, monkeypatch):
    monkeypatch.setattr("dopsd.findings.SETTLED_NANOSECONDS", 0)
    keys = [content_key(number) for number in range(3)]
    for key in keys:
        cache.save(key, torch.ones(3))
    read = []
    load = ContextCache.load
    monkeypatch.setattr(ContextCache, "load", lambda cache, key: read.append(key) or load(cache, key))
    assert ContextCache(cache.folder).missing(keys) == [] and sorted(read) == sorted(keys)
    read.clear()
    assert ContextCache(cache.folder).missing(keys) == [] and read == []
    time.sleep(0.02)  # longer than a tick of the file system's clock
    damage(cache.path(keys[0]))
    cache.path(keys[1]).unlink()
    for _ in range(2):
        assert ContextCache(cache.folder).missing(keys) == keys[:2]
    assert read == keys[:1] * 2
    cache.save(keys[0], torch.ones(3))
    cache.save(keys[1], torch.ones(3))
    assert ContextCache(cache.folder).missing(keys) == []


def test_an_entry_that_was_just_saved_is_read(cache):
    key = content_key("a")
    cache.save(key, torch.ones(3))
    assert cache.missing([key]) == []
    damage(cache.path(key))
    assert cache.missing([key]) == [key]
