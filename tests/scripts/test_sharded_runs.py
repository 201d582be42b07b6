"""Runs with the transformer's weights in host memory (--offload_transformer) or shared by two processes (--fsdp)."""

import re
import signal

import pytest
from PIL import Image

from command_line import assert_close_weights, same_weights, succeed
from dopsd.history import read_history
from dopsd.output import checkpoint_step, list_checkpoints
from models import ONE_MODEL, SLOW
from waiting import wait_until


DEFAULT_METHOD = {"num_trained_states": 1, "with_prior_preservation": True, "trigger_word": "ball"}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a house\na tree\na car\n", encoding="utf-8")
    return path


@SLOW
def test_an_offloaded_run_gives_the_lora_and_sheets_of_a_resident_one(train, tmp_path, prompts):
    flags = DEFAULT_METHOD | {"prior_prompts": prompts, "lora_dropout": 0.1, "max_train_steps": 3}
    flags |= {"validation_steps": 3, "num_validation_images": 1, "context_cache_dir": tmp_path / "cache"}
    succeed(train("resident", **flags))
    switches = ("offload_transformer", "gradient_checkpointing", "offload_activations")
    log = succeed(train("offloaded", **flags, **dict.fromkeys(switches, True), checkpointing_steps=1)).log
    assert re.search(r"Transformer blocks: (.* MB) of weights; each process holds \1 of them in host memory", log)
    assert same_weights(tmp_path / "resident", tmp_path / "offloaded")
    for name in ("preview", "validation-3", "rollout-3", "retention-3", "story"):
        resident, offloaded = (Image.open(tmp_path / run / f"{name}.png") for run in ("resident", "offloaded"))
        assert name == "story" or resident.tobytes() == offloaded.tobytes(), name
    (tmp_path / "offloaded/checkpoint-3").rename(tmp_path / "checkpoint-3")
    (tmp_path / "offloaded/pytorch_lora_weights.safetensors").unlink()
    succeed(train("offloaded", **flags, offload_transformer=True, resume_from_checkpoint="latest"))
    assert same_weights(tmp_path / "resident", tmp_path / "offloaded")


@SLOW
@pytest.mark.parametrize(
    ("model", "offload"),
    [
        ("flux2", True),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [("flux2", False), ("zimage", False), ("zimage", True)]
        ),
    ],
    indirect=["model"],
)
def test_two_processes_that_share_weights_give_the_lora_of_one(
    torchrun, command, arguments, tmp_path, prompts, offload
):
    flags = DEFAULT_METHOD | {"prior_prompts": prompts, "lora_dropout": 0.1, "max_train_steps": 3}
    flags |= {"validation_steps": 3, "num_validation_images": 1, "context_cache_dir": tmp_path / "cache"}
    sharing = {"fsdp": True, "gradient_checkpointing": True, "offload_transformer": offload}
    process, log = torchrun(arguments("two", **flags, **{name: on for name, on in sharing.items() if on}))
    succeed(command(*arguments("one", **flags, gradient_accumulation_steps=2)))
    assert process.wait(timeout=240) == 0, log.read_text()
    assert_close_weights(tmp_path / "one", tmp_path / "two", atol=1e-5, rtol=1e-3)
    whole, held = re.search(
        r"Transformer blocks: (.*) MB of weights; each process holds (.*) MB of them", log.read_text()
    ).groups()
    assert float(held) == pytest.approx(float(whole) / 2, rel=0.3, abs=0.1)
    one, two = (read_history(tmp_path / name) for name in ("one", "two"))
    for name in ("loss", "prior_loss", "retention"):
        first, second = ({line["step"]: line[name] for line in run if name in line} for run in (one, two))
        assert first == pytest.approx(second, rel=1e-3, abs=1e-9) and first
    assert (tmp_path / "two/story.png").is_file()


@SLOW
@ONE_MODEL
def test_checkpoints_move_between_two_sharing_processes_and_one(torchrun, command, arguments, tmp_path):
    flags = {"learning_rate": 1e-3, "max_train_steps": 40, "num_trained_states": 1, "lora_dropout": 0.1}
    flags |= {"checkpointing_steps": 9999, "resume_from_checkpoint": "latest"}
    folder = tmp_path / "moved"
    process, log = torchrun(arguments("moved", **flags, fsdp=True))
    wait_until(lambda: len(read_history(folder)) >= 3, process, log)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    (checkpoint,) = list_checkpoints(folder)
    assert 3 <= checkpoint_step(checkpoint) < 40, log.read_text()
    halfway = flags | {"gradient_accumulation_steps": 2, "checkpointing_steps": checkpoint_step(checkpoint) + 5}
    run, running = command.start(*arguments("moved", **halfway))
    wait_until(lambda: len(list_checkpoints(folder)) == 2, run, running)
    run.terminate()
    run.join(timeout=60)
    process, log = torchrun(arguments("moved", **flags, fsdp=True))
    succeed(command(*arguments("undisturbed", **flags, gradient_accumulation_steps=2)))
    assert process.wait(timeout=240) == 0, log.read_text()
    assert_close_weights(tmp_path / "undisturbed", folder, atol=1e-3, rtol=1e-2)


@ONE_MODEL
@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ({"fsdp": True}, "--fsdp: shares the weights among processes, and there is only one; start one process"),
        ({"offload_activations": True}, "--offload_activations: goes with --gradient_checkpointing; add that"),
        (
            {"offload_transformer": True, "bnb_quantization_config_path": "bits.json"},
            "--offload_transformer: cannot be combined with --bnb_quantization_config_path; drop one of them",
        ),
    ],
)
def test_what_cannot_be_sharded_is_one_line(train, flags, error):
    assert error in train(**flags).error
