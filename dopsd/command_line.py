"""From the command line to frozen settings: flags, `--config`, checks that need no file, one-line errors."""

import difflib
import re
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser

from .data.buckets import check_geometry, size_problem
from .errors import DOPSDError, InputError, first_line, one_line
from .model import Model, TeacherContext
from .settings import Settings, TeacherSettings, check_ranges


# Flags that only some teacher contexts use.
CONTEXT_FLAGS = tuple(
    item.name for item in fields(TeacherSettings) if item.name not in ("teacher_context", "teacher_prompt_suffix")
)
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
        wrong = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        near = difflib.get_close_matches(wrong, self._option_string_actions, n=1)
        if wrong.startswith("--") and near:
            message += f"; did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser(model: Model, description: str) -> SettingsParser:
    """The parser for a model's script, with the model's choices and defaults."""
    groups = [model.settings_class if group.name == "model" else group.type for group in fields(Settings)]
    parser = SettingsParser(
        groups,
        usage="accelerate launch %(prog)s --instance_data_dir FOLDER --instance_prompt TEXT ...",
        description=description,
        allow_abbrev=False,
        formatter_class=DefaultsHelpFormatter,
    )
    parser.add_argument(
        "--config", default=SUPPRESS, metavar="FILE", help="YAML file that sets flags. The command line wins."
    )
    parser.set_defaults(**model.default_settings, teacher_context=next(iter(model.teacher_contexts)))
    action_of = {}
    for action in parser._actions:
        action_of.setdefault(action.dest, action)
        if len(action.option_strings) > 1 and action.dest != "help":
            # --a-b works like --a_b; help and errors show the latter, as diffusers spells its flags.
            action.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        if action.nargs == "?":
            action.metavar = "true|false"
        if action.option_strings[0].startswith("--no_prodigy"):
            action.help = SUPPRESS
    action_of["optimizer"].type = str.lower
    _describe_teacher_contexts(action_of, model.teacher_contexts)
    return parser


def _describe_teacher_contexts(action_of: dict, contexts: dict[str, TeacherContext]) -> None:
    context_action, suffix_action = action_of["teacher_context"], action_of["teacher_prompt_suffix"]
    context_action.choices = list(contexts)
    meanings = "; ".join(f"{name}: {context.description}" for name, context in contexts.items())
    context_action.help = f"What the teacher sees of the target picture. {meanings}."
    suffixes = [
        f"'{context.prompt_suffix}' with {name}" for name, context in contexts.items() if context.prompt_suffix
    ]
    suffix_action.help += f" Default: {'; '.join(suffixes) or 'none'}."
    for name, context in contexts.items():
        for flag, default in context.flags.items():
            if default is not None:
                action_of[flag].help += f" Only with --teacher_context {name}. Default: {default}."


def parse_settings(model: Model, description: str, arguments: list[str] | None = None) -> Settings:
    """Settings from the command line (by default this process's) and from its `--config` file.

    Raises:
        InputError: a flag, a combination of flags or the file is wrong.
        SystemExit: for `--help` and for errors that argparse reports, in one line.
    """
    parser = build_parser(model, description)
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_args(arguments)
    if "config" in given:
        arguments = [*config_arguments(Path(given.config), parser), *arguments]
    groups = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)[: len(fields(Settings))]
    for group in groups:
        check_ranges(group)
    return resolve(Settings(*groups), model)


def config_arguments(path: Path, parser: SettingsParser) -> list[str]:
    """The file's settings as command-line arguments.

    Raises:
        InputError: the file cannot be read, or holds an unknown flag or something other than values and lists.
    """
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=TextLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: cannot be read as YAML ({one_line(error)})") from error
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: write one 'flag: value' per line")
    known = {action.dest for action in parser._actions} - {"config", "help"}
    arguments = []
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"--config {path}: there is no flag {name!r}{hint}")
        if value is None:
            continue
        if isinstance(value, str):
            arguments.append(f"--{name}={value}")
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            arguments += [f"--{name}", *value]
        else:
            raise InputError(f"--config {path}: {name} cannot be nested; give one value or a list of values")
    return arguments


def resolve(settings: Settings, model: Model) -> Settings:
    """Fills in the defaults that follow from other flags, and checks what can be checked before any file is read."""
    context = model.teacher_contexts[settings.teacher.teacher_context]
    settings = replace(settings, teacher=resolve_teacher(settings.teacher, context, model.teacher_contexts))
    check(settings, model)
    training, validation = settings.training, settings.validation
    height, width = (
        settings.data.resolution if side is None else side
        for side in (validation.validation_height, validation.validation_width)
    )
    if problem := size_problem(height, width, model.sizes):
        raise InputError(f"--validation_height {height} --validation_width {width}: {problem}")
    return settings.replace(
        validation_height=height,
        validation_width=width,
        lora_alpha=settings.lora.lora_alpha or 2 * settings.lora.rank,
        context_cache_dir=training.context_cache_dir or str(Path(training.output_dir, "context_cache")),
    )


def resolve_teacher(
    teacher: TeacherSettings, context: TeacherContext, contexts: dict[str, TeacherContext]
) -> TeacherSettings:
    """Refuses the flags of other teacher contexts and fills in the defaults of the chosen one."""
    for flag in CONTEXT_FLAGS:
        if getattr(teacher, flag) is not None and flag not in context.flags:
            users = " or ".join(name for name, other in contexts.items() if flag in other.flags)
            advice = f"goes with --teacher_context {users}; add that, or drop the flag" if users else "drop it"
            raise InputError(f"--{flag}: {advice}")
    if "teacher_caption_column" in context.flags and teacher.teacher_caption_column is None:
        raise InputError(
            f"--teacher_context {teacher.teacher_context}: name the column of the teacher's captions with "
            "--teacher_caption_column"
        )
    values = {flag: default for flag, default in context.flags.items() if getattr(teacher, flag) is None}
    if teacher.teacher_prompt_suffix is None:
        values["teacher_prompt_suffix"] = context.prompt_suffix
    teacher = replace(teacher, **values)
    if (teacher.vlm_min_pixels or 0) > (teacher.vlm_max_pixels or 0):
        raise InputError(
            f"--vlm_min_pixels {teacher.vlm_min_pixels}: is above --vlm_max_pixels {teacher.vlm_max_pixels}; pass "
            "both, the smaller one first"
        )
    return teacher


def check(settings: Settings, model: Model) -> None:
    """Raises `InputError` for flags that cannot work together or on this machine."""
    training, validation, optimizer = settings.training, settings.validation, settings.optimizer
    if settings.model.pretrained_model_name_or_path is None and not settings.publishing.push_only:
        raise InputError(f"--pretrained_model_name_or_path: is required, such as {model.example}")
    if settings.publishing.hub_token is not None and training.report_to in ("wandb", "all"):
        raise InputError(
            f"--hub_token: cannot be combined with --report_to {training.report_to}, which would show it; run hf auth "
            "login instead"
        )
    check_geometry(settings.data, model.sizes)
    if optimizer.use_8bit_adam and optimizer.optimizer != "adamw":
        raise InputError("--use_8bit_adam: needs --optimizer AdamW; drop one of them")
    if validation.preview_only and validation.validation_steps == 0:
        raise InputError("--preview_only: draws the preview, which --validation_steps 0 turns off; drop one of them")
    for flag, package, is_used in (
        ("--optimizer prodigy", "prodigyopt", optimizer.optimizer == "prodigy"),
        ("--use_8bit_adam", "bitsandbytes", optimizer.use_8bit_adam),
        *((f"--report_to {name}", name, training.report_to == name) for name in TRACKER_PACKAGES),
    ):
        if is_used and find_spec(package) is None:
            raise InputError(f"{flag}: run pip install {package} first")
    if len(validation.retention_prompts) < 2:
        raise InputError("--retention_prompts: give at least two prompts; retention is relative to their distance")
    if training.no_context_cache and training.context_cache_dir:
        raise InputError("--no_context_cache: cannot be combined with --context_cache_dir; drop one of them")


def run_script(script: str, parse: Callable[[], Settings], main: Callable[[Settings], Any]) -> None:
    """Runs a script's `main`; a `DOPSDError` ends the process with one line and a non-zero exit status."""
    try:
        main(parse())
    except DOPSDError as error:
        sys.exit(f"{script}: error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"{script}: error: out of GPU memory ({first_line(error)}); pass --gradient_checkpointing and "
            "--use_8bit_adam, or lower --resolution, --train_batch_size or --rank"
        )
    except KeyboardInterrupt:
        sys.exit(f"{script}: interrupted before training; encodings so far are in the context cache")
