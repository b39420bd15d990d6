"""Where tensor parallelism gives a process only a part of the hidden states."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from reftheads.architectures.paths import ancestors_of, within
from reftheads.graph.site import Side

Parts = Mapping[str, frozenset[Side]]
"""Of each linear module whose weight is spread over processes, the sides on which it sees a part of the features."""


def parts_of(model: nn.Module) -> Parts:
    """Return the linear modules of a model that tensor parallelism has spread over processes."""
    modules = list(model.named_modules())
    fully = [path for path, module in modules if isinstance(module, FSDPModule)]
    parts: dict[str, frozenset[Side]] = {}
    for path, module in modules:
        if not hasattr(module, "in_features"):
            continue
        sides = _sides(module, any(within(path, ancestor) for ancestor in fully))
        if sides:
            parts[path] = sides
    return parts


def _sides(module: nn.Module, fully: bool) -> frozenset[Side]:
    if getattr(module, "_hf_quantized_needs_local_tp", False):  # whose packed weight does not say how it was cut
        return frozenset(("input", "output"))
    weight = getattr(module, "weight", None)
    if not isinstance(weight, DTensor):
        return frozenset()
    # FSDP puts its own dimension first, and gathers weights before they are used
    cut = [placement for placement in weight.placements[1 if fully else 0 :] if not placement.is_replicate()]
    return frozenset("output" if getattr(placement, "dim", 0) == 0 else "input" for placement in cut)


def holds_a_part(parts: Parts, path: str, side: Side) -> bool:
    """Return whether the tensor on one side of a module is this process's part of it, or may be.

    A linear module that is cut along its outputs gives a part, and one that is cut along its inputs makes a whole of
    parts. What has both in it, such as an MLP, gives and takes wholes. What lies between such modules may be either.
    """
    if path in parts:
        return side in parts[path]
    inside = _within(parts, path)
    if inside:
        return side in inside and not _closed(inside)
    around = next((ancestor for ancestor in ancestors_of(path) if _within(parts, ancestor)), None)
    if around is None:
        return False
    depth = len(around.split(".")) if around else 0
    children = {".".join(name.split(".")[: depth + 1]) for name in parts if within(name, around)}
    return not all(_closed(_within(parts, one)) for one in children)


def _within(parts: Parts, path: str) -> frozenset[Side]:
    return frozenset(side for name, sides in parts.items() if within(name, path) for side in sides)


def _closed(sides: frozenset[Side]) -> bool:
    return len(sides) == 2
