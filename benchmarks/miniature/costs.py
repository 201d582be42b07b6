"""What a training costs, counted in forward passes of the student for one sample.

The other passes' costs are ratios of FLOPs: `Architecture.costs`. With a frozen base, a backward pass costs about as
much as a forward pass, since it computes gradients of the activations and of the adapters only.
"""

from fractions import Fraction

from benchmarks.miniature.architecture import Architecture


# Of D-OPSD's student, by default and as published, and the number of states that a baseline sees in a step.
NUM_ROLLOUT_STEPS = 4
NUM_PRIOR_PICTURES = 200  # at most; drawn by the base for SFT with prior preservation


def sampled_cost(num_trained: int, num_rollout_steps: int, teacher: float, forward_and_backward: float) -> float:
    """Of one sample whose student is trained on `num_trained` states of its trajectory, drawn at random.

    The student walks up to the last of them. Of M states out of K, it is the (K + 1) M / (M + 1)-th on average.

    Args:
        teacher: cost of the teacher's forward pass.
    """
    num_visited = Fraction((num_rollout_steps + 1) * num_trained, num_trained + 1)
    return float(num_visited - num_trained) + num_trained * (teacher + forward_and_backward)


def num_samples(flags: dict) -> int:
    """Of one training step."""
    return flags["train_batch_size"] * flags.get("gradient_accumulation_steps", 1)


def step_cost(kind: str, flags: dict, architecture: Architecture, num_draws: int = NUM_ROLLOUT_STEPS) -> float:
    """Of one training step, on average.

    Args:
        kind, flags: of a `Method` that is trained; `train_batch_size` must be among the flags.
        num_draws: of flow matching, see `Method`.
    """
    costs = architecture.costs
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
        cost = 2 * num_draws * costs.forward_and_backward
    elif kind in ("sft_teacher", "off_policy"):
        cost = NUM_ROLLOUT_STEPS * (costs.teacher + costs.forward_and_backward)
    else:
        assert kind in ("sft", "sft_deployed"), kind
        cost = num_draws * costs.forward_and_backward
    return num_samples(flags) * cost


def num_prior_pictures(flags: dict, num_steps: int, num_draws: int = NUM_ROLLOUT_STEPS) -> int:
    """No more than the training draws from."""
    return min(NUM_PRIOR_PICTURES, num_steps * num_samples(flags) * num_draws)


def preparation_cost(kind: str, num_pictures: int, architecture: Architecture) -> float:
    """Before the first step: the pictures that DreamBooth's prior preservation draws."""
    return num_pictures * architecture.num_steps * architecture.costs.base if kind == "sft_prior" else 0.0


def training_cost(
    kind: str, flags: dict, num_steps: int, architecture: Architecture, num_draws: int = NUM_ROLLOUT_STEPS
) -> float:
    prepared = preparation_cost(kind, num_prior_pictures(flags, num_steps, num_draws), architecture)
    return prepared + num_steps * step_cost(kind, flags, architecture, num_draws)


def equal_cost_steps(kind: str, flags: dict, cost: float, architecture: Architecture) -> int:
    """The number of steps whose training costs about `cost`, with all `NUM_PRIOR_PICTURES`."""
    prepared = preparation_cost(kind, NUM_PRIOR_PICTURES, architecture)
    return round((cost - prepared) / step_cost(kind, flags, architecture))
