"""The cone of influence: which blocks and which readers no edit can change, checked on what a model computes."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import LAYERS, random_ids, randomise, tiny_bart, tiny_llama
from torch import nn

import reftheads as rh
from reftheads.architectures.structure import stacks
from reftheads.graph.site import BLOCK_COMPONENTS
from reftheads.reuse.cone import Cone
from reftheads.runtime import compile_graph
from reftheads.runtime.hooks import attach

BASE = tiny_llama(initializer_range=0.3).double()


@dataclass(frozen=True)
class LooksAround(rh.LinearHead):
    """A head that looks at what entered the projection."""

    outputs: int = 2
    needs_linear = True


def edit(layer: int | None = None, component: str = "block_output", **where: Any) -> rh.Node:
    return rh.Node(rh.ScaleAndBias(), layer, component, **where)


def probe(layer: int | None = None, component: str = "block_output", **where: Any) -> rh.Node:
    return rh.Node(rh.LinearHead(2), layer, component, **where)


def cone_of(*nodes: rh.Node, base: nn.Module = BASE, stack: int = 0) -> Cone:
    return Cone.of(compile_graph(rh.InterventionGraph(*nodes), base).nodes, stacks(base)[stack])


def names(planned: Any) -> list[str]:
    return [one.node.name for one in planned]


@pytest.mark.parametrize("component", BLOCK_COMPONENTS)
def test_an_edit_within_a_block_cuts_before_it_and_one_of_its_output_behind(component: str) -> None:
    assert cone_of(edit(1, component)).cut == (2 if component == "block_output" else 1)


@pytest.mark.parametrize(
    ("node", "cut"),
    [
        (edit(component="embedding_output"), 0),
        (edit(component="final_norm_output"), 3),
        (edit(component="model.embed_tokens"), 0),
        (edit(component="model.norm", side="input"), 3),
        (edit(component="model.layers.1.input_layernorm"), 1),
        (edit(component="model.layers.1.mlp.gate_proj"), 1),
        (edit(component="model.layers.1"), 2),
        (edit(component="model.layers.1", side="input"), 1),
        (probe(component="model.layers.1.input_layernorm"), 1),  # it may read before any edit of its block, or behind
        (probe(2), 3),
    ],
)
def test_the_cut_is_where_the_first_node_acts(node: rh.Node, cut: int) -> None:
    assert cone_of(node).cut == cut


def test_the_first_of_several_edits_cuts() -> None:
    cone = cone_of(edit(2, name="late"), edit(0, "mlp_output", name="early"))
    assert (cone.cut, cone.first.node.name, names(cone.inside)) == (0, "early", ["late", "early"])


def test_readers_before_the_first_edit_are_constant() -> None:
    within = [
        probe(1, "attention_output", name="b"),
        edit(1, "mlp_input", name="edit"),
        probe(1, "mlp_output", name="c"),
    ]
    cone = cone_of(probe(0, name="a"), *within, probe(2, name="d"))
    assert names(cone.constant) == ["a", "b"] and names(cone.inside) == ["edit", "c", "d"]
    assert (cone.cut, cone.deepest_constant, cone.deepest) == (1, 2, 3)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_reader_at_the_site_of_an_edit_is_not_constant(order: tuple[int, int]) -> None:
    nodes = [probe(1, name="probe"), edit(1, name="edit")]
    assert not cone_of(*(nodes[i] for i in order)).constant


def test_a_reader_that_looks_at_more_than_its_tensor_is_not_constant() -> None:
    nodes = rh.Node(LooksAround(), 0, "query_output", name="x"), probe(0, "query_output", name="alone")
    cone = cone_of(*nodes, probe(1, name="behind"))
    assert names(cone.inside) == ["x", "alone", "behind"] and cone.first.node.name == "x" and cone.cut == 0


def test_the_source_of_a_gate_is_constant_below_it() -> None:
    gated = rh.Node(rh.Gated(rh.Steering()), 1, source="probe", name="gated")
    cone = cone_of(rh.Node(rh.LinearHead(1), 0, name="probe"), gated)
    assert names(cone.constant) == ["probe"] and cone.first.node.name == "gated"


def test_without_an_edit_all_blocks_are_below_the_cone() -> None:
    cone = cone_of(probe(0), probe(component="final_norm_output"))
    assert cone.first is None and cone.cut == LAYERS and len(cone.constant) == 2 and not cone.inside
    assert cone.deepest_constant == LAYERS and cone.deepest == 0


def test_nodes_of_the_other_stack_are_elsewhere() -> None:
    base = tiny_bart()
    one, two = edit(1, stack="decoder", name="d"), edit(2, "block_input", stack="encoder", name="e")
    found = {info.role: i for i, info in enumerate(stacks(base))}
    cone = cone_of(one, base=base, stack=found["encoder"])
    assert cone.elsewhere and cone.cut == LAYERS and not cone.nodes
    cone = cone_of(one, two, base=base, stack=found["encoder"])
    assert cone.elsewhere and cone.cut == 2 and names(cone.inside) == ["e"]


anywhere = st.tuples(st.booleans(), st.integers(0, LAYERS - 1), st.sampled_from(BLOCK_COMPONENTS))


@settings(max_examples=40, deadline=None)
@given(st.lists(anywhere, min_size=1, max_size=4))
def test_what_lies_before_the_cone_is_what_the_base_model_computes(sites: list[tuple[bool, int, str]]) -> None:
    nodes = [(edit if edits else probe)(layer, part, name=f"n{i}") for i, (edits, layer, part) in enumerate(sites)]
    cone, ids, seen = cone_of(*nodes), random_ids(), []
    model = rh.InterventionModel(tiny_llama(initializer_range=0.3).double(), rh.InterventionGraph(*nodes)).double()
    randomise(model)
    watched = [(p.address.module, p.address.side) for p in cone.constant]
    watched += [(cone.stack.blocks[cone.cut - 1], "output")] if cone.cut and cone.cut != _edited(cone) else []
    for base in (model.get_base_model(), BASE):
        values: list[torch.Tensor] = []
        handles = [attach(base.get_submodule(path), side, lambda h, x, v=values: v.append(h)) for path, side in watched]
        with torch.no_grad():
            base(ids)
        for handle in handles:
            handle.remove()
        seen.append(values)
    assert len(seen[0]) == len(watched)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def _edited(cone: Cone) -> int | None:
    """How many blocks lie before the output that the first node edits, if it edits one."""
    return cone.cut if cone.first is not None and cone.first.address.module == cone.stack.blocks[cone.cut - 1] else None
