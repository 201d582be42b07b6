"""What the training scripts share: a model's conventions, the on-policy rollout, and student and teacher adapters."""


class InputError(ValueError):
    """A user's mistake. The message is one line that names the flag or the file and says what to do."""
