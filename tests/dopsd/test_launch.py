import json

import pytest
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file

from command_line import ROOT
from dopsd.launch import resolve_seed


@pytest.mark.parametrize(("name", "num_processes"), [("one_gpu", 1), ("one_node_of_gpus", 4)])
def test_accelerate_reads_the_configurations(name, num_processes):
    config = load_config_from_file(str(ROOT / f"configs/{name}.yaml"))
    assert (config.mixed_precision, config.num_processes) == ("bf16", num_processes)


def test_the_seed_is_the_flags_then_the_checkpoints_then_drawn(tmp_path, caplog):
    PartialState()
    caplog.set_level("INFO")
    (tmp_path / "state.json").write_text(json.dumps({"step": 2, "settings": {"--seed": 7}}))
    assert resolve_seed(0, tmp_path) == 0
    assert resolve_seed(None, tmp_path) == 7
    assert not caplog.records
    drawn = [resolve_seed(None, None) for _ in range(2)]
    assert drawn[0] != drawn[1]
    messages = [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]
    assert messages == [f"No --seed was given; using --seed {seed}" for seed in drawn]
