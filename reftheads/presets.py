"""Graphs by a short name, such as `"lora8:all-linear"`, for a model at hand."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from reftheads.architectures.structure import StackInfo, stacks
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.node import Node
from reftheads.graph.site import BLOCK_COMPONENTS, Stack
from reftheads.interventions.lora import LoRA
from reftheads.interventions.reft import LoReFT

_PRESET = re.compile(r"(?P<kind>lora|loreft)(?P<rank>\d+)(:(?P<where>.+))?")
_ADAPTED = ("query_output", "value_output")
_SYNTAX = "'lora8', 'lora8:all-linear', 'lora8:query_output+mlp_output', 'loreft4' or 'loreft4:f7+l7'"


def preset(name: str, base: nn.Module) -> InterventionGraph:
    """A graph for all blocks of a model.

    | name | nodes in every block |
    |---|---|
    | `lora8` | LoRA of rank 8 on queries and values, as in its paper (https://arxiv.org/abs/2106.09685) |
    | `lora8:all-linear` | ... on every linear module, as in QLoRA's (https://arxiv.org/abs/2305.14314) |
    | `lora8:query_output+mlp_output` | ... on these components |
    | `loreft4`, `loreft4:l1` | LoReFT of rank 4 at `block_output`, on `f7+l7` or the positions given |

    LoRA has alpha = 2 · rank. Models of two stacks get nodes in both.

    Raises:
        ValueError: a name that cannot be read, a component that is none of a block, a model without recognisable
            blocks or without linear modules in them.
    """
    read = _PRESET.fullmatch(name)
    if read is None or not int(read["rank"]):
        raise ValueError(f"cannot read preset {name!r}: use {_SYNTAX}")
    rank, where, found = int(read["rank"]), read["where"], stacks(base)
    if not found:
        raise ValueError(f"preset {name!r}: no transformer blocks recognised in this {type(base).__name__}")
    if read["kind"] == "loreft":
        nodes = [
            Node(LoReFT(rank), layer, positions=where or "f7+l7", stack=side_of(stack, found))
            for stack in found
            for layer in range(len(stack.blocks))
        ]
        return InterventionGraph(*nodes)
    lora = LoRA(rank, alpha=2 * rank)
    if where == "all-linear":
        paths = [path for stack in found for block in stack.blocks for path in linear_modules(base, block)]
        nodes = [Node(lora, component=path, name=lora_name(path)) for path in paths]
        if not nodes:
            raise ValueError(f"preset {name!r}: the blocks of this {type(base).__name__} hold no linear module")
        return InterventionGraph(*nodes)
    components = tuple(where.split("+")) if where else _ADAPTED
    unknown = next((component for component in components if component not in BLOCK_COMPONENTS), None)
    if unknown is not None:
        raise ValueError(f"preset {name!r}: {unknown!r} is no component of a block: use {', '.join(BLOCK_COMPONENTS)}")
    nodes = [
        Node(lora, layer, component, stack=side_of(stack, found))
        for stack in found
        for layer in range(len(stack.blocks))
        for component in components
    ]
    return InterventionGraph(*nodes)


def linear_modules(base: nn.Module, block: str) -> Iterator[str]:
    """Paths of the linear modules in a block, quantised ones and `Conv1D` as well."""
    for path, module in base.get_submodule(block).named_modules(prefix=block):
        if isinstance(getattr(module, "in_features", getattr(module, "nx", None)), int):
            yield path


def side_of(stack: StackInfo, found: tuple[StackInfo, ...]) -> Stack | None:
    """What a site says of its stack: nothing, if the model has one."""
    return stack.role if len(found) > 1 else None


def lora_name(path: str) -> str:
    """The name of a LoRA node on the module at this path."""
    return "lora_" + path.replace(".", "_")
