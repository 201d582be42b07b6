"""Whole runs on names and captions that trip programs up, in other locales too."""

import os
import subprocess
import sys

import pytest

from command_line import ROOT, same_weights, succeed, weights
from models import ONE_MODEL, SLOW


pytestmark = ONE_MODEL

ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


@pytest.fixture
def accented(tmp_path, make_picture):
    """A folder whose names and captions have accents."""
    folder = tmp_path / "accented"
    (folder / "été").mkdir(parents=True)
    for number in range(2):
        make_picture(number).save(folder / f"été/größe {number}.png")
        (folder / f"été/größe {number}.txt").write_text(f"ein schöner Ball {number} 🐕", encoding="utf-8")
    return folder


def test_a_prompt_with_a_byte_that_is_not_utf8(train):
    error = train(instance_prompt=os.fsdecode(b"caf\xe9")).error
    assert "--instance_prompt: contains the byte 0xe9, which is not UTF-8" in error


def test_a_flags_path_with_a_byte_that_is_not_utf8(train, tmp_path):
    error = train(instance_data_dir=str(tmp_path / os.fsdecode(b"caf\xe9"))).error
    assert "--instance_data_dir: contains the byte 0xe9" in error


@SLOW
def test_names_that_are_not_utf8_train(train, photos, tmp_path):
    """File names are bytes on Linux; an archive from an old Windows has them in another encoding."""
    (tmp_path / "data").mkdir()
    for number in range(3):
        name = os.fsdecode(f"b\xe4ll {number}".encode("latin-1"))
        (tmp_path / f"data/{name}.png").write_bytes((photos / f"{number}.png").read_bytes())
    succeed(train("one", instance_data_dir=tmp_path / "data", checkpointing_steps=1))
    flags = {"instance_data_dir": tmp_path / "data", "checkpointing_steps": 1, "max_train_steps": 3}
    succeed(train("one", **flags, resume_from_checkpoint="latest"))
    assert weights(tmp_path / "one")


@SLOW
def test_accents_train_in_an_ascii_locale(train, arguments, model, accented, tmp_path):
    """Files are read and written in UTF-8, and names mean the same: the checkpoint can be resumed in UTF-8."""
    flags = {
        "instance_data_dir": accented,
        "instance_prompt": None,
        "report_to": "tensorboard",
        "validation_steps": 1,
        "num_validation_images": 1,
        "checkpointing_steps": 1,
    }
    log = run_in_ascii_locale(model, arguments("ascii", **flags))
    assert log.returncode == 0, log.stdout + log.stderr
    assert "Traceback" not in log.stderr and "UnicodeEncodeError" not in log.stderr
    assert "schöner" in (tmp_path / "ascii/README.md").read_text(encoding="utf-8")
    succeed(train("utf8", **flags))
    assert same_weights(tmp_path / "ascii", tmp_path / "utf8")
    succeed(train("ascii", **flags | {"max_train_steps": 3}, resume_from_checkpoint="latest"))


@SLOW
def test_an_accented_prompt_in_an_ascii_locale_is_one_line(arguments, model):
    result = run_in_ascii_locale(model, arguments(instance_prompt="ein schöner Ball"))
    assert result.returncode != 0 and "Traceback" not in result.stderr
    (error,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert "--instance_prompt: is not text in this locale" in error and "PYTHONUTF8=1" in error


def run_in_ascii_locale(model, arguments):
    """Runs the script in a new interpreter, since the locale is fixed when it starts."""
    environment = os.environ | ASCII_LOCALE | {"ACCELERATE_USE_CPU": "true"}
    environment.pop("PYTHONIOENCODING")
    encoded = [os.fsencode(argument) for argument in (sys.executable, str(model.script_path), *arguments)]
    return subprocess.run(encoded, env=environment, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300)
