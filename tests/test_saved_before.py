"""What was saved before the modules became packages loads after it: adapter, checkpoint, store, study."""

import shutil
from pathlib import Path

import pytest
import torch
from fixtures.saved_before_the_move import make
from safetensors.torch import load_file

import reftheads as rh
from reftheads.fewshot import Study

SAVED = Path(__file__).parent / "fixtures" / "saved_before_the_move"
ANSWERS = load_file(SAVED / "answers.safetensors")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return rh.Collator(make.tokenizer())(make.ROWS)


def test_an_adapter_answers_as_it_did(batch):
    model = rh.InterventionModel.from_pretrained(make.llama(), SAVED / "adapter")
    assert model.plan().graph == make.graph()
    with torch.no_grad():
        out = model(**batch)
    for name, value in (("logits", out.logits), ("loss", out.loss), ("mood", out.predictions["mood"])):
        torch.testing.assert_close(value, ANSWERS[name])
    torch.testing.assert_close(out.collected["seen"], ANSWERS["seen"])


def test_a_training_that_was_broken_off_ends_with_the_same_weights(tmp_path):
    shutil.copytree(SAVED / "checkpoint", tmp_path / "checkpoint-2")
    model = rh.InterventionModel(make.llama(), make.trained_graph())
    trainer = rh.InterventionTrainer(
        model, make.arguments(tmp_path), train_dataset=make.ROWS, processing_class=make.tokenizer(), reuse="off"
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    for name, tensor in model.tuner.layer.rh_nodes["default"].state_dict().items():
        torch.testing.assert_close(tensor, ANSWERS[f"trained.{name}"])


def test_a_store_serves_what_was_recorded(batch, tmp_path):
    shutil.copytree(SAVED / "store", tmp_path / "store")
    torch.manual_seed(0)
    model = rh.InterventionModel(make.llama(), make.trained_graph())
    store = rh.ActivationStore(directory=tmp_path / "store")
    with model.reusing(store):
        loss = model(**batch).loss
    assert store.misses == 0 and store.hits > 0
    torch.testing.assert_close(loss.detach(), ANSWERS["reused"])


def test_a_study_runs_no_cell_again(tmp_path):
    shutil.copytree(SAVED / "study", tmp_path / "study")

    def measure(**cell):
        raise AssertionError(f"{cell} is there already")

    cells = [{"mode": "probe", "k": 1}, {"mode": "lora4", "k": 8}]
    results = Study(tmp_path / "study", steps=30).run(cells, measure)
    assert [result["score"] for result in results] == [0.1, 0.8]
