"""Training that stops by a metric."""

import pytest
import transformers as tf
from support.models import tiny_llama

import reftheads as rh
import reftheads.fewshot as fs


def test_training_stops_when_a_logged_metric_is_beyond_its_bound(tokenizer, tmp_path):
    rows = rh.encode_pairs(tokenizer, ["a b"], ["c"])
    args = tf.TrainingArguments(
        str(tmp_path), max_steps=200, learning_rate=0.1, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip

    def train(stop):
        model = rh.InterventionModel(tiny_llama(vocab_size=40), rh.InterventionGraph(rh.Node(rh.LoReFT(rank=2), 1)))
        trainer = rh.InterventionTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[stop])
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    losses = train(fs.StopWhen("loss", below=3.52, patience=2))
    assert len(losses) < 200 and max(losses[-2:]) < 3.52 <= min(losses[:-2])
    with pytest.raises(ValueError, match="'accuracy' is not logged: there are loss"):
        train(fs.StopWhen("accuracy", above=0.5))
    with pytest.raises(ValueError, match="give below or above"):
        fs.StopWhen("loss")
