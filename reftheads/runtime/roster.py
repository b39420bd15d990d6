"""Which nodes act in a pass: of the adapters of a call those of one stack, with their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from reftheads.graph.intervention import Params
from reftheads.runtime.acting import derive
from reftheads.runtime.node_module import NodeModule
from reftheads.runtime.output import Reading
from reftheads.runtime.passes import Acting, NodeKey, SideBySide
from reftheads.runtime.plan import Plan, PlannedNode
from reftheads.runtime.scope import Call

Listed = tuple[NodeKey, PlannedNode, NodeModule]
"""Under which key a node's parameters are kept, the node, and these parameters."""


class HoldsNodes(Protocol):
    """What has the compiled graphs of all adapters, and their parameters by adapter and key."""

    plans: dict[str, Plan]
    rh_nodes: nn.ModuleDict


def nodes_of(layer: HoldsNodes, stack: str, call: Call) -> Iterator[Listed]:
    """Yield the nodes of a stack that act in a call, adapter by adapter, in the order of their graph.

    One at strength 0 does not.
    """
    for adapter in _adapters(layer, call):
        modules = layer.rh_nodes[adapter]
        for planned in layer.plans[adapter].of_stack(stack):
            if call.strengths.get((adapter, str(planned.node.name))) != 0:
                yield (adapter, planned.node.key), planned, modules[planned.node.key]  # type: ignore[index]


def _adapters(layer: HoldsNodes, call: Call) -> list[str]:
    """Return the adapters whose nodes act in a call, on all of its rows or on some."""
    named = call.adapters if call.adapter_names is None else dict.fromkeys(call.adapter_names)
    return [adapter for adapter in named if adapter in layer.plans]


def acting_on(layer: HoldsNodes, nodes: Sequence[Listed], call: Call, tokens: Tensor | None = None) -> Iterator[Acting]:
    """Yield each node with what it needs in one pass over `tokens` [rows columns …].

    Raises:
        ValueError: a number of adapter names that does not fit the rows.
    """
    derived = _derived([module for _, _, module in nodes], call)
    shares = () if tokens is None else equal_shares(layer, call, len(tokens))
    stacked = shares if _one_graph(layer, shares) and not call.strengths else ()
    for (adapter, _), planned, module in _node_by_node(nodes) if len(stacked) > 1 else nodes:
        key, rows, share, p = (adapter, str(planned.node.name)), None, None, derived[module]
        source = None if planned.node.source is None else layer.plans[adapter][planned.node.source]
        if len(stacked) > 1 and source is None and p is not None:
            if adapter == stacked[0]:
                yield _stacked(layer, planned, stacked, derived)
            continue
        if call.adapter_names is not None and tokens is not None:
            rows = _rows_of(adapter, call.adapter_names, tokens)
            if len(shares) > 1 and source is None and not planned.sees_other_tokens:
                size = len(tokens) // len(shares)
                share = slice(size * shares.index(adapter), size * (shares.index(adapter) + 1))
        strength = call.strengths.get(key, 1.0)
        yield Acting(key, planned, module, p, module.dtype, rows, source, share, strength)


def by_name(layer: HoldsNodes, call: Call, readings: Mapping[NodeKey, Reading]) -> dict[str, Reading]:
    """Return what was read by the names of the nodes; with the adapter's where several have a reader of one name.

    Whether a reader has read anything does not matter, so that names stay what they are from batch to batch.
    """
    adapters, read = list(_adapters(layer, call)), dict.fromkeys(adapter for adapter, _ in readings)
    if not read.keys() <= set(adapters):  # a run was handed on that had begun with others
        adapters = list(read)
    names = [planned.node.name for name in adapters for planned in layer.plans[name].readers]
    return {
        node if names.count(node) == 1 else f"{adapter}/{node}": reading
        for (adapter, node), reading in readings.items()
    }


def equal_shares(layer: HoldsNodes, call: Call, rows: int) -> Sequence[str]:
    """Return the adapters of a batch's rows, if they have equal shares of them, one after the other."""
    names = call.adapter_names
    if names is None or len(names) != rows or not all(name in layer.plans for name in names):
        return ()
    adapters = tuple(dict.fromkeys(names))
    share = rows // max(len(adapters), 1)
    if names != tuple(name for name in adapters for _ in range(share)):
        return ()
    return adapters


def _one_graph(layer: HoldsNodes, adapters: Sequence[str]) -> bool:
    return all(layer.plans[name].graph == layer.plans[adapters[0]].graph for name in adapters)


def _node_by_node(nodes: Sequence[Listed]) -> list[Listed]:
    """Return the nodes of adapters of one graph in its order, each for all adapters before the next one acts.

    Adapter by adapter, what acts for all of them at once would come before the own nodes of the second adapter.
    """
    by_adapter: dict[str, list[Listed]] = {}
    for one in nodes:
        by_adapter.setdefault(one[0][0], []).append(one)
    return [one for turn in zip(*by_adapter.values(), strict=True) for one in turn]


def _stacked(
    layer: HoldsNodes, planned: PlannedNode, adapters: Sequence[str], derived: dict[NodeModule, Params | None]
) -> Acting:
    name = str(planned.node.name)
    modules: dict[NodeKey, NodeModule] = {
        (adapter, name): layer.rh_nodes[adapter][planned.node.key]  # type: ignore[index,misc]
        for adapter in adapters
    }
    every = [derived[module] or {} for module in modules.values()]
    p = {letter: torch.stack([params[letter] for params in every]) for letter in every[0]}
    dtype = next(iter(modules.values())).dtype
    return Acting((adapters[0], name), planned, SideBySide(modules), p, dtype, None, None)


def _derived(modules: Sequence[NodeModule], call: Call) -> dict[NodeModule, Params | None]:
    if call.generation is None or torch.is_grad_enabled():
        return derive(modules)
    known = call.generation.derived
    known.update(derive(module for module in modules if module not in known))
    return known


def _rows_of(adapter: str, adapter_names: Sequence[str], tokens: Tensor) -> Tensor:
    keep = torch.tensor([name == adapter for name in adapter_names], device=tokens.device)
    if tokens.shape[0] % len(keep):
        raise ValueError(f"adapter_names has {len(keep)} entries for {tokens.shape[0]} rows: give one a row")
    return keep.repeat_interleave(tokens.shape[0] // len(keep))
