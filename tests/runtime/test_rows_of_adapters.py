"""Any graph, several adapters: a row of a batch is what it is alone with its adapter, whichever rows share it."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle
from support.models import VOCAB, randomise, tiny_gpt2, tiny_llama
from torch import Tensor

import reftheads as rh

ADAPTERS = ["default", "b", "c"]
RULES = ["f1", "l1", "f2+l2", "all", "prompt", "generated", "l1"]
SITES = [(1, "block_output"), (1, "block_output"), (0, "mlp_output"), (1, "query_output"), (2, "block_input")]
EDITS = [
    rh.LoReFT(rank=2), rh.DiReFT(rank=1), rh.Steering(), rh.ScaleAndBias(), rh.Ablate(), rh.NoReFT(rank=2)
]  # fmt: skip


@st.composite
def graphs(draw: Any) -> rh.InterventionGraph:
    """Readers below, and edits, gates and readers that mostly share a site, in any order."""
    sources = draw(st.lists(st.sampled_from(RULES), max_size=2))
    nodes = [
        rh.Node(rh.LinearHead(1), 0, "block_input", positions=rule, name=f"s{i}") for i, rule in enumerate(sources)
    ]
    sites = draw(st.lists(st.sampled_from(SITES), min_size=1, max_size=2))
    for i in range(draw(st.integers(1, 5))):
        layer, component = draw(st.sampled_from(sites))
        kinds = ["edit", "edit", "head", "collect", "tied", *["gated"] * 3 * bool(sources)]
        kind, rule, source = draw(st.sampled_from(kinds)), draw(st.sampled_from(RULES)), None
        options: dict[str, Any] = {}
        if kind == "edit":
            what: Any = draw(st.sampled_from(EDITS + [rh.LoRA(rank=1)] * (component in ("mlp_output", "query_output"))))
        elif kind == "tied":
            what, options = rh.LoReFT(rank=1), {"share": f"{layer}{component}"}
        elif kind == "gated":
            number = draw(st.integers(0, len(sources) - 1))
            rule = rule if sources[number] in ("f1", "l1") else sources[number]
            what, source = rh.Gated(draw(st.sampled_from(EDITS))), f"s{number}"
        else:
            what = rh.Collect() if kind == "collect" else rh.LinearHead(2)
        nodes.append(rh.Node(what, layer, component, positions=rule, name=f"n{i}", source=source, **options))
    return rh.InterventionGraph(*nodes)


@st.composite
def shares(draw: Any) -> list[str]:
    """The adapter of every row: in equal shares one after the other, or in any order."""
    if draw(st.booleans()):
        adapters = draw(st.permutations(ADAPTERS))[: draw(st.integers(2, 3))]
        times = draw(st.integers(1, 2))
        return [name for name in adapters for _ in range(times)]
    return draw(st.lists(st.sampled_from([*ADAPTERS, "__base__"]), min_size=2, max_size=6))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(graphs(), graphs(), st.booleans(), shares(), st.sampled_from(["left", "right"]), st.data())
def test_rows_of_a_batch_are_what_each_is_alone_with_its_adapter(graph, other, one_graph, names, side, data):
    make = data.draw(st.sampled_from([tiny_llama, tiny_gpt2]))
    model = rh.InterventionModel(make(initializer_range=0.3).double(), graph)
    for name in ADAPTERS[1:]:
        model.add_adapter(name, graph if one_graph else other)
    for parameter in model.tuner.layer.parameters():
        parameter.requires_grad_(True)
    randomise(model.tuner.layer)
    model.double().eval()
    lengths = data.draw(st.lists(st.integers(2, 8), min_size=len(names), max_size=len(names)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    rows = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    prompts = [data.draw(st.integers(1, n)) for n in lengths]
    batch = oracle.pad(rows, side)
    marked = oracle.pad([[1] * p + [0] * (n - p) for p, n in zip(prompts, lengths, strict=True)], side)["input_ids"]
    with torch.no_grad():
        together = model(**batch, prompt_mask=marked, adapter_names=names)
    for i, (name, row, prompt) in enumerate(zip(names, rows, prompts, strict=True)):
        real = batch["attention_mask"][i].bool()
        mask = torch.arange(len(row))[None] < prompt
        with torch.no_grad():
            alone = model(torch.tensor([row]), prompt_mask=mask, adapter_names=[name])
        close(together.logits[i][real], alone.logits[0])
        for kind in ("predictions", "collected"):
            for node, value in (alone.get(kind) or {}).items():
                key = f"{name}/{node}" if f"{name}/{node}" in together[kind] else node
                got, selected = together[kind][key][i], together.selected[key][i]
                if value.ndim == 2:
                    close(got, value[0])
                else:
                    close(got[selected], value[0][alone.selected[node][0]])


def test_a_gate_and_an_edit_of_one_site_act_in_the_order_of_the_graph_in_equal_shares():
    """The second adapter's gate before the edit that is made for all adapters at once: the two do not commute."""
    graph = rh.InterventionGraph(
        rh.Node(rh.LinearHead(1), 0, positions="l1", name="probe"),
        rh.Node(rh.Gated(rh.LoReFT(rank=2)), 1, name="gated", source="probe"),
        rh.Node(rh.ScaleAndBias(), 1, name="edit"),
    )
    model = rh.InterventionModel(tiny_llama(initializer_range=0.3).double(), graph)
    model.add_adapter("b", graph)
    for parameter in model.tuner.layer.parameters():
        parameter.requires_grad_(True)
    randomise(model.tuner.layer)
    model.double().eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    together = model(ids.repeat(2, 1), adapter_names=["default", "b"]).logits
    for i, name in enumerate(["default", "b"]):
        model.set_adapter(name)
        close(together[i], model(ids).logits[0])


@pytest.mark.parametrize("empty", ["f0", "generated"])
def test_names_of_what_is_read_do_not_hang_on_what_a_batch_holds(empty: str):
    model = rh.InterventionModel(tiny_llama(), rh.InterventionGraph(rh.Node(rh.LinearHead(1), 0, name="y")), "one")
    model.add_adapter("two", rh.InterventionGraph(rh.Node(rh.LinearHead(1), 0, positions=empty, name="y")))
    ids = torch.tensor([[5, 6, 7, 8]])
    for store in (None, rh.ActivationStore(10**6)):
        with model.reusing(store):
            model.set_adapter(["one", "two"])
            assert [*model(ids).predictions] == ["one/y"]
            assert [*model(ids.repeat(2, 1), adapter_names=["one", "two"]).predictions] == ["one/y"]
            model.set_adapter("one")
            assert [*model(ids).predictions] == ["y"]
