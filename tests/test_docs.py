"""The pages: their links, commands, flags, file names and code, and the page that is made from the settings."""

import importlib
import io
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from docs.make_flags import MODELS, PAGE, flag_actions, flags_page
from dopsd.command_line import parse_settings
from dopsd.errors import InputError
from dopsd.evaluation.settings import build_parser as evaluation_parser
from dopsd.evaluation.settings import parse_settings as parse_evaluation


ROOT = Path(__file__).resolve().parents[1]
MINIATURES = [ROOT / "benchmarks/miniature" / name for name in ("README.md", "zimage.md", "rivals.md")]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *MINIATURES]
FOLDERS = [ROOT / name for name in ("benchmarks", "configs", "docs", "dopsd", "pipelines", "tests")]
FILE_NAMES = {path.name for top in FOLDERS for path in top.rglob("*")} | {path.name for path in ROOT.iterdir()}

SCRIPTS = dict(zip(("train_dopsd_flux2.py", "train_dopsd_zimage.py"), MODELS, strict=True))
NEEDED = ["--pretrained_model_name_or_path", "a/model"]
EVALUATION_SCRIPT, EVALUATION_TEXTS = "evaluate_lora.py", {"default_vlm": "", "deployed_steps": ""}
NEEDED_TO_EVALUATE = [*NEEDED, "--lora", "a", "--instance_data_dir", "b", "--kind", "pet"]
# What docs/add_a_model.md calls the files of a model that does not exist.
PLACEHOLDERS = {"pipelines/my_model.py": None, "train_dopsd_my_model.py": MODELS[0]}

OWN_FLAGS = {"--config", "--help"} | {f"--{name}" for model in MODELS for name in flag_actions(model)}
EVALUATION_FLAGS = set(evaluation_parser(EVALUATION_TEXTS)._option_string_actions)
# Flags of other programs, and what has them.
OTHER_FLAGS = {
    "accelerate launch": {"--cpu", "--config_file", "--machine_rank", "--main_process_ip", "--num_processes"},
    "torchrun": {"--signals-to-handle"},
    "sbatch": {"--signal"},
    "tensorboard": {"--logdir"},
    "run_tests.sh": {"--fast"},
    "quickstart.sh": {"--model"},
    "diffusers": {
        "--dataloader_num_workers",
        "--do_fp8_training",
        "--fsdp_text_encoder",
        "--guidance_scale",
        "--validation_epochs",
    },
}
# What `python -m` runs and has flags; the pages in `MODULE_PAGES` may name these.
MODULES = {
    "benchmarks.miniature.comparison",
    "benchmarks.miniature.evaluate",
    "benchmarks.miniature.experiment",
    "benchmarks.miniature.make",
    "benchmarks.miniature.make_zimage",
    "benchmarks.miniature.quickstart",
    "benchmarks.miniature.rivals",
    "benchmarks.real_shapes",
    "benchmarks.startup",
    "benchmarks.step",
    "tests.faults",
}
MODULE_PAGES = {ROOT / "CONTRIBUTING.md", ROOT / "docs/memory_and_speed.md", *MINIATURES}
# Programs whose command lines are not checked.
TRUSTED = {"pip", "source"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# Reading Markdown


def fences(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block, also of an indented one."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [(language, content) for _, language, content in found]


def prose(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code_spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings."""
    seen, names = Counter(), set()
    for heading in re.findall(r"^#+ +(.+)$", prose(text), re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def linked(page: Path, text: str) -> Iterator[tuple[str, Path, str]]:
    """(target, file, anchor) of each link and picture within the repository."""
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"`[^`]*`", "", prose(text))):
        if not re.match(r"https?://\S+$", target):
            path, _, anchor = target.partition("#")
            yield target, (page.parent / path).resolve() if path else page, anchor


# Checks: each returns what is wrong


def broken_links(page: Path, text: str) -> list[str]:
    wrong = []
    for target, file, anchor in linked(page, text):
        if not file.exists() or not file.is_relative_to(ROOT):
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(text if file == page else file.read_text(encoding="utf-8")):
            wrong.append(f"{target}: no such heading")
    return wrong


def unknown_flags(page: Path, text: str) -> list[str]:
    known = OWN_FLAGS.union(
        EVALUATION_FLAGS, *OTHER_FLAGS.values(), *(map(module_flags, MODULES) if page in MODULE_PAGES else ())
    )
    return sorted(set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", text)) - known)


def missing_files(page: Path, text: str) -> list[str]:
    """Names in code that look like files of this repository, and are not."""
    words = [span for span in code_spans(text) if " " not in span]
    words += [word for _, content in fences(text) for word in re.findall(r"[\w./-]+", content)]
    return [word for word in words if word not in PLACEHOLDERS and is_missing(page, word)]


def is_missing(page: Path, word: str) -> bool:
    name = Path(word)
    if (ROOT / name).exists() or (page.parent / name).exists():
        return False
    if "/" in word.rstrip("/"):
        return any((folder / name.parts[0]).is_dir() for folder in (ROOT, page.parent))
    # A page may name a file without its folder.
    return bool(re.fullmatch(r"[\w.-]+\.(py|sh|md|toml)|requirements\S*", word)) and word not in FILE_NAMES


def wrong_code(text: str) -> list[str]:
    """Python and JSON that cannot be parsed."""
    wrong = []
    for language, content in fences(text):
        try:
            if language == "python":
                compile(content, "page", "exec")
            elif language == "json":
                [json.loads(line) for line in content.splitlines()]
        except (SyntaxError, json.JSONDecodeError) as error:
            wrong.append(f"{error}: {content}")
    return wrong


def wrong_commands(text: str) -> list[str]:
    found = [(line, True) for language, content in fences(text) if language == "bash" for line in lines(content)]
    starts = r"(\S*python|bash|accelerate launch .*train_dopsd) ?"
    found += [(span, False) for span in code_spans(text) if re.match(starts, span)]
    return [f"{problem}: {line}" for line, is_whole in found if (problem := command_problem(line, is_whole))]


def lines(content: str) -> list[str]:
    return [line for line in content.replace("\\\n", " ").splitlines() if line.split("#")[0].strip()]


def command_problem(line: str, is_whole: bool) -> str | None:
    """What is wrong with a command.

    Args:
        is_whole: whether it can be run as it is; text may name a command without its flags.
    """
    program, *arguments = shlex.split(line, comments=True)
    if program.startswith("--"):
        return problem_of(parse_settings, MODELS[0], "", [*NEEDED, program, *arguments])
    if program == "accelerate":
        try:
            launch = launch_command_parser().parse_args(arguments[1:])
        except SystemExit:
            return "accelerate launch refuses its flags"
        return script_problem(launch.training_script, launch.training_script_args)
    if program == "bash":
        script, *arguments = arguments
        if not (ROOT / script).is_file():
            return "no such file"
        return module_problem("benchmarks.miniature.quickstart", arguments) if script == "quickstart.sh" else None
    if Path(program).name == "python":
        if not arguments:
            return None
        if arguments[0] != "-m":
            return script_problem(arguments[0], arguments[1:])
        _, module, *arguments = arguments
        return module_problem(module, arguments) if arguments or is_whole else unknown_module(module)
    return None if program in TRUSTED else "an unknown program"


def script_problem(script: str, arguments: list[str]) -> str | None:
    """`...` among the arguments stands for further flags."""
    if script == EVALUATION_SCRIPT:
        further = NEEDED_TO_EVALUATE if "..." in arguments else []
        given = [argument for argument in arguments if argument != "..."]
        return problem_of(parse_evaluation, EVALUATION_TEXTS, "", [*further, *given])
    model = (SCRIPTS | PLACEHOLDERS).get(script)
    if model is None:
        return f"no script {script}"
    further = NEEDED if "..." in arguments else []
    arguments = [*further, *(argument for argument in arguments if argument != "...")]
    return problem_of(parse_settings, model, "", arguments)


def unknown_module(module: str) -> str | None:
    path = ROOT.joinpath(*module.split("."))
    is_known = module == "pytest" or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    return None if is_known else f"no module {module}"


def module_problem(module: str, arguments: list[str]) -> str | None:
    if module not in MODULES:
        return unknown_module(module)
    with patch.object(sys, "argv", [module, *arguments]):
        return problem_of(module_parser(module))


def module_parser(module: str) -> Callable[[], object]:
    """Parses this process's command line as the module does."""
    if module == "tests.faults":
        return partial(importlib.import_module("faults.report").parse, None)
    is_folder = ROOT.joinpath(*module.split(".")).is_dir()
    return importlib.import_module(f"{module}.__main__" if is_folder else module).parse_args


def module_flags(module: str) -> set[str]:
    printed = io.StringIO()
    with patch.object(sys, "argv", [module, "--help"]), redirect_stdout(printed), pytest.raises(SystemExit):
        module_parser(module)()
    return set(re.findall(r"--\w+", printed.getvalue()))


def problem_of(parse: Callable[..., object], *arguments) -> str | None:
    """What a parser says to its arguments, if it refuses them."""
    printed = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(printed):
            parse(*arguments)
    except InputError as error:
        return str(error)
    except SystemExit as error:
        return printed.getvalue().strip() or "refused" if error.code else None
    return None


# The pages


@pages
def test_a_page_is_right(page):
    text = page.read_text(encoding="utf-8")
    assert not broken_links(page, text)
    assert not unknown_flags(page, text)
    assert not missing_files(page, text)
    assert not wrong_code(text)
    assert not wrong_commands(text)


def test_the_page_of_flags_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == flags_page(), "run python -m docs.make_flags"
    assert all(f"\n| `{flag}`" in flags_page() for flag in OWN_FLAGS - {"--config", "--preset", "--help"})


def test_the_readme_leads_to_every_page():
    readme = PAGES[0]
    found = {file for _, file, _ in linked(readme, readme.read_text(encoding="utf-8"))}
    assert found >= set(PAGES) - {readme}


def test_flags_of_other_programs_are_theirs():
    assert not OWN_FLAGS & set().union(*OTHER_FLAGS.values())
    assert OTHER_FLAGS["accelerate launch"] <= launch_command_parser()._option_string_actions.keys()
    assert OTHER_FLAGS["torchrun"] <= torchrun_parser()._option_string_actions.keys()
    assert all(flag in (ROOT / "run_tests.sh").read_text() for flag in OTHER_FLAGS["run_tests.sh"])


# The checks


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        ("links", "[data](docs/data.md)", "[data](docs/date.md)"),
        ("links", "[here](docs/data.md#captions)", "[here](docs/data.md#caption)"),
        ("links", "## A `b`: c!\n[up](#a-b-c)", "## A `b`: c!\n[up](#a-b)"),
        ("links", "[![a](docs/data.md)](docs/flags.md)", "[![a](docs/data.md)](docs/flag.md)"),
        ("links", "## A\n## A\n[second](#a-1)", "```\n## A\n```\n[up](#a)"),
        ("flags", "raise `--rank`", "raise `--ranks`"),
        ("flags", "pass --cpu to accelerate", "pass --gpu to accelerate"),
        ("flags", "`--rank`", "`--eval_count`"),  # another program's, on a page that is not about it
        ("files", "`dopsd/rollout.py`", "`dopsd/roll.py`"),
        ("files", "`rollout.py`", "`roll.py`"),
        ("files", "`configs/one_gpu.yaml` `data/` `photos/1.jpg`", "`configs/two_gpus.yaml`"),
        ("files", "```\ndopsd/\n  step.py   one step\n```", "```\ndopsd/\n  steps.py   one step\n```"),
        ("code", "```python\nx = 1\n```", "```python\nx = \n```"),
        ("code", '```json\n{"a": 1}\n{"a": 2}\n```', '```json\n{"a": 1},\n```'),
        (
            "commands",
            "```bash\naccelerate launch --cpu train_dopsd_flux2.py \\\n  --rank 4 ...  # a comment\n```",
            "```bash\naccelerate launch --cpu train_dopsd_flux2.py \\\n  --rank 4\n```",
        ),
        (
            "commands",
            "`accelerate launch train_dopsd_zimage.py ... --teacher_context vlm`",
            "`accelerate launch train_dopsd_zimage.py ... --teacher_context edit`",
        ),
        (
            "commands",
            "`accelerate launch --num_processes 2 train_dopsd_flux2.py ...`",
            "`accelerate launch --num_gpus 2 train_dopsd_flux2.py ...`",
        ),
        ("commands", "```bash\n  --rank 4 --seed 0\n```", "```bash\n  --rank four\n```"),
        ("commands", "`python train_dopsd_flux2.py --help`", "`python train_dopsd_flux.py --help`"),
        ("commands", "`python evaluate_lora.py ... --judge`", "`python evaluate_lora.py --judge`"),
        ("commands", "`python -m benchmarks.startup`", "`python -m benchmarks.startups`"),
        ("commands", "`python -m tests.faults --count 4`", "`python -m tests.faults --number 4`"),
        ("commands", "```bash\nbash quickstart.sh --output_dir a\n```", "```bash\nbash quickstart.sh --to a\n```"),
        ("commands", "```bash\nbash install.sh\n```", "```bash\nbash installs.sh\n```"),
        ("commands", "```bash\npip install torch\n```", "```bash\ncurl x\n```"),
    ],
)
def test_a_check_finds_what_is_wrong(check, right, wrong):
    page = ROOT / "README.md"
    checks = {
        "links": lambda text: broken_links(page, text),
        "flags": lambda text: unknown_flags(page, text),
        "files": lambda text: missing_files(page, text),
        "code": wrong_code,
        "commands": wrong_commands,
    }
    assert not checks[check](right) and checks[check](wrong)


def test_the_readmes_cards_are_those_of_the_memory_page():
    rows = {}
    for line in (ROOT / "docs/memory.md").read_text().splitlines():
        if match := re.fullmatch(r"\| (.*), 1024 \| (.*) \| [\d,]+ \|", line):
            rows[match[1]] = [cell.split(": ")[1] for cell in match[2].split(" | ")]
    readme = (ROOT / "README.md").read_text()
    assert len(rows) == 3 and all(f"| {' | '.join([model, *cards])} |" in readme for model, cards in rows.items())
