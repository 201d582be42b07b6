import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from benchmarks.miniature import distill as distill_module
from benchmarks.miniature.distill import RolloutBuffer, Settings, distill
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.rows import Rows
from benchmarks.miniature.teacher import PosteriorTeacher
from benchmarks.miniature.training import MuonAdamW, trapezoid
from pipelines.flux2_klein import KleinContext


def test_a_stopped_distillation_continues(row_source, tmp_path, monkeypatch):
    sigmas = row_source.pipeline.schedule(64, 64, 4).sigmas
    teacher = PosteriorTeacher(row_source.latents, sigmas, num_directions=2, num_substeps=6)
    lines, measured, calls = [], [], []

    def settings(num_steps: int) -> Settings:
        rows = {"text": 1, "word": 1, "reference": 1}
        return Settings(rows, muon_lr=1e-2, adamw_lr=1e-3, num_steps=num_steps, minutes_per_evaluation=60, seed=0)

    def evaluate(transformer) -> dict:
        measured.append({name: weight.clone() for name, weight in transformer.named_parameters()})
        return {}

    train = distill_module.train_together
    monkeypatch.setattr(
        distill_module, "train_together", lambda *args, **named: calls.append(1) or train(*args, **named)
    )
    backend = _AttentionBackendRegistry.get_active_backend()[0]
    state_path = tmp_path / "distill.pt"
    for num_steps in (1, 2, 2):
        distill(
            row_source,
            teacher,
            sigmas,
            state_path,
            settings(num_steps),
            log=lines.append,
            evaluate=evaluate,
        )
    # Otherwise every pipeline in the process would use another backend, and its pictures would not be the same.
    assert _AttentionBackendRegistry.get_active_backend()[0] == backend
    assert torch.load(state_path, weights_only=True)["step"] == 2
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert len(calls) == 2 * 2  # two groups of rows per update; the second call made one update, the third none
    first, second, third = measured
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(second[name], third[name]) for name in first)


class AddOne:
    """A teacher whose steps add 1 to the states."""

    def advance(self, states, segments, means):
        return states + 1


class ZeroRows:
    """A source of rows whose states are 0."""

    architecture = KLEIN

    def draw(self, kind, count, rng):
        return Rows(KleinContext(torch.zeros(count, 1)), torch.zeros(count, 1), torch.zeros(count, 1))


def test_rows_of_a_buffer_move_on_to_the_next_segment():
    buffer = RolloutBuffer("text", 2, ZeroRows(), AddOne())
    rows = buffer.next_rows(None)
    assert buffer.segments.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 1, 1, 2, 2, 3, 3]
    assert rows.states[:, 0].tolist() == buffer.segments.tolist()  # the teacher made that many steps
    assert torch.equal(buffer.targets(rows), rows.states + 1)
    buffer.store(rows.states + 10)
    states = buffer.next_rows(None).states[:, 0].tolist()
    assert states == [0, 0, 10, 10, 11, 11, 12, 12, 1, 1, 11, 11, 12, 12]  # new rows in the slots 0 and 4


def test_the_learning_rate_rises_stays_and_falls():
    rates = [trapezoid(step, 10, warmup=2, decay_share=0.4) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_muon_takes_matrices_and_adamw_the_rest_at_the_scaled_rates():
    module = torch.nn.Conv2d(2, 3, 3)
    weight, bias = module.weight.clone(), module.bias.clone()
    optimizer = MuonAdamW(module, muon_lr=0.1, adamw_lr=0.01)
    module(torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimizer.step(0.5)
    assert module.weight.grad is None
    assert (module.bias - bias).abs().tolist() == pytest.approx(
        [0.005] * 3, rel=1e-3
    )  # AdamW's first step is its rate
    update = (module.weight - weight).detach().flatten(1)
    gram = update @ update.T / update.norm() ** 2 * 3
    torch.testing.assert_close(gram, torch.eye(3), rtol=0, atol=0.5)  # Muon's update is nearly orthogonal
