import pytest
import torch
from safetensors import SafetensorError

from dopsd.command_line import run_script
from dopsd.errors import InputError, OutputError, TrainingDiverged
from dopsd.output import CHECKPOINT_FILES, checkpoint_step, make_output_dir, reporting_write_errors


def test_an_output_folder_is_created_with_its_parents(tmp_path):
    make_output_dir(tmp_path / "runs/first")
    assert (tmp_path / "runs/first").is_dir() and not list((tmp_path / "runs/first").iterdir())
    make_output_dir(tmp_path / "runs/first")


def test_an_output_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("a file")
    for folder in (tmp_path / "taken", tmp_path / "taken/below"):
        with pytest.raises(InputError, match=f"^--output_dir {folder}: cannot be written \\(.*\\); choose another$"):
            make_output_dir(folder)


@pytest.mark.parametrize(
    ("name", "step"),
    [("checkpoint-12", 12), ("checkpoint-0", 0), ("checkpoint--1", -1), ("checkpoint-1.5", -1), ("12", -1)],
)
def test_the_step_of_a_checkpoint(tmp_path, name, step):
    folder = tmp_path / name
    assert checkpoint_step(folder) == -1
    folder.mkdir()
    for file in CHECKPOINT_FILES:
        assert checkpoint_step(folder) == -1
        (folder / file).touch()
    assert checkpoint_step(folder) == step


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
    assert message.startswith(f"--output_dir {tmp_path}: preview.png could not be written ({reason}")
    assert "; no checkpoint is complete: make room" in message and "\n" not in message
    assert caught.value.__cause__ is error


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
    def main(settings):
        with reporting_write_errors(tmp_path, "checkpoint-2"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nGPU 0 has a capacity of")

    with pytest.raises(SystemExit) as end:
        run_script("train.py", lambda: None, main)
    assert end.value.code.startswith(
        "train.py: error: out of GPU memory (CUDA out of memory. Tried to allocate 2.00 MiB.); pass "
    )
    assert "\n" not in end.value.code and "could not be written" not in end.value.code
