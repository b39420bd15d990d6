"""Two processes train, evaluate and save as one does: with DDP, and with FSDP2, which shards the base model."""

import json

import pytest
import torch
from support.processes import run_together
from support.together import train_and_judge
from support.training import llama

import reftheads as rh

PROGRAM = """
import sys, torch, transformers
from pathlib import Path
from support.processes import leave
from support.together import train_and_judge
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
train_and_judge(Path(sys.argv[1]), sys.argv[2])
leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_evaluate_save_and_resume_as_one_does(tokenizer, tmp_path, kind):
    tokenizer.save_pretrained(tmp_path)
    train_and_judge(tmp_path, "one")
    run_together(PROGRAM, tmp_path, kind)
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", kind))
    assert two["processes"] == 2 and two["sharded"] == (kind == "fsdp")
    for state in ("trained", "resumed"):
        assert one[state].keys() == two[state].keys()
        for name, expected in one[state].items():
            torch.testing.assert_close(two[state][name], expected, atol=2e-5, rtol=1e-4)
    logs = [json.loads(part["logs"]) for part in (one, two)]
    assert len(logs[0]) == len(logs[1]) > 6
    for entry, other in zip(*logs, strict=True):
        assert entry == pytest.approx(other, rel=1e-4)
    folder = tmp_path / kind
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert (folder / "checkpoint-4" / "rng_state_1.pth").is_file()
    loaded = rh.InterventionModel.from_pretrained(llama(len(tokenizer), num_hidden_layers=2), folder / "checkpoint-4")
    weights = {name: value for name, value in loaded.state_dict().items() if "rh_nodes" in name}
    assert weights.keys() == two["trained"].keys()
    assert all(torch.equal(value, two["trained"][name]) for name, value in weights.items())
