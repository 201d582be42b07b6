"""What a training costs, counted in forward passes of the student for one sample.

The other passes' costs are ratios of FLOPs: `Architecture.costs`. With a frozen base, a backward pass costs about as
much as a forward pass, since it computes gradients of the activations and of the adapters only.
"""

from fractions import Fraction

from benchmarks.miniature.architecture import Architecture


# Of D-OPSD's student, by default and as published, and the number of states that a baseline sees in a step.
NUM_ROLLOUT_STEPS = 4
NUM_PRIOR_PICTURES = 200  # drawn by the base for SFT with prior preservation


def sampled_cost(num_trained: int, num_rollout_steps: int, teacher: float, forward_and_backward: float) -> float:
    """Of one sample whose student is trained on `num_trained` states of its trajectory, drawn at random.

    The student walks up to the last of them. Of M states out of K, it is the (K + 1) M / (M + 1)-th on average.

    Args:
        teacher: cost of the teacher's forward pass.
    """
    num_visited = Fraction((num_rollout_steps + 1) * num_trained, num_trained + 1)
    return float(num_visited - num_trained) + num_trained * (teacher + forward_and_backward)


def step_cost(kind: str, flags: dict, architecture: Architecture) -> float:
    """Of one training step, on average.

    Args:
        kind, flags: of a `Method` that is trained; `train_batch_size` must be among the flags.
    """
    costs = architecture.costs
    num_samples = flags["train_batch_size"] * flags.get("gradient_accumulation_steps", 1)
    if kind == "dopsd":
        num_trained, num_rollout_steps = flags["num_trained_states"], flags.get("num_rollout_steps", NUM_ROLLOUT_STEPS)
        sampled = num_trained, num_rollout_steps
        cost = sampled_cost(*sampled, costs.teacher, costs.forward_and_backward)
        if flags["with_prior_preservation"]:
            prior = sampled_cost(*sampled, costs.base, costs.forward_and_backward)
            cost += prior / flags.get("prior_every", 1)
    elif kind.startswith("one_state"):
        cost = sampled_cost(1, NUM_ROLLOUT_STEPS, costs.teacher, costs.forward_and_backward)
    elif kind == "sft_prior":
        cost = 2 * NUM_ROLLOUT_STEPS * costs.forward_and_backward
    elif kind in ("sft_teacher", "off_policy"):
        cost = NUM_ROLLOUT_STEPS * (costs.teacher + costs.forward_and_backward)
    else:
        assert kind in ("sft", "sft_deployed"), kind
        cost = NUM_ROLLOUT_STEPS * costs.forward_and_backward
    return num_samples * cost


def preparation_cost(kind: str, architecture: Architecture) -> float:
    """Before the first step: the pictures that DreamBooth's prior preservation draws."""
    return NUM_PRIOR_PICTURES * architecture.num_steps * architecture.costs.base if kind == "sft_prior" else 0.0


def training_cost(kind: str, flags: dict, num_steps: int, architecture: Architecture) -> float:
    return preparation_cost(kind, architecture) + num_steps * step_cost(kind, flags, architecture)


def equal_cost_steps(kind: str, flags: dict, cost: float, architecture: Architecture) -> int:
    """The number of steps whose training costs about `cost`."""
    return round((cost - preparation_cost(kind, architecture)) / step_cost(kind, flags, architecture))
