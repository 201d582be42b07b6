import sys

import pytest

from dopsd import text
from dopsd.command_line import parse_settings
from dopsd.errors import InputError, OutputError
from dopsd.text import MAX_CAPTION_CHARACTERS, argument_problem, printable, text_problem
from train_dopsd_flux2 import MODEL


BAD_BYTE = b"caf\xe9".decode("utf-8", "surrogateescape")
IN_ASCII_LOCALE = "café".encode().decode("ascii", "surrogateescape")


@pytest.fixture
def ascii_locale(monkeypatch):
    """The locale's encoding is ASCII, as with LC_ALL=C, PYTHONUTF8=0 and PYTHONCOERCECLOCALE=0."""
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    monkeypatch.setattr(text.os, "fsencode", lambda name: name.encode("ascii", "surrogateescape"))


def test_printable_text_is_one_line():
    assert printable("a\nb\r\0\x1b[2J\u2028\ud83d") == r"a\nb\r\x00\x1b[2J\u2028\ud83d"
    assert printable("größe 👨‍👩‍👧 犬") == "größe 👨‍👩‍👧 犬"


@pytest.mark.parametrize(
    ("caption", "part"),
    [("half \ud83d", r"'\ud83d'"), ("a\0", "zero byte"), ("x" * (MAX_CAPTION_CHARACTERS + 1), "20,001 characters")],
)
def test_text_that_cannot_be_used(caption, part):
    assert part in text_problem(caption)


@pytest.mark.parametrize("caption", ["a dog", "größe 👨‍👩‍👧\n犬", "x" * MAX_CAPTION_CHARACTERS])
def test_text_that_can_be_used(caption):
    assert text_problem(caption) is None
    assert argument_problem(caption) is None


def test_a_byte_that_is_not_utf8():
    assert "the byte 0xe9, which is not UTF-8" in argument_problem(BAD_BYTE)


@pytest.mark.parametrize("argument", ["café", IN_ASCII_LOCALE])
def test_accents_in_an_ascii_locale_name_the_way_out(ascii_locale, argument):
    assert "PYTHONUTF8=1" in argument_problem(argument)


def test_ascii_in_an_ascii_locale(ascii_locale):
    assert argument_problem("a dog") is None
    assert "0xe9" in argument_problem(BAD_BYTE)


@pytest.mark.parametrize(
    "flag",
    ["instance_prompt", "validation_prompt", "output_dir", "instance_data_dir", "pretrained_model_name_or_path"],
)
def test_flags_must_be_text(flag):
    with pytest.raises(InputError, match=f"^--{flag}: contains the byte 0xe9") as caught:
        parse_settings(MODEL, "", ["--pretrained_model_name_or_path", "x", f"--{flag}", BAD_BYTE])
    assert "\n" not in str(caught.value)


def test_a_token_that_is_not_text_is_not_shown():
    with pytest.raises(InputError) as caught:
        parse_settings(MODEL, "", ["--pretrained_model_name_or_path", "x", "--hub_token", "hf_secret\udce9"])
    assert "secret" not in str(caught.value)


def test_messages_of_errors_are_one_line():
    assert str(InputError("a\nb.png: bad; fix")) == r"a\nb.png: bad; fix"
    assert str(OutputError("a\nb.png: full; fix")) == r"a\nb.png: full; fix"
