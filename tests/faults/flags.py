"""Wrong, odd and unusual flags, made from the script's own parser."""

import argparse
from types import ModuleType
from typing import Any

from dopsd.command_line import build_parser
from dopsd.flag_types import Range, annotations
from dopsd.settings import Settings

from .cases import Case, kind
from .damage import ODD_TEXTS
from .lab import Scene


# Arguments as the system passes them: without NUL, and with undecodable bytes as surrogates.
ODD_ARGUMENTS = (
    *["", " ", "-1", "0", "0.5", "1e400", "-0", "nan", "inf", "-inf", "NaN", "0x10", "1_000", "１２", "½", "9" * 5000],
    *[
        "1e-320",
        "true",
        "null",
        "None",
        "[]",
        "{}",
        "é",
        "😀",
        "\udcff\udc80",
        "a\nb",
        "\x1b[31m",
        "a" * 5000,
        "a" * 150_000,
    ],
    *["-", "=", "a,b", "../x", "x/y/z", "%s", "{0}", "1 2", "\u202e", "hf_" + "a" * 34, ".", "/dev/null/x", "nowhere"],
)
# A huge value of these makes a run long, as it should.
LONG_FLAGS = ("max_train_steps", "gradient_accumulation_steps", "num_rollout_steps", "num_inference_steps")
# They publish, or write where they are told, or take a minute to compile.
UNSAFE_FLAGS = ("help", "config", "output_dir", "push_to_hub", "push_only", "hub_token", "compile")
# Runs with these may end without a LoRA.
WITHOUT_LORA = ("preview_only", "push_only", "dry_run", "help")
NUMBERS = (0, 1, 2, 3, 4, 5, 8, 16, 64, 80, 96, 0.1, 0.25, 0.5, 0.9, 0.999, 1e-8)
GOOD_VALUES = {
    "resolution": ["64", "80", "128"],
    "aspect_ratio_buckets": ["64,64;64,128;128,64", "64,64"],
    "lora_layers": ["to_q", ".*to_q", "to_q,to_k", "to_out.0"],
    "text_encoder_out_layers": ["0", "9", "28"],
    "instance_prompt": ["a dog", *ODD_TEXTS],
    "teacher_prompt_suffix": ["", " again"],
    "validation_prompt": ["a dog", "a cat"],
    "final_validation_prompt": ["a fish"],
    "retention_prompts": ["a", "b"],
    "report_to": ["none", "tensorboard"],
    "max_train_steps": ["1", "2", "3"],
    "gradient_accumulation_steps": ["1", "2"],
    "num_rollout_steps": ["1", "3"],
    "max_sequence_length": ["80", "100"],
    "rank": ["1", "4", "8"],
    "train_batch_size": ["1", "2", "3", "7"],
    "repeats": ["1", "3"],
    "num_validation_images": ["1", "2"],
    "num_inference_steps": ["1", "4"],
    "validation_steps": ["0", "1", "2"],
    "seed": ["0", "7", "4294967295"],
    "image_column": ["image"],
    "checkpointing_steps": ["1", "2"],
    "checkpoints_total_limit": ["1", "2"],
    "logging_dir": ["logs", "my logs"],
    "variant": ["fp16"],
    "attention_backend": ["native", "_native_math", "flash"],
    "teacher_resolution": ["64", "80"],
}


def actions(script: ModuleType) -> list[argparse.Action]:
    """The script's flags, in the order of its parser."""
    return [action for action in build_parser(script.MODEL, "")._actions if action.option_strings]


def limits(script: ModuleType) -> dict[str, Range]:
    """Flag -> the range of its numbers."""
    groups = [script.MODEL.settings_class, *(item.type for item in Settings.__dataclass_fields__.values())]
    found = {name: markers for group in groups for name, markers in annotations(group).items()}
    return {name: mark for name, markers in found.items() for mark in markers if isinstance(mark, Range)}


def good_values(action: argparse.Action, ranges: dict[str, Range]) -> list[str]:
    """Some values that a flag accepts; none for those that need a file."""
    name = action.dest
    if name in UNSAFE_FLAGS:
        return []
    if name in GOOD_VALUES:
        return GOOD_VALUES[name]
    if action.choices:
        return [choice for choice in map(str, action.choices) if choice not in ("fp16", "wandb", "comet_ml", "all")]
    if action.nargs in (0, "?"):
        return ["true", "false"]
    if name in ranges:
        return [str(n) for n in NUMBERS if n in ranges[name] and (action.type is not int or isinstance(n, int))]
    return []


def as_text(action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[0]
    return [flag] if action.nargs == 0 else [f"{flag}={value}"]


def shown(value: str) -> str:
    return ascii(value) if len(value) < 40 else f"{ascii(value[:20])} x {len(value)}"


@kind
def wrong_value(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    safe = [action for action in actions(scene.lab.model(subject).script) if action.dest not in UNSAFE_FLAGS]
    action, value = rng.choice(safe), rng.choice(ODD_ARGUMENTS)
    if action.dest in LONG_FLAGS and value.isdecimal():
        value = "-" + value
    flag = action.option_strings[0]
    arguments = (f"{flag}={value}",) if rng.random() < 0.7 else (flag, value)
    return Case(f"{flag} {shown(value)}", subject, arguments=arguments, saves_lora=action.dest not in WITHOUT_LORA)


@kind
def wrong_number(scene: Scene) -> Case:
    """A number at or beyond the end of a flag's range."""
    rng, subject = scene.rng, scene.subject()
    script = scene.lab.model(subject).script
    numbers = [action for action in actions(script) if action.dest not in LONG_FLAGS and action.dest in limits(script)]
    action = rng.choice(numbers)
    around = limits(script)[action.dest]
    value = rng.choice(
        [
            around.low,
            around.low - 1,
            around.high,
            around.high + 1,
            10**9,
            10**19,
            -(10**19),
            2**31,
            2**63,
            1e-300,
            1e300,
        ]
    )
    text = str(int(value)) if rng.random() < 0.8 and abs(value) < 10**20 else str(value)
    return Case(f"--{action.dest} {text}", subject, arguments=(f"--{action.dest}={text}",))


@kind
def unknown_argument(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    name = rng.choice(actions(scene.lab.model(subject).script)).option_strings[-1]
    place = rng.randrange(2, len(name))
    token = "hf_" + "".join(rng.choices("abcdefghij", k=34))
    arguments = rng.choice(
        [
            (name[:place] + name[place + 1 :], "1"),
            (name[:place] + rng.choice("xé_-=") + name[place:], "1"),
            (name.upper(), "1"),
            (name.replace("--", "-", 1), "1"),
            (name.replace("--", "\u2014", 1), "1"),
            ("stray",),
            ("",),
            ("--",),
            ("--", "--rank", "4"),
            ("@file",),
            ("\udcff",),
            ("a\nb",),
            ("x" * 100_000,),
            ("--" + "x" * 100_000,),
            tuple(f"stray{number}" for number in range(500)),
            (token,),
            ("--hub_tokn", token),
            (f"--hub_tokn={token}",),
            ("-h_x",),
            ("--é\u2028",),
        ]
    )
    what = " ".join(map(shown, arguments[:3]))
    return Case(f"arguments {what}", subject, arguments=arguments)


@kind
def pair_of_flags(scene: Scene) -> Case:
    """Two flags with values that each of them accepts."""
    rng, subject = scene.rng, scene.subject()
    script = scene.lab.model(subject).script
    ranges = limits(script)
    choices = [(action, good_values(action, ranges)) for action in actions(script)]
    pair = rng.sample([choice for choice in choices if choice[1]], 2)
    arguments = [text for action, values in pair for text in as_text(action, rng.choice(values))]
    names = {action.dest for action, _ in pair}
    saves_lora = not names & {*WITHOUT_LORA}
    return Case(" ".join(map(shown, arguments)), subject, arguments=tuple(arguments), saves_lora=saves_lora)


@kind
def repeated_flag(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    script = scene.lab.model(subject).script
    ranges = limits(script)
    choices = [(action, good_values(action, ranges)) for action in actions(script)]
    action, values = rng.choice([choice for choice in choices if choice[1]])
    arguments = [text for value in rng.choices(values, k=rng.choice([2, 3])) for text in as_text(action, value)]
    if rng.random() < 0.3:
        arguments.append(action.option_strings[0])
    saves_lora = action.dest not in WITHOUT_LORA
    return Case(" ".join(map(shown, arguments)), subject, arguments=tuple(arguments), saves_lora=saves_lora)


@kind
def missing_flag(scene: Scene) -> Case:
    subject = scene.subject()
    flags = scene.lab.flags(subject, scene.output_dir)
    names = [name for name in flags if name not in ("output_dir", "max_sequence_length", "resolution", "report_to")]
    dropped = scene.rng.sample(sorted(names), scene.rng.choice([1, 1, 2]))
    return Case(f"without {', '.join(dropped)}", subject, dict.fromkeys(dropped))


@kind
def odd_prompt(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject(with_captions=False)
    text = rng.choice(
        [*ODD_TEXTS, *ODD_ARGUMENTS, "a" * 79, "é" * 60, "<|im_start|>" * 30, "\u0301" * 30, "\ufffe\uffff"]
    )
    flag = rng.choice(["instance_prompt", "teacher_prompt_suffix", "final_validation_prompt", "validation_prompt"])
    drawing = {"validation_steps": 2, "num_validation_images": 1} if "validation" in flag else {}
    return Case(f"--{flag} {shown(text)}", subject, drawing, (f"--{flag}={text}",))


@kind
def odd_path(scene: Scene) -> Case:
    """A path that cannot be what the flag wants."""
    rng, subject = scene.rng, scene.subject(with_captions=False)
    inputs = [
        "instance_data_dir",
        "pretrained_model_name_or_path",
        "init_lora",
        "config",
        "bnb_quantization_config_path",
    ]
    flag = rng.choice([*inputs, "resume_from_checkpoint", "dataset_name", "vlm_model_name_or_path", "output_dir"])
    (scene.folder / "a file").write_text("x")
    (scene.folder / "work").mkdir()
    (scene.folder / "loop").symlink_to("loop")
    inside = [
        str(scene.folder / name) for name in ("a file", "a file/x", "loop", "loop/x", "é 😀", "a\nb", "\udcff", "-x")
    ]
    path = rng.choice([*inside, "\udcff", "a" * 300, "a/" * 3000, "nowhere", "a b", "%x", "$HOME/x", "a:b", "", " "])
    if flag != "output_dir":
        path = rng.choice(
            [path, path, "/dev/null", "/proc/self/mem", "/dev/zero", "http://localhost:9/x", "a/b/c", ".."]
        )
    drop = {"instance_data_dir": None} if flag == "dataset_name" else {}
    return Case(f"--{flag} {shown(path)}", subject, drop, (f"--{flag}={path}",), saves_lora=flag != "output_dir")
