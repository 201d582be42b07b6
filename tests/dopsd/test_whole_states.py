"""Whole weights among processes and on a GPU, as far as one process on a CPU can show it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from dopsd import output, training_state
from dopsd.errors import InputError
from dopsd.optimizers import build_optimizer
from dopsd.train_modes import FullMode
from dopsd.training_state import WeightState
from dopsd.weight_bytes import weight_bytes
from dopsd.weight_roles import StudentTeacherWeights
from short_runs import default_settings, one_process


CPU = torch.device("cpu")


def roles_of(transformer: nn.Module, **options) -> StudentTeacherWeights:
    return StudentTeacherWeights(transformer, ema_device=CPU, base_device=CPU, **options)


def test_a_role_with_other_weights_contains_no_other_role():
    roles = roles_of(nn.Linear(4, 4))
    with roles.shipped_role(torch.float32), roles.teacher_role():
        pass  # the student's own weights are no other weights
    for outer, inner in ((roles.teacher_role, roles.base_role), (roles.base_role, roles.idle_role)):
        with pytest.raises(AssertionError, match="contains no other role"), outer(), inner():
            pass
    with roles.teacher_role():
        pass


@pytest.mark.parametrize("in_8_bits", [False, True])
def test_averages_that_are_not_in_8_bits_are_float32(in_8_bits):
    """In bfloat16, the average of squared gradients stalls."""
    layer = nn.Linear(64, 64).bfloat16()
    settings = default_settings(train_mode="full", bf16_update="stochastic_rounding", use_8bit_adam=in_8_bits)
    optimizer = build_optimizer(settings.optimizer, [*layer.parameters()], 1, is_full=True)
    layer(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    for weight, is_quantized in ((layer.weight, in_8_bits), (layer.bias, False)):
        for name in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[weight][name]
            assert hasattr(state, "codes") == is_quantized and (is_quantized or state.dtype == torch.float32)


def test_8_bit_states_that_cannot_be_divided_are_not_called_damaged(monkeypatch, tmp_path):
    layer = nn.Linear(64, 64)
    state = WeightState(roles_of(layer), torch.optim.AdamW(layer.parameters()))
    state.write(tmp_path, {"lr_scheduler": {}})
    assert state.read(tmp_path) == {"lr_scheduler": {}}

    def fail(*_, **__):
        raise CheckpointException("", {0: (ValueError("Invalid start or end"), None)})

    monkeypatch.setattr(training_state.dcp, "load", fail)
    with pytest.raises(CheckpointException):  # as many processes: it is damaged
        state.read(tmp_path)
    monkeypatch.setattr(training_state, "num_processes", lambda: 8)
    with pytest.raises(InputError, match="1 processes saved it, and its 8-bit states cannot be divided among 8"):
        state.read(tmp_path)


@pytest.mark.parametrize("is_shared", [True, False])
def test_machines_that_do_not_share_the_folder_are_told_before_training(monkeypatch, tmp_path, is_shared):
    monkeypatch.setattr(output, "broadcast_object_list", lambda names: names if is_shared else [".shared-elsewhere"])
    monkeypatch.setattr("dopsd.sharing.gather_object", list)
    if is_shared:
        output.check_is_shared(tmp_path, one_process())
    else:
        with pytest.raises(InputError, match=f"--output_dir {tmp_path}: is not the same folder on all machines; give"):
            output.check_is_shared(tmp_path, one_process())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("flags", "free_gb", "others_fit", "device"),
    [
        ({}, 115, True, "cuda"),
        ({}, 20, True, "cpu"),
        ({}, 115, False, "cpu"),  # all processes decide alike
        ({"ema_device": "cpu"}, 115, True, "cpu"),
        ({"ema_device": "cuda"}, 0, True, "cuda"),
        ({"offload_transformer": True}, 115, True, "cpu"),
    ],
)
def test_copies_are_on_the_gpu_if_they_fit_on_all(monkeypatch, flags, free_gb, others_fit, device):
    settings = default_settings(train_mode="full", **flags)
    with torch.device("meta"):
        transformer = nn.Linear(100_000, 40_000, dtype=torch.bfloat16)  # 4 billion weights
    kept = weight_bytes(settings, torch.bfloat16, has_prior=True)
    assert 40 < 4 * (kept.gradient + kept.master + kept.states + kept.copies) < 100
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gb * 1e9, 120e9))
    monkeypatch.setattr("dopsd.train_modes.torch.tensor", lambda values, device: values)
    accelerator = one_process("cuda", gather=lambda fits: SimpleNamespace(all=lambda: fits[0] and others_fit))
    chosen = FullMode.device_of_copies(SimpleNamespace(), transformer, kept, settings, accelerator)
    assert chosen.type == device
