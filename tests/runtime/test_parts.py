"""The base model by its `.forward`, and its backbone by itself, get the edits that a call gets.

Libraries that know nothing of hooks call models so: sentence-transformers says `model.forward(…)`, and others take
the backbone out of a model with a head. `base.forward(…)` gives what `base(…)` gives: the same class of output, with
what heads predict.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from support import oracle
from support.calls import same, tensors
from support.models import random_ids, randomise, tiny_bart, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import Tensor

import reftheads as rh

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn of each other's deprecations

ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15], [16, 17, 18, 19, 20]]


@dataclass(frozen=True)
class Kind:
    """How a model is made, where its backbone is, and what it is fed besides ids, mask and positions."""

    make: Callable[[], Any]
    backbone: str
    more: tuple[str, ...] = ()


KINDS = {
    "llama": Kind(tiny_llama, "model"),
    "gpt2": Kind(tiny_gpt2, "transformer"),
    "a bare llama": Kind(lambda: tiny_llama().model, ""),
    "a bare bert": Kind(lambda: tiny_bert(tf.BertModel), ""),
    "bert that classifies": Kind(lambda: tiny_bert(tf.BertForSequenceClassification), "bert"),
    "bert's masked words": Kind(lambda: tiny_bert(tf.BertForMaskedLM), "bert"),
    "t5": Kind(tiny_t5, "encoder", ("decoder_input_ids",)),
    "bart": Kind(tiny_bart, "model.encoder", ("decoder_input_ids",)),
}


def intervened(kind: str) -> rh.InterventionModel:
    """A model with an edit at both ends of the prompt, and a head that reads its last token."""
    stack = "encoder" if kind in ("t5", "bart") else None
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=2), 1, positions="f1+l1", name="edit", stack=stack),
        rh.Node(rh.LinearHead(2, target="judged"), -1, positions="l1", name="verdict", stack=stack),
    )
    model = rh.InterventionModel(KINDS[kind].make(), graph).double().eval()
    randomise(model)
    return model


def fed(kind: str, side: str) -> dict[str, Tensor]:
    """Rows of one to seven tokens, padded on one side."""
    batch = oracle.pad(ROWS, side)
    if KINDS[kind].more:
        del batch["position_ids"]
        batch["decoder_input_ids"] = random_ids(len(ROWS), 3)
    return batch


KINDS_AND_SIDES = [(kind, side) for kind in KINDS for side in (["left", "right"] if "bert" not in kind else ["right"])]


def alike(got: Any, expected: Any, plain: Any) -> None:
    """The same class of output with the same tensors, which are not those of the base model."""
    assert type(got) is type(expected)
    same(tensors(got), tensors(expected))
    assert not torch.equal(next(iter(tensors(got).values())), next(iter(tensors(plain).values())))


@torch.no_grad()
@pytest.mark.parametrize("kind, side", KINDS_AND_SIDES)
def test_forward_gives_what_a_call_gives(kind: str, side: str):
    model, batch = intervened(kind), fed(kind, side)
    base = model.get_base_model()
    expected = base(**batch)
    assert "verdict" in expected.predictions
    with model.disable_adapter():
        plain = base(**batch)
        same(tensors(base.forward(**batch)), tensors(plain))
    alike(base.forward(**batch), expected, plain)
    alike(base.forward(batch.pop("input_ids"), **batch), expected, plain)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert that classifies", "bert's masked words", "t5"])
def test_forward_takes_labels_targets_and_prompt_masks_as_a_call_does(kind: str):
    model = intervened(kind)
    batch = fed(kind, "right")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100).index_fill(1, torch.arange(2), -100)
    labels = {"bert that classifies": torch.tensor([0, 1, 1, 0]), "t5": batch.get("decoder_input_ids")}.get(
        kind, labels
    )
    batch |= {"labels": labels, "judged": torch.tensor([1, 0, 1, 0])}
    batch |= {"prompt_mask": mask.bool() & (torch.arange(ids.shape[1]) < 4)}
    base = model.get_base_model()
    expected, got = base(**batch), base.forward(**batch)
    assert expected.head_loss is not None and type(got) is type(expected)
    same(tensors(got), tensors(expected))
    shorter = tensors(base.forward(**{**batch, "prompt_mask": mask.bool() & (torch.arange(ids.shape[1]) < 3)}))
    assert not torch.equal(shorter["predictions.verdict"], got.predictions["verdict"])


@torch.no_grad()
@pytest.mark.parametrize("kind, side", KINDS_AND_SIDES)
def test_the_backbone_by_itself_gives_what_it_gives_within_a_call(kind: str, side: str):
    model, batch = intervened(kind), fed(kind, side)
    base = model.get_base_model()
    backbone = base.get_submodule(KINDS[kind].backbone)
    within: list[Tensor] = []
    handle = backbone.register_forward_hook(lambda module, args, output: within.append(output[0]))
    base(**batch)
    handle.remove()
    part = {name: batch[name] for name in batch if name not in KINDS[kind].more}
    called, forward = backbone(**part), backbone.forward(**part)
    with model.disable_adapter():
        plain = backbone.forward(**part)
    for output in (called, forward):
        torch.testing.assert_close(output.last_hidden_state, within[0], atol=1e-12, rtol=0)
        assert not torch.equal(output.last_hidden_state, plain.last_hidden_state)


@torch.no_grad()
def test_a_backbone_by_itself_knows_nothing_of_the_call_before():
    model = intervened("llama")
    base, batch = model.get_base_model(), fed("llama", "left")
    expected = base.model.forward(**batch).last_hidden_state
    prompt = batch["attention_mask"].bool() & (torch.arange(7) < 5)
    base.forward(**batch, prompt_mask=prompt)
    assert torch.equal(base.model.forward(**batch).last_hidden_state, expected)
    assert torch.equal(base.model(**batch).last_hidden_state, expected)


def test_forward_trains_as_a_call_does():
    model, batch = intervened("llama").train(), fed("llama", "left")
    batch |= {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    batch["labels"][:, -1] = 3
    batch["labels"][:, :-1] = -100
    batch["labels"][batch["attention_mask"].cumsum(1) == 1] = -100
    base, trained = model.get_base_model(), [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(base(**batch).loss, trained, allow_unused=True)
    got = torch.autograd.grad(base.forward(**batch).loss, trained, allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in got)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_keeps_its_signature_and_is_the_models_own_after_unload(kind: str):
    plain = KINDS[kind].make()
    model = intervened(kind)
    base = model.get_base_model()
    for path in {"", KINDS[kind].backbone}:
        part = base.get_submodule(path)
        assert inspect.signature(part.forward) == inspect.signature(plain.get_submodule(path).forward)
    base = model.unload()
    for module in base.modules():
        assert "forward" not in vars(module)
    for module, other in zip(base.modules(), plain.modules(), strict=True):
        assert type(module) is type(other)
