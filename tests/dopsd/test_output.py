import errno
import fcntl
import os
import socket
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors import SafetensorError

from dopsd.errors import InputError, OutputError, TrainingDiverged
from dopsd.output import (
    OWNER_FILE,
    check_nothing_in_the_way,
    checkpoint_step,
    lock_output_dir,
    make_output_dir,
    replacing,
    reporting_write_errors,
    sync_to_disk,
)
from dopsd.terminal import ending_in_one_line
from waiting import wait_until


def test_an_output_folder_is_created_with_its_parents(tmp_path):
    make_output_dir(tmp_path / "runs/first")
    assert (tmp_path / "runs/first").is_dir() and not list((tmp_path / "runs/first").iterdir())
    make_output_dir(tmp_path / "runs/first")


def test_an_output_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("a file")
    for folder in (tmp_path / "taken", tmp_path / "taken/below"):
        with pytest.raises(InputError, match=f"^--output_dir {folder}: cannot be written \\(.*\\); choose another$"):
            make_output_dir(folder)


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "a\0b"])
def test_an_output_folder_with_an_impossible_name_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match="cannot be written .*; choose another$"):
        make_output_dir(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-12", 12),
        ("checkpoint-0", 0),
        ("checkpoint--1", -1),
        ("checkpoint-1.5", -1),
        ("checkpoint-012", -1),
        ("checkpoint-2.damaged", -1),
        ("12", -1),
    ],
)
def test_the_step_of_a_checkpoint(tmp_path, name, step):
    folder = tmp_path / name
    assert checkpoint_step(folder) == -1
    folder.mkdir()
    assert checkpoint_step(folder) == step


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint-4", "sheets"])
def test_what_is_in_the_way_is_named_before_training(tmp_path, name):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    check_nothing_in_the_way(tmp_path, ["metrics.jsonl", "other"], folders=["sheets"])
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir() if name.endswith(".jsonl") else (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"^--output_dir {tmp_path}: its {name} is not a f.*; remove it$"):
        check_nothing_in_the_way(tmp_path, ["metrics.jsonl", "other"], folders=["sheets"])


# The lock


def hold_the_lock(folder: str) -> None:
    PartialState()
    lock = lock_output_dir(Path(folder))
    Path(folder, "locked").touch()
    time.sleep(600)
    del lock


def test_a_folder_is_locked_until_its_process_dies(forkserver, tmp_path):
    holder = forkserver.start(hold_the_lock, str(tmp_path))
    wait_until((tmp_path / "locked").exists, holder, tmp_path / OWNER_FILE)
    with pytest.raises(InputError) as caught:
        lock_output_dir(tmp_path)
    assert str(caught.value) == (
        f"--output_dir {tmp_path}: another run (process {holder.pid} on {socket.gethostname()}) is writing to it; "
        "wait for it to end, or choose another folder"
    )
    holder.kill()
    holder.join()
    lock_output_dir(tmp_path).release()


@pytest.mark.parametrize("owner", ["", "[]", "{}", '{"pid": 1}'])
def test_a_locked_folder_with_a_damaged_owner_is_refused_all_the_same(tmp_path, owner):
    lock = lock_output_dir(tmp_path)
    (tmp_path / OWNER_FILE).write_text(owner)
    with pytest.raises(InputError, match="another run is writing to it"):
        lock_output_dir(tmp_path)
    lock.release()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def fail(self, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.BaseFileLock.acquire", fail)
    lock_output_dir(tmp_path)
    assert "cannot be locked ([Errno 37] No locks available); start no second run in it" in caplog.text


# Writing


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_is_no_error(tmp_path, monkeypatch, number):
    def fail(descriptor):
        raise OSError(number, "fsync")

    monkeypatch.setattr("os.fsync", fail)
    with replacing(tmp_path / "file") as unfinished:
        unfinished.write_text("content")
    assert (tmp_path / "file").read_text() == "content" and len(list(tmp_path.iterdir())) == 1


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("theirs")
    (tmp_path / ".file.tmp").symlink_to(tmp_path / "other")
    with replacing(tmp_path / "file") as unfinished:
        unfinished.write_text("content")
    assert not (tmp_path / "file").is_symlink() and (tmp_path / "other").read_text() == "theirs"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_content_that_is_lost_while_syncing_is_an_error(tmp_path, monkeypatch, number):
    def fail(descriptor):
        raise OSError(number, "fsync")

    (tmp_path / "file").write_text("before")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError), replacing(tmp_path / "file") as unfinished:
        unfinished.write_text("content")
    assert (tmp_path / "file").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_files_are_synced_through_a_writable_descriptor_as_windows_needs(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr("os.fsync", lambda descriptor: modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & 3))
    (tmp_path / "file").touch()
    sync_to_disk(tmp_path / "file")
    assert modes == [os.O_RDWR]


def test_a_folder_that_cannot_be_opened_as_on_windows_is_no_error(tmp_path, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.open", refuse)
    sync_to_disk(tmp_path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (SafetensorError("Error while serializing"), "Error while serializing"),
        (OSError(), "OSError"),
    ],
)
def test_a_write_error_names_the_file_and_the_complete_checkpoint(tmp_path, error, reason):
    with pytest.raises(OutputError) as caught, reporting_write_errors(tmp_path, "preview.png"):
        raise error
    message = str(caught.value)
    assert message == (
        f"--output_dir {tmp_path}: preview.png could not be written ({reason}): make room, then run the same command "
        "with --resume_from_checkpoint latest; no checkpoint is complete"
    )
    assert caught.value.__cause__ is error


def test_the_advice_fits_the_error(tmp_path):
    with pytest.raises(OutputError, match="make room"), reporting_write_errors(tmp_path, "story.png"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(OutputError) as caught, reporting_write_errors(tmp_path, "story.png"):
        raise IsADirectoryError(errno.EISDIR, "Is a directory")
    assert "story.png could not be written" in str(caught.value)
    assert "remove what is in its place" in str(caught.value) and "make room" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        TrainingDiverged("the loss is nan"),
        InputError("--rank 0: no"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        ZeroDivisionError(),
    ],
)
def test_other_errors_are_not_reported_as_write_errors(tmp_path, error):
    with pytest.raises(type(error)) as caught, reporting_write_errors(tmp_path, "checkpoint-2"):
        raise error
    assert caught.value is error


def test_a_gpu_that_runs_out_of_memory_while_saving_ends_the_script_with_one_line(tmp_path):
    with pytest.raises(SystemExit) as end, ending_in_one_line("train.py"):
        with reporting_write_errors(tmp_path, "checkpoint-2"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nGPU 0 has a capacity of")
    assert end.value.code.startswith(
        "train.py: error: out of GPU memory (CUDA out of memory. Tried to allocate 2.00 MiB.); pass "
    )
    assert "\n" not in end.value.code and "could not be written" not in end.value.code
