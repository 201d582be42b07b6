"""Writes flags.md, the page of all flags, from the settings of all scripts: python -m docs.make_flags"""

import re
from argparse import SUPPRESS, Action, ArgumentParser
from dataclasses import fields
from pathlib import Path
from typing import Any

import evaluate_lora
import train_dopsd_flux2
import train_dopsd_zimage
from dopsd.command_line import build_parser
from dopsd.evaluation import settings as evaluation
from dopsd.flag_types import MUST_MATCH, Range, annotations
from dopsd.model_flags import ModelFlags
from dopsd.settings import Settings


PAGE = Path(__file__).with_name("flags.md")
MAX_DEFAULT = 100  # characters; a longer default stands below the meaning, which would else be squeezed
MODELS: tuple[ModelFlags, ...] = (train_dopsd_flux2.MODEL, train_dopsd_zimage.MODEL)
EVALUATION = """\
# Flags of evaluate_lora.py

What they do together, and what the figures mean: [evaluation.md](evaluation.md).
"""
INTRODUCTION = """\
# All flags

Made from the settings by `python -m docs.make_flags`; a test checks that it is up to date. Which flags to change, and
when: [settings.md](settings.md). `python train_dopsd_flux2.py --help` prints the same.

- `--config run.yaml` reads flags from a file, one `flag: value` per line, with a list for a flag of several values.
  The command line wins.
- `--preset 16gb` reads flags that fit a card of that memory, see [memory.md](memory.md). `--config` and the command
  line win.
- A switch, marked true or false, is turned on by its name alone. `false` after it turns it off, also if the file
  turns it on.
- \\* A resumed run must keep the flag. Data, model and prompts that are held are compared by their content instead,
  and the number of processes by the micro-batches of a step.
"""


def flags_page() -> str:
    actions = [flag_actions(model) for model in MODELS]
    parts = [INTRODUCTION, *(section(group.name, actions) for group in fields(Settings)), EVALUATION]
    own = shown_actions(evaluation.build_parser(evaluate_lora.TEXTS))
    return "\n".join([*parts, *(evaluation_section(group, own) for group in evaluation.GROUPS)])


def flag_actions(model: ModelFlags) -> dict[str, Action]:
    """Flag -> its action, of a training script."""
    return shown_actions(build_parser(model, ""))


def shown_actions(parser: ArgumentParser) -> dict[str, Action]:
    """Flag -> its action, without those that `--help` hides: --no_... of a switch, flags of other models' teachers."""
    return {action.dest: action for action in parser._actions if action.help != SUPPRESS}


def section(group: str, actions: list[dict[str, Action]]) -> str:
    """One settings group of both scripts as a heading and a table."""
    classes = [model.settings_class if group == "model" else None for model in MODELS]
    classes = [own or next(item.type for item in fields(Settings) if item.name == group) for own in classes]
    markers = {name: found for own in classes for name, found in annotations(own).items()}
    lines = header(classes[0])
    for name, found in markers.items():
        own = {model.name: by_name[name] for model, by_name in zip(MODELS, actions, strict=True) if name in by_name}
        value = joined({model: values(action, found) for model, action in own.items()})
        texts = {model: describe(action) for model, action in own.items()}
        default = joined({model: text for model, (text, _) in texts.items()})
        meaning = joined({model: text for model, (_, text) in texts.items()})
        if len(own) < len(MODELS):
            meaning = f"{', '.join(own)} only. {meaning}"
        star = " \\*" if MUST_MATCH in found else ""
        lines.append(line(f"`--{name}`{star}", value, default, meaning))
    return "\n".join([*lines, ""])


def evaluation_section(group: type, actions: dict[str, Action]) -> str:
    """One settings group of evaluate_lora.py as a heading and a table."""
    lines = header(group)
    for name, found in annotations(group).items():
        lines.append(line(f"`--{name}`", values(actions[name], found), *describe(actions[name])))
    return "\n".join([*lines, ""])


def header(group: type) -> list[str]:
    title = group._argument_group_name
    return [f"## {title[0].upper()}{title[1:]}", "", "| flag | value | default | |", "|---|---|---|---|"]


def line(flag: str, value: str, default: str, meaning: str) -> str:
    if len(default) > MAX_DEFAULT:
        default, meaning = "at the right", f"{meaning}<br>Default: {default}"
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in (flag, value, default, meaning))} |"


def joined(texts: dict[str, str]) -> str:
    """What all models have in common, or each model's text after its name."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "<br>".join(f"{model}: {text}" for model, text in texts.items())


def values(action: Action, markers: list[Any]) -> str:
    """What may stand after the flag."""
    limits = next((marker.description for marker in markers if isinstance(marker, Range)), None)
    if action.nargs == "?":
        return "true or false"
    if action.choices:
        text = ", ".join(f"`{choice}`" for choice in action.choices)
    elif limits:
        text = limits
    else:
        text = "a whole number" if action.type is int else "text"
    return f"{text}; one or more" if action.nargs == "+" else text


def describe(action: Action) -> tuple[str, str]:
    """(default, meaning), from the flag's line in `--help`."""
    text = (action.help or "").replace("%%", "%")
    # A full stop in a quoted default does not end it.
    stated = re.search(r" ?Default: ((?:(?<=\s)'[^']*'|.)+?)\.(?= [A-Z]|$)", text)
    if stated:
        return stated[1], text.replace(stated[0], "")
    return shown(action.default), text


def shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:g}".replace("e-0", "e-")
    return "none" if value in (None, "") else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(flags_page(), encoding="utf-8")
