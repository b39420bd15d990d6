"""Fine-tuning modes: which weights of a model are trained, by a short name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from reftheads.adapter.model import InterventionModel
from reftheads.architectures.paths import own_modules, within
from reftheads.architectures.structure import StackInfo, stacks
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.intervention import Head
from reftheads.graph.node import Node
from reftheads.interventions.lora import LoRA
from reftheads.interventions.reft import LoReFT
from reftheads.presets import PresetName, preset
from reftheads.runtime.node_module import NodeModule

MODES = ("all", "first", "middle", "last", "last:3", "lora4", "loreft4", "bitfit", "head", "probe")
"""Name a mode of each kind; numbers and components of others are as good, see `parameters_to_fine_tune`.

Example:
    ```python
    >>> import reftheads.fewshot as fs
    >>> "bitfit" in fs.MODES
    True
    ```
"""
_OF_BASE = re.compile(r"all|bitfit|head|probe|(first|middle|last)(:[1-9]\d*)?")


class _Mode(NamedTuple):
    """What a mode says: `what` is the name without numbers, `number` that of blocks, or a rank."""

    what: str
    number: int

    @property
    def adds_nodes(self) -> bool:
        return self.what in ("lora", "loreft")


def parameters_to_fine_tune(model: nn.Module, mode: str) -> list[nn.Parameter]:
    """Return the parameters that a mode trains, each once. Nothing is frozen or unfrozen.

    | mode | parameters |
    |---|---|
    | `all` | all of the base model |
    | `first`, `last` | two blocks of each stack; `first:3`: three |
    | `middle` | blocks L/2 - 1 and L/2 of L; `middle:4`: four around the same place |
    | `lora4`, `loreft4`, or another name that `reftheads.preset` takes | the LoRA or LoReFT nodes of this rank |
    | `bitfit` | the biases (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199) |
    | `head` | the base model's own output layer, such as a classifier |
    | `probe` | none of the base model |

    Heads in the graph of an `InterventionModel` are trained in every mode.

    Raises:
        ValueError: an unknown mode, more blocks than there are, a mode that selects nothing or quantised weights.

    Example:
        ```python
        >>> import reftheads as rh
        >>> import reftheads.fewshot as fs
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> [sum(p.numel() for p in fs.parameters_to_fine_tune(base, mode)) for mode in ("all", "last", "last:3")]
        [2705856, 738048, 1107072]
        ```
    """
    read = _read(mode)
    base = model.get_base_model() if isinstance(model, InterventionModel) else model
    nodes = list(_nodes(model)) if isinstance(model, InterventionModel) else []
    of_heads = [p for node in nodes if isinstance(node.intervention, Head) for p in node.parameters()]
    if mode == "probe":
        chosen = of_heads
    elif read.adds_nodes:
        chosen = [p for node in nodes if _is_of(node, read) for p in node.parameters()]
    else:
        chosen = list(_of_base(base, read))
    if not chosen:
        raise ValueError(f"mode {mode!r} selects nothing in this {type(base).__name__}{_why(mode, read)}")
    if not all(p.is_floating_point() for p in chosen):
        raise ValueError(
            f"mode {mode!r} selects quantised weights, which cannot be trained: load the base model without bits, or "
            "take loraN, loreftN, bitfit or probe"
        )
    return list(dict.fromkeys([*chosen, *of_heads]))


def fine_tuning_model(base: nn.Module, mode: str, *heads: Node) -> nn.Module:
    """Add the nodes that a mode needs and these heads to the base model, and freeze what the mode does not train.

    `lora4` and `loreft4`, with whatever follows a colon, are the graphs of `reftheads.preset`. `lora4:cs330` is the
    LoRA of problem set 4 of Stanford's CS330.

    An adapter's checkpoint holds the nodes alone: a base model that is trained has a `save_pretrained` of its own.

    Returns:
        An `InterventionModel`; the base model itself where there are no nodes at all.

    Raises:
        ValueError: as by `parameters_to_fine_tune`, and what compiling finds.

    Example:
        ```python
        >>> import reftheads as rh
        >>> import reftheads.fewshot as fs
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> head = rh.Node(rh.LinearHead(3, target="label"), layer=-1, positions="l1", name="head")
        >>> model = fs.fine_tuning_model(base, "loreft4:l1", head)
        >>> model.print_trainable_parameters()
        trainable params: 9,819 || all params: 2,715,675 || trainable%: 0.3616
        ```
    """
    read, nodes = _read(mode), list(heads)
    if read.adds_nodes:
        nodes = [*preset(mode, base), *nodes]
    model = InterventionModel(base, InterventionGraph(*nodes)) if nodes else base
    trained = set(parameters_to_fine_tune(model, mode))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad = parameter in trained
    return model


def _read(mode: str) -> _Mode:
    if _OF_BASE.fullmatch(str(mode)):
        what, _, count = mode.partition(":")
        return _Mode(what, int(count or 2))
    try:
        name = PresetName.read(mode)
    except (TypeError, ValueError):
        raise ValueError(
            f"unknown mode {mode!r}: use {', '.join(MODES)}, with other numbers if you like, or another name of a "
            "preset, such as lora4:all-linear"
        ) from None
    return _Mode(name.kind, name.rank)


def _nodes(model: InterventionModel) -> Iterator[NodeModule]:
    for adapter in model.tuner.active_adapters:
        yield from model.tuner.layer.rh_nodes[adapter].values()  # type: ignore[operator,misc]


def _is_of(node: NodeModule, read: _Mode) -> bool:
    """Say whether a node is of the kind and rank that a mode adds."""
    what = node.intervention
    return isinstance(what, LoRA if read.what == "lora" else LoReFT) and what.rank == read.number


def _of_base(base: nn.Module, read: _Mode) -> Iterator[nn.Parameter]:
    modules = dict(own_modules(base))
    if read.what in ("first", "middle", "last"):
        blocks = [path for stack in stacks(base) for path in _blocks(stack, read)]
        modules = {path: module for path, module in modules.items() if any(within(path, block) for block in blocks)}
    body = set(getattr(base, "base_model", base).parameters()) if read.what == "head" else set()
    for module in modules.values():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter in body:
                continue
            if read.what != "bitfit" or name.endswith("bias"):
                yield parameter


def _blocks(stack: StackInfo, read: _Mode) -> tuple[str, ...]:
    where, count = read
    total = len(stack.blocks)
    if count > total:
        raise ValueError(f"mode '{where}:{count}' asks for more blocks than there are, {total}")
    start = {"first": 0, "middle": min(max(total // 2 - count // 2, 0), total - count), "last": total - count}[where]
    return stack.blocks[start : start + count]


def _why(mode: str, read: _Mode) -> str:
    if read.adds_nodes:
        return f": it has no such nodes. Build the model by fine_tuning_model(base, {mode!r})"
    if mode == "head":
        return ": it has no output layer of its own, or one that is tied to its embeddings"
    if mode == "probe":
        return ": it has no heads. Pass nodes such as rh.Node(rh.LinearHead(2, target='label'), layer=-1)"
    return ""
