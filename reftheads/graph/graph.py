"""A graph: named nodes, checked, frozen, and written to and from JSON."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from reftheads.graph.intervention import Head, Intervention, Reader
from reftheads.graph.node import Node
from reftheads.graph.positions import Positions


@dataclass(frozen=True, init=False)
class InterventionGraph:
    """Nodes in the order in which they act where they meet at one site.

    Nodes without a name get one from their type and site.

    Raises:
        ValueError: no nodes, a name twice, a source that is missing, does not read or has another number of
            outputs than is needed, a cycle of sources, nodes that share parameters of different definitions,
            heads that take the numbers of one target for different things.
    """

    nodes: tuple[Node, ...]

    def __init__(self, *nodes: Node):
        if not nodes:
            raise ValueError("an intervention graph needs at least one node, got none")
        for node in nodes:
            if not isinstance(node, Node):
                raise ValueError(f"an intervention graph is made of Nodes, got {node!r}")
        object.__setattr__(self, "nodes", _named(nodes))
        self._check_sources()
        self._check_targets()
        shared: dict[str, Intervention] = {}
        for node in self.nodes:
            if not _same(first := shared.setdefault(node.key, node.intervention), node.intervention):
                raise ValueError(
                    f"nodes that share {node.key!r} need one definition, got {first} and {node.intervention}"
                    + (" with other numbers" if first == node.intervention else "")
                )

    @classmethod
    def over(
        cls,
        layers: Iterable[int],
        intervention: Intervention,
        positions: Any = "all",
        *,
        tied: bool = True,
        name: str | None = None,
        **where: Any,
    ) -> "InterventionGraph":
        """The same intervention at several layers, each layer with parameters of its own.

        Args:
            layers: indices of blocks; negative ones count from the end.
            tied: one node a layer for all its positions; `False` makes one for each part of a sum, so
                that `f7+l7` edits prefix and suffix by different weights.
            name: begins the names: `name_3`, and `name_3_f7` if not tied.
            where: further arguments of `Node`, such as `component` or `share`.
        """
        rule = Positions.parse(positions)
        parts = (rule,) if tied else rule.parts
        nodes = []
        for layer in layers:
            for part in parts:
                node = Node(intervention, layer, positions=part, **where)
                label = f"{name}_{layer}" if name else node.default_name()
                if len(parts) > 1:
                    label += f"_{part.text.split(' ')[0]}"
                nodes.append(replace_name(node, label))
        return cls(*nodes)

    def _check_sources(self) -> None:
        by_name = {node.name: node for node in self.nodes}
        for node in self.nodes:
            if node.source is None:
                continue
            if node.source not in by_name:
                raise ValueError(
                    f"node {node.name!r} reads {node.source!r}, which is not in the graph: {', '.join(self.names)}"
                )
            trail, at = [node.name], node
            while at.source is not None:
                at = by_name[at.source]
                trail.append(at.name)
                if at.name == node.name:
                    raise ValueError(f"the sources form a cycle: {' ← '.join(map(str, trail))}")
                if len(trail) > len(self.nodes):
                    break
            source = by_name[node.source]
            if not isinstance(source.intervention, Reader):
                raise ValueError(f"node {node.name!r} reads {source.name!r}, which has no output: name a head instead")
            wanted, given = node.intervention.source_outputs, source.intervention.outputs
            if None not in (wanted, given) and wanted != given:
                raise ValueError(
                    f"node {node.name!r} reads {source.name!r}, which has outputs={given}: "
                    f"name a source with outputs={wanted}"
                )
            if source.intervention.pools:
                raise ValueError(
                    f"node {node.name!r} reads {source.name!r}, which pools all its tokens, later ones included: "
                    "name a head with pool=None"
                )
            if source.positions != node.positions and source.positions.bound != 1:
                raise ValueError(
                    f"node {node.name!r} at positions {node.positions} reads {source.name!r} at {source.positions}: "
                    "a source selects one token a row, or the same tokens as its reader"
                )

    def _check_targets(self) -> None:
        first: dict[str, Node] = {}
        for node in self.nodes:
            head = node.intervention
            if not isinstance(head, Head) or head.target is None or head.kind is None:
                continue
            other = first.setdefault(head.target, node)
            assert isinstance(other.intervention, Head)
            here, there = ((h.kind, h.target_width) for h in (head, other.intervention))
            one_meaning = {here, there} == {("classes", None), ("probabilities", None)}
            if here != there and not one_meaning:
                raise ValueError(
                    f"heads {other.name!r} and {node.name!r} take the target {head.target!r} for {there[0]} and for "
                    f"{here[0]}, {_each(there[1])} and {_each(here[1])}: give them losses of one kind, or a column each"
                )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes if node.name is not None)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(f"no node {name!r} in this graph: it has {', '.join(self.names)}")

    def __add__(self, other: "InterventionGraph") -> "InterventionGraph":
        return InterventionGraph(*self.nodes, *other.nodes)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` gives an equal graph. The numbers of constants are not included."""
        return {"nodes": [node.to_dict() for node in self.nodes]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "InterventionGraph":
        """Raises `ValueError` for what `to_dict` cannot have written, or a type of node not imported."""
        if not isinstance(data, Mapping) or not isinstance(data.get("nodes"), list):
            raise ValueError(f"cannot read a graph from {data!r}: it needs a list under 'nodes'")
        return cls(*(Node.from_dict(node) for node in data["nodes"]))

    def __str__(self) -> str:
        table = Table("node", "what", "where", "positions", box=None, pad_edge=False)
        for node in self.nodes:
            extra = "".join(
                f" {word}={value}" for word, value in (("share", node.share), ("source", node.source)) if value
            )
            table.add_row(node.name, f"{node.intervention}{extra}", str(node.site), str(node.positions))
        return render(table)


def render(table: Table) -> str:
    """A table as plain text, one line a row."""
    console = Console(width=1000, color_system=None, force_terminal=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))


def replace_name(node: Node, name: str) -> Node:
    """The same node under another name."""
    site = node.site
    return Node(
        node.intervention, site.layer, site.component, node.positions,
        head=site.head, stack=site.stack, side=site.side, name=name, share=node.share, source=node.source,
    )  # fmt: skip


def _each(width: int | None) -> str:
    return f"{width or 'one'} a prediction"


def _same(a: Intervention, b: Intervention) -> bool:
    """Whether two definitions are equal, the numbers of their constants included."""
    return a == b and all(torch.equal(x.value, y.value) for x, y in zip(a.constants(), b.constants(), strict=True))


def _named(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    given = [node.name for node in nodes if node.name is not None]
    for name in given:
        if given.count(name) > 1:
            raise ValueError(
                f"the graph has the name {name!r} twice: every node needs its own, by name=… of Node or of "
                "InterventionGraph.over"
            )
    taken, named = set(given), []
    for node in nodes:
        if node.name is None:
            base, count = node.default_name(), 2
            name = base
            while name in taken:
                name, count = f"{base}_{count}", count + 1
            taken.add(name)
            node = replace_name(node, name)
        named.append(node)
    return tuple(named)
