"""Graphs by a short name, such as `"lora8:all-linear"`, for a model at hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from reftheads.architectures.addresses import locate
from reftheads.architectures.structure import StackInfo, stacks
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.node import Node
from reftheads.graph.site import BLOCK_COMPONENTS, Site, Stack
from reftheads.interventions.lora import LoRA
from reftheads.interventions.reft import LoReFT

_NAME = re.compile(r"(?P<kind>lora|loreft)(?P<rank>[1-9]\d*)(:(?P<where>.+))?")
_SYNTAX = "'lora8', 'lora8:all-linear', 'lora8:query_output+mlp_output', 'lora8:cs330', 'loreft4' or 'loreft4:f1+l1'"


@dataclass(frozen=True)
class PresetName:
    """What the name of a preset says: `KIND RANK`, or `KIND RANK:WHERE`.

    Attributes:
        kind: "lora" or "loreft".
        rank: of every node.
        where: of LoRA the modules, of LoReFT the positions; `None` for the usual ones.
    """

    kind: str
    rank: int
    where: str | None

    @classmethod
    def read(cls, name: str) -> PresetName:
        """Read a name.

        Raises:
            ValueError: one that is not of this form.
        """
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise ValueError(f"cannot read preset {name!r}: use {_SYNTAX}")
        return cls(parts["kind"], int(parts["rank"]), parts["where"])


def preset(name: str, base: nn.Module) -> InterventionGraph:
    """Make a graph for all blocks of a model by a short name.

    | name | nodes in every block |
    |---|---|
    | `lora8` | LoRA of rank 8 on queries and values, as in its paper (https://arxiv.org/abs/2106.09685) |
    | `lora8:all-linear` | … on every linear module, as in QLoRA's (https://arxiv.org/abs/2305.14314) |
    | `lora8:query_output+mlp_output` | … on these components |
    | `lora8:cs330` | … on every linear module but the attention's output projection, with α = r |
    | `loreft4` | LoReFT of rank 4 at `block_output`, on `f7+l7` as in its paper (https://arxiv.org/abs/2404.03592) |
    | `loreft4:f1+l1`, `loreft4:all` | … on these positions |

    The factor α/r of LoRA is 2, and 1 in `cs330`, the LoRA of problem set 4 of Stanford's CS330: in GPT-2 it is on
    `c_attn`, `c_fc` and the MLP's `c_proj`. Models of two stacks get nodes in both. The modes of `reftheads.fewshot`
    are these graphs under these names.

    Raises:
        ValueError: a name that cannot be read, a component that is none of a block, a model without recognisable
            blocks or without linear modules in them.

    Example:
        ```python
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> rh.preset("lora8", base).names[:2]
        ('lora_0_query_output', 'lora_0_value_output')
        >>> print(rh.preset("loreft4:l1", base)["loreft_5"].positions)
        l1
        ```
    """
    read, in_stacks = PresetName.read(name), stacks(base)
    if not in_stacks:
        raise ValueError(f"preset {name!r}: no transformer blocks recognised in this {type(base).__name__}")
    if read.kind == "loreft":
        nodes = [
            Node(LoReFT(read.rank), layer, positions=read.where or "f7+l7", stack=stack)
            for layer, stack, _ in _blocks(in_stacks)
        ]
    elif read.where == "all-linear":
        nodes = list(_on_linear_modules(base, LoRA(read.rank, alpha=2 * read.rank), in_stacks))
    elif read.where == "cs330":
        outputs = {_attention_output(base, layer, stack) for layer, stack, _ in _blocks(in_stacks)}
        every = _on_linear_modules(base, LoRA(read.rank), in_stacks)
        nodes = [node for node in every if node.site.component not in outputs]
    else:
        components = read.where.split("+") if read.where else ["query_output", "value_output"]
        nodes = list(_on_components(name, LoRA(read.rank, alpha=2 * read.rank), components, in_stacks))
    if not nodes:
        raise ValueError(f"preset {name!r}: the blocks of this {type(base).__name__} hold no linear module")
    return InterventionGraph(*nodes)


def lora_name(path: str) -> str:
    """Return the name of a LoRA node on the module at this path."""
    return "lora_" + path.replace(".", "_")


def _blocks(in_stacks: tuple[StackInfo, ...]) -> Iterator[tuple[int, Stack | None, str]]:
    """Yield layer, stack and path of every block; of a model that has one stack, sites do not name it."""
    for stack in in_stacks:
        for layer, path in enumerate(stack.blocks):
            yield layer, stack.role if len(in_stacks) > 1 else None, path


def _on_components(name: str, lora: LoRA, components: list[str], in_stacks: tuple[StackInfo, ...]) -> Iterator[Node]:
    for component in components:
        if component not in BLOCK_COMPONENTS:
            known = ", ".join(BLOCK_COMPONENTS)
            raise ValueError(f"preset {name!r}: {component!r} is no component of a block: use {known}")
    for layer, stack, _ in _blocks(in_stacks):
        for component in components:
            yield Node(lora, layer, component, stack=stack)


def _on_linear_modules(base: nn.Module, lora: LoRA, in_stacks: tuple[StackInfo, ...]) -> Iterator[Node]:
    """Yield a node for each linear module in the blocks, quantised ones and `Conv1D` as well."""
    for _, _, block in _blocks(in_stacks):
        for path, module in base.get_submodule(block).named_modules(prefix=block):
            if isinstance(getattr(module, "in_features", getattr(module, "nx", None)), int):
                yield Node(lora, component=path, name=lora_name(path))


def _attention_output(base: nn.Module, layer: int, stack: Stack | None) -> str | None:
    """Return the path of the attention's output projection; `None` for a block without attention."""
    with suppress(ValueError):
        return locate(base, Site(layer, "head_output", stack=stack)).module
    return None
