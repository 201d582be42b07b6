import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command_line import LORA_FILE, same_weights
from dopsd.errors import OutputError, TrainingDiverged
from dopsd.output import list_checkpoints
from toy_training import ToyTraining


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


def test_metrics_are_on_disk_before_the_checkpoint(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr("dopsd.checkpoints.sync_history", lambda folder: found.append(list(folder.iterdir())))
    ToyTraining().checkpoints(tmp_path).save(7)
    assert found == [[]]


def test_only_the_main_process_saves(tmp_path):
    training = ToyTraining()
    training.accelerator.is_main_process = False
    training.checkpoints(tmp_path).save(1)
    assert not list(tmp_path.iterdir())


def test_the_oldest_checkpoints_are_removed(tmp_path):
    training = ToyTraining()
    for step in (1, 2, 3):
        training.checkpoints(tmp_path).save(step)
    training.checkpoints(tmp_path, total_limit=2).save(4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    training.checkpoints(tmp_path, total_limit=1).save(5)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5"]


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, caplog):
    training = ToyTraining()
    training.checkpoints(tmp_path).save(1)
    (tmp_path / ".checkpoint-1.tmp/left").mkdir(parents=True)  # as NFS leaves a file that is open elsewhere
    monkeypatch.setattr("dopsd.checkpoints.remove", lambda path: None)
    training.checkpoints(tmp_path, total_limit=1).save(2)
    assert "checkpoint-1 could not be removed" in caplog.text and (tmp_path / "checkpoint-2").is_dir()


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


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(28, "No space left on device"), ".*space left on device"),
        (RuntimeError("[enforce fail at x.cc:6] . unexpected pos 7 vs 5\nmore"), "the file could not be completed"),
        (RuntimeError("it is broken\nmore"), "it is broken"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path, monkeypatch, error, reason):
    training = ToyTraining()
    training.checkpoints(tmp_path).save(1)
    monkeypatch.setattr("dopsd.checkpoints.torch.save", raising(error))
    with pytest.raises(OutputError) as caught:
        training.checkpoints(tmp_path, total_limit=1).save(2)
    assert re.fullmatch(
        f"--output_dir {tmp_path}: checkpoint-2 could not be written \\({reason}\\): make room, "
        "then run the same command with --resume_from_checkpoint latest; checkpoint-1 is complete",
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


def in_the_way(folder: Path) -> Path:
    """A folder that a LoRA file cannot be written to."""
    (folder / f".{LORA_FILE}.tmp").mkdir(parents=True)
    return folder


def test_a_final_lora_that_cannot_be_written_is_saved_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    training = ToyTraining()
    training.step()
    with pytest.raises(OutputError) as caught:
        training.checkpoints(in_the_way(tmp_path / "run")).save_final(NoStop())
    message = str(caught.value)
    assert f"{LORA_FILE} could not be written" in message and "no checkpoint is complete" in message
    elsewhere = Path(re.search("the LoRA is in (.*), move it to a safe place$", message)[1])
    assert elsewhere.parent == tmp_path / "temporary"
    training.checkpoints(tmp_path).save_final(NoStop())
    assert same_weights(tmp_path, elsewhere)


class NoStop:
    """No request to stop until it was asked a few times."""

    def __init__(self, num_answers: int = 999):
        self.num_answers = num_answers

    @property
    def is_set(self) -> bool:
        self.num_answers -= 1
        return self.num_answers < 0


@pytest.fixture
def no_room_elsewhere(monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", raising(OSError(28, "No space left on device")))


def test_a_final_lora_without_room_anywhere_waits_for_room(tmp_path, monkeypatch, caplog, no_room_elsewhere):
    folder = in_the_way(tmp_path / "run")
    waits = []

    def make_room(seconds):
        waits.append(seconds)
        if len(waits) == 90:
            (folder / f".{LORA_FILE}.tmp").rmdir()

    monkeypatch.setattr("dopsd.checkpoints.time.sleep", make_room)
    ToyTraining().checkpoints(folder).save_final(NoStop())
    assert len(waits) == 90 and (folder / LORA_FILE).stat().st_size > 0
    messages = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(messages) == 3 and all("Trying again every 30 seconds" in message for message in messages)


def test_a_stop_request_ends_the_wait_for_room(tmp_path, monkeypatch, no_room_elsewhere):
    monkeypatch.setattr("dopsd.checkpoints.time.sleep", lambda seconds: None)
    with pytest.raises(OutputError, match="could not be written"):
        ToyTraining().checkpoints(in_the_way(tmp_path)).save_final(NoStop(num_answers=40))


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
