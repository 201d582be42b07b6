"""A third model needs a script and a pipeline, and no line of `dopsd/`."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_dopsd_toy
from command_line import Command, same_weights, succeed
from short_runs import PUBLISHED
from toy_pipeline import ToyPipeline, make_toy


@pytest.fixture
def train(forkserver, tmp_path):
    command = Command(forkserver, Path(train_dopsd_toy.__file__))
    model, pictures = make_toy(tmp_path / "model"), tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 64), (220, 40, 40)).save(pictures / "red.png")

    def run(output_dir: Path, **changed):
        flags = {
            "pretrained_model_name_or_path": model,
            "instance_data_dir": pictures,
            "instance_prompt": "red",
            "output_dir": output_dir,
            "resolution": 64,
            "rank": 8,
            "validation_steps": 60,
            "num_validation_images": 1,
            "seed": 0,
            "report_to": "none",
            "ignore_exam": "true",  # an untrained teacher knows nothing
            **PUBLISHED,
        }
        return command(*(text for name, value in (flags | changed).items() for text in (f"--{name}", value)))

    run.model = model
    return run


def test_a_toy_model_trains_resumes_and_its_lora_loads(train, tmp_path):
    succeed(train(tmp_path / "whole", teacher="base"))
    losses = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert len(losses) == 60 and sum(losses[-5:]) < 0.2 * sum(losses[:5])
    assert {"preview.png", "validation-60.png", "story.png", "README.md"} <= {p.name for p in tmp_path.glob("whole/*")}

    succeed(train(tmp_path / "parts", teacher="base", max_train_steps=30, checkpointing_steps=30))
    succeed(train(tmp_path / "parts", teacher="base", resume_from_checkpoint="latest"))
    assert same_weights(tmp_path / "whole", tmp_path / "parts")

    pipeline = ToyPipeline.from_pretrained(train.model)
    tokens = torch.rand(1, 4, 4, 23)
    before = pipeline.transformer(tokens)
    pipeline.load_lora_weights(tmp_path / "whole")
    assert (pipeline.transformer(tokens) - before).abs().mean() > 0.01


def test_a_bad_flag_of_a_toy_model_is_one_line(train, tmp_path):
    message = train(tmp_path / "run", teacher_context="edit").error
    assert "--teacher_context" in message and "colours" in message


def test_a_teacher_that_knows_nothing_stops_the_run(train, tmp_path):
    result = train(tmp_path / "run", ignore_exam="false")
    assert "--teacher_context colours: the teacher is no better than the base (it draws what the base " in result.error
    assert {"preview.png", "exam.json", "report.html"} <= {path.name for path in tmp_path.glob("run/*")}
    assert "Steps:" not in result.log and not (tmp_path / "run/metrics.jsonl").read_text()
