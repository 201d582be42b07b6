"""From the command line to frozen settings: flags, `--config`, checks that need no file, one-line errors."""

import difflib
import logging
import os
import re
import sys
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from dataclasses import fields
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .errors import InputError, one_line
from .files import read_regular_file
from .flag_types import check_ranges
from .full_settings import FULL_FLAGS, FullSettings
from .model_flags import ModelFlags, TeacherContext
from .settings import LORA_FLAGS, NO_QUANTIZATION, QUANTIZATION_PACKAGES, LoRASettings, Settings, TeacherSettings
from .sizes import check_geometry, size_problem
from .terminal import MAX_REFUSAL_CHARACTERS, as_line
from .text import argument_problem


logger = logging.getLogger(__name__)

MAX_CONFIG_BYTES = 1_000_000
PRESETS = Path(__file__).parents[1] / "configs" / "presets"
LAUNCHER_VARIABLE = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch`

TRANSFORMER_QUANTIZATION = ("quantize", "bnb_quantization_config_path")
QUANTIZATION_SETTINGS = ("quantize", "quantize_text_encoder")
GENERAL_TEACHER_FLAGS = {"teacher_context", "teacher_prompt_suffix", "teacher_picture"}  # all contexts use them
EDITING_FLAGS = ("cond_image_column", "validation_image")
# With --train_mode full, in the place of a LoRA's flags.
INSTEAD = {
    "rank": "; --extract_lora saves a LoRA of that rank beside a whole model",
    "lora_layers": "; --trainable_modules says what of a whole model is trained",
}
TRACKER_PACKAGES = ("tensorboard", "wandb", "comet_ml")


class TextLoader(yaml.BaseLoader):
    """Leaves every YAML value as text, so that `no`, `007` and `1e-4` mean what they mean on the command line.

    Only `null`, `~` and nothing are read as None.
    """


TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(null|~|)$"), ["n", "~", ""])
TextLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


class DefaultsHelpFormatter(ArgumentDefaultsHelpFormatter):
    """Appends the default to each help text that does not state it itself."""

    def _get_help_string(self, action) -> str | None:
        if action.default is None or "Default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class SettingsParser(HfArgumentParser):
    """`HfArgumentParser` that reports an error in one line, without the usage text."""

    def error(self, message: str):
        wrong = message.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
        near = difflib.get_close_matches(wrong, self._option_string_actions, n=1)
        if wrong.startswith("--") and near:
            message += f"; did you mean {near[0]}?"
        if "--hub_token" in (wrong, *near) or wrong.startswith("--hub_t"):
            message = f"{wrong}: cannot be used" + (f"; did you mean {near[0]}?" if near else "")
        self.exit(2, f"{self.prog}: error: {as_line(message, MAX_REFUSAL_CHARACTERS)}\n")


def build_parser(model: ModelFlags, description: str) -> SettingsParser:
    """The parser for a model's script, with the model's choices and defaults."""
    groups = [model.settings_class if group.name == "model" else group.type for group in fields(Settings)]
    parser = SettingsParser(
        groups,
        usage="accelerate launch %(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir FOLDER ...",
        description=description.partition("\n")[0],
        allow_abbrev=False,
        formatter_class=DefaultsHelpFormatter,
    )
    parser.add_argument(
        "--preset",
        default=SUPPRESS,
        metavar="|".join(preset_names()),
        help="Flags that fit a card of that memory, from configs/presets/. --config and the command line win. "
        "Default: none.",
    )
    parser.add_argument(
        "--config", default=SUPPRESS, metavar="FILE", help="YAML file that sets flags. The command line wins."
    )
    parser.set_defaults(**model.default_settings, teacher_context=next(iter(model.teacher_contexts)))
    action_of = tidy_actions(parser)
    action_of["optimizer"].type = str.lower
    if not model.can_edit:
        for name in EDITING_FLAGS:
            action_of[name].help = SUPPRESS
    # `resolve` fills in this default, unless a number of epochs is given.
    parser.set_defaults(max_train_steps=None)
    action_of["max_train_steps"].help += f" Default: {model.default_settings['max_train_steps']}."
    _describe_teacher_contexts(action_of, model.teacher_contexts)
    return parser


def tidy_actions(parser: SettingsParser) -> dict[str, Action]:
    """Flag -> its action, each shown as diffusers spells its flags."""
    action_of = {}
    for action in parser._actions:
        action_of.setdefault(action.dest, action)
        if len(action.option_strings) > 1 and action.dest != "help":
            # --a-b works like --a_b; help and errors show the latter.
            action.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        if action.nargs == "?":
            action.metavar = "true|false"
        if action.option_strings[0].startswith("--no_") and action.nargs == 0:
            action.help = SUPPRESS  # the twin of a switch that is on by default
    return action_of


def _describe_teacher_contexts(action_of: dict, contexts: dict[str, TeacherContext]) -> None:
    context_action, suffix_action = action_of["teacher_context"], action_of["teacher_prompt_suffix"]
    context_action.choices = list(contexts)
    meanings = "; ".join(f"{name}: {context.description}" for name, context in contexts.items())
    context_action.help = f"What the teacher sees of the target picture. {meanings}."
    suffixes = [
        f"'{suffix}' with {name}{pairs}"
        for name, context in contexts.items()
        for suffix, pairs in (
            (context.prompt_suffix, ""),
            (context.other_suffix, " and --teacher_picture other"),
            (context.editing.get("teacher_prompt_suffix"), " and --cond_image_column"),
        )
        if suffix
    ]
    suffix_action.help += f" Default: {'; '.join(suffixes) or 'none'}."
    for name in special_teacher_flags({}):
        if not any(name in context.flags for context in contexts.values()):
            action_of[name].help = SUPPRESS  # a flag of another model's teacher
    for name, context in contexts.items():
        for flag, default in context.flags.items():
            details = context.flag_help.get(flag, "")
            default = "" if default is None else f"Default: {default}"
            if flag in context.editing:
                default += f"; {context.editing[flag]} with --cond_image_column"
            default = default and f"{default}."
            action_of[flag].help = " ".join(
                filter(None, [action_of[flag].help, details, f"Only with --teacher_context {name}.", default])
            )


def special_teacher_flags(contexts: dict[str, TeacherContext]) -> set[str]:
    """The flags that not all teacher contexts use."""
    own = {item.name for item in fields(TeacherSettings)} - GENERAL_TEACHER_FLAGS
    return own | {name for context in contexts.values() for name in context.flags}


def parse_settings(model: ModelFlags, description: str, arguments: list[str] | None = None) -> Settings:
    """Settings from the command line (by default this process's) and from its `--preset` and `--config` files.

    If they are this process's, packages that only other settings need are hidden from later imports.

    Raises:
        InputError: a flag, a combination of flags or the file is wrong.
        SystemExit: for `--help` and for errors that argparse reports, in one line.
    """
    parser = build_parser(model, description)
    is_own = arguments is None
    arguments = sys.argv[1:] if is_own else arguments
    given = parser.parse_args(arguments)
    files = {}
    if "preset" in given:
        files[f"--preset {given.preset}"] = preset_file(given.preset)
    if "config" in given:
        files[f"--config {given.config}"] = Path(given.config)
    # What comes later wins.
    arguments = [*chain(*(config_arguments(path, parser, flag) for flag, path in files.items())), *arguments]
    if files:
        parser.parse_args(arguments)
    groups = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)[: len(fields(Settings))]
    for group in groups:
        check_ranges(group)
    settings = Settings(*groups)
    check_text(settings.flat())
    # Publishing a finished run needs none of the settings that it was trained with.
    if not settings.publishing.push_only:
        settings = resolve(settings, model)
        if "preset" in given and settings.full.is_full and not settings.performance.dry_run:
            logger.warning(
                f"--preset {given.preset}: is for a LoRA, and a whole model takes several times the memory; try "
                "--config configs/full_80gb.yaml, and see with --dry_run what the run takes"
            )
    if is_own:
        hide_torchao(settings)
    return settings


def hide_torchao(settings: Settings) -> None:
    """Makes torchao look as if it was not installed if this run does not need it.

    diffusers would import it wherever it is installed, and peft would ask it about every layer.
    """
    kinds = [getattr(settings.model, name) for name in QUANTIZATION_SETTINGS]
    quantizes = any(QUANTIZATION_PACKAGES.get(kind) == "torchao" for kind in kinds)
    # Its optimizers train whole models.
    optimizes = settings.full.rounds_at_random or (settings.full.is_full and settings.optimizer.use_8bit_adam)
    if not (quantizes or optimizes):
        sys.modules.setdefault("torchao", None)  # what makes Python's own import statement fail, see its reference


def check_text(values: dict[str, Any]) -> None:
    """Raises `InputError` for a flag's value that is not text. It is not shown, since it may be a token."""
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (problem := argument_problem(text)):
                raise InputError(f"--{name}: {problem}")


def preset_names() -> list[str]:
    """From the smallest card to the largest."""
    return sorted((path.stem for path in PRESETS.glob("*.yaml")), key=lambda name: int(name.removesuffix("gb")))


def preset_file(name: str) -> Path:
    """Raises `InputError` if there is no preset of that name."""
    if name.lower() not in (names := preset_names()):
        raise InputError(f"--preset {name}: there is no such preset; pass one of {', '.join(names)}")
    return PRESETS / f"{name.lower()}.yaml"


def config_arguments(path: Path, parser: SettingsParser, flag: str) -> list[str]:
    """The file's settings as command-line arguments.

    Args:
        flag: that names the file, for error messages.

    Raises:
        InputError: the file cannot be read, or holds an unknown flag or something other than values and lists.
    """
    try:
        text = read_regular_file(path, MAX_CONFIG_BYTES).decode("utf-8")
        settings = yaml.load(text, Loader=TextLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{flag}: cannot be read as YAML ({one_line(error)})") from error
    if not isinstance(settings, dict):
        raise InputError(f"{flag}: write one 'flag: value' per line")
    known = {action.dest for action in parser._actions} - {"config", "preset", "help"}
    arguments = []
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{flag}: there is no flag {name!r}{hint}")
        if value is None:
            continue
        if isinstance(value, str):
            arguments.append(f"--{name}={value}")
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            arguments += [f"--{name}", *value]
        else:
            raise InputError(f"{flag}: {name} must be a value or a list of values")
    return arguments


def resolve(settings: Settings, model: ModelFlags) -> Settings:
    """Fills in the defaults that follow from other flags, and checks what can be checked before any file is read."""
    settings = resolve_teacher(without_none(settings), model)
    check(settings, model)
    training, validation = settings.training, settings.validation
    height, width = (
        settings.data.resolution if side is None else side
        for side in (validation.validation_height, validation.validation_width)
    )
    if problem := size_problem(height, width, model.sizes):
        raise InputError(f"--validation_height {height} --validation_width {width}: {problem}")
    num_steps = training.max_train_steps
    if num_steps is None and training.num_train_epochs is None:
        num_steps = model.default_settings["max_train_steps"]
    return settings.replace(
        max_train_steps=num_steps,
        validation_height=height,
        validation_width=width,
        lora_alpha=None if settings.full.is_full else settings.lora.lora_alpha or 2 * settings.lora.rank,
        context_cache_dir=training.context_cache_dir or str(Path(training.output_dir, "context_cache")),
    )


def without_none(settings: Settings) -> Settings:
    """Replaces a quantization "none", which undoes a preset's, by what it is without a flag."""
    chosen = [name for name in QUANTIZATION_SETTINGS if getattr(settings.model, name) == NO_QUANTIZATION]
    return settings.replace(**dict.fromkeys(chosen))


def resolve_teacher(settings: Settings, model: ModelFlags) -> Settings:
    """Refuses the flags of other teacher contexts and fills in the defaults of the chosen one."""
    context, flags = model.teacher_context(settings), settings.flat()
    for name in sorted(special_teacher_flags(model.teacher_contexts) - context.flags.keys()):
        if flags[name] is not None:
            users = " or ".join(key for key, other in model.teacher_contexts.items() if name in other.flags)
            advice = f"goes with --teacher_context {users}; add that, or drop the flag" if users else "drop it"
            raise InputError(f"--{name}: {advice}")
    if "teacher_caption_column" in context.flags and flags["teacher_caption_column"] is None:
        raise InputError(
            f"--teacher_context {settings.teacher.teacher_context}: name the column of the teacher's captions with "
            "--teacher_caption_column"
        )
    defaults = context.defaults(
        is_editing=settings.data.cond_image_column is not None,
        shows_other=settings.teacher.teacher_picture == "other",
    )
    settings = settings.replace(**{name: default for name, default in defaults.items() if flags[name] is None})
    teacher = settings.teacher
    if (teacher.vlm_min_pixels or 0) > (teacher.vlm_max_pixels or 0):
        raise InputError(
            f"--vlm_min_pixels {teacher.vlm_min_pixels}: is above --vlm_max_pixels {teacher.vlm_max_pixels}; pass "
            "both, the smaller one first"
        )
    return settings


def check(settings: Settings, model: ModelFlags) -> None:
    """Raises `InputError` for flags that cannot work together or on this machine."""
    training, validation, optimizer = settings.training, settings.validation, settings.optimizer
    if settings.model.pretrained_model_name_or_path is None:
        raise InputError(f"--pretrained_model_name_or_path: is required, such as {model.example}")
    if settings.publishing.hub_token is not None and training.report_to not in ("tensorboard", "none"):
        raise InputError(
            f"--hub_token: cannot be combined with --report_to {training.report_to}, which stores the command line; "
            "run hf auth login instead"
        )
    if settings.publishing.hub_token is not None and LAUNCHER_VARIABLE in os.environ:
        raise InputError(
            "--hub_token: accelerate launch prints the command line if a run fails; run hf auth login or set HF_TOKEN "
            "instead, or start the script with python or torchrun"
        )
    check_geometry(settings.data, model.sizes)
    resolution = settings.teacher.teacher_resolution
    if resolution is not None and (problem := size_problem(resolution, resolution, model.sizes)):
        raise InputError(f"--teacher_resolution {resolution}: {problem}")
    check_teacher_picture(settings, model)
    distillation = settings.distillation
    if distillation.num_trained_states > distillation.num_rollout_steps:
        raise InputError(
            f"--num_trained_states {distillation.num_trained_states}: the rollout has only "
            f"{distillation.num_rollout_steps} states; pass fewer, or raise --num_rollout_steps"
        )
    if optimizer.use_8bit_adam and optimizer.optimizer != "adamw":
        raise InputError("--use_8bit_adam: needs --optimizer AdamW; drop one of them")
    if validation.preview_only and validation.validation_steps == 0:
        raise InputError("--preview_only: draws the preview, which --validation_steps 0 turns off; drop one of them")
    for flag, package, is_used in (
        ("--optimizer prodigy", "prodigyopt", optimizer.optimizer == "prodigy"),
        ("--use_8bit_adam", "torchao" if settings.full.is_full else "bitsandbytes", optimizer.use_8bit_adam),
        ("--bf16_update stochastic_rounding", "torchao", settings.full.bf16_update == "stochastic_rounding"),
        *(
            (f"--{name} {kind}", package, getattr(settings.model, name) == kind)
            for kind, package in QUANTIZATION_PACKAGES.items()
            for name in QUANTIZATION_SETTINGS
        ),
        *((f"--report_to {name}", name, training.report_to == name) for name in TRACKER_PACKAGES),
    ):
        if is_used and find_spec(package) is None and not settings.performance.dry_run:
            raise InputError(f"{flag}: run pip install {package} first")
    if len(validation.retention_prompts) < 2:
        raise InputError(
            "--retention_prompts: give at least two prompts; retention is measured relative to the distance between "
            "their images"
        )
    if settings.performance.offload_activations and not settings.performance.gradient_checkpointing:
        raise InputError("--offload_activations: goes with --gradient_checkpointing; add that, or drop the flag")
    check_quantization_flags(settings)
    check_train_mode(settings, model)
    if settings.performance.card is not None and not settings.performance.dry_run:
        raise InputError("--card: goes with --dry_run; add that, or drop the flag")
    if training.no_context_cache and training.encode_only:
        raise InputError("--encode_only: fills the cache, which --no_context_cache turns off; drop one of them")
    if training.no_context_cache and training.context_cache_dir:
        raise InputError("--no_context_cache: cannot be combined with --context_cache_dir; drop one of them")


def check_quantization_flags(settings: Settings) -> None:
    """Raises `InputError` for a quantization of the transformer that does not go with other flags."""
    quantized = [f"--{name}" for name in TRANSFORMER_QUANTIZATION if getattr(settings.model, name) is not None]
    if len(quantized) > 1:
        raise InputError(f"{quantized[0]}: cannot be combined with {quantized[1]}; drop one of them")
    refusals = {
        "--train_mode full": settings.full.is_full,
        "--fsdp": settings.performance.fsdp,
        "--offload_transformer": settings.performance.offload_transformer,
    }
    for flag, is_given in refusals.items():
        if is_given and quantized:
            kind = settings.model.quantize
            other, hint = quantized[0], ""
            if kind is not None:
                other, hint = f"--quantize {kind}", f" (--quantize {NO_QUANTIZATION} if a preset or --config sets it)"
            raise InputError(f"{flag}: cannot be combined with {other}; drop one of them{hint}")


def check_train_mode(settings: Settings, model: ModelFlags) -> None:
    """Raises `InputError` for flags of a LoRA with `--train_mode full`, and the other way round."""
    flags, is_full = settings.flat(), settings.full.is_full
    others = LORA_FLAGS if is_full else FULL_FLAGS
    defaults = {item.name: item.default for group in (LoRASettings, FullSettings) for item in fields(group)}
    for name in others:
        if flags[name] != model.default_settings.get(name, defaults[name]):
            other, hint = "lora" if is_full else "full", INSTEAD.get(name, "")
            raise InputError(f"--{name}: goes with --train_mode {other}; pass that, or drop the flag{hint}")
    if not is_full:
        return
    if settings.training.mixed_precision == "fp16":
        raise InputError("--train_mode full: cannot be combined with --mixed_precision fp16; pass bf16 or no")
    if settings.full.rounds_at_random and settings.optimizer.use_8bit_adam and settings.performance.is_sharded:
        raise InputError(
            "--bf16_update stochastic_rounding: torchao's 8-bit optimizer cannot round sharded weights at random; "
            "drop --use_8bit_adam, or pass --bf16_update master_weights"
        )
    if settings.optimizer.optimizer != "adamw":
        raise InputError(f"--train_mode full: needs --optimizer AdamW; drop --optimizer {flags['optimizer']}")
    if settings.full.ema_device == "cuda" and settings.performance.offload_transformer:
        raise InputError(
            "--ema_device cuda: cannot be combined with --offload_transformer, which keeps all weights in host "
            "memory; drop one of them"
        )
    source, target = (Path(path) for path in (flags["pretrained_model_name_or_path"], flags["output_dir"]))
    if source.is_dir() and Path(os.path.realpath(target)).is_relative_to(os.path.realpath(source)):
        raise InputError(
            f"--output_dir {target}: is in the folder of --pretrained_model_name_or_path, which is left as it is; "
            "choose another folder"
        )


def check_teacher_picture(settings: Settings, model: ModelFlags) -> None:
    """Raises `InputError` for flags of editing, or of the teacher's picture, that do not go together."""
    data, teacher = settings.data, settings.teacher
    for name in EDITING_FLAGS:
        if settings.flat()[name] is not None and not model.can_edit:
            raise InputError(f"--{name}: {model.name} takes no pictures to edit; drop the flag")
    if settings.validation.validation_image is not None and data.cond_image_column is None:
        raise InputError("--validation_image: goes with --cond_image_column; add that, or drop the flag")
    if data.group_column is not None and teacher.teacher_picture != "other":
        raise InputError("--group_column: goes with --teacher_picture other; add that, or drop the flag")
    if teacher.teacher_picture == "other":
        if data.cond_image_column is not None:
            raise InputError(
                "--teacher_picture other: cannot be combined with --cond_image_column, whose teacher must see the "
                "result of the edit; drop one of them"
            )
        if teacher.teacher_caption_column is not None:
            raise InputError(
                f"--teacher_picture other: the teacher of --teacher_context {teacher.teacher_context} sees no "
                "picture; drop one of them"
            )
