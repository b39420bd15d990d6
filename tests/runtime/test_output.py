"""What a model returns keeps its type, its names and all that is in it, whatever nodes read or edit."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.models import WIDTH, random_ids, tiny_llama
from torch import nn
from transformers.utils.generic import ModelOutput

import reftheads as rh
from reftheads.runtime.hooks import attach

HEAD = rh.InterventionGraph(
    rh.Node(rh.LinearHead(2, target="mood"), layer=1, positions="l1", name="mood"),
    rh.Node(rh.Collect(), layer=0, positions="f1", name="seen"),
)
TARGETS = {"mood": torch.tensor([0, 1])}


@dataclass
class Named(ModelOutput):
    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    why: Any = None


@dataclass
class Plain:
    scores: torch.Tensor
    note: str = "own"
    made: int = field(default=0, init=False)


@dataclass(frozen=True)
class Frozen:
    scores: torch.Tensor


class Own(nn.Module):
    """A classifier of somebody's own around a backbone, with an output of their own."""

    def __init__(self, form):
        super().__init__()
        self.model = tiny_llama().model
        self.config = self.model.config
        self.score = nn.Linear(WIDTH, 3)
        self.form = form

    def forward(self, input_ids, attention_mask=None, labels=None):
        scores = self.score(self.model(input_ids, attention_mask=attention_mask).last_hidden_state[:, -1])
        loss = None if labels is None else nn.functional.cross_entropy(scores, labels)
        return self.form(loss, scores)


def plain(loss, scores):
    made = Plain(scores)
    made.made = 7
    return made


def with_an_item(loss, scores):
    made = Named(loss=loss, scores=scores)
    made["extra"] = 3
    return made


FORMS = {
    "dict": lambda loss, scores: {"loss": loss, "scores": scores, "names": ["a", "b", "c"]},
    "ordered": lambda loss, scores: OrderedDict(loss=loss, scores=scores),
    "output": lambda loss, scores: ModelOutput(loss=loss, scores=scores, why="own"),
    "named": lambda loss, scores: Named(loss, scores, "own"),
    "with an item": with_an_item,
    "plain": plain,
    "frozen": lambda loss, scores: Frozen(scores),
}


def items(output):
    return dict(output) if isinstance(output, dict) else dict(vars(output))


@pytest.mark.parametrize("labels", [None, torch.tensor([2, 0])])
@pytest.mark.parametrize("form", FORMS)
def test_an_own_output_keeps_its_type_and_gets_what_was_read(form, labels):
    ids = random_ids()
    own = Own(FORMS[form])
    before = own(ids, labels=labels)
    expected = items(before)
    model = rh.InterventionModel(own, HEAD)
    out = model(ids, labels=labels, **TARGETS)
    assert isinstance(out, type(before))
    after = items(out)
    for name in expected.keys() - {"loss", "scores"}:
        assert after[name] == expected[name]
    assert torch.equal(after["scores"], expected["scores"])
    assert after["predictions"]["mood"].shape == (2, 2)
    assert after["collected"]["seen"].shape == (2, WIDTH)
    base_loss = expected.get("loss")
    want = after["losses"]["mood"] + (0 if base_loss is None else base_loss)
    torch.testing.assert_close(after["loss"], want)
    torch.testing.assert_close(after["head_loss"], after["losses"]["mood"])


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("labels", [None, torch.tensor([2, 0])])
def test_a_tuple_or_list_has_what_was_read_behind_its_own_elements(kind, labels):
    ids = random_ids()
    own = Own(lambda loss, scores: kind([scores] if loss is None else [loss, scores]))
    *loss, scores = own(ids, labels=labels)
    model = rh.InterventionModel(own, HEAD)
    out = model(ids, labels=labels, **TARGETS)
    assert type(out) is kind
    total, same, predictions, losses, counts, collected, selected, head_loss = out
    assert torch.equal(same, scores)
    torch.testing.assert_close(total, losses["mood"] + sum(loss))
    assert torch.equal(head_loss, losses["mood"]) and counts["mood"] == 2 and collected.keys() == {"seen"}
    assert predictions["mood"].shape == (2, 2) and selected.keys() == {"mood", "seen"}
    without_targets = model(ids, labels=labels)
    assert len(without_targets) == len(loss) + 4 and torch.equal(without_targets[len(loss)], scores)


def test_return_dict_false_gives_the_tuple_of_the_named_output():
    model = rh.InterventionModel(tiny_llama(), HEAD)
    batch = {"input_ids": random_ids(), "labels": random_ids(), "use_cache": False, **TARGETS}
    batch["labels"][:, 0] = -100
    named, bare = model(**batch), model(**batch, return_dict=False)
    assert type(bare) is tuple and len(bare) == len(named.to_tuple())
    for one, other in zip(named.to_tuple(), bare, strict=True):
        torch.testing.assert_close(one, other)


def test_a_field_of_the_model_under_our_name_is_refused_rather_than_lost():
    model = rh.InterventionModel(Own(lambda loss, scores: {"predictions": scores}), HEAD)
    with pytest.raises(ValueError, match="own output has 'predictions'.*give that field of the model another name"):
        model(random_ids())
    edit = rh.InterventionGraph(rh.Node(rh.Steering(), layer=1, name="edit"))
    out = rh.InterventionModel(Own(lambda loss, scores: {"predictions": scores}), edit)(random_ids())
    assert out.keys() == {"predictions"}


Scores = namedtuple("Scores", "scores")


@pytest.mark.parametrize("form", [lambda loss, scores: scores, lambda loss, scores: Scores(scores)])
def test_an_output_without_room_is_refused_where_a_graph_reads(form):
    with pytest.raises(ValueError, match="has no room: return a ModelOutput, a dict, a dataclass or a plain tuple"):
        rh.InterventionModel(Own(form), HEAD)(random_ids())


Pair = namedtuple("Pair", ["hidden_states", "rest"])
BLOCKS = {
    "tuple": lambda h: (h, "rest"),
    "list": lambda h: [h, "rest"],
    "named tuple": lambda h: Pair(h, "rest"),
    "output": lambda h: Named(scores=h, why="rest"),
    "dict": lambda h: {"hidden": h, "rest": "rest"},
    "tensor": lambda h: h,
}


@pytest.mark.parametrize("form", BLOCKS)
def test_an_edited_module_gives_the_type_that_it_gave_before(form):
    class Block(nn.Module):
        def forward(self, h):
            return BLOCKS[form](h * 2)

    block, h = Block(), torch.ones(1, 2, 3)
    before = block(h)
    attach(block, "output", lambda h, x: h + x)
    after = block(h)
    assert type(after) is type(before)
    values = after if isinstance(after, torch.Tensor) else list(after.values() if isinstance(after, dict) else after)
    torch.testing.assert_close(values if form == "tensor" else values[0], 3 * h)
    assert form == "tensor" or values[1] == "rest"
