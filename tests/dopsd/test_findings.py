"""What earlier runs have found out about files."""

import os
import shutil

import pytest

from dopsd import findings
from dopsd.findings import Findings, file_state


def test_findings_of_several_processes_are_read_by_the_next(tmp_path):
    first, second = Findings(tmp_path / "new"), Findings(tmp_path / "new")
    first.add({"a": [[64, 96], "digest", None]})
    second.add({"b": None})
    first.add({"c": "ä\n"})
    known = Findings(tmp_path / "new").read(["a", "b", "c", "d"])
    assert known == {"a": [[64, 96], "digest", None], "b": None, "c": "ä\n"}
    assert first.read(["b"]) == {"b": None}


def test_a_line_that_was_not_finished_is_not_known(tmp_path):
    own = Findings(tmp_path)
    own.add({"a": ["whole"], "b": ["cut off"]})
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for length in range(whole.index(b"b "), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert Findings(tmp_path).read(["a", "b"]) == {"a": ["whole"]}
    path.write_bytes(whole[:-4])
    own.add({"c": 1, "d": 2})  # the first of these lines continues the one that was cut off
    assert Findings(tmp_path).read("abcd") == {"a": ["whole"], "d": 2}


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path):
    for folder in (None, tmp_path / "file" / "folder"):
        (tmp_path / "file").touch()
        kept = Findings(folder)
        kept.add({"a": 1})
        assert kept.read(["a"]) == {}


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(findings, "SETTLED_NANOSECONDS", 0)


def test_a_file_with_other_content_has_another_state_though_size_and_time_are_kept(tmp_path, settled):
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"old")
    os.utime(path, ns=(0, 0))
    before = file_state(path)
    assert before == file_state(path) and before[:2] == (3, 0)
    other.write_bytes(b"new")
    os.utime(other, ns=(0, 0))
    shutil.copy2(other, path)
    assert file_state(path)[:2] == before[:2] and file_state(path) != before


def test_the_state_of_a_file_that_has_just_changed_cannot_be_told(tmp_path):
    path = tmp_path / "a"
    assert file_state(path) is None
    path.write_bytes(b"new")
    assert file_state(path) is None
    os.utime(path, ns=(0, 0))  # which changes its status
    assert file_state(path) is None
