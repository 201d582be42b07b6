"""Runs that train the transformer's own weights (--train_mode full): resuming, and processes that share them."""

import re
import shutil

import pytest
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file

from command_line import succeed
from dopsd.history import read_history
from models import ONE_MODEL, SLOW, with_exhaustive


METHOD = {"num_trained_states": 1, "with_prior_preservation": True, "trigger_word": "ball"}
# Adam divides the first gradients by themselves, whatever their size, and so enlarges rounding.
FULL = METHOD | {
    "train_mode": "full",
    "rank": None,
    "learning_rate": 1e-4,
    "adam_epsilon": 1e-3,
    "max_train_steps": 3,
    "ema_decay": 0.5,
}
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a house\na tree\na car\n", encoding="utf-8")
    return path


def weights(folder):
    return load_file(folder / TRANSFORMER)


def largest_difference(first, second) -> float:
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    return max((one[name].float() - two[name].float()).abs().max().item() for name in one)


def begin_from(checkpoint, folder):
    """Makes the folder of a run that was stopped at a checkpoint of another one."""
    folder.mkdir()
    shutil.copytree(checkpoint, folder / checkpoint.name)
    return {"resume_from_checkpoint": "latest"}


PRECISIONS = {
    "float32": {},
    "master": {"mixed_precision": "bf16"},
    "master-8bit": {"mixed_precision": "bf16", "use_8bit_adam": True},
    "rounding": {"mixed_precision": "bf16", "bf16_update": "stochastic_rounding"},
    "rounding-8bit": {"mixed_precision": "bf16", "bf16_update": "stochastic_rounding", "use_8bit_adam": True},
    "part": {"trainable_modules": "attn.to_q,norm_out", "gradient_checkpointing": True},
    "offloaded": {"offload_transformer": True},
}


REPEATS = ("master-8bit", "rounding-8bit", "offloaded")


@SLOW
@ONE_MODEL
@pytest.mark.parametrize(
    "precision",
    [pytest.param(name, marks=[pytest.mark.exhaustive] if name in REPEATS else []) for name in PRECISIONS],
)
def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(train, tmp_path, prompts, precision):
    flags = FULL | PRECISIONS[precision] | {"prior_prompts": prompts, "context_cache_dir": tmp_path / "cache"}
    succeed(train("whole", **flags, checkpointing_steps=2))
    resuming = begin_from(tmp_path / "whole/checkpoint-2", tmp_path / "resumed")
    succeed(train("resumed", **flags, **resuming, checkpointing_steps=2))
    assert largest_difference(tmp_path / "whole", tmp_path / "resumed") == 0
    steps = [[line["loss"] for line in read_history(tmp_path / name)] for name in ("whole", "resumed")]
    assert steps[0][2:] == steps[1]
    assert largest_difference(tmp_path / "whole", tmp_path / "whole/checkpoint-2") > 0


@SLOW
@with_exhaustive("flux2", "zimage")
def test_two_processes_share_a_model_and_end_with_the_weights_of_one(torchrun, command, arguments, tmp_path, prompts):
    """Checkpoints move between two processes and one."""
    flags = FULL | {"prior_prompts": prompts, "context_cache_dir": tmp_path / "cache", "checkpointing_steps": 2}
    drawn = {"validation_steps": 3, "num_validation_images": 1}
    sharing = {"fsdp": True, "gradient_checkpointing": True}
    process, log = torchrun(arguments("two", **flags, **sharing, **drawn))
    succeed(command(*arguments("one", **flags, **drawn, gradient_accumulation_steps=2)))
    assert process.wait(timeout=240) == 0, log.read_text()
    whole, held = re.search(r"Transformer: (.*) MB of weights; each process holds (.*) MB", log.read_text()).groups()
    assert float(held) == pytest.approx(float(whole) / 2, rel=0.3, abs=0.1)
    first, second = (
        {name: [line[name] for line in read_history(tmp_path / run) if name in line] for name in ("loss", "retention")}
        for run in ("one", "two")
    )
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-3) and first["retention"]
    assert first["retention"] == pytest.approx(second["retention"], rel=1e-2, abs=1e-9)

    one_process = begin_from(tmp_path / "two/checkpoint-2", tmp_path / "two-one")
    two_processes = begin_from(tmp_path / "one/checkpoint-2", tmp_path / "one-two")
    process, log = torchrun(arguments("one-two", **flags, **sharing, **two_processes))
    succeed(command(*arguments("two-one", **flags, **one_process, gradient_accumulation_steps=2)))
    assert process.wait(timeout=240) == 0, log.read_text()
    for name in ("two", "two-one", "one-two"):
        assert largest_difference(tmp_path / "one", tmp_path / name) < 1e-6, name
    assert largest_difference(tmp_path / "one", tmp_path / "one/checkpoint-2") > 1e-5


@SLOW
@ONE_MODEL
def test_the_stock_pipeline_loads_what_two_processes_saved(torchrun, arguments, tmp_path):
    flags = FULL | {"with_prior_preservation": False, "mixed_precision": "bf16", "use_8bit_adam": True}
    process, log = torchrun(arguments("two", **flags, fsdp=True))
    assert process.wait(timeout=240) == 0, log.read_text()
    pipe = Flux2KleinPipeline.from_pretrained(tmp_path / "two")
    image = pipe(prompt="a ball", height=64, width=64, num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)


@pytest.mark.exhaustive
@ONE_MODEL
def test_a_checkpoint_of_four_processes_is_resumed_by_two_and_by_one(torchrun, command, arguments, tmp_path, prompts):
    flags = FULL | {"prior_prompts": prompts, "context_cache_dir": tmp_path / "cache", "checkpointing_steps": 2}
    process, log = torchrun(arguments("four", **flags, fsdp=True), num_processes=4)
    assert process.wait(timeout=240) == 0, log.read_text()
    for name, count in (("two", 2), ("one", 1)):
        flags |= begin_from(tmp_path / "four/checkpoint-2", tmp_path / name)
        sharing = {"fsdp": True} if count > 1 else {}
        process, log = torchrun(
            arguments(name, **flags, **sharing, gradient_accumulation_steps=4 // count), num_processes=count
        )
        assert process.wait(timeout=240) == 0, log.read_text()
        assert largest_difference(tmp_path / "four", tmp_path / name) < 1e-6
        assert largest_difference(tmp_path / name, tmp_path / "four/checkpoint-2") > 1e-5


@pytest.mark.exhaustive
@ONE_MODEL
@pytest.mark.parametrize(
    "changed", [{"mixed_precision": "bf16"}, {"mixed_precision": "bf16", "use_8bit_adam": True}, {"repeats": 2}]
)
def test_two_processes_are_one_in_other_settings_too(torchrun, command, arguments, tmp_path, prompts, changed):
    flags = FULL | changed | {"prior_prompts": prompts, "context_cache_dir": tmp_path / "cache"}
    process, log = torchrun(arguments("two", **flags, fsdp=True))
    succeed(command(*arguments("one", **flags, gradient_accumulation_steps=2)))
    assert process.wait(timeout=240) == 0, log.read_text()
    one, two = ([line["loss"] for line in read_history(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=2e-2)
    atol = 1e-6 if "mixed_precision" not in changed else 4e-3  # a rounding of bfloat16
    assert largest_difference(tmp_path / "one", tmp_path / "two") <= atol
