"""Reward models: pairs from text to the loss, and what training on them does."""

import random

import pytest
import torch
from support.models import tiny_llama
from transformers import TrainingArguments, set_seed

import reftheads as rh


def judge(tokenizer, *nodes: rh.Node, dtype: str = "float32") -> rh.InterventionModel:
    """A reward at the last token of every row."""
    base = tiny_llama(vocab_size=len(tokenizer), eos_token_id=1, initializer_range=0.3)
    head = rh.LinearHead(1, target="preference", loss="bradley_terry", dtype=dtype)
    return rh.InterventionModel(base, rh.InterventionGraph(*nodes, rh.Node(head, positions="l1", layer=-1, name="r")))


def test_the_loss_of_a_batch_of_pairs_is_bradley_and_terrys_written_out(tokenizer):
    model = judge(tokenizer, dtype="float64").double().eval()
    pairs = rh.encode_preferences(tokenizer, ["a b", "c", "d e f"], ["g", "h i j k", "l"], ["m n o", "p", "q r"])
    with torch.no_grad():
        loss = model(**rh.Collator(tokenizer)(pairs)).loss
        rewards = [[model(torch.tensor([row["input_ids"]])).predictions["r"][0, 0] for row in pair] for pair in pairs]
    expected = torch.stack([-torch.sigmoid(chosen - rejected).log() for chosen, rejected in rewards]).mean()
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("reuse", ["off", "auto"])
def test_training_tells_chosen_answers_that_it_has_not_seen_from_rejected_ones(tokenizer, tmp_path, reuse):
    set_seed(0)
    texts = random.Random(0)

    def some(letters: str) -> list[str]:
        return [" ".join(texts.choices(letters, k=texts.randint(1, 4))) for _ in range(100)]

    def pairs() -> list[list[dict]]:
        """An answer is chosen for its letters, whatever the prompt."""
        return rh.encode_preferences(tokenizer, some("mnopqrs"), some("abcdef"), some("ghijkl"))

    train, held_out = pairs(), pairs()
    model = judge(tokenizer, rh.Node(rh.LoReFT(rank=4), 0, positions="all"), rh.Node(rh.LoRA(4), 2, "value_output"))

    def right() -> float:
        rewards = rh.predict(model, tokenizer, [row for pair in held_out for row in pair])["r"]
        chosen, rejected = rewards.view(-1, 2).T
        return (chosen > rejected).float().mean().item()

    before = right()
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=8, learning_rate=2e-2, per_device_train_batch_size=20, save_strategy="no",
        logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rh.InterventionTrainer(model, args, train_dataset=train, processing_class=tokenizer, reuse=reuse).train()
    assert right() > max(0.9, before + 0.15), before


def test_rows_of_other_tasks_are_no_answers_of_a_pair(tokenizer):
    model = judge(tokenizer, dtype="float64").double().eval()
    [pair] = rh.encode_preferences(tokenizer, ["a"], ["b"], ["c"])
    other = {"input_ids": [3, 4, 5]}
    hundredth = [row | {"preference": 100 * row["preference"]} for row in pair]
    alone, beside = (model(**rh.Collator(tokenizer)(rows)) for rows in ([hundredth], [hundredth, other, other]))
    torch.testing.assert_close(beside.loss, alone.loss)
    assert int(beside.counts["r"]) == int(alone.counts["r"]) == 2
