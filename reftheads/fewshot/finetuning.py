"""Fine-tuning modes: which weights of a model are trained, by a short name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress

from torch import nn

from reftheads.adapter.model import InterventionModel
from reftheads.architectures.addresses import locate
from reftheads.architectures.paths import within
from reftheads.architectures.structure import StackInfo, own_modules, stacks
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.intervention import Head
from reftheads.graph.node import Node
from reftheads.graph.site import Site
from reftheads.interventions.lora import LoRA
from reftheads.interventions.reft import LoReFT
from reftheads.presets import linear_modules, lora_name, preset, side_of
from reftheads.runtime.node_module import NodeModule

MODES = ("all", "first", "middle", "last", "last:3", "lora4", "loreft4", "bitfit", "head", "probe")
_MODE = re.compile(
    r"(?P<plain>all|bitfit|head|probe)|(?P<where>first|middle|last)(:(?P<count>[1-9]\d*))?"
    r"|(?P<kind>lora|loreft)(?P<rank>[1-9]\d*)(:(?P<positions>.+))?"
)


def parameters_to_fine_tune(model: nn.Module, mode: str) -> list[nn.Parameter]:
    """The parameters that a mode trains, each once. Nothing is frozen or unfrozen.

    | mode | parameters |
    |---|---|
    | `all` | all of the base model |
    | `first`, `last` | two blocks of each stack; `first:3`: three |
    | `middle` | blocks L/2 - 1 and L/2 of L; `middle:4`: four around the same place |
    | `lora4`, `loreft4` | the LoRA or LoReFT nodes of rank 4 in the model's graph |
    | `bitfit` | the biases (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199) |
    | `head` | the base model's own output layer, such as a classifier |
    | `probe` | none of the base model |

    Heads in the graph of an `InterventionModel` are trained in every mode.

    Raises:
        ValueError: a mode that is not known, more blocks than there are, a mode that selects nothing or quantised
            weights.
    """
    read = _read(mode)
    base = model.get_base_model() if isinstance(model, InterventionModel) else model
    nodes = list(_nodes(model)) if isinstance(model, InterventionModel) else []
    chosen = [p for node in nodes if isinstance(node.intervention, Head) for p in node.parameters()]
    if mode == "probe":
        found = chosen
    elif read["kind"]:
        found = [p for node in nodes if _rank(node, read["kind"]) == int(read["rank"]) for p in node.parameters()]
    else:
        found = list(_of_base(base, read))
    if not found:
        raise ValueError(f"mode {mode!r} selects nothing in this {type(base).__name__}{_why(mode, read)}")
    if not all(p.is_floating_point() for p in found):
        raise ValueError(
            f"mode {mode!r} selects quantised weights, which cannot be trained: load the base model without bits, or "
            "take loraN, loreftN, bitfit or probe"
        )
    return list(dict.fromkeys([*found, *chosen]))


def fine_tuning_model(base: nn.Module, mode: str, *heads: Node) -> nn.Module:
    """The base model with the nodes that a mode needs and with these heads; what the mode does not train is frozen.

    `lora4` puts LoRA of rank 4 on the linear modules of every block but the attention's output projection: in GPT-2
    `c_attn`, `c_fc` and the MLP's `c_proj`, as Stanford's CS330 has it. `loreft4` edits the output of every block at
    `f1+l1`, `loreft4:all` all tokens.

    An adapter's checkpoint holds the nodes alone: a base model that is trained has a `save_pretrained` of its own.

    Returns:
        An `InterventionModel`; the base model itself where there are no nodes at all.

    Raises:
        ValueError: as by `parameters_to_fine_tune`, and what compiling finds.
    """
    read, nodes = _read(mode), list(heads)
    if read["kind"] == "lora":
        nodes = [*_lora(base, int(read["rank"])), *nodes]
    elif read["kind"] == "loreft":
        nodes = [*preset(f"loreft{read['rank']}:{read['positions'] or 'f1+l1'}", base), *nodes]
    model = InterventionModel(base, InterventionGraph(*nodes)) if nodes else base
    trained = set(parameters_to_fine_tune(model, mode))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad = parameter in trained
    return model


def _read(mode: str) -> re.Match[str]:
    read = _MODE.fullmatch(mode) if isinstance(mode, str) else None
    if read is None or (read["kind"] == "lora" and read["positions"]):
        raise ValueError(f"unknown mode {mode!r}: use {', '.join(MODES)}, with other numbers if you like")
    return read


def _nodes(model: InterventionModel) -> Iterator[NodeModule]:
    for adapter in model.tuner.active_adapters:
        yield from model.tuner.layer.rh_nodes[adapter].values()  # type: ignore[operator,misc]


def _rank(node: NodeModule, kind: str) -> int | None:
    what = node.intervention
    return what.rank if isinstance(what, LoRA if kind == "lora" else LoReFT) else None


def _of_base(base: nn.Module, read: re.Match[str]) -> Iterator[nn.Parameter]:
    own = dict(own_modules(base))
    if read["where"]:
        blocks = [path for stack in stacks(base) for path in _blocks(stack, read["where"], int(read["count"] or 2))]
        own = {path: module for path, module in own.items() if any(within(path, block) for block in blocks)}
    body = set(getattr(base, "base_model", base).parameters()) if read["plain"] == "head" else set()
    for module in own.values():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in body and (read["plain"] != "bitfit" or name.endswith("bias")):
                yield parameter


def _blocks(stack: StackInfo, where: str, count: int) -> tuple[str, ...]:
    total = len(stack.blocks)
    if count > total:
        raise ValueError(f"mode '{where}:{count}' asks for more blocks than there are, {total}")
    start = {"first": 0, "middle": min(max(total // 2 - count // 2, 0), total - count), "last": total - count}[where]
    return stack.blocks[start : start + count]


def _lora(base: nn.Module, rank: int) -> Iterator[Node]:
    found = stacks(base)
    for stack in found:
        for layer, block in enumerate(stack.blocks):
            out = None
            with suppress(ValueError):  # there are blocks without attention
                out = locate(base, Site(layer, "head_output", stack=side_of(stack, found))).module
            for path in linear_modules(base, block):
                if path != out:
                    yield Node(LoRA(rank), component=path, name=lora_name(path))


def _why(mode: str, read: re.Match[str]) -> str:
    if read["kind"]:
        return f": it has no such nodes. Build the model by fine_tuning_model(base, {mode!r})"
    if mode == "head":
        return ": it has no output layer of its own, or one that is tied to its embeddings"
    if mode == "probe":
        return ": it has no heads. Pass nodes such as rh.Node(rh.LinearHead(2, target='label'), layer=-1)"
    return ""
