"""Settings of a comparison: a dataclass field per flag of `evaluate_lora.py`."""

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from ..command_line import DefaultsHelpFormatter, SettingsParser, check_text, tidy_actions
from ..errors import InputError
from ..flag_types import Count, Range, Seed, check_ranges, flag
from ..prior import TriggerWord
from .comparison import Kind


DEFAULT_STRENGTHS = (0.5, 1.0, 1.5)
# More pictures per prompt would take hours.
SeedCount = Annotated[int, Range("a whole number from 1 to 64", 1, 64)]
Strength = Annotated[float, Range("a number above 0 and at most 10", 0, 10, open_low=True)]
# Models that pad every prompt to this length would take all memory.
TextLength = Annotated[int, Range("a whole number from 1 to 4096", 1, 4096)]
PromptCount = Annotated[int, Range("a whole number from 1 to 200", 1, 200)]


# What a subject is called without --class_word.
DEFAULT_CLASS = {"person": "person", "pet": "animal", "object": "object"}
DETERMINERS = frozenset("a an the one some its his her their my our your own".split())
REQUIRED = {
    "pretrained_model_name_or_path": "the base model's hub id",
    "lora": "pytorch_lora_weights.safetensors",
    "instance_data_dir": "the folder of the pictures that the LoRAs were trained on",
}


@dataclass(frozen=True)
class BaseModelSettings:
    _argument_group_name = "base model"

    pretrained_model_name_or_path: str | None = flag(
        None, "Hub id or folder of the few-step model that the LoRAs belong to. Default: none, it is required."
    )
    revision: str | None = flag(None, "Branch, tag or commit of the hub checkpoint. Default: main.")
    variant: str | None = flag(
        None, "Variant of the checkpoint's files, such as fp16. Default: the files without a variant."
    )
    cache_dir: str | None = flag(None, "Folder for downloads. Default: the Hugging Face cache.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None, "Precision of the model that draws. Default: bf16 on a GPU, no on a CPU."
    )
    enable_model_cpu_offload: bool = flag(
        False, "Keep on the GPU only the part of the pipeline that computes: less memory, slower."
    )


@dataclass(frozen=True)
class LoRAListSettings:
    _argument_group_name = "LoRAs"

    lora: list[str] | None = flag(
        None,
        "LoRAs to compare, of any trainer: each a .safetensors file, its folder or a hub id, or NAME=that to give it "
        "a name in the tables. Default: none, at least one is required.",
    )
    together_with: str | None = flag(
        None,
        "Another LoRA: each --lora is also drawn together with it, both at full strength. Default: none.",
    )
    strengths: list[Strength] = flag(
        DEFAULT_STRENGTHS,
        "Strengths at which each LoRA is drawn. 1 is always among them; at the others, only prompts for the subject "
        "and unrelated ones are drawn.",
    )


@dataclass(frozen=True)
class TrainingPictureSettings:
    _argument_group_name = "training pictures"

    instance_data_dir: str | None = flag(
        None,
        "Folder of the pictures that the LoRAs were trained on, with or without captions. Default: none, it is "
        "required.",
    )
    instance_prompt: str | None = flag(
        None, "Caption that all training pictures had, if they have none in the folder. Default: none."
    )
    image_column: str = flag("image", "Column with the pictures, in a metadata.jsonl or metadata.csv.")
    caption_column: list[str] | None = flag(
        None, "Column with the captions, in a metadata.jsonl or metadata.csv. Default: all columns with texts."
    )
    cond_image_column: list[str] | None = flag(
        None, "Column with the pictures to edit, which the LoRAs do not learn to draw. Default: none."
    )
    kind: Kind | None = flag(
        None,
        "What the LoRAs were taught, which chooses the built-in prompts. Default: none, it is required without "
        "--prompts.",
    )
    trigger_word: str | None = flag(
        None, "The new word as in the captions, as WORD or WORD=CLASS. Default: none, the LoRAs have none."
    )
    class_word: str | None = flag(
        None,
        "What the subject is in words that every model knows, such as dog or 'oil painting'. The built-in prompts "
        "have it after the new word, as in 'a photo of sks dog'. Default: that of --trigger_word; without one, the "
        "prompts have the new word alone.",
    )


@dataclass(frozen=True)
class PromptSettings:
    _argument_group_name = "prompts"

    prompts: str | None = flag(
        None,
        "File of prompts to draw: a text file with one prompt for the subject per line, or a prompts.json of another "
        "comparison. Default: the built-in prompts of --kind.",
    )
    write_prompts: bool = flag(
        False, "Have a vision-language model write the prompts for the subject from the training pictures."
    )
    vlm_name_or_path: str | None = flag(
        None,
        "Hub id or folder of the vision-language model for --write_prompts and --judge. Default: {default_vlm}.",
    )
    num_prompts: PromptCount = flag(10, "Prompts for the subject, of the built-in ones or to be written.")
    validation_image: list[str] | None = flag(
        None,
        "With --kind edit: pictures to edit, which the LoRAs were not trained on. The prompts use them in turn. "
        "Default: none, they are required there.",
    )


@dataclass(frozen=True)
class DrawingSettings:
    _argument_group_name = "drawing"

    num_seeds: SeedCount = flag(4, "Pictures per prompt, each from another noise, the same for all LoRAs.")
    seed: Seed = flag(0, "Seed of the first picture of each prompt; the others follow.")
    num_inference_steps: Count | None = flag(
        None, "Sampling steps. Default: those that the model is deployed at, {deployed_steps}."
    )
    resolution: Count = flag(1024, "Height and width of the pictures, in pixels.")
    height: Count | None = flag(None, "Height of the pictures, in pixels. Default: --resolution.")
    width: Count | None = flag(None, "Width of the pictures, in pixels. Default: --resolution.")
    max_sequence_length: TextLength = flag(512, "Maximum number of tokens in a prompt.")
    batch_size: Count | None = flag(
        None, "Pictures that are drawn at once. Default: 4, halved as long as they do not fit the memory."
    )


@dataclass(frozen=True)
class MeasuringSettings:
    _argument_group_name = "measuring"

    clip_model: str = flag("openai/clip-vit-large-patch14", "Hub id or folder of the CLIP model that is measured by.")
    dino_model: str = flag("facebook/dinov2-base", "Hub id or folder of the DINO model that is measured by.")
    mask_background: bool = flag(
        False,
        "Measure likeness on the subject alone as well, which --mask_model separates by the class word. Not with "
        "--kind style or edit.",
    )
    mask_model: str = flag(
        "CIDAS/clipseg-rd64-refined", "Hub id or folder of the CLIPSeg model for --mask_background."
    )
    judge: bool = flag(False, "Also ask a vision-language model how well each picture fits the training pictures.")


@dataclass(frozen=True)
class OutputSettings:
    _argument_group_name = "output"

    output_dir: str = flag("comparison", "Folder for the pictures, the figures and comparison.html.")


GROUPS = (
    BaseModelSettings,
    LoRAListSettings,
    TrainingPictureSettings,
    PromptSettings,
    DrawingSettings,
    MeasuringSettings,
    OutputSettings,
)


@dataclass(frozen=True)
class EvaluationSettings(*reversed(GROUPS)):
    """All settings of a comparison.

    Resolved ones have these filled in: `height`, `width`, `class_word` ("" for none), `trigger_word` (the word alone;
    None for none), `vlm_name_or_path`, and, once the base model is known, `num_inference_steps`. `kind` is None if
    `--prompts` is given without it.
    """

    def replace(self, **values: Any) -> "EvaluationSettings":
        return replace(self, **values)

    def as_dict(self) -> dict[str, Any]:
        """Flag without dashes -> value, in the order of `--help`."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def build_parser(texts: dict[str, str], description: str = "") -> SettingsParser:
    """The parser of `evaluate_lora.py`.

    Args:
        texts: what the script fills into the help texts: "default_vlm", "deployed_steps".
    """
    parser = SettingsParser(
        GROUPS,
        usage="%(prog)s --pretrained_model_name_or_path MODEL --lora FILE ... --instance_data_dir FOLDER --kind KIND",
        description=description.partition("\n")[0],
        allow_abbrev=False,
        formatter_class=DefaultsHelpFormatter,
    )
    tidy_actions(parser)
    for action in parser._actions:
        for name, text in texts.items():
            action.help = action.help.replace(f"{{{name}}}", text)
    return parser


def parse_settings(texts: dict[str, str], description: str, arguments: list[str] | None = None) -> EvaluationSettings:
    """Settings from the command line, by default this process's, checked as far as no file is needed.

    Args:
        texts: see `build_parser`.

    Raises:
        InputError: a flag, or a combination of flags, is wrong.
        SystemExit: for `--help` and for errors that argparse reports, in one line.
    """
    parser = build_parser(texts, description)
    parser.parse_args(arguments)  # reports unknown flags in one line
    groups = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    values = {}
    for group in groups[: len(GROUPS)]:
        check_ranges(group)
        values |= vars(group)
    settings = EvaluationSettings(**values)
    check_text(settings.as_dict())
    return resolve(settings, texts["default_vlm"])


def resolve(settings: EvaluationSettings, default_vlm: str) -> EvaluationSettings:
    """Checks the flags against each other, and fills in the defaults that follow from others.

    Raises:
        InputError: flags do not go together, or one is missing.
    """
    for name, example in REQUIRED.items():
        if not getattr(settings, name):
            raise InputError(f"--{name}: is required, such as {example}")
    word, class_word = None, settings.class_word
    if settings.trigger_word is not None:
        trigger = TriggerWord.parse(settings.trigger_word)
        word, class_word = trigger.word, class_word or without_determiners(trigger.class_words)
        if class_word and TriggerWord(word, "").is_in(class_word):
            raise InputError(
                f"--class_word {class_word}: contains the new word {word}; name what it is in words that every model "
                "knows"
            )
    pictures = os.path.realpath(settings.instance_data_dir)
    if Path(os.path.realpath(settings.output_dir)).is_relative_to(pictures):
        raise InputError(
            f"--output_dir {settings.output_dir}: is in --instance_data_dir, where drawings would be taken for "
            "training pictures; choose another folder"
        )
    settings = settings.replace(
        trigger_word=word,
        class_word=(class_word or "").strip() or DEFAULT_CLASS.get(settings.kind, ""),
        height=settings.height or settings.resolution,
        width=settings.width or settings.resolution,
        strengths=sorted({1.0, *settings.strengths}),
        vlm_name_or_path=settings.vlm_name_or_path or default_vlm,
    )
    check_prompt_flags(settings)
    if settings.mask_background and settings.kind in ("style", "edit"):
        raise InputError(f"--mask_background: --kind {settings.kind} has no subject to separate; drop one of them")
    if settings.mask_background and not settings.class_word:
        raise InputError("--mask_background: name what is to be separated with --class_word, such as dog")
    return settings


def without_determiners(class_words: str) -> str:
    """The words; nothing if they name no class. Training takes "sks=a", which makes "a corgi" of "sks corgi"."""
    return "" if DETERMINERS.issuperset(class_words.lower().split()) else class_words


def check_prompt_flags(settings: EvaluationSettings) -> None:
    """Raises `InputError` for flags about the prompts that do not go together."""
    is_editing = settings.validation_image is not None
    if settings.prompts is not None and settings.write_prompts:
        raise InputError("--write_prompts: cannot be combined with --prompts; drop one of them")
    if settings.judge and settings.kind is None:
        raise InputError("--judge: asks about a --kind; pass person, pet, object, style or edit")
    if settings.kind is None and settings.prompts is None:
        raise InputError("--kind: is required without --prompts; pass person, pet, object, style or edit")
    if is_editing and settings.kind not in ("edit", None):
        raise InputError("--validation_image: goes with --kind edit; pass that, or drop the flag")
    if settings.kind == "edit" and not is_editing:
        raise InputError("--kind edit: needs pictures to edit; pass --validation_image with one or several files")
    if settings.write_prompts and not (settings.trigger_word or settings.class_word):
        raise InputError("--write_prompts: say what to write about with --trigger_word or --class_word")
    makes_edits = settings.kind == "edit" and settings.prompts is None and not settings.write_prompts
    if makes_edits and not (settings.trigger_word and settings.class_word):
        raise InputError(
            "--kind edit: the built-in instructions need --trigger_word, and in --class_word what it stands for, such "
            "as 'an oil painting'; pass both, or your instructions with --prompts"
        )
