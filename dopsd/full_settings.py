"""Settings of `--train_mode`: a LoRA, or the transformer's own weights."""

from dataclasses import dataclass, fields
from typing import Literal

from .flag_types import Count, MayDiffer, MustMatch, flag


@dataclass(frozen=True)
class FullSettings:
    _argument_group_name = "full fine-tuning"

    train_mode: MustMatch[Literal["lora", "full"]] = flag(
        "lora", "What is trained: a LoRA, or the weights of the transformer themselves."
    )
    trainable_modules: MustMatch[str | None] = flag(
        None,
        "With --train_mode full: modules to train, with all that is in them; names or endings of names, separated by "
        "commas, or a regular expression that matches whole names. Default: none, the whole transformer is trained.",
    )
    bf16_update: MustMatch[Literal["master_weights", "stochastic_rounding"]] = flag(
        "master_weights",
        "With --train_mode full and bf16: how steps that are smaller than the weights' precision are kept. "
        "master_weights trains a float32 copy, which takes 6 more bytes per weight with its gradient; "
        "stochastic_rounding rounds up or down at random.",
    )
    ema_device: MayDiffer[Literal["auto", "cuda", "cpu"]] = flag(
        "auto",
        "With --train_mode full: where the teacher's and the base model's weights are, on the GPU or in host memory. "
        "auto takes host memory if they do not fit.",
    )
    save_transformer_only: MayDiffer[bool] = flag(
        False, "With --train_mode full: save the transformer without the pipeline's other parts."
    )
    extract_lora: MayDiffer[Count | None] = flag(
        None,
        "With --train_mode full: also save the change as a LoRA of this rank, the nearest that there is. Default: no "
        "LoRA is saved.",
    )

    @property
    def is_full(self) -> bool:
        return self.train_mode == "full"

    @property
    def rounds_at_random(self) -> bool:
        return self.is_full and self.bf16_update == "stochastic_rounding"


# Flags without effect on a LoRA.
FULL_FLAGS = tuple(item.name for item in fields(FullSettings) if item.name != "train_mode")
