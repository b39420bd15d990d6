"""What a node is: an intervention at a site on some tokens; and the abstract kinds of intervention.

An intervention is a frozen dataclass: its fields are its hyperparameters, and its methods are pure
functions of the parameters and the hidden states. An `Edit` writes, a `Head` and a `Reader`
reads. The parameters themselves live in a `NodeModule`, made when a graph is compiled.

A type of one's own is one small class; docs/nodes.md shows one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftheads.graph.positions import Positions
from reftheads.graph.site import Side, Site, Stack

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped

Params = Mapping[str, Tensor]

IGNORE = -100
"""What stands for no target, as in all of torch and transformers."""


@dataclass(frozen=True)
class Shape:
    """What an intervention knows of its place when its parameters are made.

    Attributes:
        width: features that it sees.
        input_width: features that enter the linear module whose output it edits, if it `needs_linear`.
    """

    width: int
    input_width: int | None = None

    def __str__(self) -> str:
        return f"{self.width}" if self.input_width is None else f"{self.input_width} → {self.width}"


@dataclass(frozen=True)
class Context:
    """What an edit may look at besides the hidden states.

    Attributes:
        x: what entered the module, at the same tokens.
        source: the output of the node named as source, in the same slots or in one slot for all of them.
        training: whether dropout is active.
        valid: which slots hold a token, for what reads; the others hold anything. `None`: all of them.
    """

    x: Float[Tensor, "batch slots input_width"] | None = None
    source: Float[Tensor, " batch #slots outputs"] | None = None
    training: bool = False
    valid: Bool[Tensor, "batch slots"] | None = None


class Intervention(ABC):
    """What is done at a site. Subclasses are frozen dataclasses of JSON values and `Constant`s."""

    needs_linear: bool = False  # acts only on the output of a linear module, whose input it reads
    reads_source: bool = False  # looks at another node's output, `context.source`, where there is one
    needs_source: bool = False  # cannot do without it
    source_outputs: int | None = None  # how many outputs that node must have; `None`: any number
    letters: Mapping[str, str] = {}  # the paper's letter -> the stored parameter that stands for it
    lr: float | None = None  # the learning rate of its parameters; `None`: the trainer's

    @abstractmethod
    def parameters(self, shape: Shape) -> dict[str, Tensor]:
        """New parameters: an `nn.Parameter` is trained, a plain tensor is saved but not trained."""

    def __str__(self) -> str:
        given = [f for f in fields(self) if f.default is MISSING or getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={_shown(getattr(self, f.name))}' for f in given)})"

    def constants(self) -> list[Constant]:
        """What the user gave, here and in interventions within this one."""
        values = [getattr(self, f.name) for f in fields(self)]  # type: ignore[arg-type]
        inner = [c for value in values if isinstance(value, Intervention) for c in value.constants()]
        return [value for value in values if isinstance(value, Constant)] + inner

    @property
    def derives_from(self) -> tuple[str, ...]:
        """The stored parameters that `derive` needs; none, if there is nothing to derive."""
        return ()

    def derive(self, p: Params) -> Params:
        """Further tensors for `edit` and `read`, computed from stored ones once a forward pass.

        The parameters may carry leading batch dimensions: nodes of one kind are derived together.
        """
        return {}


class Edit(Intervention):
    """An intervention that writes."""

    @abstractmethod
    def edit(
        self, p: Params, h: Float[Tensor, "batch slots width"], context: Context
    ) -> Float[Tensor, "batch slots width"]:
        """The new hidden states at the selected tokens."""


class Reader(Intervention):
    """An intervention that reads and leaves the hidden states as they are."""

    detach: bool = True
    outputs: int | None = None  # how many; `None`: that shows when it reads
    pools: bool = False  # gives one slot a row, made of all that are valid

    @abstractmethod
    def read(
        self, p: Params, h: Float[Tensor, "batch slots width"], context: Context
    ) -> Float[Tensor, " batch #slots outputs"]:
        """What the hidden states at the selected tokens give."""

    def shown(self, value: Float[Tensor, "*items outputs"]) -> Float[Tensor, "*items outputs"]:
        """What was read as users see it."""
        return value


class Head(Reader):
    """A reader with a loss: its output is a prediction of a target column of the batch."""

    target: str | None
    weight: float | str = 1.0  # of its loss in the total
    kind: str | None = None  # what its targets are, see `Loss`; heads with one target need one kind
    target_width: int | None = None  # how many numbers a target is; `None`: one, without a dimension of its own
    shift: bool = False  # whether a token's target is that of the next column

    @abstractmethod
    def loss_of(
        self,
        prediction: Float[Tensor, "batch slots outputs"],
        target: Shaped[Tensor, "batch slots *target_width"],
        valid: Bool[Tensor, "batch slots"],
    ) -> Float[Tensor, ""]:
        """The mean loss over slots that are valid and have a target."""

    def weighted(self, loss: Float[Tensor, ""], count: Int[Tensor, ""], p: Params) -> Float[Tensor, ""]:
        """What its loss, a mean over so many targets, adds to the total."""
        assert not isinstance(self.weight, str)
        return self.weight * loss

    def check(
        self,
        target: Shaped[Tensor, "*batch slots *target_width"],
        where: str = "row {row}",
        valid: Bool[Tensor, "*batch slots"] | None = None,
    ) -> None:
        """Raises `ValueError` for a target in a valid slot that cannot be, and says `where`, with its row put in."""

    def given(self, target: Shaped[Tensor, "*items"]) -> Bool[Tensor, "*items"]:
        """Which of these targets are there."""
        return torch.ones_like(target, dtype=torch.bool)


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Intervention) else repr(value)


def read_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a floating-point type of torch, given itself or its name.

    Raises:
        ValueError: anything else.
    """
    read = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(read, torch.dtype) or not read.is_floating_point:
        raise ValueError(
            "dtype must be the name of a torch float type such as 'float32' or 'bfloat16', or the type itself, "
            f"got {dtype!r}"
        )
    return read


def keep_name_of_dtype(intervention: Any) -> None:
    """Put the name of its type in the place of an intervention's `dtype`, so that JSON can hold it.

    Raises:
        ValueError: a `dtype` that is no floating-point type of torch.
    """
    name = str(read_dtype(intervention.dtype)).removeprefix("torch.")
    object.__setattr__(intervention, "dtype", name)


class Constant:
    """A tensor given by the user as part of an intervention's definition.

    Its numbers are saved with the weights; the definition itself says the shape only, and so does equality.
    """

    def __init__(self, value: Any):
        self.value = torch.as_tensor(value).detach().clone()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.value.shape == other.value.shape

    def __hash__(self) -> int:
        return hash(tuple(self.value.shape))

    def __repr__(self) -> str:
        return f"Constant({'×'.join(map(str, self.value.shape)) or 'scalar'})"


@dataclass(frozen=True, init=False)
class Node:
    """One node of an intervention graph: *what* at *where* on *which tokens*.

    Args:
        intervention: what is done, such as `LoReFT(rank=4)`.
        layer, component, head, stack, side: where; see `Site`.
        positions: on which tokens; see `Positions`.
        name: how `model.node(name)` and outputs call it; made up from type and site if left out.
        share: nodes with the same `share` use one set of parameters.
        source: name of a reading node whose output this node gets in the same pass.

    Raises:
        ValueError: a site or positions that cannot be read, a name that cannot be used; a source that is
            missing, or that the intervention would not look at.
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
        """Under which name the parameters are kept."""
        assert self.name is not None
        return self.share or self.name

    def default_name(self) -> str:
        """A name made from type and site, such as `loreft_3`."""
        site = self.site
        words = [type(self.intervention).__name__.lower(), site.stack]
        words += [None if site.layer is None else str(site.layer)]
        words += [None if site.component == "block_output" else site.component.replace(".", "_")]
        words += [None if site.head is None else f"head{site.head}"]
        return "_".join(word for word in words if word)

    def to_dict(self) -> dict[str, Any]:
        """JSON values that `from_dict` reads back; defaults are left out."""
        site = {f.name: getattr(self.site, f.name) for f in fields(Site) if getattr(self.site, f.name) != f.default}
        if self.site.layer is not None:
            site["layer"] = self.site.layer
        out = {"name": self.name, **_intervention_to_dict(self.intervention), **site}
        out["positions"] = self.positions.to_json()
        return out | {k: v for k, v in (("share", self.share), ("source", self.source)) if v is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Node:
        """Raises `ValueError` for what `to_dict` cannot have written, or a type that no imported module defines."""
        if not isinstance(data, Mapping):
            raise ValueError(f"cannot read the node {data!r}: it needs a 'type', and a 'layer' or what else it takes")
        rest = dict(data)
        try:
            intervention = _intervention_from_dict(rest.pop("type"), rest.pop("options", {}))
            return cls(intervention, **rest)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"cannot read the node {data!r}: {error!r}") from error


_RESERVED = frozenset(dir(nn.ModuleDict()))


def check_key(key: str, label: str) -> None:
    """Raises `ValueError` for what cannot name a child module or a column of a checkpoint."""
    if not isinstance(key, str) or not key or "." in key or "rh_" in key or key in _RESERVED:
        raise ValueError(
            f"{label} {key!r} cannot be used: take a word that has no dot and no 'rh_' in it "
            "and is no attribute of a torch module"
        )


def _intervention_to_dict(intervention: Intervention) -> dict[str, Any]:
    options = {}
    for f in fields(intervention):  # type: ignore[arg-type]
        value = getattr(intervention, f.name)
        if isinstance(value, Constant):
            options[f.name] = {"constant": list(value.value.shape)}
        elif isinstance(value, Intervention):
            options[f.name] = _intervention_to_dict(value)
        elif value != f.default:
            options[f.name] = value
    return {"type": type(intervention).__name__, **({"options": options} if options else {})}


def _intervention_from_dict(name: str, options: Mapping[str, Any]) -> Intervention:
    known = {cls.__name__: cls for cls in _concrete(Intervention)}
    if name not in known:
        raise ValueError(
            f"unknown type of node {name!r}: known are {', '.join(sorted(known))}. "
            "If it is your own, import the module that defines it first"
        )
    read = {}
    for key, value in options.items():
        if isinstance(value, dict) and "constant" in value:
            value = Constant(torch.zeros(value["constant"]))
        elif isinstance(value, dict) and "type" in value:
            value = _intervention_from_dict(value["type"], value.get("options", {}))
        elif isinstance(value, list):
            value = tuple(value)
        read[key] = value
    return known[name](**read)


def _concrete(cls: type) -> list[type]:
    found = [] if getattr(cls, "__abstractmethods__", None) or cls.__name__.startswith("_") else [cls]
    return found + [c for sub in cls.__subclasses__() for c in _concrete(sub)]


def apply(intervention: Intervention, p: Params, h: Tensor, context: Context) -> Tensor:
    """Edits or reads `h` with parameters and what was derived from them."""
    if isinstance(intervention, Edit):
        return intervention.edit(p, h, context)
    assert isinstance(intervention, Reader)
    return intervention.read(p, h.detach() if intervention.detach else h, context)


class NodeModule(nn.Module):
    """The parameters of one node (or of all nodes that share them).

    An attribute is a stored parameter, or one of the paper's letters, such as `node.R` of a LoReFT:
    the derived value, without gradient.
    """

    def __init__(self, intervention: Intervention, shape: Shape):
        super().__init__()
        self.intervention = intervention
        self.shape = shape
        for name, value in intervention.parameters(shape).items():
            own = value.detach().clone()  # what comes from a constant of the graph must not change with the weights
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, nn.Parameter(own, requires_grad=value.requires_grad))
            else:
                self.register_buffer(name, own)

    def stored(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {name: t for name, t in (*self._parameters.items(), *self._buffers.items()) if t is not None}

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the parameters, and hence of the computation; `None` without parameters."""
        for tensor in (*self._parameters.values(), *self._buffers.values()):
            if tensor is not None:
                return tensor.dtype
        return None

    def forward(self, p: Params | None, tensors: Tensor, context: Context) -> Tensor:
        """Edits or reads `tensors` with the derived parameters `p` (`None`: derive them here)."""
        if p is None:
            stored = self.stored()
            p = {**stored, **self.intervention.derive(stored)}
        return apply(self.intervention, p, tensors, context)

    def assign(self, **letters: Any) -> None:
        """Sets parameters by the names or letters of the paper: `node.assign(R=…, W=…, b=…)`.

        Raises:
            ValueError: a name that this node does not have, or a value that does not fit; nothing is changed then.
        """
        stored = self.stored()
        device = next((tensor.device for tensor in stored.values()), None)
        given = {letter: torch.as_tensor(value, device=device) for letter, value in letters.items()}
        names = {letter: self.intervention.letters.get(letter, letter) for letter in given}
        for letter, value in given.items():
            if names[letter] not in stored:
                raise ValueError(
                    f"{type(self.intervention).__name__} has no parameter {letter!r}: it has {', '.join(stored)}"
                )
            shape = stored[names[letter]].shape
            if value.shape != shape:
                raise ValueError(f"{letter} must have shape {tuple(shape)}, got {tuple(value.shape)}")
        before = {name: tensor.clone() for name, tensor in stored.items()}
        with torch.no_grad():
            for letter, value in given.items():
                stored[names[letter]].copy_(value)
            for letter, value in given.items():
                if names[letter] != letter and not torch.allclose(
                    getattr(self, letter).float(), value.float(), atol=1e-4
                ):
                    for name, tensor in before.items():
                        stored[name].copy_(tensor)
                    raise ValueError(f"{letter} of a {type(self.intervention).__name__} needs orthonormal rows")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in self.__dict__.get("intervention", Intervention).letters:
                raise
            with torch.no_grad():
                return self.intervention.derive(self.stored())[name]

    def extra_repr(self) -> str:
        return f"{self.intervention}, width={self.shape.width}"
