"""Predictions of heads for many rows: in order, in evaluation mode, each as if its row were alone."""

import pytest
import torch
from support.models import random_ids, randomise, tiny_bart, tiny_llama

import reftheads as rh


def made(base, *nodes: rh.Node) -> rh.InterventionModel:
    model = rh.InterventionModel(base, rh.InterventionGraph(*nodes))
    randomise(model)
    return model


def rows(*lengths: int) -> list[dict]:
    return [{"input_ids": random_ids(1, n, seed=n)[0].tolist()} for n in lengths]


def test_every_row_gets_what_it_gets_alone_whatever_its_length_and_place(tokenizer):
    model = made(
        tiny_llama(attention_dropout=0.5),
        rh.Node(rh.LoReFT(rank=2, dropout=0.5), 0, positions="f1", name="edit"),
        rh.Node(rh.LinearHead(3, activation="softmax"), 1, positions="l1", name="last"),
        rh.Node(rh.MLPHead(2, hidden=4), 0, name="each"),
    ).train()
    some = rows(5, 2, 9, 3, 3)
    found = rh.predict(model, tokenizer, some, batch_size=2)
    assert model.training
    model.eval()
    for i, row in enumerate(some):
        alone = model(input_ids=torch.tensor([row["input_ids"]])).predictions
        torch.testing.assert_close(found["last"][i], alone["last"][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["each"][i], alone["each"][0], atol=1e-5, rtol=1e-5)
    assert found["last"].shape == (5, 3) and not found["last"].requires_grad


def test_a_row_in_which_a_head_selects_nothing_has_no_prediction(tokenizer):
    model = made(tiny_llama(), rh.Node(rh.LinearHead(1), 0, positions=3, name="fourth"))
    found = rh.predict(model, tokenizer, rows(5, 2))["fourth"]
    assert found[0].isfinite().all() and found[1].isnan().all()


def test_texts_are_rows_and_models_of_two_stacks_predict_too(tokenizer):
    model = made(tiny_llama(vocab_size=40), rh.Node(rh.LinearHead(2), 1, positions="l1", name="head"))
    ids = tokenizer("a b c")["input_ids"]
    texts = rh.predict(model, tokenizer, ["a b c", "d"])["head"]
    torch.testing.assert_close(texts[:1], rh.predict(model, tokenizer, [{"input_ids": ids}])["head"])

    model = made(tiny_bart(), rh.Node(rh.LinearHead(2), 0, positions="l1", stack="encoder", name="head"))
    assert rh.predict(model, tokenizer, rows(4, 6))["head"].shape == (2, 2)


def test_no_rows_are_an_error(tokenizer):
    with pytest.raises(ValueError, match="give at least one text, or row"):
        rh.predict(made(tiny_llama(), rh.Node(rh.LinearHead(2), 1, positions="l1")), tokenizer, [])
