import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.exhaustive


def test_the_benchmark_measures_starts_with_an_empty_and_a_full_cache():
    command = [sys.executable, "-m", "benchmarks.startup", "--captions", "6"]
    done = subprocess.run(
        command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "Encoding 12 of 12 prompts and 6 of 6 pictures" in done.stderr
    assert "Encoding 0 of 12 prompts and 0 of 6 pictures" in done.stderr
    headings = [line for line in done.stdout.splitlines() if line.endswith(" cache")]
    assert headings == [f"{count} pictures, {state} cache" for count in (6, 5) for state in ("empty", "full")]
