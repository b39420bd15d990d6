"""Nodes: each says what is done, where, and on which tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from reftheads._utils.showing import shown
from reftheads.graph.intervention import Intervention
from reftheads.graph.positions import Positions
from reftheads.graph.serialisation import check_depth, intervention_from_dict, intervention_to_dict
from reftheads.graph.site import Side, Site, Stack


@dataclass(frozen=True, init=False)
class Node:
    """Put *what* at *where* on *which tokens*: one node of an intervention graph.

    Args:
        intervention: what is done, such as `LoReFT(rank=4)`.
        layer, component, head, stack, side: where; see `Site`.
        positions: on which tokens; see `Positions`.
        name: how `model.node(name)` and outputs call it; if left out, it is built from the type and the site, as
            `loreft_8`.
        share: nodes with the same `share` use one set of parameters.
        source: name of a reading node whose output this node gets in the same pass.

    Raises:
        ValueError: a site or positions that cannot be read, a name that cannot be used; a source that is
            missing, or that the intervention would not look at.

    Example:
        ```python
        >>> import reftheads as rh
        >>> node = rh.Node(rh.LoReFT(rank=4), layer=8, positions="f7+l7")
        >>> node.default_name(), str(node.site), node.positions.bound
        ('loreft_8', 'block_output[8]', 14)
        ```
    """

    intervention: Intervention
    site: Site
    positions: Positions
    name: str | None = None
    share: str | None = None
    source: str | None = None

    def __init__(
        self,
        intervention: Intervention,
        layer: int | None = None,
        component: str = "block_output",
        positions: Any = "all",
        *,
        head: int | None = None,
        stack: Stack | None = None,
        side: Side = "output",
        name: str | None = None,
        share: str | None = None,
        source: str | None = None,
    ):
        if not isinstance(intervention, Intervention):
            raise ValueError(
                f"a node needs an intervention such as LoReFT(rank=4), got {intervention!r}"
                + (": add parentheses to make one" if isinstance(intervention, type) else "")
            )
        for label, key in (("name", name), ("share", share)):
            if key is not None:
                check_key(key, label)
        if source is not None:
            check_key(source, "source")
        if intervention.needs_source and source is None:
            raise ValueError(f"{type(intervention).__name__} reads another node: name it with source=…")
        if source is not None and not (intervention.reads_source or intervention.needs_source):
            raise ValueError(
                f"{type(intervention).__name__} reads no other node, got source={source!r}: leave it out, wrap an edit "
                "in Gated, or set reads_source = True in a type of your own"
            )
        for attribute, value in (
            ("intervention", intervention),
            ("site", Site(layer, component, head, stack, side)),
            ("positions", Positions.parse(positions)),
            ("name", name),
            ("share", share),
            ("source", source),
        ):
            object.__setattr__(self, attribute, value)

    @property
    def key(self) -> str:
        """Return the name under which the parameters are kept."""
        assert self.name is not None
        return self.share or self.name

    def default_name(self) -> str:
        """Return a name made from type and site, such as `loreft_3`."""
        site = self.site
        words = [type(self.intervention).__name__.lower()]
        if site.stack is not None:
            words.append(site.stack)
        if site.layer is not None:
            words.append(str(site.layer))
        if site.component != "block_output":
            words.append(site.component.replace(".", "_"))
        if site.head is not None:
            words.append(f"head{site.head}")
        return "_".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values that `from_dict` reads back; defaults are left out."""
        values = {"name": self.name, **intervention_to_dict(self.intervention)}
        for f in fields(Site):
            value = getattr(self.site, f.name)
            if value != f.default:
                values[f.name] = value
        values["positions"] = self.positions.to_json()
        if self.share is not None:
            values["share"] = self.share
        if self.source is not None:
            values["source"] = self.source
        return values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Node:
        """Make a node from what `to_dict` has written.

        Raises:
            ValueError: what it cannot have written, or a type that no imported module defines.
        """
        check_depth(data, "a node")
        if not isinstance(data, Mapping) or "type" not in data:
            raise ValueError(
                f"cannot read the node {shown(data)}: it needs a 'type', and a 'layer' or what else it takes"
            )
        where = {name: value for name, value in data.items() if name not in ("type", "options")}
        unknown = [name for name in where if name not in _FIELDS]
        if unknown:
            raise ValueError(
                f"cannot read the node {shown(data)}: it has no {shown(unknown[0])}, but {', '.join(_FIELDS)}"
            )
        try:
            return cls(intervention_from_dict(data["type"], data.get("options", {})), **where)
        except ValueError as error:
            raise ValueError(f"cannot read the node {shown(data)}: {error}") from error
        except (
            TypeError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RuntimeError,
        ) as error:  # of a type of one's own
            raise ValueError(f"cannot read the node {shown(data)}: {error!r}") from error


_FIELDS = ("type", "options", *(f.name for f in fields(Site)), "positions", "name", "share", "source")
_RESERVED = frozenset(dir(nn.ModuleDict()))


def check_key(key: str, label: str) -> None:
    """Raise `ValueError` for what cannot name a child module or a column of a checkpoint."""
    if not isinstance(key, str) or not key or "." in key or "rh_" in key or key in _RESERVED:
        raise ValueError(
            f"{label} {shown(key)} cannot be used: take a word that has no dot and no 'rh_' in it "
            "and is no attribute of a torch module"
        )
    if not key.isprintable() or len(key.encode()) > 255:
        raise ValueError(f"{label} {shown(key)} cannot be used: take printable letters, at most 255 bytes of them")
