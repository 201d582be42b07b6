"""What a training costs, counted in forward passes of the student for one sample.

The other passes' costs are ratios of FLOPs, measured with torch's `FlopCounterMode` on the shipped model. With a
frozen base, a backward pass costs about as much as a forward pass, since it computes gradients of the activations and
of the adapters only.
"""

from fractions import Fraction

from benchmarks.miniature.parts import NUM_STEPS


FORWARD_AND_BACKWARD = 2.09
TEACHER = 1.71  # its sequence has the picture's tokens as well
BASE = 0.87  # no adapter
NUM_PRIOR_PICTURES = 200  # drawn by the base for SFT with prior preservation


def sampled_cost(num_trained: int, teacher: float) -> float:
    """Of one sample whose student is trained on `num_trained` states of its trajectory, drawn at random.

    The student walks up to the last of them. Of M states out of K, it is the (K + 1) M / (M + 1)-th on average.
    """
    num_visited = Fraction((NUM_STEPS + 1) * num_trained, num_trained + 1)
    return float(num_visited - num_trained) + num_trained * (teacher + FORWARD_AND_BACKWARD)


def step_cost(kind: str, flags: dict) -> float:
    """Of one training step, on average.

    Args:
        kind, flags: of a `Method` that is trained; `train_batch_size` must be among the flags.
    """
    num_samples = flags["train_batch_size"] * flags.get("gradient_accumulation_steps", 1)
    if kind == "dopsd":
        num_trained = flags["num_trained_states"]
        cost = sampled_cost(num_trained, TEACHER)
        if flags["with_prior_preservation"]:
            cost += sampled_cost(num_trained, BASE) / flags.get("prior_every", 1)
    elif kind.startswith("one_state"):
        cost = sampled_cost(1, TEACHER)
    elif kind == "sft_prior":
        cost = 2 * NUM_STEPS * FORWARD_AND_BACKWARD
    elif kind in ("sft_teacher", "off_policy"):
        cost = NUM_STEPS * (TEACHER + FORWARD_AND_BACKWARD)
    else:
        assert kind in ("sft", "sft_deployed"), kind
        cost = NUM_STEPS * FORWARD_AND_BACKWARD
    return num_samples * cost


def preparation_cost(kind: str) -> float:
    """Before the first step: the pictures that DreamBooth's prior preservation draws."""
    return NUM_PRIOR_PICTURES * NUM_STEPS * BASE if kind == "sft_prior" else 0.0


def training_cost(kind: str, flags: dict, num_steps: int) -> float:
    return preparation_cost(kind) + num_steps * step_cost(kind, flags)


def equal_cost_steps(kind: str, flags: dict, cost: float) -> int:
    """The number of steps whose training costs about `cost`."""
    return round((cost - preparation_cost(kind)) / step_cost(kind, flags))
