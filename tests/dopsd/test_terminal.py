import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dopsd.errors import InputError, OutputError
from dopsd.terminal import (
    MAX_REFUSAL_CHARACTERS,
    LastingStream,
    as_line,
    ending_in_one_line,
    lasting_output,
    without_tokens,
)


ROOT = Path(__file__).parents[2]


def end_of(raised: Exception) -> str:
    with pytest.raises(SystemExit) as end, ending_in_one_line("folder/train.py"):
        raise raised
    return end.value.code


def test_errors_that_end_a_run_are_one_line():
    assert end_of(InputError("--rank 0: no")) == "train.py: error: --rank 0: no"
    assert end_of(OutputError("full")) == "train.py: error: full"
    assert end_of(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")).startswith(
        "train.py: error: out of GPU memory (CUDA out of memory. Tried); pass --gradient_checkpointing"
    )
    assert "out of GPU memory" in end_of(torch.AcceleratorError("CUDA error: out of memory"))


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), ending_in_one_line("train.py"):
        raise ZeroDivisionError
    with pytest.raises(torch.AcceleratorError), ending_in_one_line("train.py"):
        raise torch.AcceleratorError("CUDA error: illegal memory access")


def test_refusals_are_short_and_name_both_ends():
    line = as_line("--rank " + "9" * 5000 + ": is too large; pass less", MAX_REFUSAL_CHARACTERS)
    assert len(line) <= MAX_REFUSAL_CHARACTERS and line.startswith("--rank 9") and line.endswith("; pass less")
    assert len(end_of(InputError("--rank " + "9" * 5000))) < 400
    assert len(end_of(OutputError("x" * 5000))) > 5000  # it may say where a result is


def test_a_line_has_no_control_characters():
    assert as_line("a\n b\0 \x1b[31m \ud83d ü 犬") == r"a b\x00 \x1b[31m \ud83d ü 犬"


@pytest.mark.parametrize(
    "text",
    ["hf_abcdefgh", "a hf_abcdefgh.", "'hf_abcdefgh'", "Bearer abcdefgh", "sk-abcdefghijklmnopqrstu", "ghp_abcdefghi"],
)
def test_what_looks_like_a_token_is_not_shown(text):
    assert "abcdefgh" not in without_tokens(text) and "[token]" in without_tokens(text)


def test_ordinary_text_is_shown():
    text = "--hub_token --hf_token hf_home/out /data/hf_datasets/dogs hf_cache_models half_hf_x huggingface/sks-dog"
    assert without_tokens(text) == text


# Streams


class Gone(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise OSError(5, "Input/output error")  # a terminal that was closed


def test_a_stream_without_a_reader_swallows_what_is_written():
    stream = LastingStream(Gone())
    assert stream.write("text") == 4
    stream.flush()
    print("text", file=stream)


def test_a_closed_descriptor_is_no_stream():
    stream = LastingStream(None)
    assert stream.write("text") == 4
    stream.flush()


def test_an_ascii_stream_takes_every_character():
    buffer = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(buffer, encoding="ascii"))
    stream.write("Bär \ud83d")
    stream.flush()
    assert buffer.getvalue() == rb"B\xe4r \ud83d" and stream.encoding == "ascii"


PRINTS_TO_A_CLOSED_PIPE = """
import sys
from dopsd.terminal import lasting_output
with lasting_output():
    sys.stdin.read()  # until the reader is gone
    for number in range(20_000):
        print("a line", number)
        print("an error", number, file=sys.stderr)
    open(sys.argv[1], "w").write("done")
"""


def test_a_run_outlives_the_reader_of_its_log(tmp_path):
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS_TO_A_CLOSED_PIPE, tmp_path / "said"],
        stdin=subprocess.PIPE,
        stdout=writing,
        stderr=writing,
        cwd=ROOT,
    )
    os.close(writing)
    os.close(reading)
    process.communicate(timeout=60)
    assert (tmp_path / "said").read_text() == "done"
    assert process.returncode == 0


def test_streams_are_as_before_after_a_script(capsys):
    before = sys.stdout, sys.stderr
    with lasting_output():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before
