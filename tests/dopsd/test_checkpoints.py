import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command_line import LORA_FILE, same_weights
from dopsd.checkpoints import Checkpoints, check_resumable, find_checkpoint
from dopsd.errors import InputError, OutputError, TrainingDiverged
from dopsd.output import CHECKPOINT_FILES, list_checkpoints, remove_unfinished_checkpoints
from dopsd.settings import TrainingSettings
from toy_training import ToyTraining


# Finding


def make_checkpoint(folder: Path, step: int, *, without: str | None = None) -> Path:
    """A checkpoint's folder with empty files."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in CHECKPOINT_FILES:
        if name != without:
            (checkpoint / name).touch()
    return checkpoint


def find(folder: Path, wanted: str | None = "latest") -> Path | None:
    return find_checkpoint(TrainingSettings(output_dir=str(folder), resume_from_checkpoint=wanted))


def problem_of(folder: Path, wanted: str | None) -> str:
    with pytest.raises(InputError) as caught:
        find(folder, wanted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_run_has_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "not-there"):
        assert find(folder, None) is None
        assert find(folder, "latest") is None


def test_latest_is_the_checkpoint_with_the_most_steps(tmp_path):
    make_checkpoint(tmp_path, 9)
    newest = make_checkpoint(tmp_path, 10)
    for missing in CHECKPOINT_FILES:
        make_checkpoint(tmp_path, 11 + CHECKPOINT_FILES.index(missing), without=missing)
    for name in ("checkpoint-x", "checkpoint-", "checkpoint-99"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-100").touch()
    assert find(tmp_path) == newest
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_a_checkpoint_may_be_named_or_be_in_another_folder(tmp_path):
    own, other = make_checkpoint(tmp_path / "own", 5), make_checkpoint(tmp_path / "other", 7)
    assert find(tmp_path / "own", "checkpoint-5") == own
    assert find(tmp_path / "own", str(other)) == other
    assert find(tmp_path / "new", str(other)) == other


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(tmp_path):
    assert problem_of(tmp_path, "checkpoint-7").endswith(f"no complete checkpoint; {tmp_path} has: none")
    make_checkpoint(tmp_path, 5)
    make_checkpoint(tmp_path, 7, without="state.json")
    message = problem_of(tmp_path, "checkpoint-7")
    assert message == f"--resume_from_checkpoint checkpoint-7: no complete checkpoint; {tmp_path} has: checkpoint-5"


def test_a_second_branch_is_refused(tmp_path):
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    message = problem_of(tmp_path, "checkpoint-1")
    assert "--resume_from_checkpoint checkpoint-1" in message
    assert "holds newer checkpoints (checkpoint-1, checkpoint-2, checkpoint-3)" in message


def test_an_earlier_runs_folder_is_refused(tmp_path):
    make_checkpoint(tmp_path, 3)
    message = problem_of(tmp_path, None)
    assert message.startswith(f"--output_dir {tmp_path}: holds an earlier run (checkpoint-3)")
    assert "--resume_from_checkpoint latest" in message


@pytest.mark.parametrize("wanted", [None, "latest"])
def test_a_finished_run_without_checkpoints_is_refused(tmp_path, wanted):
    (tmp_path / LORA_FILE).touch()
    assert problem_of(tmp_path, wanted).startswith(f"--output_dir {tmp_path}: holds a finished run's {LORA_FILE}")


# Saving and loading


def state_of(training: ToyTraining) -> tuple:
    adapters = {name: weight.clone() for name, weight in training.roles.state_dict().items()}
    return adapters, training.optimizer.state_dict(), training.lr_scheduler.state_dict()


def test_loading_restores_what_was_saved(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    saved, loaded = ToyTraining(scaler=scaler), ToyTraining(seed=1, scaler=torch.amp.GradScaler("cpu"))
    saved.step()
    saved.checkpoints(tmp_path).save(7)
    assert loaded.checkpoints(tmp_path).load(tmp_path / "checkpoint-7") == 7
    (adapters, optimizer, schedule), (expected, expected_optimizer, expected_schedule) = map(state_of, (loaded, saved))
    assert adapters.keys() == expected.keys() and len({name.partition(".")[0] for name in adapters}) == 2
    assert all(torch.equal(adapters[name], expected[name]) for name in expected)
    for key, value in expected_optimizer["state"].items():
        assert all(torch.equal(optimizer["state"][key][name], tensor) for name, tensor in value.items())
    assert optimizer["param_groups"] == expected_optimizer["param_groups"]
    assert schedule == expected_schedule
    assert loaded.accelerator.scaler.state_dict() == scaler.state_dict()


def test_a_saved_checkpoint_is_left_as_it_is(tmp_path):
    training = ToyTraining()
    training.checkpoints(tmp_path).save(7)
    before = (tmp_path / "checkpoint-7/adapters.safetensors").read_bytes()
    training.step()
    training.checkpoints(tmp_path).save(7)
    assert (tmp_path / "checkpoint-7/adapters.safetensors").read_bytes() == before


def test_only_the_main_process_saves(tmp_path):
    training = ToyTraining()
    training.accelerator.is_main_process = False
    training.checkpoints(tmp_path).save(1)
    assert not list(tmp_path.iterdir())


def test_the_oldest_checkpoints_are_removed(tmp_path):
    training = ToyTraining()
    for step in (1, 2, 3):
        training.checkpoints(tmp_path).save(step)
    (tmp_path / "checkpoint-0").mkdir()  # incomplete: not counted, not removed
    training.checkpoints(tmp_path, total_limit=2).save(4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-0", "checkpoint-3", "checkpoint-4"]
    training.checkpoints(tmp_path, total_limit=1).save(5)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5"]


def test_unfinished_checkpoints_are_removed(tmp_path):
    (tmp_path / ".checkpoint-2.tmp").mkdir()
    (tmp_path / ".checkpoint-2.tmp/state.json").touch()
    make_checkpoint(tmp_path, 1)
    remove_unfinished_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def damaged(checkpoint: Path, name: str) -> None:
    file = checkpoint / name
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize("name", ["adapters.safetensors", "trainer_state.pt"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, name):
    training = ToyTraining()
    training.checkpoints(tmp_path).save(2)
    damaged(tmp_path / "checkpoint-2", name)
    with pytest.raises(InputError, match="^--resume_from_checkpoint checkpoint-2: is damaged .*; remove it") as caught:
        training.checkpoints(tmp_path).load(tmp_path / "checkpoint-2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 2}', '{"settings": {}}', b"\xff"])
def test_a_damaged_state_is_one_line(tmp_path, text):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(InputError, match=f"^--resume_from_checkpoint {tmp_path}: state.json is damaged"):
        check_resumable(tmp_path, {})


class FailingOptimizer:
    """Its state cannot be saved."""

    def __init__(self, error: Exception):
        self.error = error

    def state_dict(self):
        raise self.error


def raising(error: Exception):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed\nmore")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path, monkeypatch, error):
    training = ToyTraining()
    training.checkpoints(tmp_path).save(1)
    monkeypatch.setattr("dopsd.checkpoints.torch.save", raising(error))
    with pytest.raises(OutputError) as caught:
        training.checkpoints(tmp_path, total_limit=1).save(2)
    assert re.fullmatch(
        f"--output_dir {tmp_path}: checkpoint-2 could not be written \\(.*(space left|write failed).*\\); "
        "checkpoint-1 is complete: make room, then run the same command with --resume_from_checkpoint latest",
        str(caught.value),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("CUDA error: out of memory")],
)
def test_a_gpu_that_fails_while_its_state_is_written_is_not_called_a_write_error(tmp_path, monkeypatch, error):
    monkeypatch.setattr("dopsd.checkpoints.torch.save", raising(error))
    with pytest.raises(type(error)) as caught:
        ToyTraining().checkpoints(tmp_path).save(2)
    assert caught.value is error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_while_saving_are_not_called_write_errors(tmp_path, error):
    training = ToyTraining()
    training.optimizer = FailingOptimizer(error)
    with pytest.raises(type(error)) as caught:
        training.checkpoints(tmp_path).save(2)
    assert caught.value is error
    assert not list(tmp_path.iterdir())


def test_a_final_lora_that_cannot_be_written_is_saved_elsewhere(tmp_path):
    training = ToyTraining()
    training.step()
    checkpoints = training.checkpoints(tmp_path / "run")
    (tmp_path / f"run/.{LORA_FILE}.tmp").mkdir(parents=True)  # in the way of the writer
    with pytest.raises(OutputError) as caught:
        checkpoints.save_final_lora()
    message = str(caught.value)
    assert f"{LORA_FILE} could not be written" in message and "no checkpoint is complete" in message
    elsewhere = re.search("the LoRA is in (.*), move it to a safe place$", message)[1]
    training.checkpoints(tmp_path / "other").save_final_lora()
    assert same_weights(tmp_path / "other", elsewhere)
    shutil.rmtree(elsewhere)


# Runs that diverge


def test_the_weights_before_a_diverging_step_are_saved(tmp_path):
    training = ToyTraining()
    checkpoints = training.checkpoints(tmp_path)
    training.step()
    with pytest.raises(TrainingDiverged) as caught, checkpoints.saved_on_divergence(step=4, first_step=3):
        raise TrainingDiverged("at step 5 the loss is nan")
    assert str(caught.value).startswith(
        "at step 5 the loss is nan; the weights before it are in checkpoint-4; start in another --output_dir"
    )
    adapters = load_file(tmp_path / "checkpoint-4/adapters.safetensors")
    assert all(torch.equal(adapters[name], weight) for name, weight in training.roles.state_dict().items())


def test_nothing_is_saved_if_the_first_step_diverges(tmp_path):
    with pytest.raises(TrainingDiverged, match="; no step was completed after step 3; start in another --output_dir"):
        with ToyTraining().checkpoints(tmp_path).saved_on_divergence(step=3, first_step=3):
            raise TrainingDiverged("at step 4 the loss is nan")
    assert not list(tmp_path.iterdir())


def test_other_errors_of_a_step_save_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), ToyTraining().checkpoints(tmp_path).saved_on_divergence(4, 3):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


# A checkpoint's settings


def test_settings_are_saved_with_a_checkpoint(tmp_path):
    checkpoints: Checkpoints = ToyTraining().checkpoints(tmp_path, contract={"--rank": 4, "model": "abc"})
    checkpoints.save(2)
    state = json.loads((tmp_path / "checkpoint-2/state.json").read_text())
    assert state == {"step": 2, "settings": {"--rank": 4, "model": "abc"}}
    check_resumable(tmp_path / "checkpoint-2", {"--rank": 4, "model": "abc", "--new_flag": 1})
    with pytest.raises(InputError) as caught:
        check_resumable(tmp_path / "checkpoint-2", {"--rank": 8, "model": "abc"})
    assert str(caught.value) == (
        "--resume_from_checkpoint checkpoint-2: its --rank was 4, now it is 8; pass the same, or start in another "
        "--output_dir"
    )
    with pytest.raises(InputError, match="its --rank was 4, now it is None"):
        check_resumable(tmp_path / "checkpoint-2", {"model": "abc"})
