"""Which checkpoint a run resumes from, what counts as damage, and which settings must match."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from command_line import LORA_FILE
from dopsd.checkpoints import Checkpoints
from dopsd.context_cache import content_key
from dopsd.errors import InputError
from dopsd.output import checkpoint_step, list_checkpoints, tidy_output_dir
from dopsd.resuming import (
    EARLIER_FILES,
    PICTURES,
    PRIOR,
    check_resumable,
    damage,
    file_digest,
    find_checkpoint,
    read_state,
)
from dopsd.settings import TrainingSettings
from short_runs import one_process
from toy_training import ToyTraining


# Finding


def make_checkpoint(folder: Path, step: int, *, contract: dict | None = None) -> Path:
    """An intact checkpoint's folder, whose files are only text."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in EARLIER_FILES:
        (checkpoint / name).write_text(f"{name} of step {step}")
    write_state(checkpoint, step=step, settings=contract or {})
    return checkpoint


def write_state(checkpoint: Path, **changed) -> None:
    """A state file with a right checksum."""
    state = {"files": {name: file_digest(checkpoint / name) for name in EARLIER_FILES}} | changed
    (checkpoint / "state.json").write_text(json.dumps(state | {"checksum": content_key(state)}))


def find(folder: Path, wanted: str | None = "latest") -> Path | None:
    return find_checkpoint(TrainingSettings(output_dir=str(folder), resume_from_checkpoint=wanted), one_process())


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


@pytest.mark.parametrize("name", [*EARLIER_FILES, "state.json"])
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


OLD_SETTINGS = {"--seed": 0, "--rank": 4, "model": "abc", PICTURES: {}}


def write_old_state(checkpoint: Path, settings: dict) -> None:
    (checkpoint / "state.json").write_text(json.dumps({"step": checkpoint_step(checkpoint), "settings": settings}))


def test_a_checkpoint_of_an_older_version_has_no_checksums_and_is_a_warning(tmp_path, caplog):
    checkpoint = make_checkpoint(tmp_path, 2)
    write_old_state(checkpoint, OLD_SETTINGS)
    assert find(tmp_path) == checkpoint
    assert "an older version saved it without checksums, so it is not verified" in caplog.text
    check_resumable(checkpoint, OLD_SETTINGS | {"--new_flag": 1}, max_train_steps=2)
    with pytest.raises(InputError, match="^--resume_from_checkpoint checkpoint-2: is damaged .*; remove it"):
        ToyTraining().checkpoints(tmp_path).load(checkpoint)


def test_a_checkpoint_without_checksums_is_not_taken_beside_one_that_has_them(tmp_path):
    verified = make_checkpoint(tmp_path, 2)
    write_old_state(make_checkpoint(tmp_path, 4), OLD_SETTINGS)
    assert find(tmp_path) == verified


@pytest.mark.parametrize("missing", ["--seed", "model", PICTURES])
def test_a_state_without_what_every_version_wrote_is_damaged(tmp_path, missing):
    checkpoint = make_checkpoint(tmp_path, 4)
    write_old_state(checkpoint, {name: value for name, value in OLD_SETTINGS.items() if name != missing})
    assert damage(checkpoint) == "its state.json is damaged"


@pytest.mark.parametrize("state", [{}, {"optimizer": {}, "lr_scheduler": {}}, []])
def test_an_older_versions_trainer_state_without_its_parts_is_one_line(tmp_path, state):
    training = ToyTraining()
    training.checkpoints(tmp_path).save(2)
    write_old_state(tmp_path / "checkpoint-2", OLD_SETTINGS)
    torch.save(state, tmp_path / "checkpoint-2/trainer_state.pt")
    with pytest.raises(InputError, match="^--resume_from_checkpoint checkpoint-2: is damaged .*; remove it"):
        training.checkpoints(tmp_path).load(tmp_path / "checkpoint-2")


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, 2)
    checkpoint = make_checkpoint(tmp_path, 4)

    def fail(path):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("dopsd.resuming.file_digest", fail)
    message = problem_of(tmp_path, "latest")
    assert f"{checkpoint}: adapters.safetensors cannot be read ([Errno 116] Stale file handle)" in message


def test_all_processes_resume_from_the_main_process_choice(tmp_path, monkeypatch):
    """The second of two processes, on a machine that lacks the checkpoint, or has another one."""
    PartialState()
    shared, settings = make_checkpoint(tmp_path / "main", 4), TrainingSettings(output_dir=str(tmp_path / "run"))
    other = one_process(is_main_process=False, process_index=1)
    for chosen, state in ((None, None), (shared, read_state(shared))):
        monkeypatch.setattr("dopsd.resuming.broadcast_object_list", lambda own, c=chosen, s=state: [c, s])
        assert find_checkpoint(settings, other) == chosen
    for content in ("", json.dumps({"step": 4})):
        (shared / "state.json").write_text(content)
        with pytest.raises(InputError):
            find_checkpoint(settings, other)
    (shared / "state.json").unlink()
    with pytest.raises(InputError, match="checkpoint-4: not every machine has this checkpoint; copy it to each"):
        find_checkpoint(settings, other)


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
    (make_checkpoint(tmp_path, 4) / "adapters.safetensors").unlink()
    tidy_output_dir(tmp_path, first_step=2)
    assert (tmp_path / "checkpoint-4.damaged").is_dir() and (tmp_path / "checkpoint-4.damaged-2").is_dir()
    ToyTraining().checkpoints(tmp_path).save(4)
    assert find(tmp_path).name == "checkpoint-4"


def test_unfinished_checkpoints_are_removed(tmp_path):
    (tmp_path / ".checkpoint-2.tmp").mkdir()
    (tmp_path / ".checkpoint-2.tmp/state.json").touch()
    (tmp_path / ".checkpoint-3.tmp").touch()
    make_checkpoint(tmp_path, 1)
    tidy_output_dir(tmp_path, first_step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


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


def test_settings_that_came_later_are_what_they_were_before(tmp_path):
    contract = {"--num_rollout_steps": 4, "--num_trained_states": 4, PRIOR: None}
    checkpoint = make_checkpoint(tmp_path, 2, contract={"--num_rollout_steps": 4})
    check_resumable(checkpoint, contract, max_train_steps=2)
    states, prior = {"--num_trained_states": 1}, {PRIOR: [1.0, 1, "abc"]}
    told = (
        "its --num_trained_states was 4, now it is 1",
        "it had no prior preservation (--with_prior_preservation false)",
    )
    for changed, problem in ((states, told[0]), (prior, told[1]), (states | prior, ", and ".join(told))):
        with pytest.raises(InputError) as caught:
            check_resumable(checkpoint, contract | changed, max_train_steps=2)
        assert str(caught.value) == (
            f"--resume_from_checkpoint checkpoint-2: {problem}; pass the same, or start in another --output_dir"
        )


def test_a_checkpoint_with_prior_preservation_is_not_resumed_without_it(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 2, contract={PRIOR: [1.0, 1, "abc"]})
    with pytest.raises(
        InputError, match="its prior preservation was set differently .*--trigger_word.; pass the same,"
    ):
        check_resumable(checkpoint, {PRIOR: None}, max_train_steps=2)


@pytest.mark.parametrize(("saved", "now"), [({}, {"--rank": 4}), ({"--rank": 4}, {})])
def test_a_setting_that_only_one_of_checkpoint_and_run_knows_is_named(tmp_path, saved, now):
    checkpoint = make_checkpoint(tmp_path, 2, contract=saved)
    with pytest.raises(InputError, match="checkpoint-2: its --rank was (4|None), now it is (4|None); pass the same"):
        check_resumable(checkpoint, now, max_train_steps=2)


def test_a_checkpoint_past_the_last_step_is_one_line(tmp_path):
    with pytest.raises(InputError, match="^--max_train_steps 3: checkpoint-4 is past it; pass at least 4, or use"):
        check_resumable(make_checkpoint(tmp_path, 4), {}, max_train_steps=3)
    check_resumable(tmp_path / "checkpoint-4", {}, max_train_steps=4)
