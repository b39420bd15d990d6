"""Any graph on any batch: losses and gradients are those of the plain path, whatever is reused."""

from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models import LAYERS
from support.replay import TINY, Step, base_of, batch_of, check, intervened, step
from torch import Tensor, nn

import reftheads as rh
from reftheads.graph.positions import Positions
from reftheads.reuse import prefixes
from reftheads.reuse.store import ActivationStore

pytestmark = pytest.mark.usefixtures("loss_in_float64")


RULES = ["f1", "f2", "l1", "l2", "f1+l1", "all", "prompt", "generated", 0, -1, "2:4", Positions.where([4, 7])]
LATE = ["l1", "l2", "generated", -1, "2:4", Positions.where([4, 7])]  # before them lies a prefix
COMPONENTS = ["block_input", "block_output", "attention_output", "mlp_output", "query_output", "head_output"]
EDITS = [rh.LoReFT(rank=2), rh.DiReFT(rank=1, act_fn="relu"), rh.Steering(), rh.ScaleAndBias()]


@st.composite
def graphs(draw: Any, family: str) -> list[rh.Node]:
    layers, rules = st.integers(0, LAYERS - 1), st.sampled_from(draw(st.sampled_from([RULES, LATE, LATE])))
    nodes: list[rh.Node] = []
    for i in range(draw(st.integers(1, 4))):
        layer, component, rule = draw(layers), draw(st.sampled_from(COMPONENTS)), draw(rules)
        kind = draw(st.sampled_from(["edit", "edit", "head", "head", "lora", "tied", "gated", "collect"]))
        name, where = f"n{i}", {"layer": layer, "component": component, "positions": rule}
        if kind == "edit":
            nodes.append(rh.Node(draw(st.sampled_from(EDITS)), **where, name=name))
        elif kind == "head":
            nodes.append(rh.Node(draw(heads(rule)), **where, name=name))
        elif kind == "lora":
            linear = ["query_output"] if family == "tiny gemma3" else ["query_output", "mlp_output"]
            where["component"] = draw(st.sampled_from(linear))
            nodes.append(rh.Node(rh.LoRA(rank=2), **where, name=name))
        elif kind == "tied":
            nodes.append(rh.Node(rh.LoReFT(rank=2), **where, name=name, share="w"))
            nodes.append(rh.Node(rh.LoReFT(rank=2), draw(layers), positions=draw(rules), name=f"{name}b", share="w"))
        elif kind == "gated":
            read = draw(st.sampled_from(["l1", rule]))
            gate = rh.LinearHead(1, detach=draw(st.booleans()))
            nodes.append(rh.Node(gate, draw(st.integers(0, layer)), "block_input", read, name=f"{name}s"))
            edit = rh.Gated(rh.DiReFT(rank=2))
            nodes.append(rh.Node(edit, layer, "block_output", rule, name=name, source=f"{name}s"))
        else:
            nodes.append(rh.Node(rh.Collect(detach=draw(st.booleans())), **where, name=name))
    return nodes


@st.composite
def heads(draw: Any, rule: Any) -> rh.LinearHead:
    target = draw(st.sampled_from([None, "y" if Positions.parse(rule).bound == 1 else "t"]))
    return rh.LinearHead(3, target=target, detach=draw(st.booleans()), weight=draw(st.sampled_from([1.0, 0.3])))


MOSTLY = st.sampled_from([True, True, False])


@st.composite
def batches(draw: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two batches that share rows, in another order and with other padding."""
    common = draw(st.lists(st.integers(3, 9), min_size=20, max_size=20))
    pool = []
    for _ in range(draw(st.integers(1, 5))):
        length, same = draw(st.integers(2, 20)), draw(st.integers(0, 12))
        fresh = draw(st.lists(st.integers(3, 9), min_size=length, max_size=length))
        pool.append(([*common[:same], *fresh][:length], draw(st.integers(1, length - 1))))
    again = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4))
    sides = st.sampled_from([("right", False), ("right", True), ("left", True), ("left", True), ("left", False)])
    flags = st.builds(lambda side, labels: {"side": side[0], "labels": labels, "position_ids": side[1]}, sides, MOSTLY)
    return draw(completed(pool, draw(flags))), draw(completed(again, draw(flags)))


@st.composite
def completed(draw: Any, rows: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    batch = batch_of([row for row, _ in rows], [prompt for _, prompt in rows], **options)
    if draw(MOSTLY):
        batch["y"] = (batch["input_ids"].sum(1) % 4 - 1).masked_fill(batch["input_ids"].sum(1) % 4 == 0, -100)
        batch["t"] = batch["input_ids"].where(batch["input_ids"] > 5, -97) - 3
        batch["t"] = batch["t"].where(batch["t"] < 3, -100)
    if not draw(MOSTLY):
        batch.pop("prompt_mask")
    if bool(batch["attention_mask"].all()) and draw(st.booleans()):
        batch.pop("attention_mask")
    return batch


def attempt(model: nn.Module, batch: dict[str, Tensor]) -> Step | ValueError:
    try:
        return step(model, batch)
    except ValueError as error:
        return error


def check_as_plain(model: rh.InterventionModel, batch: dict[str, Tensor], used: Any, times: int) -> None:
    plain = attempt(model, batch)
    for _ in range(times):
        with model.reusing(used):
            got = attempt(model, batch)
        if isinstance(plain, ValueError):
            assert isinstance(got, ValueError), plain
        else:
            assert isinstance(got, Step), got
            check(got, plain)


def check_any(family: str, nodes: list[rh.Node], two: Any, training: bool, budget: int) -> None:
    model = intervened(base_of(family), *nodes, training=training)
    strange = {"y", "t"} - set(model.plan().targets)
    first, second = ({name: value for name, value in batch.items() if name not in strange} for batch in two)
    store = ActivationStore(budget)
    with mock.patch.object(prefixes, "SHARED", 4):
        check_as_plain(model, first, store, 2)
        check_as_plain(model, second, store, 2)
        check_as_plain(model, first, None, 1)


def any_graph(examples: int) -> Any:
    def decorate(test: Any) -> Any:
        anything = st.sampled_from(sorted(TINY)).flatmap(lambda family: st.tuples(st.just(family), graphs(family)))
        budgets = st.sampled_from([2**30, 2**30, 5000, 0])
        configured = settings(
            max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
        )
        return configured(given(anything, batches(), st.booleans(), budgets)(test))

    return decorate


@any_graph(60)
def test_any_graph_on_any_batch_has_the_plain_losses_and_gradients(graph: Any, two: Any, training: bool, budget: int):
    check_any(*graph, two, training, budget)


@pytest.mark.slow
@any_graph(500)
def test_many_graphs_on_many_batches_have_the_plain_losses_and_gradients(
    graph: Any, two: Any, training: bool, budget: int
):
    check_any(*graph, two, training, budget)
