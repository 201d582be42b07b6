import json
import shutil

import pytest
from transformers import AutoConfig

from dopsd.encoders import PICTURE_FORMAT
from dopsd.errors import InputError
from models import ONE_MODEL, WITH_VLM, ZIMAGE
from short_runs import same_tensors
from tiny_vlm import make_tiny_vlm
from tiny_zimage import tiny_text_config


@WITH_VLM
def test_a_vlm_that_does_not_fit_the_text_encoder_is_refused(prepare, model, tmp_path):
    other = make_tiny_vlm(tmp_path / "vlm", text_config=tiny_text_config(num_hidden_layers=5))
    with pytest.raises(InputError) as caught:
        prepare(vlm_model_name_or_path=other)
    layers = AutoConfig.from_pretrained(model.path, subfolder="text_encoder").num_hidden_layers
    message = str(caught.value)
    assert message.startswith(f"--vlm_model_name_or_path {other}") and str(model.path) in message
    assert f"num_hidden_layers 5, not {layers}" in message and "\n" not in message


@WITH_VLM
def test_a_vlm_must_be_named_if_none_is_known_for_the_text_encoder(prepare):
    with pytest.raises(
        InputError, match="^--vlm_model_name_or_path has no default for a text encoder with hidden size 32; pass "
    ):
        prepare(vlm_model_name_or_path=None)


@WITH_VLM
def test_a_new_arithmetic_of_the_vision_tower_changes_the_keys_of_its_encodings_only(prepare, monkeypatch):
    contexts = prepare().contexts
    contexts.fingerprints = {"text_encoder": "weights", "vae": "weights"}
    encodings = list(contexts.all_encodings(["a cat"]))
    with_tower = [encoding for encoding in encodings if encoding.encoder.name == "vlm"]
    before = {encoding: contexts.key(encoding) for encoding in encodings}
    monkeypatch.setattr("dopsd.encoders.PICTURE_FORMAT", PICTURE_FORMAT - 1)
    changed = [encoding for encoding in before if contexts.key(encoding) != before[encoding]]
    assert changed == list(dict.fromkeys(with_tower)) and 0 < len(changed) < len(before)


@ZIMAGE
def test_only_the_vision_towers_files_of_a_hub_vlm_are_read(prepare, model, tmp_path):
    commit = "0" * 40
    snapshot = tmp_path / "hub/models--org--vlm/snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(commit)
    shard_of = json.loads((model.vlm_path / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {shard for key, shard in shard_of.items() if ".visual." in key}
    assert shards < set(shard_of.values())
    for name in ("config.json", "preprocessor_config.json", "model.safetensors.index.json", *shards):
        shutil.copy(model.vlm_path / name, snapshot)
    hub = prepare(vlm_model_name_or_path="org/vlm", cache_dir=tmp_path / "hub").encode_without_cache()
    local = prepare().encode_without_cache()
    assert same_tensors(hub.all_contexts(), local.all_contexts())
    assert hub.conditioning.teacher[0].identity() == local.conditioning.teacher[0].identity()
    with pytest.raises(InputError, match="^--vlm_model_name_or_path org/vlm"):
        prepare(vlm_model_name_or_path="org/vlm")


@ONE_MODEL
def test_the_caption_teacher_encodes_prompts_only(prepare, photos, tmp_path):
    data = shutil.copytree(photos, tmp_path / "data")
    rows = [{"file_name": f"{n}.png", "short": "a ball", "long": f"a ball, number {n}"} for n in range(3)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = prepare(
        instance_data_dir=data,
        instance_prompt=None,
        caption_column="short",
        teacher_context="caption",
        teacher_caption_column="long",
        teacher_prompt_suffix=None,
    )
    encodings = [encoding for _, encoding in run.contexts.all_teacher_encodings()]
    assert [encoding.prompt for encoding in encodings] == [row["long"] for row in rows]
    assert all(encoding.pictures == () and encoding.encoder.component == "text_encoder" for encoding in encodings)
