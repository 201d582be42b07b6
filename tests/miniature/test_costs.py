from itertools import combinations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.miniature import costs, world
from benchmarks.miniature.architectures import architecture_of
from benchmarks.miniature.baselines import encode_pictures
from benchmarks.miniature.concepts import CONCEPTS, training_pictures
from benchmarks.miniature.costs import NUM_ROLLOUT_STEPS
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.methods import ALL_STATES, DOPSD, DOPSD_BOTH, EQUAL_COST_TABLE, NUM_TRAIN_STEPS, SFT_PRIOR
from dopsd.lora_roles import StudentTeacherLoRA, lora_target_modules
from dopsd.rollout import rollout, seeded_noise


def test_the_passes_cost_what_the_constants_say(miniature):
    architecture = architecture_of(miniature)
    targets = lora_target_modules(miniature.transformer, architecture.lora_layers)
    roles = StudentTeacherLoRA(miniature.transformer, targets, rank=16, alpha=32)
    pictures = encode_pictures(
        miniature,
        *training_pictures(CONCEPTS[0], 0),
        prompt_suffix=world.REFERENCE_SUFFIX,
    )
    noise = seeded_noise(miniature.latent_shape(world.SIDE, world.SIDE), [0] * len(pictures.x0))
    timestep = miniature.schedule(world.SIDE, world.SIDE, NUM_ROLLOUT_STEPS).timesteps[0]

    def predict(context):
        return miniature.predict_velocity(noise, timestep, context)

    def flops(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    forward = flops(lambda: predict(pictures.student))
    assert flops(lambda: predict(pictures.student).sum().backward()) / forward == pytest.approx(
        architecture.costs.forward_and_backward, abs=0.01
    )
    assert flops(lambda: roles.as_teacher(predict)(pictures.teacher)) / forward == pytest.approx(
        architecture.costs.teacher, abs=0.01
    )
    assert flops(lambda: roles.as_base(predict)(pictures.student)) / forward == pytest.approx(
        architecture.costs.base, abs=0.01
    )
    assert flops(lambda: roles.as_base(predict)(pictures.teacher)) / forward == pytest.approx(
        architecture.costs.base_teacher, abs=0.01
    )


@pytest.mark.parametrize("num_trained", [1, 2, 3, 4])
def test_a_sampled_step_costs_the_mean_over_all_draws(num_trained, miniature):
    schedule = miniature.schedule(world.SIDE, world.SIDE, NUM_ROLLOUT_STEPS)
    totals = []
    for trained in combinations(range(NUM_ROLLOUT_STEPS), num_trained):
        calls = {"student": 0, "teacher": 0}

        def count(role, latents, calls=calls):
            calls[role] += 1
            return latents

        noise = seeded_noise((4, 2, 2), [0])
        steps = rollout(
            lambda x, t, count=count: count("student", x),
            lambda x, t, count=count: count("teacher", x),
            noise,
            schedule,
            trained=trained,
        )
        assert len(list(steps)) == calls["teacher"] == num_trained
        walked = calls["student"] - num_trained
        totals.append(walked + num_trained * (2 + 3))
    assert costs.sampled_cost(num_trained, NUM_ROLLOUT_STEPS, 2, 3) == pytest.approx(sum(totals) / len(totals))


def test_a_step_of_every_method_by_hand():
    def cost(kind, **flags):
        return costs.step_cost(kind, {"train_batch_size": 2} | ALL_STATES | flags, KLEIN)

    all_states = 4 * (1.71 + 2.09)
    assert cost("dopsd") == cost("off_policy") == pytest.approx(2 * all_states)
    assert cost("dopsd", gradient_accumulation_steps=3) == pytest.approx(6 * all_states)
    one, prior = 1.5 + 1.71 + 2.09, 1.5 + 0.87 + 2.09
    assert cost("dopsd", num_trained_states=1) == cost("one_state_by_norm") == pytest.approx(2 * one)
    with_prior = {"num_trained_states": 1, "with_prior_preservation": True}
    assert cost("dopsd", **with_prior) == pytest.approx(2 * (one + prior))
    assert cost("dopsd", **with_prior, prior_every=2) == pytest.approx(2 * (one + prior / 2))
    assert cost("sft") == pytest.approx(2 * 4 * 2.09) and cost("sft_prior") == 2 * cost("sft")
    assert SFT_PRIOR.cost(30, KLEIN) == pytest.approx(200 * 4 * 0.87 + 30 * cost("sft_prior"))
    # Ten steps of two pictures draw from the prior pictures 80 times.
    assert SFT_PRIOR.cost(10, KLEIN) == pytest.approx(80 * 4 * 0.87 + 10 * cost("sft_prior"))


def test_the_table_at_equal_cost_is_at_equal_cost():
    wanted = DOPSD.cost(NUM_TRAIN_STEPS, KLEIN)
    for method in EQUAL_COST_TABLE:
        num_steps = method.num_steps(NUM_TRAIN_STEPS)
        assert method.cost(num_steps, KLEIN) == pytest.approx(wanted, rel=0.02)
    assert DOPSD_BOTH.cost(NUM_TRAIN_STEPS, KLEIN) < 0.7 * wanted
