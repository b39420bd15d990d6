"""A graph: named nodes, checked, frozen, and written to and from JSON."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from reftheads._utils.deprecation import reordered
from reftheads._utils.showing import shown
from reftheads.graph.intervention import Head, Intervention, Reader
from reftheads.graph.node import Node
from reftheads.graph.positions import Positions


@dataclass(frozen=True, init=False)
class InterventionGraph:
    """Join nodes to one graph; nodes at the same site act in this order.

    Nodes without a name get one from their type and site.

    Attributes:
        nodes: all of them, named.

    Raises:
        ValueError: no nodes, a name twice, a source that is missing, does not read or has another number of
            outputs than is needed, a cycle of sources, nodes that share parameters of different definitions,
            two heads that read one target column as different kinds, such as classes and numbers.

    Example:
        ```python
        >>> import reftheads as rh
        >>> head = rh.Node(rh.LinearHead(outputs=2, target="mood"), layer=-1, positions="l1", name="mood")
        >>> graph = rh.InterventionGraph(rh.Node(rh.LoReFT(rank=4), layer=3), head)
        >>> graph.names
        ('loreft_3', 'mood')
        >>> rh.InterventionGraph.from_dict(graph.to_dict()) == graph
        True
        ```
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
        self._check_shared()

    @classmethod
    @reordered("cls", "layers", "intervention", "positions", intervention=Intervention)
    def over(
        cls,
        intervention: Intervention,
        layers: Iterable[int],
        positions: Any = "all",
        *,
        tied: bool = True,
        name: str | None = None,
        **where: Any,
    ) -> "InterventionGraph":
        """Make a graph of the same intervention at several layers, each with parameters of its own.

        Args:
            intervention: what is done at each of them.
            layers: indices of blocks; negative ones count from the end.
            tied: one node per layer for all its positions; `False` makes one for each part of a sum, so
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
        """Raise `ValueError` for a node whose source it cannot read."""
        by_name = {node.name: node for node in self.nodes}
        for node in self.nodes:
            if node.source is None:
                continue
            if node.source not in by_name:
                raise ValueError(
                    f"node {node.name!r} reads {node.source!r}, which is not in the graph: {', '.join(self.names)}"
                )
            _check_cycle(node, by_name)
            _check_source(node, by_name[node.source])

    def _check_targets(self) -> None:
        """Raise `ValueError` for heads that take the numbers of one target for different things."""
        heads: dict[str, Node] = {}  # the first of each target
        for node in self.nodes:
            head = node.intervention
            if not isinstance(head, Head) or head.target is None or head.kind is None:
                continue
            other = heads.setdefault(head.target, node)
            assert isinstance(other.intervention, Head)
            here, there = ((h.kind, h.target_width) for h in (head, other.intervention))
            one_meaning = {here, there} == {("classes", None), ("probabilities", None)}
            if here != there and not one_meaning:
                raise ValueError(
                    f"heads {other.name!r} and {node.name!r} take the target {head.target!r} for {there[0]} and for "
                    f"{here[0]}, {_each(there[1])} and {_each(here[1])}: give them losses of one kind, or a column each"
                )

    def _check_shared(self) -> None:
        """Raise `ValueError` for nodes that share parameters of different definitions."""
        definitions: dict[str, Intervention] = {}
        for node in self.nodes:
            definition = definitions.setdefault(node.key, node.intervention)
            if not _same(definition, node.intervention):
                raise ValueError(
                    f"nodes that share {node.key!r} need one definition, got {definition} and {node.intervention}"
                    + (" with other numbers" if definition == node.intervention else "")
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the nodes, in their order."""
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
        """Return JSON values, of which `from_dict` makes an equal graph. The numbers of constants are not included."""
        return {"nodes": [node.to_dict() for node in self.nodes]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "InterventionGraph":
        """Make a graph from what `to_dict` has written.

        Raises:
            ValueError: what it cannot have written, or a type of node that no imported module defines.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("nodes"), list):
            raise ValueError(f"cannot read a graph from {shown(data)}: it needs a list under 'nodes'")
        return cls(*(Node.from_dict(node) for node in data["nodes"]))

    def __str__(self) -> str:
        table = Table("node", "what", "where", "positions", box=None, pad_edge=False)
        for node in self.nodes:
            what = str(node.intervention)
            if node.share:
                what += f" share={node.share}"
            if node.source:
                what += f" source={node.source}"
            table.add_row(node.name, what, str(node.site), str(node.positions))
        return render(table)


def render(table: Table) -> str:
    """Return a table as plain text, one line per row."""
    console = Console(width=1000, color_system=None, force_terminal=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))


def replace_name(node: Node, name: str) -> Node:
    """Return the same node under another name."""
    site = node.site
    return Node(
        node.intervention, site.layer, site.component, node.positions,
        head=site.head, stack=site.stack, side=site.side, name=name, share=node.share, source=node.source,
    )  # fmt: skip


def _check_cycle(node: Node, by_name: Mapping[str | None, Node]) -> None:
    """Raise `ValueError` if a node reads itself through its source and the sources of that."""
    trail = [node.name]
    at = node
    while at.source in by_name and len(trail) <= len(by_name):  # longer, and the cycle is one of other nodes
        at = by_name[at.source]
        trail.append(at.name)
        if at.name == node.name:
            raise ValueError(f"the sources form a cycle: {' ← '.join(map(str, trail))}")


def _check_source(node: Node, source: Node) -> None:
    """Raise `ValueError` if a node cannot read what its source gives."""
    if not isinstance(source.intervention, Reader):
        raise ValueError(f"node {node.name!r} reads {source.name!r}, which has no output: name a head instead")
    wanted, outputs = node.intervention.source_outputs, source.intervention.outputs
    if None not in (wanted, outputs) and wanted != outputs:
        raise ValueError(
            f"node {node.name!r} reads {source.name!r}, which has outputs={outputs}: "
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


def _each(width: int | None) -> str:
    """Return how errors call the number of targets of a prediction."""
    return f"{width or 'one'} a prediction"


def _same(a: Intervention, b: Intervention) -> bool:
    """Return whether two definitions are equal, the numbers of their constants included."""
    pairs = zip(a.constants(), b.constants(), strict=True) if a == b else ()
    return a == b and all(x.value.data_ptr() == y.value.data_ptr() or torch.equal(x.value, y.value) for x, y in pairs)


def _named(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Return the nodes, those without a name under one that no other has.

    Raises:
        ValueError: a name twice.
    """
    taken: set[str] = set()
    for node in nodes:
        if node.name is None:
            continue
        if node.name in taken:
            raise ValueError(
                f"the graph has the name {node.name!r} twice: every node needs its own, by name=… of Node or of "
                "InterventionGraph.over"
            )
        taken.add(node.name)
    named = []
    for node in nodes:
        if node.name is None:
            name, count = node.default_name(), 2
            while name in taken:
                name, count = f"{node.default_name()}_{count}", count + 1
            taken.add(name)
            node = replace_name(node, name)
        named.append(node)
    return tuple(named)
