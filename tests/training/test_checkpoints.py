"""Checkpoints are there as a whole or not at all: killed at random moments, removed, replaced, best ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.killing import leftovers
from support.paths import TESTS
from support.training import arguments, llama, weights
from transformers import TrainerCallback

import reftheads as rh
from reftheads.training.checkpoints import WholeCheckpoints

EDIT = rh.InterventionGraph.over(rh.LoReFT(rank=2, dropout=0.1), range(2), positions="f1+l1")
SAVING = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}


@pytest.fixture
def rows(tokenizer):
    return rh.encode_pairs(tokenizer, ["a b c", "d", "e f", "g h i j"] * 2, ["b", "d e", "f", "x y z"] * 2)


def trainer_of(tokenizer, rows, folder, trainer=rh.InterventionTrainer, **options):
    model = rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), EDIT)
    args = arguments(folder, **SAVING | options)
    return trainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


PROGRAM = """
import sys, torch, transformers
from pathlib import Path
from support.killing import survive
from support.training import arguments, llama, weights
import reftheads as rh

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
rows = rh.encode_pairs(tokenizer, ["a b c", "d", "e f", "g h i j"] * 2, ["b", "d e", "f", "x y z"] * 2)
graph = rh.InterventionGraph.over(rh.LoReFT(rank=2, dropout=0.1), range(2), positions="f1+l1")


class Begun(transformers.TrainerCallback):
    def __init__(self, say):
        self.say = say

    def on_step_begin(self, *args, **kwargs):
        self.say()


def train(say=lambda: None, out="out", steps=10**6, resume=None, **options):
    model = rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), graph)
    options = {
        "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "lr_scheduler_type": "constant",
        "logging_strategy": "no", "max_steps": steps,
    } | options
    callbacks = [Begun(say)]
    args = arguments(folder / out, **options)
    trainer = rh.InterventionTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return weights(model)


def again(say):
    out = folder / "out"
    train(say, resume=True if out.is_dir() and any(out.iterdir()) else None)


faults = survive(again, kills, seed, longest=0.6)
assert not faults, "\\n".join([f"{len(faults)} of {kills}", *faults[:2]])
last = max(int(path.name.split("-")[1]) for path in (folder / "out").glob("checkpoint-*"))
resumed, whole = train(steps=last + 2, resume=True), train(out="whole", steps=last + 2, save_strategy="no")
assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
print(kills, last)
"""


@pytest.mark.slow
def test_trainings_killed_at_random_moments_resume_and_end_as_one_that_was_not(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path), "10", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert leftovers(tmp_path / "out") == [] and len(checkpoints(tmp_path / "out")) == 2


PARTS = [
    "save_model", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state", "_once_a_node", "_keep",
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_save_that_is_broken_off_leaves_the_checkpoints_before_it_alone(tokenizer, rows, tmp_path, monkeypatch, part):
    """Whatever fails in a save, the next training goes on from the last whole checkpoint, and clears up."""

    class Breaks(rh.InterventionTrainer):
        pass

    def broken(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise InterruptedError(part)
        return getattr(super(Breaks, self), part)(*args, **kwargs)

    setattr(Breaks, part, broken)
    with pytest.raises(InterruptedError):
        trainer_of(tokenizer, rows, tmp_path, Breaks, save_total_limit=1).train()
    whole = checkpoints(tmp_path)
    assert set(whole) <= {2, 3} and whole
    again = trainer_of(tokenizer, rows, tmp_path, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == [6] and leftovers(tmp_path) == []
    uninterrupted = trainer_of(tokenizer, rows, tmp_path / "other", save_strategy="no")
    uninterrupted.train()
    expected = weights(uninterrupted.model)
    assert all(torch.equal(value, expected[name]) for name, value in weights(again.model).items())


def test_a_training_whose_first_save_was_broken_off_begins_anew_and_one_without_any_is_an_error(
    tokenizer, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(WholeCheckpoints, "_save_rng_state", lambda *args: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        trainer_of(tokenizer, rows, tmp_path).train()
    assert checkpoints(tmp_path) == [] and leftovers(tmp_path) == ["_saving"]
    monkeypatch.undo()
    made = trainer_of(tokenizer, rows, tmp_path)
    assert made.train(resume_from_checkpoint=True).global_step == 6 and leftovers(tmp_path) == []
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer_of(tokenizer, rows, tmp_path / "none").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("limit", [None, 1, 2, 3])
@pytest.mark.parametrize("at_end", [True, False])
def test_as_many_checkpoints_stay_as_with_a_plain_trainer_and_the_best_is_named_by_its_place(
    tokenizer, rows, tmp_path, limit, at_end
):
    from transformers import Trainer

    options = {
        "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": limit, "load_best_model_at_end": at_end,
        "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    kept, best = [], []
    for trainer in (rh.InterventionTrainer, Trainer):
        folder = tmp_path / trainer.__name__
        model = rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), EDIT)
        made = trainer(
            model, arguments(folder, **SAVING | options), train_dataset=rows, eval_dataset=rows,
            data_collator=rh.Collator(tokenizer),
        )  # fmt: skip
        made.train()
        kept.append(checkpoints(folder))
        best.append(Path(made.state.best_model_checkpoint).relative_to(folder))
        last = json.loads((folder / f"checkpoint-{kept[-1][-1]}" / "trainer_state.json").read_text())
        assert Path(last["best_model_checkpoint"]).is_dir()
    assert kept[0] == kept[1] and best[0] == best[1]


@pytest.mark.parametrize("options", [{"save_only_model": True}, {"save_total_limit": 1}])
def test_a_checkpoint_of_the_same_step_is_replaced(tokenizer, rows, tmp_path, options):
    for _ in range(2):
        trainer_of(tokenizer, rows, tmp_path, max_steps=2, **options).train()
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "trainer_state.json"} <= files
    assert ("optimizer.pt" in files) == ("save_only_model" not in options)
    assert leftovers(tmp_path) == []


def test_what_is_uploaded_or_told_of_has_its_place(tokenizer, rows, tmp_path, monkeypatch):
    pushed, saved = [], []

    class Told(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved.append((tmp_path / f"checkpoint-{state.global_step}" / "adapter_model.safetensors").is_file())

    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", lambda self, folder: pushed.append(Path(folder)))
    made = trainer_of(tokenizer, rows, tmp_path, max_steps=2)
    made.args.push_to_hub = True
    monkeypatch.setattr(made, "_finish_current_push", lambda: None)
    made.add_callback(Told())
    made.train()
    assert pushed == [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"] and saved == [True, True]
