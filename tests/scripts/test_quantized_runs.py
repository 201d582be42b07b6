"""Runs on a base in fewer bits, from the command line to the LoRA in the stock pipeline."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from command_line import same_weights, succeed
from dopsd.history import read_history
from models import ONE_MODEL, SLOW, both_models


@both_models(quick="flux2")
def test_an_int8_base_trains_saves_resumes_and_draws(train, model, tmp_path):
    flags = {"quantize": "int8", "quantize_text_encoder": "int8", "checkpointing_steps": 1, "max_train_steps": 2}
    drawing = {"validation_steps": 2, "num_validation_images": 1, "validation_prompt": "a ball"}
    log = succeed(train("whole", **flags, **drawing)).log
    assert log.count("Host memory peak so far: ") == 1
    assert not [line for line in log.splitlines() if "torchao" in line or "Enum" in line]
    losses = [line["loss"] for line in read_history(tmp_path / "whole") if "loss" in line]
    assert len(losses) == 2 and all(np.isfinite(losses))

    shutil.copytree(tmp_path / "whole/checkpoint-1", tmp_path / "resumed/checkpoint-1")
    succeed(train("resumed", **flags, resume_from_checkpoint="latest"))
    assert same_weights(tmp_path / "whole", tmp_path / "resumed")
    whole, resumed = (
        load_file(tmp_path / name / "checkpoint-2/adapters.safetensors") for name in ("whole", "resumed")
    )
    assert whole and {weight.dtype for weight in whole.values()} == {torch.float32}
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)

    pipeline = model.pipeline(dtype=torch.float32)
    base = model.run(pipeline, output_type="latent")
    pipeline.load_lora_weights(tmp_path / "whole")
    assert not torch.equal(model.run(pipeline, output_type="latent"), base)


@ONE_MODEL
def test_an_int8_base_is_another_base(train, tmp_path):
    succeed(train("plain"))
    succeed(train("int8", quantize="int8"))
    assert not same_weights(tmp_path / "plain", tmp_path / "int8")


@SLOW
def test_float8_trains_in_bf16_with_checkpointing(train, tmp_path):
    flags = {"quantize": "float8", "quantize_text_encoder": "float8", "mixed_precision": "bf16"}
    succeed(train(**flags, gradient_checkpointing=True, lora_dropout=0.1, random_flip=True))
    assert len(read_history(tmp_path / "run")) == 2


# A new process: the others' imports come from a process that has imported everything.
PROBE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("torchao:", sys.modules.get("torchao") is not None, "diffusers:", "diffusers" in sys.modules)
"""


@pytest.mark.exhaustive
@ONE_MODEL
@pytest.mark.parametrize(("quantization", "is_imported"), [(None, False), ("int8", True)])
def test_torchao_is_imported_if_it_is_needed_and_prints_nothing(model, arguments, quantization, is_imported):
    flags = {"pretrained_model_name_or_path": "nowhere", "quantize": quantization}
    command = [sys.executable, "-c", PROBE, str(model.script_path), *arguments(**flags)]
    environment = os.environ | {"PYTHONPATH": str(Path(model.script_path).parent), "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert f"torchao: {is_imported} diffusers: True" in result.stdout
    assert "nowhere: this is not the folder of a diffusers checkpoint" in result.stderr
    assert not [line for line in result.stderr.splitlines() if "torchao" in line.lower() or "Enum" in line]
