"""The recipes are really run: the demo as it is, the others small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reftheads as rh

RECIPES = Path(__file__).parent.parent / "recipes"

pytestmark = pytest.mark.slow


def run(recipe: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "ignore", str(RECIPES / recipe), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_ten_demonstrations_make_the_chat_model_answer_in_emoji(tmp_path):
    shown = run("emoji_chat.py", "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert figures["base"]["emoji_only"] < 0.02
    assert figures["l1"]["emoji_only"] >= 0.9
    assert figures["l1"]["on_topic"] >= 0.6
    assert figures["l1"]["parameters"] == 2 * 4 * 192 + 4
    assert "120 prompts" in shown


def test_the_embedded_model_is_small_and_stops(tmp_path):
    folder = Path(rh.__file__).parent / "tiny_chat"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 6_000_000
    base, tokenizer = rh.load_base("tiny-chat")
    assert base.num_parameters() <= 3_000_000
    assert base.dtype == torch.float32
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me about dogs. Answer in emoji."}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    ids = base.generate(**asked, max_new_tokens=64, do_sample=False)[0]
    assert ids[-1] == tokenizer.eos_token_id
    plain, emoji = rh.reply(base, tokenizer, ["Tell me about dogs.", "Tell me about dogs. Answer in emoji."])
    assert plain.isascii() and not any(character.isascii() for character in emoji)


def test_pretraining_is_deterministic_and_writes_a_model_that_loads(tmp_path):
    for name in ("a", "b"):
        run("pretrain_tiny.py", "--steps", 3, "--limit", 20, "--threads", 1, "--out", tmp_path / name)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    base, tokenizer = rh.load_base(str(tmp_path / "a"))
    assert rh.reply(base, tokenizer, ["Tell me about dogs."], max_new_tokens=3)


def test_the_benchmark_prints_its_tables():
    assert "import reftheads" in run("benchmark.py", "import")


def test_a_sweep_prints_its_grid_and_writes_a_plot_and_all_figures(tmp_path):
    shown = run(
        "sweep.py", "--ranks", "1", "--rates", "1e-2", "--seeds", "0,1", "--steps", 5, "--out", tmp_path / "out"
    )
    assert "mean ± deviation of 2 seeds" in shown and "an extrapolation" in shown and "train_runtime" not in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sweep.json", "sweep.png"}
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [(r["rank"], r["learning_rate"], r["seed"]) for r in figures["results"]] == [(1, 1e-2, 0), (1, 1e-2, 1)]
    assert all(r["eval_loss"] > 0 and 0 <= r["emoji_only"] <= 1 for r in figures["results"])
