"""A graph is named, checked and serialisable."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reftheads as rh
from reftheads.graph import Tokens
from reftheads.graph.site import BLOCK_COMPONENTS, HEAD_COMPONENTS

_LAYERS = st.integers(-40, 40)
_RANKS = st.integers(1, 8)
_WORDS = st.text("abcdefghij", min_size=1, max_size=6).map("n_{}".format)
_POSITIONS = st.one_of(
    st.sampled_from(
        ["all", "prompt", "generated", "f3", "l1", "f7+l7", "f1+l2", "3", "-1", "2:5", "-4:", "f2+7", "l1+0"]
    ),
    st.integers(-9, 9),
    st.lists(st.integers(0, 99), min_size=1, max_size=4).map(rh.Positions.where),
)
_ACTIVATIONS = st.sampled_from([None, "relu", "gelu"])
_REFT = st.one_of(
    st.builds(rh.LoReFT, rank=_RANKS, act_fn=_ACTIVATIONS, dropout=st.sampled_from([0.0, 0.1]), bias=st.booleans()),
    st.builds(rh.NoReFT, rank=_RANKS, dtype=st.sampled_from(["float32", "bfloat16"])),
    st.builds(rh.DiReFT, rank=_RANKS, init=st.sampled_from(["orthogonal", "identity"])),
    st.builds(rh.NoDiReFT, rank=_RANKS, act_fn=_ACTIVATIONS),
    st.builds(rh.ConsReFT, rank=_RANKS),
    st.builds(rh.LobiReFT, rank=_RANKS),
)
_VECTORS = st.integers(1, 5).map(torch.ones)
_INTERVENTIONS = st.one_of(
    _REFT,
    st.builds(rh.ScaleAndBias),
    st.builds(rh.Steering, vector=st.none() | _VECTORS, scale=st.floats(-4, 4), trainable=st.booleans()),
    st.builds(rh.Replace, _VECTORS),
    st.builds(rh.Ablate, mean=st.none() | _VECTORS),
    st.builds(rh.Collect, detach=st.booleans()),
    st.builds(rh.LoRA, rank=_RANKS, alpha=st.none() | st.floats(0.5, 32), dropout=st.sampled_from([0.0, 0.5])),
    st.builds(
        rh.LinearHead,
        outputs=st.integers(2, 5),
        target=st.none() | _WORDS,
        detach=st.booleans(),
        weight=st.floats(0, 2),
    ),
)


@st.composite
def _sites(draw: Any) -> dict[str, Any]:
    stack = draw(st.sampled_from([None, "encoder", "decoder"]))
    kind = draw(st.sampled_from(["block", "head", "stack", "path"]))
    if kind == "block":
        return {"layer": draw(_LAYERS), "component": draw(st.sampled_from(BLOCK_COMPONENTS)), "stack": stack}
    if kind == "head":
        component = draw(st.sampled_from(HEAD_COMPONENTS))
        return {"layer": draw(_LAYERS), "component": component, "head": draw(st.integers(-8, 8)), "stack": stack}
    if kind == "stack":
        return {"component": draw(st.sampled_from(["embedding_output", "final_norm_output"])), "stack": stack}
    return {"component": "model.layers.3.mlp.gate_proj", "side": draw(st.sampled_from(["input", "output"]))}


@st.composite
def _graphs(draw: Any) -> rh.InterventionGraph:
    names = draw(st.lists(st.none() | _WORDS, min_size=1, max_size=6, unique_by=lambda n: object() if n is None else n))
    return rh.InterventionGraph(
        *(rh.Node(draw(_INTERVENTIONS), positions=draw(_POSITIONS), name=name, **draw(_sites())) for name in names)
    )


@settings(max_examples=200, deadline=None)
@given(_graphs())
def test_a_graph_survives_json(graph):
    again = rh.InterventionGraph.from_dict(json.loads(json.dumps(graph.to_dict())))
    assert again == graph
    assert hash(again) == hash(graph)
    assert again.to_dict() == graph.to_dict()
    assert str(again) == str(graph)


@settings(max_examples=100, deadline=None)
@given(_graphs(), _graphs())
def test_made_up_names_are_unique_and_leave_given_ones_alone(first, second):
    nodes = [*first, *(rh.Node(n.intervention, n.site.layer, n.site.component, head=n.site.head) for n in second)]
    graph = rh.InterventionGraph(*nodes)
    assert len(set(graph.names)) == len(graph) == len(nodes)
    assert graph.names[: len(first)] == first.names
    assert all(graph[name].name == name for name in graph.names)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(_LAYERS, min_size=1, max_size=5, unique=True), _REFT, st.sampled_from(["f7+l7", "l1", "f2+l3", "3+l1+0"])
)
def test_over_makes_a_node_a_layer_and_untied_a_node_a_layer_and_part(layers, intervention, positions):
    tied = rh.InterventionGraph.over(intervention, layers, positions)
    assert [(n.site.layer, n.positions.text) for n in tied] == [(layer, positions) for layer in layers]
    untied = rh.InterventionGraph.over(intervention, layers, positions, tied=False, name="x")
    parts = positions.split("+")
    assert [(n.site.layer, n.positions.text.split(" ")[0]) for n in untied] == [(la, p) for la in layers for p in parts]
    assert all(n.intervention == intervention for n in (*tied, *untied))
    assert len({n.key for n in untied}) == len(untied)
    assert rh.InterventionGraph.from_dict(json.loads(json.dumps(untied.to_dict()))) == untied


def test_untied_parts_of_a_capped_sum_stay_capped():
    graph = rh.InterventionGraph.over(rh.LoReFT(rank=1), [0], "f7+l7", tied=False, name="x")
    assert graph.names == ("x_0_f7", "x_0_l7")
    tokens = Tokens.of((1, 5))
    first, last = (node.positions.mask(tokens) for node in graph)
    assert first[0].tolist() == [True, True, False, False, False]  # half of five is two
    assert last[0].tolist() == [False, False, False, True, True]


def test_over_takes_any_argument_of_a_node():
    graph = rh.InterventionGraph.over(rh.LoReFT(rank=1), range(2), component="query_output", head=1, share="one")
    assert [node.site.head for node in graph] == [1, 1]
    assert {node.key for node in graph} == {"one"}
    assert graph.names == ("loreft_0_query_output_head1", "loreft_1_query_output_head1")


def test_equality_sees_every_field_of_a_node():
    def graph(intervention=rh.LoReFT(rank=2), layer=1, positions="l1", name="a", **rest):  # noqa: B008
        return rh.InterventionGraph(rh.Node(intervention, layer, positions=positions, name=name, **rest))

    assert graph() == graph()
    others = [
        graph(rh.LoReFT(rank=3)), graph(rh.NoReFT(rank=2)), graph(layer=2), graph(positions="f1"), graph(name="b"),
        graph(share="s"), graph(stack="encoder"), graph(component="mlp_output"),
    ]  # fmt: skip
    assert all(graph() != other for other in others)


def test_adding_graphs_keeps_the_order_and_refuses_a_name_in_both():
    a = rh.InterventionGraph(rh.Node(rh.LoReFT(rank=1), layer=1, name="a"))
    b = rh.InterventionGraph(rh.Node(rh.LoReFT(rank=1), layer=0, name="b"))
    assert (a + b).names == ("a", "b")
    with pytest.raises(ValueError, match="has the name 'a' twice: every node needs its own"):
        a + a


def test_two_graphs_over_the_same_layers_need_names():
    def over(**options):
        return rh.InterventionGraph.over(rh.LoReFT(rank=1), range(2), **options)

    with pytest.raises(ValueError, match="'loreft_0' twice: .* by name=… of Node or of InterventionGraph.over"):
        over() + over(positions="l1")
    assert (over(name="a") + over(positions="l1", name="b")).names == ("a_0", "a_1", "b_0", "b_1")


def test_a_long_list_of_token_ids_prints_short_and_is_kept_whole():
    def graph(ids):
        return rh.InterventionGraph(rh.Node(rh.LoReFT(rank=1), 0, positions=rh.Positions.where(ids), name="a"))

    long = graph(range(1000))
    assert str(long).endswith("where token_ids in [0, 1, 2, 3, 996 more]")
    assert str(graph([7, 9])).endswith("where token_ids in [7, 9]")
    assert rh.InterventionGraph.from_dict(json.loads(json.dumps(long.to_dict()))) == long
    assert graph([*range(999), 5000]) != long and str(graph([*range(999), 5000])) == str(long)


def test_a_graph_prints_a_line_a_node():
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=4), layer=8, positions="l1", name="emoji", share="both"),
        rh.Node(rh.LinearHead(outputs=1), layer=-3, positions="l1", name="probe"),
        rh.Node(rh.Gated(rh.LoReFT(rank=2)), layer=-1, positions="all", name="gated", source="probe"),
    )
    header, *lines = str(graph).split("\n")
    assert header.split() == ["node", "what", "where", "positions"]
    assert [line.split()[0] for line in lines] == ["emoji", "probe", "gated"]
    assert "LoReFT(rank=4) share=both" in lines[0] and "block_output[8]" in lines[0] and lines[0].endswith("l1")
    assert "Gated(inner=LoReFT(rank=2)) source=probe" in lines[2]
    assert rh.InterventionGraph.from_dict(json.loads(json.dumps(graph.to_dict()))) == graph


def test_nodes_that_share_need_one_definition():
    with pytest.raises(ValueError, match=r"share 's' need one definition, got LoReFT\(rank=1\) and LoReFT\(rank=2\)"):
        rh.InterventionGraph(
            rh.Node(rh.LoReFT(rank=1), layer=0, share="s"), rh.Node(rh.LoReFT(rank=2), layer=1, share="s")
        )


def test_nodes_that_share_given_vectors_need_the_same_numbers():
    ones, zeros = (rh.Steering(vector=v) for v in (torch.ones(4), torch.zeros(4)))
    rh.InterventionGraph(rh.Node(ones, layer=0, share="s"), rh.Node(rh.Steering(torch.ones(4)), layer=1, share="s"))
    with pytest.raises(ValueError, match="share 's' need one definition, .* with other numbers"):
        rh.InterventionGraph(rh.Node(ones, layer=0, share="s"), rh.Node(zeros, layer=1, share="s"))


def test_a_node_may_share_the_parameters_of_another_by_its_name():
    a, b = rh.Node(rh.LoReFT(rank=1), layer=0, name="a"), rh.Node(rh.LoReFT(rank=1), layer=1, name="b", share="a")
    assert [node.key for node in rh.InterventionGraph(a, b)] == ["a", "a"]


def test_a_source_is_a_reader_in_the_graph():
    def graph(source):
        return rh.InterventionGraph(
            rh.Node(rh.LoReFT(rank=1), layer=0, positions="l1", name="edit"),
            rh.Node(rh.LinearHead(outputs=1), layer=0, positions="l1", name="probe"),
            rh.Node(rh.LinearHead(outputs=1), layer=0, positions="f2", name="two"),
            rh.Node(rh.Gated(rh.LoReFT(rank=1)), layer=1, positions="all", name="gated", source=source),
        )

    assert graph("probe")["gated"].source == "probe"
    with pytest.raises(ValueError, match="'gated' reads 'nobody', which is not in the graph: edit, probe, two, gated"):
        graph("nobody")
    with pytest.raises(ValueError, match="'gated' reads 'edit', which has no output: name a head instead"):
        graph("edit")
    with pytest.raises(ValueError, match="reads 'two' at f2: a source selects one token a row, or the same tokens"):
        graph("two")


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_cycle_of_sources_is_refused_and_shown(length):
    nodes = [
        rh.Node(rh.Gated(rh.LoReFT(rank=1)), layer=0, positions="l1", name=f"n{i}", source=f"n{(i + 1) % length}")
        for i in range(length)
    ]
    with pytest.raises(ValueError, match="the sources form a cycle: n0 ← ") as error:
        rh.InterventionGraph(*nodes)
    assert str(error.value).endswith("← n0")


@pytest.mark.parametrize("data", [None, [], {}, {"nodes": {}}, {"nodes": "abc"}, {"graph": []}])
def test_what_is_no_graph_is_refused(data):
    with pytest.raises(ValueError, match="cannot read a graph from .*: it needs a list under 'nodes'"):
        rh.InterventionGraph.from_dict(data)


@pytest.mark.parametrize(
    "node", [{}, {"type": "LoReFT"}, {"type": "LoReFT", "options": {"rank": 1}, "layr": 3}, "LoReFT", None, 3]
)
def test_a_node_that_cannot_be_read_is_refused_and_shown(node):
    with pytest.raises(ValueError, match="cannot read the node"):
        rh.InterventionGraph.from_dict({"nodes": [node]})


def test_a_graph_needs_nodes_and_nothing_else():
    with pytest.raises(ValueError, match="needs at least one node, got none"):
        rh.InterventionGraph()
    with pytest.raises(ValueError, match=r"is made of Nodes, got LoReFT\(rank=1"):
        rh.InterventionGraph(rh.LoReFT(rank=1))  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="no node 'b' in this graph: it has a"):
        rh.InterventionGraph(rh.Node(rh.LoReFT(rank=1), layer=0, name="a"))["b"]
