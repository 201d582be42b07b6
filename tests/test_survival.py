"""Kills, signals, full disks and several processes: what a long run must survive."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

import train_dopsd_flux2 as script  # for what both scripts share
from command_line import LORA_FILE, ROOT, same_weights, succeed, weights
from dopsd.errors import InputError


ONE_SCRIPT = pytest.mark.parametrize("model", ["flux2"], indirect=True)  # see test_train.py


@pytest.fixture
def arguments(model, photos, tmp_path):
    """The command line of a short run with many checkpoints; all runs share the encodings."""

    def make(folder, *more, steps=20):
        return [
            *("--pretrained_model_name_or_path", str(model.path), "--instance_data_dir", str(photos)),
            *(str(part) for name, value in model.flags.items() for part in (f"--{name}", value)),
            *("--instance_prompt", "a ball", "--resolution", "64", "--rank", "4"),
            *("--learning_rate", "1e-3", "--seed", "0"),
            *("--max_train_steps", str(steps), "--checkpointing_steps", "2", "--report_to", "none"),
            *("--lora_dropout", "0.1", "--lr_scheduler", "cosine", "--validation_steps", "0"),
            *("--context_cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / folder)),
            *("--resume_from_checkpoint", "latest", *more),
        ]

    return make


def wait_for(condition, process, seconds=60):
    """Whether the condition came true while the process ran."""
    end = time.monotonic() + seconds
    while not condition():
        if not process.is_alive() or time.monotonic() > end:
            return condition()
        time.sleep(0.01)
    return True


def checkpoints(folder):
    return [script.checkpoint_step(path) for path in script.list_checkpoints(Path(folder))]


def kill_and_resume(command, arguments, tmp_path, kills, seed):
    """Kills one run so many times at random moments; returns how many kills hit it while it was training."""
    steps = 120
    succeed(command(*arguments("undisturbed", "--checkpointing_steps", "9999", steps=steps)))
    rng = random.Random(seed)
    counts = {"kills": 0, "while training": 0, "unfinished checkpoints": 0}
    while counts["kills"] < kills:
        # Each round is a run of its own, killed again and again until it is done.
        folder = tmp_path / f"killed-{counts['kills']}"
        for _ in range(kills):
            process, log = command.start(*arguments(folder.name, steps=steps))
            process.join(timeout=rng.uniform(0.5, 4.0))
            if not process.is_alive():
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            counts["kills"] += 1
            counts["while training"] += "Steps:" in log.read_text(errors="replace")
            counts["unfinished checkpoints"] += len(list(folder.glob(".checkpoint-*.tmp")))
            for step in checkpoints(folder):  # whatever is called a checkpoint is whole
                load_file(folder / f"checkpoint-{step}/adapters.safetensors")
                torch.load(folder / f"checkpoint-{step}/trainer_state.pt", weights_only=True)
            if counts["kills"] == kills:
                break
        succeed(command(*arguments(folder.name, steps=steps)))
        assert same_weights(tmp_path / "undisturbed", folder)
        assert [line["step"] for line in script.read_history(folder)] == list(range(1, steps + 1))
        assert not list(folder.glob(".checkpoint-*"))
    print(counts)
    return counts


@pytest.mark.parametrize(("model", "kills"), [("flux2", 10), ("zimage", 4)], indirect=["model"])
def test_kills_at_random_moments_end_in_the_same_weights(command, arguments, tmp_path, kills):
    counts = kill_and_resume(command, arguments, tmp_path, kills=kills, seed=0)
    assert counts["kills"] == kills
    assert counts["while training"] >= kills // 3


@ONE_SCRIPT
@pytest.mark.exhaustive
def test_twenty_kills_at_random_moments_end_in_the_same_weights(command, arguments, tmp_path):
    assert kill_and_resume(command, arguments, tmp_path, kills=20, seed=1)["kills"] == 20


@ONE_SCRIPT
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(command, arguments, tmp_path, number):
    succeed(command(*arguments("undisturbed")))
    process, log = command.start(*arguments("stopped", "--checkpointing_steps", "1000"))
    assert wait_for(
        lambda: (tmp_path / "stopped/metrics.jsonl").exists() and script.read_history(tmp_path / "stopped"), process
    )
    os.kill(process.pid, number)
    process.join(timeout=30)
    assert process.exitcode == 128 + number
    text = log.read_text(errors="replace")
    (step,) = checkpoints(tmp_path / "stopped")
    assert 0 < step < 20
    assert f"Stopped after step {step} ({number.name}); checkpoint-{step} is saved" in text
    assert "--resume_from_checkpoint latest" in text and "Traceback" not in text
    assert not (tmp_path / "stopped" / LORA_FILE).exists()
    succeed(command(*arguments("stopped")))
    assert same_weights(tmp_path / "undisturbed", tmp_path / "stopped")


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "import train_dopsd_flux2 as script\n"
        "stop = script.StopRequest(); assert not stop.is_made\n"
        "os.kill(os.getpid(), signal.SIGINT); assert stop.is_made and stop.reason == 'SIGINT'\n"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(ROOT)], timeout=120)
    assert result.returncode == -signal.SIGTERM


@ONE_SCRIPT
def test_a_run_whose_launcher_died_saves_and_stops(model, arguments, tmp_path):
    """As under `accelerate launch` of one process, which dies of a SIGTERM and leaves its child training."""
    launcher = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    folder = tmp_path / "orphan"
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                launcher,
                str(model.script_path),
                *arguments("orphan", "--checkpointing_steps", "9999", steps=9999),
            ],
            stdout=log,
            stderr=log,
            env=environment,
        )
    end = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or not script.read_history(folder):
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.05)
    process.kill()
    process.wait()
    while not checkpoints(folder):
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.05)
    time.sleep(1)
    assert "its launcher has ended" in (tmp_path / "log").read_text()
    before = len(script.read_history(folder))
    time.sleep(1)
    assert len(script.read_history(folder)) == before == checkpoints(folder)[-1]


@ONE_SCRIPT
@pytest.mark.parametrize("kilobytes", [8, 40, 90])
def test_a_writer_that_fails_leaves_the_checkpoints_whole_and_one_line(model, arguments, tmp_path, kilobytes):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    whole = [sys.executable, str(model.script_path), *arguments("run", steps=2)]
    subprocess.run(whole, check=True, env=environment, capture_output=True)
    before = weights(tmp_path / "run/checkpoint-2")
    limited = " ".join(map(repr, [sys.executable, str(model.script_path), *arguments("run", steps=6)]))
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f {kilobytes}; exec {limited}"], env=environment, capture_output=True, text=True
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith(model.script_path.name + ": error: ")]
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    assert (
        len(errors) == 1 and "checkpoint-4 could not be written" in errors[0] and "checkpoint-2 is whole" in errors[0]
    )
    assert checkpoints(tmp_path / "run") == [2] and not list((tmp_path / "run").glob(".checkpoint-*"))
    after = weights(tmp_path / "run/checkpoint-2")
    assert all(torch.equal(before[name], after[name]) for name in before)
    subprocess.run([sys.executable, str(model.script_path), *arguments("run", steps=6)], check=True, env=environment)
    assert checkpoints(tmp_path / "run") == [2, 4, 6]


@ONE_SCRIPT
def test_a_lora_that_cannot_be_written_at_the_end_is_saved_elsewhere(command, arguments, tmp_path):
    succeed(command(*arguments("undisturbed", steps=2)))
    (tmp_path / f"run/.{LORA_FILE}.tmp").mkdir(parents=True)  # in the way of the writer
    error = command(*arguments("run", "--checkpointing_steps", "9999", steps=2)).error
    assert f"{LORA_FILE} could not be written" in error
    elsewhere = re.search("the LoRA is in (.*), move it", error)[1]
    assert same_weights(tmp_path / "undisturbed", elsewhere)
    shutil.rmtree(elsewhere)


@ONE_SCRIPT
def test_an_output_folder_that_cannot_be_written_is_one_line(command, arguments, tmp_path):
    (tmp_path / "taken").write_text("a file")
    assert "--output_dir" in command(*arguments("taken")).error


def test_twenty_skipped_steps_in_a_row_are_a_fault_and_fewer_are_not():
    skipped = 0
    for _ in range(19):
        skipped = script.count_skipped(skipped, True)
    assert script.count_skipped(skipped, False) == 0
    with pytest.raises(InputError, match="--mixed_precision fp16: gradients overflowed in 20 steps in a row"):
        script.count_skipped(skipped, True)


@ONE_SCRIPT
def test_only_the_last_visited_state_of_a_step_synchronises(command, arguments, monkeypatch, tmp_path):
    succeed(command(*arguments("first", steps=2)))  # fills the cache
    unsynchronised = []
    original = script.Accelerator.no_sync
    monkeypatch.setattr(
        script.Accelerator, "no_sync", lambda self, model: unsynchronised.append(1) or original(self, model)
    )
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    script.main(script.parse_args(arguments("second", "--gradient_accumulation_steps", "3", steps=2)))
    # Two steps of three batches of four states; accelerate itself asks once for each batch that is not the last.
    assert len(unsynchronised) == 2 * (3 * 4 - 1) + 2 * 2


@pytest.mark.parametrize("name", ["one_gpu", "one_node_of_gpus"])
def test_accelerate_reads_the_configurations(name):
    config = load_config_from_file(str(ROOT / f"configs/{name}.yaml"))
    assert config.mixed_precision == "bf16"
    assert config.num_processes == {"one_gpu": 1, "one_node_of_gpus": 4}[name]


# Two processes


@pytest.fixture
def torchrun(model):
    """Starts the script as two CPU processes."""

    def run(arguments, log, port):
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        launcher = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2"]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        return subprocess.Popen([*launcher, model.script_path, *arguments], stdout=log, stderr=log, env=environment)

    return run


@ONE_SCRIPT
@pytest.mark.slow
def test_sigterm_under_torchrun_saves_and_the_run_goes_on(torchrun, command, arguments, tmp_path):
    two_batches = ("--gradient_accumulation_steps", "2", "--checkpointing_steps", "9999")
    succeed(command(*arguments("undisturbed", *two_batches, steps=80)))
    folder = tmp_path / "two"
    with open(tmp_path / "log", "wb") as log:
        process = torchrun(arguments("two", "--checkpointing_steps", "9999", steps=80), log, 29543)
        end = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or len(script.read_history(folder)) < 3:
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    text = (tmp_path / "log").read_text()
    (step,) = checkpoints(folder)
    assert f"Stopped after step {step}" in text
    # The other number of processes goes on with the same batches a step.
    succeed(command(*arguments("two", *two_batches, steps=80)))
    first, second = weights(tmp_path / "undisturbed"), weights(folder)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-3, rtol=1e-2)


@ONE_SCRIPT
@pytest.mark.slow
def test_a_nan_on_one_process_stops_all(torchrun, command, arguments, tmp_path):
    succeed(command(*arguments("first", steps=2)))
    entries = sorted((tmp_path / "cache").glob("*/*.safetensors"))
    cache = script.ContextCache(tmp_path / "cache")
    references = [path for path in entries if next(iter(load_file(path).values())).ndim == 4]
    tensor = next(iter(load_file(references[0]).values()))
    cache.save(references[0].stem, torch.full_like(tensor, float("nan")))
    with open(tmp_path / "log", "wb") as log:
        process = torchrun(arguments("two", steps=20), log, 29544)
        assert process.wait(timeout=120) != 0
    text = (tmp_path / "log").read_text()
    assert "the loss is nan" in text
    assert not (tmp_path / "two" / LORA_FILE).exists()
    history = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert len(history) < 2  # three pictures, two a step: the bad one comes in step 1 or 2
