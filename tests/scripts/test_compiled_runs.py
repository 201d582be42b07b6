"""Runs with --compile, and with the other switches of memory and speed beside it."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from command_line import ROOT, assert_close_weights, same_weights, succeed
from dopsd.history import read_history
from models import NEEDS_COMPILER, ONE_MODEL, SLOW, with_exhaustive


pytestmark = SLOW

# One adapted layer per block: what is compiled is the same, in a fraction of the time.
FLAGS = {"lora_layers": "attn.to_out", "num_rollout_steps": 2, "num_trained_states": 1, "learning_rate": 1e-3}
BUCKETS = {
    "use_aspect_ratio_buckets": True,
    "aspect_ratio_buckets": "64,64;64,128;112,64",
    "lora_dropout": 0.1,
}


def losses(folder) -> list[float]:
    return [line["loss"] for line in read_history(folder)]


@with_exhaustive("flux2", "zimage")
@NEEDS_COMPILER
def test_all_switches_together_resume_bit_for_bit_and_end_near_the_run_without_them(train, model, tmp_path):
    flags = FLAGS | BUCKETS | {"max_train_steps": 8, "checkpointing_steps": 4}
    switches = {"compile": True, "gradient_checkpointing": True, "offload_activations": True}
    switches["attention_backend"] = "native"
    if "zimage" in model.script.__name__:
        flags |= {"lora_layers": "to_q", "train_batch_size": 2}
        switches["offload_transformer"] = True  # not for quantized weights
    else:
        flags |= {"quantize": "int8", "teacher_resolution": 64}
    whole = succeed(train("whole", **flags, **switches)).log
    counts = [int(count) for count in re.findall(r"Compiled (\d+) graphs for \d block class", whole)]
    assert counts == sorted(set(counts)) and 0 < len(counts) <= 3 and counts[-1] <= 20, whole
    assert "the compiler failed" not in whole and "Warning" not in whole, whole
    shutil.copytree(tmp_path / "whole/checkpoint-4", tmp_path / "resumed/checkpoint-4")
    succeed(train("resumed", **flags, **switches, resume_from_checkpoint="latest"))
    assert same_weights(tmp_path / "whole", tmp_path / "resumed")
    succeed(train("eager", **flags))
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
    assert_close_weights(tmp_path / "whole", tmp_path / "eager", atol=1e-4, rtol=1e-2)


@pytest.mark.exhaustive
@ONE_MODEL
def test_without_a_compiler_a_run_says_so_and_is_the_eager_one(train, model, arguments, tmp_path):
    flags = FLAGS | {"lora_dropout": 0.1, "gradient_accumulation_steps": 2}
    succeed(train("eager", **flags))
    environment = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, model.script_path, *arguments("compiled", **flags, compile=True)]
    environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("--compile: the compiler failed (") == 1, result.stderr
    assert result.stderr.count("/no/compiler") == 1 and "Traceback" not in result.stderr, result.stderr
    assert "Compiled " not in result.stderr
    assert losses(tmp_path / "eager") == losses(tmp_path / "compiled")
    assert same_weights(tmp_path / "eager", tmp_path / "compiled")
