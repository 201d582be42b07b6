import pytest
import torch

from dopsd.optimizers import build_lr_scheduler, build_optimizer, effective_learning_rate
from dopsd.settings import OptimizerSettings


def build(size: int = 8, pictures_per_step: int = 1, **flags):
    return build_optimizer(OptimizerSettings(**flags), [torch.nn.Parameter(torch.ones(size))], pictures_per_step)


def test_adamw_gets_its_settings():
    optimizer = build(learning_rate=0.5, adam_beta1=0.5, adam_beta2=0.75, adam_weight_decay=0.25, adam_epsilon=1e-3)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.5, (0.5, 0.75), 0.25, 1e-3)


def test_scale_lr_multiplies_by_the_pictures_per_step():
    assert build(learning_rate=0.5, pictures_per_step=6).param_groups[0]["lr"] == 0.5
    assert build(learning_rate=0.5, pictures_per_step=6, scale_lr=True).param_groups[0]["lr"] == 3.0


def test_prodigy_gets_its_settings(caplog):
    optimizer = build(
        optimizer="prodigy",
        learning_rate=1.0,
        prodigy_beta3=0.5,
        prodigy_decouple=False,
        prodigy_use_bias_correction=False,
        prodigy_safeguard_warmup=False,
        adam_epsilon=1e-3,
    )
    assert type(optimizer).__name__ == "Prodigy" and not caplog.records
    (group,) = optimizer.param_groups
    names = ("lr", "beta3", "decouple", "use_bias_correction", "safeguard_warmup", "eps")
    assert [group[name] for name in names] == [1.0, 0.5, False, False, False, 1e-3]


def test_the_logged_rate_is_prodigys_own_estimate_times_the_schedules():
    optimizer = build(optimizer="prodigy", learning_rate=1.0)
    (parameter,) = optimizer.param_groups[0]["params"]
    rates = [effective_learning_rate(optimizer)]
    for _ in range(20):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()
        rates.append(effective_learning_rate(optimizer))
    assert rates[0] == 1e-6 < rates[-1]  # Prodigy's first guess, and what it found
    assert rates[-1] == optimizer.param_groups[0]["d"]
    assert effective_learning_rate(build(learning_rate=0.5)) == 0.5


def test_prodigy_with_a_small_learning_rate_gets_a_warning(caplog):
    build(optimizer="prodigy", learning_rate=2e-5)
    assert "--learning_rate 2e-05: Prodigy multiplies its own rate by it; use 1.0" in caplog.text


def test_8_bit_adam_keeps_8_bit_states():
    optimizer = build(size=4096, use_8bit_adam=True)  # smaller tensors keep 32 bits
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.sum().backward()
    optimizer.step()
    assert torch.uint8 in {value.dtype for value in optimizer.state[parameter].values() if torch.is_tensor(value)}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"lr_scheduler": "constant"}, [0.1] * 6),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 2}, [0.0, 0.05, 0.1, 0.075, 0.05, 0.025]),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}, [0.0, 0.05, 0.1, 0.1, 0.1, 0.1]),
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, [0.1, 0.075, 0.025, 0.1, 0.075, 0.025]),
        ({"lr_scheduler": "polynomial", "lr_power": 2.0}, [0.1 * (1 - step / 6) ** 2 for step in range(6)]),
    ],
)
def test_the_learning_rate_follows_its_schedule(flags, expected):
    optimizer = build(learning_rate=0.1)
    scheduler = build_lr_scheduler(OptimizerSettings(**flags), optimizer, num_steps=6)
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, rel=1e-4)
