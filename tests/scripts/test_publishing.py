"""Whole runs that publish, to a local server instead of the Hub."""

import os
import subprocess
import sys

import numpy as np
from huggingface_hub import ModelCard
from PIL import Image

from command_line import LORA_FILE, succeed, weights
from loopback_hub import TOKEN, Hub, serving
from models import ONE_MODEL, SLOW


@ONE_MODEL
@SLOW
def test_a_run_that_cannot_publish_keeps_its_weights_and_publishes_later(train, model, tmp_path):
    token = "hf_" + "secretsecret" * 3
    flags = {"validation_steps": 2, "validation_prompt": ["a ball", "a box"], "num_validation_images": 2}
    flags |= {"report_to": "tensorboard", "checkpointing_steps": 2, "hub_model_id": "someone/ball"}
    result = train(**flags, push_to_hub=True, hub_token=token)  # the tests' environment is offline
    assert "--hub_model_id someone/ball: could not be published" in result.error
    assert "--push_only" in result.error
    run = tmp_path / "run"
    assert weights(run)
    everything = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert token.encode() not in everything + result.log.encode()

    card = ModelCard.load(run / "README.md")
    assert card.data.instance_prompt == "a ball"
    assert [entry["text"] for entry in card.data.widget] == ["a ball", "a box"]
    stock = model.pipeline()
    stock.load_lora_weights(run)
    for entry in card.data.widget:
        with Image.open(run / entry["output"]["url"]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(model.draw(stock, entry["text"], 0)))

    hub = Hub()
    with serving(hub):
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, model.script_path, "--push_only", "--output_dir", run]
        command += ["--hub_model_id", "someone/ball", "--hub_private_repo", "--hub_token", TOKEN]
        done = subprocess.run(command, env=os.environ | online, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Published: {hub.url}/someone/ball" in done.stdout
    repository = hub.repositories["someone/ball"]
    assert repository["private"]
    assert repository["files"][LORA_FILE] == (run / LORA_FILE).read_bytes()
    assert {"README.md", "story.png", "validation-2.png", "images/validation_1.png"} <= set(repository["files"])
    assert not [name for name in repository["files"] if "checkpoint" in name or "cache" in name or "logs" in name]


@ONE_MODEL
def test_a_readme_that_is_not_a_model_card_is_kept(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/README.md").write_text("# my notes")
    assert "README.md is not the model card of a D-OPSD run, so it is not overwritten" in succeed(train()).log
    assert (tmp_path / "run/README.md").read_text() == "# my notes"
