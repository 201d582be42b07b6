import json
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.exhaustive


@pytest.mark.parametrize("source", ["txt", "metadata", "dataset"])
def test_the_benchmark_kills_a_run_and_counts_what_each_process_does(tmp_path, source):
    command = [sys.executable, "-m", "benchmarks.many_pictures", "--num_pictures", "600", "--num_processes", "2"]
    command += ["--source", source, "--output_dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr
    starts = json.loads((tmp_path / "many-pictures.json").read_text())["starts"]
    counts = {start["name"]: start["counts"] for start in starts}
    assert all(count["captions"] == ([300, 300] if source == "txt" else [0, 0]) for count in counts.values())
    assert counts["killed half-way"]["pictures"] == [300, 300]
    assert sum(counts["again"]["verified"]) >= 600
    assert sum(counts["again"]["verified"]) + sum(counts["again"]["encoded"]) >= 1200
    for name in ("again", "training", "from a checkpoint"):
        assert counts[name]["pictures"] == [0, 0]
    for name in ("training", "from a checkpoint"):
        assert counts[name]["encoded"] == [0, 0]
    assert counts["from a checkpoint"]["verified"] == [0, 0]
    assert "| pictures, count | 300 + 300 | 0 + 0 | 0 + 0 | 0 + 0 |" in done.stdout
