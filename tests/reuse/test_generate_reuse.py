"""What `generate` reuses of the frozen base model: it gives what it gives without."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from support.models import random_ids, randomise, tiny_gemma3, tiny_gpt2, tiny_llama
from torch import Tensor, nn

import reftheads as rh
from reftheads.reuse.store import ActivationStore


def prompts() -> dict[str, Tensor]:
    """Ragged, padded at the left."""
    ids, mask = random_ids(3, 10), torch.ones(3, 10, dtype=torch.long)
    mask[0, :4] = mask[2, :7] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generating(make: Callable[..., Any], *nodes: rh.Node) -> rh.InterventionModel:
    options = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if make is tiny_gpt2 else {}
    model = rh.InterventionModel(make(initializer_range=0.5, **options), rh.InterventionGraph(*nodes))
    randomise(model)
    return model.eval()


GATED = (
    rh.Node(rh.LinearHead(1, loss="bce"), layer=0, positions="l1", name="probe"),
    rh.Node(rh.Gated(rh.Steering()), layer=1, positions="l1", source="probe"),
)
RULES = ["l1", "l2", "l3+generated", "generated", "f1", "all", rh.Positions.where(token_ids=range(30, 45))]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}


def block0(model: rh.InterventionModel) -> nn.Module:
    return model.get_base_model().get_submodule(model.plan().stacks[0].blocks[0])


@contextmanager
def columns_of(model: rh.InterventionModel) -> Iterator[list[int]]:
    seen: list[int] = []
    handle = block0(model).register_forward_hook(
        lambda module, args, output: seen.append((args[0] if args else output).shape[1])
    )
    try:
        yield seen
    finally:
        handle.remove()


def compare(model: rh.InterventionModel, given: Mapping[str, Any], seed: int | None = None) -> list[int]:
    """How many columns the first pass of a second call computes; its ids are those without a store."""

    def run() -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return model.generate(**{name: v.clone() if isinstance(v, Tensor) else v for name, v in given.items()})

    want = run()
    with model.reusing(ActivationStore(2**28)):
        assert torch.equal(run(), want)
        with columns_of(model) as seen:
            assert torch.equal(run(), want)
    return seen


@pytest.mark.parametrize(
    "make, rule",
    [(tiny_llama, rule) for rule in RULES]
    + [(make, rule) for make in (tiny_gpt2, tiny_gemma3) for rule in RULES[1:4:2]],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_generate_gives_the_same_ids_and_begins_where_a_node_looks(make, rule):
    model = generating(make, rh.Node(rh.LoReFT(rank=2), layer=1, positions=rule))
    first = compare(model, prompts() | GREEDY)[0]
    expected = {"l1": 1, "l2": 2, "l3+generated": 3, "generated": 1, "f1": 10, "all": 10}.get(str(rule))
    assert first == expected or (expected is None and first <= 10)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_gemma3])
def test_generate_gives_the_same_ids_where_an_edit_is_gated_by_a_head(make):
    assert compare(generating(make, *GATED), prompts() | GREEDY)[0] == 1


LATER = {
    "sampling": ({"do_sample": True}, 1),
    "two samples": ({"do_sample": True, "num_return_sequences": 2}, 10),
    "beams": ({"num_beams": 2}, 10),
    "beams of a configuration": ({"generation_config": tf.GenerationConfig(num_beams=2, **GREEDY)}, 10),
    "no cache": ({"use_cache": False}, 10),
    "no cache in the configuration": ({"generation_config": tf.GenerationConfig(use_cache=False, **GREEDY)}, 10),
    "a static cache": ({"cache_implementation": "static"}, 10),
    "a static cache in the configuration": (
        {"generation_config": tf.GenerationConfig(cache_implementation="static", **GREEDY)}, 10
    ),
    "a configuration": ({"generation_config": tf.GenerationConfig(**GREEDY | {"max_new_tokens": 5})}, 1),
    "chunks": ({"prefill_chunk_size": 4}, None),
    "ids that repeat": ({"repetition_penalty": 1.5}, 1),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, None),
    "prompt lookup in the configuration": (
        {"generation_config": tf.GenerationConfig(prompt_lookup_num_tokens=2, **GREEDY)}, None
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER)
def test_generate_gives_the_same_ids_whatever_it_is_asked_for(case):
    options, first = LATER[case]
    model = generating(tiny_llama, rh.Node(rh.LoReFT(rank=2), layer=1, positions="l1"))
    given = prompts() | (options if "generation_config" in options else GREEDY | options)
    if "lookup" in case:
        given = {name: value[1:2] if isinstance(value, Tensor) else value for name, value in given.items()}
    seen = compare(model, given, seed=3)
    assert first is None or seen[0] == first


def test_padding_that_no_mask_shows_is_padding(monkeypatch):
    model = generating(tiny_llama, rh.Node(rh.LoReFT(rank=2), layer=1, positions="l1"))
    given = {"input_ids": prompts()["input_ids"]}
    options = {**GREEDY, "eos_token_id": 2}
    assert torch.equal(model.generate(**prompts(), **options), model.generate(**given, **options))
    compare(model, given | options)


def test_ids_of_32_bits_are_not_taken_for_others():
    model = generating(tiny_llama, rh.Node(rh.LoReFT(rank=2), layer=1, positions="l1"))
    long = random_ids(1, 65)
    short = torch.stack([long, torch.zeros_like(long)], dim=2).flatten(1)[:, :129].int()  # the same bytes, but for one
    given = {"input_ids": short, "attention_mask": torch.ones_like(short), **GREEDY}
    want = model.generate(**given)
    with model.reusing(ActivationStore(2**28)):
        model.generate(input_ids=long, **GREEDY)
        assert torch.equal(model.generate(**given), want)


def test_prompts_without_padding_and_padded_at_the_right_give_the_same_ids():
    model = generating(tiny_llama, rh.Node(rh.LoReFT(rank=2), layer=1, positions="l1"))
    assert compare(model, {"input_ids": random_ids(2, 9)} | GREEDY)[0] == 1
    assert compare(model, {"input_ids": random_ids(1, 1)} | GREEDY)[0] == 1
    right = prompts()
    right["attention_mask"] = right["attention_mask"].flip(1)
    assert compare(model, right | GREEDY)[0] == 10
    assert compare(model, {"inputs": random_ids(2, 9)} | GREEDY)[0] == 9
    with model.reusing(ActivationStore(2**28)):
        assert torch.equal(
            model.generate(random_ids(2, 9), **GREEDY), model.generate(input_ids=random_ids(2, 9), **GREEDY)
        )


def test_the_ids_are_the_same_while_the_model_is_in_training_mode_or_two_adapters_act():
    model = generating(tiny_llama, rh.Node(rh.LoReFT(rank=2), layer=1, positions="l1"))
    model.add_adapter("two", rh.InterventionGraph(rh.Node(rh.LoReFT(rank=2), layer=0, positions="l3")))
    randomise(model)
    assert compare(model.train(), prompts() | GREEDY)[0] == 1
    model.set_adapter(["default", "two"])
    assert compare(model.eval(), prompts() | GREEDY)[0] == 3
    compare(model, prompts() | GREEDY | {"adapter_names": ["default", "two", "default"]})
    with model.disable_adapter():
        compare(model, prompts() | GREEDY)


def test_all_that_generate_returns_is_the_same():
    config = tf.GenerationConfig(**GREEDY, return_dict_in_generate=True, output_scores=True, output_logits=True)
    model = generating(tiny_llama, rh.Node(rh.LoReFT(rank=2), layer=1, positions="l1"))
    want = model.generate(**prompts(), generation_config=config)
    store = ActivationStore(2**28)
    with model.reusing(store):
        for _ in range(2):
            got = model.generate(**prompts(), generation_config=config)
            assert torch.equal(got.sequences, want.sequences)
            for name in ("scores", "logits"):
                for a, b in zip(got[name], want[name], strict=True):
                    assert torch.allclose(a, b, atol=1e-4)
    before = {key: {n: v.clone() for n, v in entry.items()} for key, entry in store._memory.items()}
    with model.reusing(store):
        model.generate(**prompts(), generation_config=config)
    assert all(torch.equal(store._memory[key][n], v) for key, entry in before.items() for n, v in entry.items())


def test_hidden_states_of_generate_are_those_of_the_whole_prompt():
    model = generating(tiny_llama, rh.Node(rh.LoReFT(rank=2), layer=1, positions="l1"))
    given = prompts() | GREEDY | {"return_dict_in_generate": True, "output_hidden_states": True}
    want = model.generate(**given)
    with model.reusing(ActivationStore(2**28)):
        got = model.generate(**given)
    assert [h[0].shape for h in got.hidden_states] == [h[0].shape for h in want.hidden_states]


def test_replies_are_the_same_and_begin_with_what_is_kept(tokenizer):
    base, tokenizer = rh.load_base("tiny-chat")
    model = rh.InterventionModel(base, rh.InterventionGraph(rh.Node(rh.LoReFT(rank=4), layer=1, positions="l1"))).eval()
    randomise(model)
    asked = ["Tell me about dogs.", "What are flamingos, and where do they live?"]
    want = rh.reply(model, tokenizer, asked, max_new_tokens=6)
    store = ActivationStore(2**28)
    with model.reusing(store):
        assert rh.reply(model, tokenizer, asked, max_new_tokens=6) == want
        misses = store.misses
        with columns_of(model) as seen:
            assert rh.reply(model, tokenizer, asked, max_new_tokens=6) == want
    assert seen[0] == 1 and store.misses == misses and store.hits > 0


def test_a_cache_that_a_call_has_filled_is_not_the_next_ones():
    model = generating(tiny_llama, rh.Node(rh.LoReFT(rank=2), layer=1, positions="l1"))
    want = [model.generate(**prompts(), **GREEDY | {"max_new_tokens": n}) for n in (8, 3, 8)]
    with model.reusing(ActivationStore(2**28)):
        got = [model.generate(**prompts(), **GREEDY | {"max_new_tokens": n}) for n in (8, 3, 8)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
