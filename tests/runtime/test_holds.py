"""Where a graph has hold of a model: others take its methods back, blocks end elsewhere, adapters come and go."""

import inspect
import threading
from collections.abc import Iterator

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module, remove_hook_from_submodules
from support.idle import idle
from support.models import random_ids, randomise, tiny_llama
from torch import Tensor

import reftheads as rh
from reftheads.runtime import scope

IDS = random_ids(tokens=8)
LABELS = IDS.masked_fill(torch.arange(8) < 3, -100)
GRAPH = rh.InterventionGraph(
    rh.Node(rh.LoReFT(2), layer=1, positions="l1", name="edit"),
    rh.Node(rh.LinearHead(2), layer=1, positions="l1", name="head"),
)


def intervened(base: torch.nn.Module | None = None) -> rh.InterventionModel:
    model = rh.InterventionModel(base or tiny_llama(), GRAPH).eval()
    randomise(model)
    return model


@torch.no_grad()
def answers(model: torch.nn.Module) -> list[Tensor]:
    """Where labels say that the prompt ends, and where the whole input is the prompt; and what a head reads."""
    labelled, whole = model(input_ids=IDS, labels=LABELS), model(input_ids=IDS)
    return [labelled.logits, labelled.loss, whole.logits, labelled.predictions["head"]]


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def hook(base: torch.nn.Module) -> None:
    for module in (base, base.model, *base.model.layers):
        add_hook_to_module(module, ModelHook())


@pytest.mark.parametrize("when", ["before", "after", "before and after"])
def test_hooks_of_accelerate_come_and_go(when):
    expected = answers(intervened())
    base = tiny_llama()
    if "before" in when:
        hook(base)
    model = intervened(base)
    if "after" in when:
        hook(base)
    same(answers(model), expected)
    remove_hook_from_module(base, recurse=True)
    same(answers(model), expected)
    hook(base)
    same(answers(model), expected)


@pytest.mark.parametrize("what", ["the model", "its stack", "both"])
def test_a_base_that_lost_its_graph_refuses_calls_until_the_peft_model_is_called(what):
    base = tiny_llama()
    hooked = {"the model": [base], "its stack": [base.model], "both": [base, base.model]}[what]
    for module in hooked:
        add_hook_to_module(module, ModelHook())
    model = intervened(base)
    expected = answers(model)
    for module in hooked:
        remove_hook_from_module(module)
    with pytest.raises(RuntimeError, match="was replaced after a graph was compiled into the model"):
        base(input_ids=IDS)
    same(answers(model), expected)
    same(answers(base), expected)


def test_blocks_give_what_a_run_holds_after_others_took_their_methods_back():
    base = tiny_llama()
    hook(base)
    model, store = intervened(base), rh.ActivationStore()
    expected = model(input_ids=IDS, labels=LABELS).loss
    with model.reusing(store):
        torch.testing.assert_close(model(input_ids=IDS, labels=LABELS).loss, expected)
        remove_hook_from_submodules(base.model.layers)
        torch.testing.assert_close(model(input_ids=IDS, labels=LABELS).loss, expected)


def test_an_adapter_that_is_gone_does_nothing_even_where_others_stand_above_it():
    base, plain = tiny_llama(), tiny_llama()
    model = intervened(base).train()
    hook(base)
    model.unload()
    assert torch.equal(base(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    again = intervened(base)
    same(answers(again), answers(intervened()))


def test_what_another_adapter_s_reuse_knew_is_found_out_anew():
    base = tiny_llama()
    model = intervened(base)
    with model.reusing(rh.ActivationStore()) as replay:
        model(input_ids=IDS, labels=LABELS)
    model.unload()
    assert not [name for name, module in base.named_modules() if "forward" in module.__dict__]
    model = rh.InterventionModel(base, rh.InterventionGraph(rh.Node(rh.LoReFT(2), layer=2, positions="l1"))).eval()
    randomise(model)
    expected = model(input_ids=IDS, labels=LABELS).loss
    with model.reusing(replay):
        torch.testing.assert_close(model(input_ids=IDS, labels=LABELS).loss, expected)


def test_a_block_that_has_ended_holds_nowhere():
    model = intervened()
    expected = answers(model)

    def disabled() -> Iterator[Tensor]:
        with model.disable_adapter():
            yield model(input_ids=IDS).logits
            yield model(input_ids=IDS).logits

    one = disabled()
    next(one)
    thread = threading.Thread(target=lambda: list(one))
    thread.start()
    thread.join()
    same(answers(model), expected)

    first, second = disabled(), disabled()
    next(first), next(second)
    first.close()
    assert not torch.equal(model(input_ids=IDS).logits, expected[2]), "the second block is open"
    second.close()
    same(answers(model), expected)
    assert idle(model.tuner.layer) and not scope._OPEN


def test_what_stands_in_for_a_method_looks_like_it():
    base, plain = tiny_llama(), tiny_llama()
    intervened(base)
    assert inspect.signature(base.forward) == inspect.signature(plain.forward)
    exported = torch.export.export(base, (), {"input_ids": IDS, "use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(input_ids=IDS, use_cache=False).logits, base(input_ids=IDS).logits)
