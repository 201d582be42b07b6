import json
import re
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from command_line import LORA_FILE, same_weights
from dopsd.checkpoints import CHECKPOINT_FILES, Checkpoints, check_resumable, damage, file_digest, find_checkpoint
from dopsd.context_cache import content_key
from dopsd.errors import InputError, OutputError, TrainingDiverged
from dopsd.output import list_checkpoints, tidy_output_dir
from dopsd.settings import TrainingSettings
from toy_training import ToyTraining


# Finding


def make_checkpoint(folder: Path, step: int, *, contract: dict | None = None) -> Path:
    """An intact checkpoint's folder, whose files are only text."""
    PartialState()  # accelerate's logger asks it which process this is
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in CHECKPOINT_FILES:
        (checkpoint / name).write_text(f"{name} of step {step}")
    write_state(checkpoint, step=step, settings=contract or {})
    return checkpoint


def write_state(checkpoint: Path, **changed) -> None:
    """A state file with a right checksum."""
    state = {"files": {name: file_digest(checkpoint / name) for name in CHECKPOINT_FILES}} | changed
    (checkpoint / "state.json").write_text(json.dumps(state | {"checksum": content_key(state)}))


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
    for name in ("checkpoint-x", "checkpoint-", "checkpoint-0011", "checkpoint-12.damaged", "checkpoint-٣"):
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
    assert problem_of(tmp_path, "checkpoint-7").endswith(f"there is no such checkpoint; {tmp_path} has: none")
    make_checkpoint(tmp_path, 5)
    message = problem_of(tmp_path, "checkpoint-7")
    assert message == (
        f"--resume_from_checkpoint checkpoint-7: there is no such checkpoint; {tmp_path} has: checkpoint-5"
    )


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


# Damage


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap_in(path: Path) -> None:
    """The file of another checkpoint."""
    path.write_bytes((path.parents[1] / "checkpoint-2" / path.name).read_bytes())


@pytest.mark.parametrize("name", [*CHECKPOINT_FILES, "state.json"])
@pytest.mark.parametrize("harm", [flip_a_bit, truncate, swap_in, Path.unlink])
def test_latest_falls_back_to_the_newest_intact_checkpoint_and_says_so(tmp_path, caplog, harm, name):
    intact, damaged = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 4)
    harm(damaged / name)
    assert find(tmp_path) == intact
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"{damaged}: " in warning and "trying the checkpoint before it" in warning
    message = problem_of(tmp_path, "checkpoint-4")
    assert message.startswith("--resume_from_checkpoint checkpoint-4: ") and message.endswith("; resume from latest")


@pytest.mark.parametrize("step", [2, 10**9, -1, "4", None])
def test_a_checkpoint_of_another_step_is_damaged(tmp_path, step):
    checkpoint = make_checkpoint(tmp_path, 4)
    write_state(checkpoint, step=step, settings={})
    assert damage(checkpoint) == f"it is the checkpoint of step {step}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"step": 2}',
        '{"settings": {}}',
        '{"step": 2, "settings": null}',
        "[" * 100_000,
        b"\xff",
        b"\0" * 99,
    ],
)
def test_a_damaged_state_is_named(tmp_path, text):
    checkpoint = make_checkpoint(tmp_path, 2)
    (checkpoint / "state.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert damage(checkpoint).startswith("its state.json is damaged")


@pytest.mark.parametrize("changed", [{"step": 3}, {"settings": None}, {"settings": {"--rank": 8}}, {"files": {}}])
def test_an_edited_state_is_damaged(tmp_path, changed):
    checkpoint = make_checkpoint(tmp_path, 2, contract={"--rank": 4})
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | changed))
    assert damage(checkpoint) == "its state.json is damaged"


def test_a_checkpoint_of_an_older_version_has_no_checksums_and_is_a_warning(tmp_path, caplog):
    checkpoint = make_checkpoint(tmp_path, 2)
    (checkpoint / "state.json").write_text(json.dumps({"step": 2, "settings": {"--rank": 4}}))
    assert damage(checkpoint) is None and "saved it without checksums, so it is not verified" in caplog.text
    check_resumable(checkpoint, {"--rank": 4, "--new_flag": 1}, max_train_steps=2)
    with pytest.raises(InputError, match="^--resume_from_checkpoint checkpoint-2: is damaged .*; remove it"):
        ToyTraining().checkpoints(tmp_path).load(checkpoint)


def test_only_damaged_checkpoints_are_one_line(tmp_path):
    for step in (2, 4):
        (make_checkpoint(tmp_path, step) / "adapters.safetensors").unlink()
    assert problem_of(tmp_path, "latest") == (
        f"--resume_from_checkpoint latest: no checkpoint in {tmp_path} is intact; move them away to start anew"
    )


def test_damaged_checkpoints_are_moved_away_before_the_run_saves_its_own(tmp_path):
    (make_checkpoint(tmp_path, 4) / "adapters.safetensors").unlink()
    make_checkpoint(tmp_path, 2)
    tidy_output_dir(tmp_path, first_step=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4.damaged"]
    ToyTraining().checkpoints(tmp_path).save(4)
    assert find(tmp_path).name == "checkpoint-4"


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


def test_unfinished_checkpoints_are_removed(tmp_path):
    (tmp_path / ".checkpoint-2.tmp").mkdir()
    (tmp_path / ".checkpoint-2.tmp/state.json").touch()
    make_checkpoint(tmp_path, 1)
    tidy_output_dir(tmp_path, first_step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


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
        f"--output_dir {tmp_path}: checkpoint-2 could not be written \\(.*(space left|write failed).*\\): make room, "
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
        training.checkpoints(in_the_way(tmp_path / "run")).save_final_lora(NoStop())
    message = str(caught.value)
    assert f"{LORA_FILE} could not be written" in message and "no checkpoint is complete" in message
    elsewhere = Path(re.search("the LoRA is in (.*), move it to a safe place$", message)[1])
    assert elsewhere.parent == tmp_path / "temporary"
    training.checkpoints(tmp_path).save_final_lora(NoStop())
    assert same_weights(tmp_path, elsewhere)


class NoStop:
    """No request to stop until it was asked a few times."""

    def __init__(self, num_answers: int = 99):
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
        if len(waits) == 3:
            (folder / f".{LORA_FILE}.tmp").rmdir()

    monkeypatch.setattr("dopsd.checkpoints.time.sleep", make_room)
    ToyTraining().checkpoints(folder).save_final_lora(NoStop())
    assert len(waits) == 3 and (folder / LORA_FILE).stat().st_size > 0
    messages = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(messages) == 3 and all("Trying again every 30 seconds" in message for message in messages)


def test_a_stop_request_ends_the_wait_for_room(tmp_path, monkeypatch, no_room_elsewhere):
    monkeypatch.setattr("dopsd.checkpoints.time.sleep", lambda seconds: None)
    with pytest.raises(OutputError, match="could not be written"):
        ToyTraining().checkpoints(in_the_way(tmp_path)).save_final_lora(NoStop(num_answers=2))


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
    checkpoint = tmp_path / "checkpoint-2"
    assert damage(checkpoint) is None
    check_resumable(checkpoint, {"--rank": 4, "model": "abc"}, max_train_steps=2)
    with pytest.raises(InputError) as caught:
        check_resumable(checkpoint, {"--rank": 8, "model": "abc"}, max_train_steps=2)
    assert str(caught.value) == (
        "--resume_from_checkpoint checkpoint-2: its --rank was 4, now it is 8; pass the same, or start in another "
        "--output_dir"
    )


@pytest.mark.parametrize(("saved", "now"), [({}, {"--rank": 4}), ({"--rank": 4}, {})])
def test_a_setting_that_only_one_of_checkpoint_and_run_knows_is_named(tmp_path, saved, now):
    checkpoint = make_checkpoint(tmp_path, 2, contract=saved)
    with pytest.raises(InputError, match="checkpoint-2: its --rank was (4|None), now it is (4|None); pass the same"):
        check_resumable(checkpoint, now, max_train_steps=2)


def test_a_checkpoint_past_the_last_step_is_one_line(tmp_path):
    with pytest.raises(InputError, match="^--max_train_steps 3: checkpoint-4 is past it; pass at least 4, or use"):
        check_resumable(make_checkpoint(tmp_path, 4), {}, max_train_steps=3)
    check_resumable(tmp_path / "checkpoint-4", {}, max_train_steps=4)
