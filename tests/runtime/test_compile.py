"""torch.compile: as few graph breaks as PEFT's LoRA, and the answers of the model as it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import torch._dynamo as dynamo
from support.models import random_ids, randomise, tiny_llama
from torch import Tensor, nn

import reftheads as rh

GRAPHS = {
    "an edit": [rh.Node(rh.LoReFT(2), layer=1, positions="l1", name="edit")],
    "an edit in every block": [rh.Node(rh.LoReFT(2), layer=i, name=f"edit{i}") for i in range(3)],
    "LoRA": [rh.Node(rh.LoRA(2), layer=i, component="query_output", name=f"lora{i}") for i in range(3)],
    "a head": [rh.Node(rh.LinearHead(2), layer=1, positions="l1", name="head")],
    "all of them": [
        rh.Node(rh.LinearHead(2), layer=0, positions="l1", name="head"),
        rh.Node(rh.LoReFT(2), layer=1, positions="f2+l1", name="edit"),
        rh.Node(rh.LoRA(2), layer=2, component="value_output", name="lora"),
        rh.Node(rh.Steering(), layer=2, positions="l1", name="steering"),
    ],
}


def intervened(name: str) -> rh.InterventionModel:
    model = rh.InterventionModel(tiny_llama(), rh.InterventionGraph(*GRAPHS[name])).eval()
    randomise(model)
    return model


def batch(tokens: int = 7, padded: int = 2) -> dict[str, Any]:
    ids = random_ids(tokens=tokens)
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def breaks(model: nn.Module) -> int:
    dynamo.reset()
    return dynamo.explain(model)(**batch()).graph_break_count


@contextmanager
def compiled(model: nn.Module, **options: Any) -> Iterator[Any]:
    dynamo.reset()
    yield torch.compile(model, backend="eager", **options)
    dynamo.reset()


@pytest.fixture(scope="module")
def of_peft() -> int:
    lora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    return breaks(lora)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_breaks_no_more_than_lora_of_peft(name, of_peft):
    model = intervened(name)
    model(**batch())  # the class of an output with what was read is made once, and not while something is compiled
    count = breaks(model)
    print(f"{name}: {count} graph breaks; PEFT's LoRA: {of_peft}")
    assert count <= of_peft


@pytest.mark.slow
def test_a_compiled_model_sees_what_holds_for_each_call():
    model = intervened("all of them")
    model.add_adapter("other", rh.InterventionGraph(rh.Node(rh.Steering(), layer=0, positions="l1", name="other")))
    model.set_adapter("other")
    randomise(model, seed=3)
    model.set_adapter("default")

    def answers(called: Any) -> list[Tensor]:
        out = [called(**batch()).logits, called(**batch(tokens=9, padded=3)).logits]
        with model.disable_adapter():
            out.append(called(**batch()).logits)
        out.append(called(**batch()).logits)
        model.set_adapter("other")
        out.append(called(**batch()).logits)
        model.set_adapter("default")
        out.append(called(**batch(), adapter_names=["other", "default"]).logits)
        out.append(called(**batch(), prompt_mask=torch.tensor([[1, 1, 1, 1, 0, 0, 0]] * 2).bool()).logits)
        out.append(called(**batch()).predictions["head"])
        return out

    expected = answers(model)
    with compiled(model) as called:
        for got, wanted in zip(answers(called), expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_a_compiled_model_trains_the_gradients_of_the_model_as_it_is():
    model = intervened("all of them").train()
    labels = batch()["input_ids"].clone()
    labels[:, :3] = -100

    def gradients(called: Any) -> dict[str, Tensor]:
        model.zero_grad()
        called(**batch(), labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model)
    with compiled(model) as called:
        got = gradients(called)
    assert got.keys() == expected.keys() and got
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_compiled_block_sees_the_call_that_it_is_part_of():
    model = intervened("an edit")
    expected = model(**batch()).logits
    with model.disable_adapter():
        plain = model(**batch()).logits
    block = model.get_base_model().model.layers[1]
    dynamo.reset()
    block.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(model(**batch()).logits, expected)
        with model.disable_adapter():
            torch.testing.assert_close(model(**batch()).logits, plain)
    assert not torch.allclose(expected, plain)
    dynamo.reset()
