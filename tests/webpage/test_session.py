"""What one visitor of a page does: nobody else sees it, and whatever is typed gets an answer or a message."""

import json
import os
import threading

import pytest
import torch
from support.models import randomise

import reftheads as rh
from reftheads.webpage import Session
from reftheads.webpage.copies import own_copy
from reftheads.webpage.folder import Folder
from reftheads.webpage.retraining import Demonstration

OWLS = "Tell me about owls."


def last(answers):
    """Both complete answers."""
    *_, both = answers
    return both


def weights(model: rh.InterventionModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def session(model, words, demonstrations, tmp_path):
    randomise(model)
    generator = torch.Generator().manual_seed(0)
    for node in ("emoji", "tone"):  # strong enough for another answer, each of them
        name = "b" if node == "emoji" else "v"
        shape = getattr(model.node(node), name).shape
        model.node(node).assign(**{name: 20 * torch.randn(shape, generator=generator)})
    return Session(model, words, tmp_path / "adapters", demonstrations, steps=4)


# --- a visitor's own model ----------------------------------------------------------------------------------


def test_a_copy_shares_all_base_weights_and_no_node(model):
    own = own_copy(model)
    for (name, ours), theirs in zip(own.named_parameters(), model.parameters(), strict=True):
        assert (ours is theirs) != ("rh_nodes" in name), name
        assert torch.equal(ours, theirs)
    assert not {id(module) for module in own.modules()} & {id(module) for module in model.modules()}


def test_what_a_visitor_trains_and_adds_changes_nobody_else(model, words, demonstrations, tmp_path):
    one, other = (Session(model, words, tmp_path, demonstrations, steps=3) for _ in range(2))
    before, answer = weights(model), last(other.answer(OWLS))
    assert list(one.retrain()) == [1, 2, 3]
    one.demonstrate("Hi!", "👋")
    one.turn("default", "emoji", on=False)
    assert equal(weights(model), before) and equal(weights(other.model), before)
    assert not equal(weights(one.model), before)
    other.forget()
    assert last(other.answer(OWLS)) == answer
    assert len(other.demonstrations) == len(one.demonstrations) - 1
    assert other.dials["default", "emoji"].on and not one.dials["default", "emoji"].on
    assert not any(module.training for module in one.model.modules())


# --- answers ------------------------------------------------------------------------------------------------


def test_the_streamed_answers_grow_to_those_that_reply_gives(session):
    model = session.model
    edited = rh.reply(model, session.tokenizer, [OWLS], max_new_tokens=session.max_new_tokens)
    with model.disable_adapter():
        base = rh.reply(model, session.tokenizer, [OWLS], max_new_tokens=session.max_new_tokens)
    answers = list(session.answer(OWLS))
    assert answers[-1] == (*base, *edited) and base != edited
    assert len(answers) > 10
    for i in range(2):
        assert all(new[i].startswith(old[i]) for old, new in zip(answers, answers[1:], strict=False))


def test_each_model_knows_what_was_said_before(session):
    first = last(session.answer(OWLS))
    second = last(session.answer("Why?"))
    for i, block in enumerate([session.model.disable_adapter, lambda: session.model.at_strength({})]):
        talk = [OWLS, first[i], "Why?"]
        turns = [{"role": ("user", "assistant")[j % 2], "content": text} for j, text in enumerate(talk)]
        with block():
            expected = rh.reply(session.model, session.tokenizer, [turns], max_new_tokens=session.max_new_tokens)
        assert second[i] == expected[0]
        assert [turn["content"] for turn in session.conversations[i]] == [*talk, second[i]]
    session.forget()
    assert last(session.answer(OWLS)) == first


def test_an_answer_that_nobody_waits_for_ends(session):
    before = threading.active_count()
    answers = session.answer(OWLS)
    next(answers)
    with pytest.raises(ValueError, match="still running"):
        next(session.answer("Hi!"))
    answers.close()
    assert threading.active_count() == before
    assert session.conversations == ([], [])
    assert last(session.answer(OWLS))


def test_what_fails_in_a_thread_is_raised_where_the_answer_is_read(session, monkeypatch):
    monkeypatch.setattr(session.model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(session.answer(OWLS))


# --- switches and strengths ---------------------------------------------------------------------------------


def test_with_all_nodes_off_both_answers_are_the_same(session):
    base, edited = last(session.answer(OWLS))
    assert base != edited
    for node in ("emoji", "tone"):
        session.turn("default", node, on=False)
    session.forget()
    assert last(session.answer(OWLS)) == (base, base)
    for node in ("emoji", "tone"):
        session.turn("default", node, on=True)
    session.forget()
    assert last(session.answer(OWLS)) == (base, edited)


def test_a_strength_is_that_of_the_call(session):
    session.turn("default", "emoji", strength=0.4)
    session.turn("default", "tone", on=False)
    edited = last(session.answer(OWLS))[1]
    with session.model.at_strength({"emoji": 0.4, "tone": 0}):
        assert rh.reply(session.model, session.tokenizer, [OWLS], max_new_tokens=128) == [edited]


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -0.1, 2.5, "1", True, [1], {}])
def test_a_strength_that_is_no_number_from_0_to_2_is_refused(session, strength):
    with pytest.raises(ValueError, match="a strength is a number from 0 to 2, got"):
        session.turn("default", "emoji", strength=strength)
    assert session.dials["default", "emoji"].strength == 1


def test_a_switch_is_on_or_off_and_belongs_to_a_node_that_acts(session):
    with pytest.raises(ValueError, match="a switch is on or off, got 'yes'"):
        session.turn("default", "emoji", on="yes")
    with pytest.raises(ValueError, match="no node 'x' of an adapter 'default' acts"):
        session.turn("default", "x", on=True)
    assert session.dials.keys() == {("default", "emoji"), ("default", "tone")}


# --- questions that nobody should ask -------------------------------------------------------------------------

HOSTILE = [
    ("", "empty"), ("  \n ", "empty"), ("a" * 100_000, "100,000 letters"), (None, "must be a text"), (["a"], "a text"),
    ("word " * 900, "tokens, and the model reads 512"), ("a\x00b", r"U\+0000"), ("\x1b[31mred", r"U\+001B"),
    ("\ud800", r"U\+D800"),
]  # fmt: skip


@pytest.mark.parametrize(("question", "message"), HOSTILE, ids=[message for _, message in HOSTILE])
def test_a_hostile_question_gets_a_message_and_the_page_goes_on(session, question, message):
    with pytest.raises(ValueError, match=message):
        list(session.answer(question))
    with pytest.raises(ValueError, match=message):
        session.demonstrate("Why?", question)
    assert session.conversations == ([], []) and len(session.demonstrations) == 6
    assert last(session.answer(OWLS))


def test_what_was_said_before_counts_among_the_tokens(session):
    session.max_new_tokens = 4
    session.conversations[0].append({"role": "user", "content": "word " * 600})
    with pytest.raises(ValueError, match="what was said before has .* begin a new conversation"):
        list(session.answer(OWLS))


# --- training -----------------------------------------------------------------------------------------------


def test_retraining_learns_what_was_demonstrated(model, words, tmp_path):
    session = Session(model, words, tmp_path, steps=40)
    session.demonstrate(OWLS, "🦉🌙")
    assert session.demonstrations == [Demonstration(OWLS, "🦉🌙")]
    assert list(session.retrain()) == list(range(1, 41))
    base, edited = last(session.answer(OWLS))
    assert edited == "🦉🌙" and base.isascii()
    hits = session._store.hits
    list(session.retrain())
    assert session._store.hits > hits  # what the frozen model computes is found again


def test_training_that_is_left_ends_and_leaves_the_model_fit_for_answers(session):
    session.steps = 1000
    steps = session.retrain()
    assert next(steps) == 1
    with pytest.raises(ValueError, match="still running"):
        session.choose(["default"])
    steps.close()
    assert not session.model.training and last(session.answer(OWLS))


def test_training_without_a_demonstration_is_refused(model, words, tmp_path):
    with pytest.raises(ValueError, match="there is no demonstration"):
        list(Session(model, words, tmp_path).retrain())


# --- adapters -----------------------------------------------------------------------------------------------


def test_what_one_visitor_saves_another_chooses_and_combines(session, model, words, tmp_path):
    list(session.retrain())
    session.forget()
    answer = last(session.answer(OWLS))
    session.save("mine")
    assert {path.name for path in session.folder.path.iterdir()} == {"mine"}
    other = Session(model, words, tmp_path / "adapters")
    assert other.adapters == ["default", "mine"] and other.chosen == ["default"]
    other.choose(["mine"])
    assert last(other.answer(OWLS)) == answer
    other.choose(["mine", "default"])
    assert list(other.dials) == [(name, node) for name in ("mine", "default") for node in ("emoji", "tone")]
    other.turn("mine", "emoji", on=False)
    other.turn("mine", "tone", on=False)
    other.forget()
    both = last(other.answer(OWLS))
    assert both == last(Session(model, words, tmp_path).answer(OWLS))  # the other one alone
    assert "mine\nnode" in other.table() and "LoReFT(rank=4)" in other.table()
    with pytest.raises(ValueError, match="mine and default are chosen: choose one of them"):
        other.save("both")


NAMES = [
    "", ".", "..", "../x", "a/b", "a\\b", "/etc/passwd", "C:x", "a\x00b", "a\nb", " a", "con", "x" * 65, "a.b", "rh_x",
    None, 3, ["default"], "__base__", "a*",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_name_is_one_word_and_never_a_path(session, tmp_path, name):
    everything = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError):
        session.save(name)
    with pytest.raises(ValueError):
        session.choose([name])
    assert sorted(tmp_path.rglob("*")) == everything and session.chosen == ["default"]


@pytest.mark.parametrize("names", [[], None, "default", ["default", "missing"]], ids=repr)
def test_a_choice_that_cannot_be_made_leaves_the_old_one(session, names):
    with pytest.raises(ValueError, match=r"choose at least one|no adapter 'missing': there are none yet"):
        session.choose(names)
    assert session.chosen == ["default"]


def test_a_name_that_is_taken_is_refused(session):
    session.save("mine")
    before = (session.folder.path / "mine" / "adapter_model.safetensors").read_bytes()
    list(session.retrain())
    for name in ("mine", "default"):
        with pytest.raises(ValueError, match="already"):
            session.save(name)
    assert (session.folder.path / "mine" / "adapter_model.safetensors").read_bytes() == before


def test_a_link_that_leads_out_of_the_folder_is_no_adapter(session, tmp_path):
    session.save("mine")
    os.rename(session.folder.path / "mine", tmp_path / "outside")
    os.symlink(tmp_path / "outside", session.folder.path / "mine")
    assert session.folder.names() == []
    with pytest.raises(ValueError, match="a link that leads out"):
        session.choose(["mine"])


def test_a_damaged_adapter_gets_a_message(session):
    session.save("mine")
    config = session.folder.path / "mine" / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields["graph"]["nodes"][0]["layer"] = 99
    config.write_text(json.dumps(fields))
    with pytest.raises(ValueError):
        session.choose(["mine"])
    assert session.chosen == ["default"] and last(session.answer(OWLS))


def test_a_folder_takes_so_many_adapters(session, monkeypatch):
    monkeypatch.setattr("reftheads.webpage.folder.MOST", 1)
    session.save("one")
    with pytest.raises(ValueError, match="there are 1 adapters already"):
        session.save("two")
    assert Folder(session.folder.path).names() == ["one"]


def test_a_page_needs_a_model_with_a_graph(words):
    with pytest.raises(ValueError, match="needs an InterventionModel, got LlamaForCausalLM"):
        Session(rh.load_base("tiny-chat")[0], words)
