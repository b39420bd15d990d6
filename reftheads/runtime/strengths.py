"""How strongly nodes act in a call: from the names that users write to the nodes that are meant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from reftheads._utils.showing import shown
from reftheads.runtime.passes import NodeKey
from reftheads.runtime.roster import HoldsNodes


def read_strengths(layer: HoldsNodes, written: Mapping[str, Any]) -> dict[NodeKey, float]:
    """Return strengths by adapter and node.

    Args:
        layer: the interventions of the model.
        written: by the name of a node, which is then meant in every adapter; or by `adapter/node`.

    Raises:
        ValueError: a name that no node has, a node that reads, or what is no finite number.
    """
    strengths: dict[NodeKey, float] = {}
    for name, value in written.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"the strength of node {name!r} must be a finite number, got {shown(value)}")
        meant = [
            (adapter, planned)
            for adapter, plan in layer.plans.items()
            for planned in plan.nodes
            if name in (planned.node.name, f"{adapter}/{planned.node.name}")
        ]
        if not meant:
            known = [
                f"{adapter}/{planned.node.name}" for adapter, plan in layer.plans.items() for planned in plan.nodes
            ]
            raise ValueError(f"no node {shown(name)}: there are {', '.join(known)}")
        if not all(planned.edits for _, planned in meant):
            raise ValueError(f"node {name!r} reads and edits nothing, so that it has no strength: leave it out")
        strengths |= {(adapter, str(planned.node.name)): float(value) for adapter, planned in meant}
    return strengths
