"""Answers to many conversations at once, and a conversation in the terminal."""

import sys
from unittest import mock

import pytest
from support.models import TEMPLATE
from support.training import llama

import reftheads as rh


@pytest.fixture
def model(tokenizer):
    graph = rh.InterventionGraph(rh.Node(rh.LoReFT(rank=2), layer=0, positions="l1"))
    return rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), graph).eval()


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_reply_does_not_depend_on_the_batch_it_is_made_in(model, tokenizer, template):
    tokenizer.chat_template = template
    questions = ["a b c d e", "a", "x y", "k l m"]
    options = {"max_new_tokens": 6, "eos_token_id": -1}
    together = rh.reply(model, tokenizer, questions, batch_size=3, **options)
    assert together == [rh.reply(model, tokenizer, [question], **options)[0] for question in questions]
    assert len(set(together)) > 1


def test_the_chat_keeps_the_conversation_and_switches_to_the_base(model, tokenizer, monkeypatch, capsys):
    tokenizer.chat_template = TEMPLATE
    lines = iter(["a b", "c", "/base", "/new", "a b", ""])
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt: next(lines))
    rh.chat(model, tokenizer, max_new_tokens=4, eos_token_id=-1)
    shown = [line.split(" ", 1) for line in capsys.readouterr().out.splitlines() if line[:5] in ("model", "base ")]
    options = {"max_new_tokens": 4, "eos_token_id": -1}
    first = rh.reply(model, tokenizer, ["a b"], **options)[0]
    history = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": first}]
    second = rh.reply(model, tokenizer, [[*history, {"role": "user", "content": "c"}]], **options)[0]
    with model.disable_adapter():
        base = rh.reply(model, tokenizer, ["a b"], **options)[0]
    assert [(who, said.strip()) for who, said in shown] == [("model", first), ("model", second), ("base", base)]
    assert base != first


def test_a_closed_terminal_ends_the_chat(model, tokenizer, monkeypatch):
    def closed(self, prompt):
        raise EOFError

    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr("rich.console.Console.input", closed)
    assert rh.chat(model, tokenizer) is None


def test_a_reply_is_made_in_evaluation_mode_and_leaves_the_mode_as_it_was(tokenizer):
    graph = rh.InterventionGraph(rh.Node(rh.LoReFT(rank=2, dropout=0.5), layer=0, positions="all"))
    model = rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), graph).train()
    replies = [rh.reply(model, tokenizer, ["a b c"], max_new_tokens=6, eos_token_id=-1) for _ in range(3)]
    assert replies[0] == replies[1] == replies[2]
    assert model.training and all(module.training for module in model.modules())


def test_brackets_in_an_answer_are_shown_as_they_are(model, tokenizer, monkeypatch, capsys):
    tokenizer.chat_template = TEMPLATE
    lines = iter(["a", ""])
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt: next(lines))
    monkeypatch.setattr(
        sys.modules["reftheads.inference.conversation"],
        "reply",
        lambda *args, **options: ["use [/INST] and [b] :smile:"],
    )
    rh.chat(model, tokenizer)
    assert "use [/INST] and [b] :smile:" in capsys.readouterr().out


def test_without_a_chat_template_turns_are_refused_and_not_dropped(model, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template.*load a chat model.*or use reply"):
        rh.chat(model, tokenizer)
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    with pytest.raises(ValueError, match="no chat template, which would make one text of 3 messages: load a chat"):
        rh.reply(model, tokenizer, [turns])
    one, text = rh.reply(model, tokenizer, [turns[:1], "a"], max_new_tokens=4, eos_token_id=-1)
    assert one == text


def test_a_bare_text_is_no_list_of_conversations(model, tokenizer):
    with pytest.raises(ValueError, match="put it into a list"):
        rh.reply(model, tokenizer, "a b")


def test_what_cannot_be_asked_is_an_error_before_anything_is_answered(model, tokenizer):
    """Here in the second of two batches."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    tokenizer.chat_template = None
    with mock.patch.object(model, "generate") as generate, pytest.raises(ValueError, match="no chat template"):
        rh.reply(model, tokenizer, ["a", turns], batch_size=1)
    generate.assert_not_called()
