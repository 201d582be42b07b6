"""Settings for what follows training: evaluation and publishing."""

from dataclasses import dataclass

from .evaluation.comparison import Kind
from .flag_types import MayDiffer, flag


@dataclass(frozen=True)
class AfterTrainingSettings:
    _argument_group_name = "evaluation"

    evaluate: MayDiffer[Kind | None] = flag(
        None,
        "After training, compare the LoRA with the base as evaluate_lora.py does, with its prompts for this kind of "
        "subject. The page is evaluation/comparison.html in --output_dir; its figures are also in report.html and on "
        "the card. If it fails, the run has still succeeded. Default: none, nothing is compared.",
    )
    evaluate_with: MayDiffer[list[str] | None] = flag(
        None,
        "With --evaluate: more flags of evaluate_lora.py as NAME=VALUE, such as num_seeds=8 or "
        "lora=other.safetensors. A flag of several values is repeated. Default: none.",
    )


@dataclass(frozen=True)
class PublishingSettings:
    _argument_group_name = "publishing"

    push_to_hub: MayDiffer[bool] = flag(
        False, "Publish the LoRA or the model, its card and its sheets on the Hugging Face Hub after training."
    )
    push_only: MayDiffer[bool] = flag(False, "Publish the finished run in --output_dir without training anything.")
    hub_model_id: MayDiffer[str | None] = flag(
        None, "Hub repository, ACCOUNT/NAME. Default: the name of the output folder, in your account."
    )
    hub_private_repo: MayDiffer[bool] = flag(False, "Make the hub repository private.")
    hub_token: MayDiffer[str | None] = flag(None, "Hub token. Default: the one stored by `hf auth login`.")
