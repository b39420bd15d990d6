"""Edits by given or learnt vectors, and reading an activation: steering, ablation, patching, gating."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reftheads.graph.intervention import Constant, Context, Edit, Params, Reader, Shape

if TYPE_CHECKING:
    from jaxtyping import Float


def _vector(value: object, shape: Shape, what: str) -> Float[Tensor, " width"]:
    """Return a copy of the vector that the user gave; `what` is how errors call it."""
    assert isinstance(value, Constant)
    if value.value.shape != (shape.width,):
        raise ValueError(f"{what} must have shape ({shape.width},), the width there; got {tuple(value.value.shape)}")
    return value.value.float().clone()  # several nodes may be made from one definition


@dataclass(frozen=True)
class Steering(Edit):
    """Add a vector: h ↦ h + scale · v, with a learnt v that starts at zero, or one that you give.

    Turner et al. 2023, https://arxiv.org/abs/2308.10248; learnt, it is the `b` of RED without its scale.

    Args:
        vector: [width], the direction; `None` learns it.
        scale: how far to go along it.
        trainable: whether a vector that you give is trained further.

    Example:
        ```python
        >>> import torch
        >>> import reftheads as rh
        >>> steer = rh.Node(rh.Steering(torch.ones(192), scale=3.0), layer=2, positions="generated", name="steer")
        >>> model = rh.InterventionModel(rh.load_base("tiny-chat")[0], rh.InterventionGraph(steer))
        >>> model.node("steer").v.requires_grad
        False
        ```
    """

    vector: Constant | None = None
    scale: float = 1.0
    trainable: bool = False

    def __post_init__(self) -> None:
        _as_constant(self, "vector")

    def parameters(self, shape: Shape) -> dict[str, Tensor]:
        if self.vector is None:
            return {"v": nn.Parameter(torch.zeros(shape.width))}
        vector = _vector(self.vector, shape, "the steering vector")
        return {"v": nn.Parameter(vector) if self.trainable else vector}

    def edit(self, p: Params, h: Tensor, context: Context) -> Tensor:
        return h + self.scale * p["v"]


@dataclass(frozen=True)
class Replace(Edit):
    """Replace the activation: h ↦ a, which you give (activation patching, interchange intervention).

    Args:
        value: [width], the activation.

    Example:
        ```python
        >>> import torch
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> patch = rh.Node(rh.Replace(torch.zeros(192)), layer=2, positions="l1", name="patch")
        >>> seen = rh.Node(rh.Collect(), layer=2, positions="l1", name="seen")
        >>> model = rh.InterventionModel(base, rh.InterventionGraph(patch, seen))
        >>> bool(model(**tokenizer("Hi!", return_tensors="pt")).collected["seen"].any())
        False
        ```
    """

    value: Constant

    def __post_init__(self) -> None:
        _as_constant(self, "value")

    def parameters(self, shape: Shape) -> dict[str, Tensor]:
        return {"a": _vector(self.value, shape, "the activation")}

    def edit(self, p: Params, h: Tensor, context: Context) -> Tensor:
        return p["a"].expand_as(h).clone()  # a model may add to it in place, as Falcon does


@dataclass(frozen=True)
class Ablate(Edit):
    """Ablate the activation: h ↦ 0 (zero ablation), or h ↦ a mean activation that you give (mean ablation).

    Args:
        mean: [width], the mean over some data, such as `Collect` gathers; `None` for zero.

    Example:
        ```python
        >>> import reftheads as rh
        >>> print(rh.InterventionGraph(rh.Node(rh.Ablate(), layer=2, component="head_output", head=0, name="zero")))
        node what     where                  positions
        zero Ablate() head_output[2].head[0] all
        ```
    """

    mean: Constant | None = None

    def __post_init__(self) -> None:
        _as_constant(self, "mean")

    def parameters(self, shape: Shape) -> dict[str, Tensor]:
        return {"a": torch.zeros(shape.width) if self.mean is None else _vector(self.mean, shape, "the mean")}

    def edit(self, p: Params, h: Tensor, context: Context) -> Tensor:
        return p["a"].expand_as(h).clone()  # a model may add to it in place, as Falcon does


@dataclass(frozen=True)
class Gated(Edit):
    """Gate an edit Φ by another node's output s: h ↦ h + g · (Φ(h) − h), g = σ(s).

    The node names that other one, a head with a single output, as its `source`: a probe low in the
    model then decides, in the same forward pass, how much of an edit higher up takes place.

    Args:
        inner: the edit Φ.

    Raises:
        ValueError: an inner intervention that is no edit; a source with several outputs.

    Example:
        ```python
        >>> import reftheads as rh
        >>> probe = rh.Node(rh.LinearHead(1, "rude", loss="bce"), layer=1, positions="l1", name="probe")
        >>> edit = rh.Node(rh.Gated(rh.LoReFT(rank=4)), layer=4, positions="l1", source="probe", name="edit")
        >>> rh.InterventionGraph(probe, edit)["edit"].source
        'probe'
        ```
    """

    inner: Edit
    needs_source = True
    source_outputs = 1

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Edit):
            raise ValueError(f"Gated needs an edit such as LoReFT(rank=4), got {self.inner!r}")

    @property
    def needs_linear(self) -> bool:  # type: ignore[override]
        return self.inner.needs_linear

    @property
    def letters(self):  # type: ignore[override]
        return self.inner.letters

    def parameters(self, shape: Shape) -> dict[str, Tensor]:
        return self.inner.parameters(shape)

    @property
    def derives_from(self) -> tuple[str, ...]:
        return self.inner.derives_from

    def derive(self, p: Params) -> Params:
        return self.inner.derive(p)

    def check_parameters(self, p: Params) -> None:
        self.inner.check_parameters(p)

    def edit(
        self, p: Params, h: Float[Tensor, "batch slots width"], context: Context
    ) -> Float[Tensor, "batch slots width"]:
        assert context.source is not None
        if context.source.shape[-1] != 1:
            raise ValueError(f"a gate is one number a token, but its source has {context.source.shape[-1]} outputs")
        gate = torch.sigmoid(context.source.to(h.dtype))
        return h + gate * (self.inner.edit(p, h, context) - h)


@dataclass(frozen=True)
class Collect(Reader):
    """Collect the activation in `out.collected[name]`, zero where a slot is empty.

    Args:
        detach: cuts the activation off from the graph of gradients.

    Example:
        ```python
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> graph = rh.InterventionGraph(rh.Node(rh.Collect(), layer=3, component="mlp_activation", name="neurons"))
        >>> out = rh.InterventionModel(base, graph)(**tokenizer("Hi!", return_tensors="pt"))
        >>> out.collected["neurons"].shape  # rows, tokens, width
        torch.Size([1, 2, 384])
        ```
    """

    detach: bool = True

    def parameters(self, shape: Shape) -> dict[str, Tensor]:
        return {}

    def read(
        self, p: Params, h: Float[Tensor, "batch slots width"], context: Context
    ) -> Float[Tensor, "batch slots width"]:
        return h


def _as_constant(intervention: object, name: str) -> None:
    """Put a `Constant` in the place of a tensor or list that the user gave as this option."""
    value = getattr(intervention, name)
    if value is not None and not isinstance(value, Constant):
        object.__setattr__(intervention, name, Constant(value))
