import json
import os
import sys
from itertools import product

import numpy as np
import pytest
from PIL import Image

from benchmarks.miniature import experiment as experiment_module
from benchmarks.miniature import methods
from benchmarks.miniature.concepts import CONCEPTS
from benchmarks.miniature.files import MODEL, ZIMAGE_MODEL
from benchmarks.miniature.methods import DOPSD, QUICK_TABLE, SFT, SFT_STOPPED, Run
from dopsd.errors import InputError


def set_command_line(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["experiment.py", *map(str, arguments)])


@pytest.mark.exhaustive
def test_an_experiment_trains_measures_and_reports(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # `main` changes it; this restores it
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    set_command_line(monkeypatch, "--quick", "--output_dir", tmp_path, "--num_train_steps", 3, "--eval_count", 16)
    monkeypatch.setattr(methods, "STEP_TABLE", (DOPSD,))
    experiment_module.main()

    results = json.loads((tmp_path / "results.json").read_text())
    runs = {method.name: Run(CONCEPTS[0], 0, method) for method in QUICK_TABLE}
    assert set(results) == {str(run.folder) for run in runs.values()}
    dopsd, sft = results[str(runs[DOPSD.name].folder)], results[str(runs[SFT.name].folder)]
    assert dopsd["retention"] == pytest.approx(dopsd["retention_logged"], abs=1e-3) and dopsd["retention"] > 0
    assert sft["steps"] == dopsd["steps"] == 3 and set(dopsd["step_counts"]) == {"1", "2", "4", "8"}
    assert "reached" in results[str(runs[SFT_STOPPED.name].folder)]
    assert sft["forwards"] == 50 and "seconds" not in sft and "stack" not in sft
    text = (tmp_path / "results.md").read_text()
    assert text.count("| D-OPSD |") == 6  # in the table, in the concept's, and for each number of sampling steps
    for name in ("sheet.png", "step_counts.png", "first_table.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / name)).reshape(-1, 3), axis=0)) > 100

    set_command_line(monkeypatch, "--quick", "--output_dir", tmp_path, "--num_train_steps", 4, "--eval_count", 16)
    with pytest.raises(InputError, match="--output_dir .* another num_train_steps \\(3, now 4\\)"):
        experiment_module.main()


def test_quick_measures_fewer_pictures_in_a_folder_of_its_own(monkeypatch):
    set_command_line(monkeypatch)
    full = experiment_module.parse_args()
    set_command_line(monkeypatch, "--quick")
    quick = experiment_module.parse_args()
    assert full.output_dir is None and quick.eval_count < full.eval_count
    folders = {
        experiment_module.default_folder(model, is_quick=is_quick)
        for model, is_quick in product((MODEL, ZIMAGE_MODEL), (False, True))
    }
    assert len(folders) == 4
    assert (full.num_workers, quick.num_workers) == (os.cpu_count(), 1)
    set_command_line(monkeypatch, "--quick", "--eval_count", "20", "--output_dir", "here")
    given = experiment_module.parse_args()
    assert (given.eval_count, str(given.output_dir)) == (20, "here")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "--model nowhere: holds no pipeline"),
        (["--eval_count", "8"], "--eval_count 8: give 16 to 192"),
        (["--eval_count", "200"], "--eval_count 200: give 16 to 192"),
        (["--output_dir", "a_file"], "--output_dir a_file: File exists; choose another folder"),
    ],
)
def test_wrong_flags_are_reported_in_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    set_command_line(monkeypatch, *flags)
    with pytest.raises(InputError, match=message):
        experiment_module.main()


def test_counts_below_one_are_refused(monkeypatch, capsys):
    set_command_line(monkeypatch, "--num_workers", "0")
    with pytest.raises(SystemExit):
        experiment_module.parse_args()
    assert "--num_workers: '0' is not a whole number of at least 1" in capsys.readouterr().err
