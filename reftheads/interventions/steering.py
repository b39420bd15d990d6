"""Edits by given or learned vectors, and reading an activation: steering, ablation, patching, gating."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reftheads.graph.intervention import Constant, Context, Edit, Params, Reader, Shape

if TYPE_CHECKING:
    from jaxtyping import Float


def _vector(value: object, shape: Shape, what: str) -> Float[Tensor, " width"]:
    assert isinstance(value, Constant)
    if value.value.shape != (shape.width,):
        raise ValueError(f"{what} must have shape ({shape.width},), the width there; got {tuple(value.value.shape)}")
    return value.value.float().clone()  # nodes made from one definition each have their own


@dataclass(frozen=True)
class Steering(Edit):
    """h ↦ h + scale · v, with a learned v (starting at zero) or a given one.

    Turner et al. 2023, https://arxiv.org/abs/2308.10248; learned: the `b` of RED without its scale.

    Args:
        vector: [width], the direction; `None` learns it.
        scale: how far to go along it.
        trainable: whether a given vector is trained further.
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
    """h ↦ a, a given activation (activation patching, interchange intervention).

    Args:
        value: [width], the activation.
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
    """h ↦ 0 (zero ablation), or h ↦ a given mean activation (mean ablation).

    Args:
        mean: [width], the mean over some data, such as `Collect` gathers; `None` for zero.
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
    """h ↦ h + g · (Φ(h) − h): an edit Φ as far as another node's output s lets it through, g = σ(s).

    The node names that other one, a head with a single output, as its `source`: a probe low in the
    model then decides, in the same forward pass, about an edit higher up.

    Args:
        inner: the edit Φ.

    Raises:
        ValueError: an inner intervention that is no edit; a source with several outputs.
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
    """Returns the activation in `out.collected[name]`, zero where a slot is empty.

    Args:
        detach: cuts the activation off from the graph of gradients.
    """

    detach: bool = True

    def parameters(self, shape: Shape) -> dict[str, Tensor]:
        return {}

    def read(
        self, p: Params, h: Float[Tensor, "batch slots width"], context: Context
    ) -> Float[Tensor, "batch slots width"]:
        return h


def _as_constant(intervention: object, name: str) -> None:
    value = getattr(intervention, name)
    if value is not None and not isinstance(value, Constant):
        object.__setattr__(intervention, name, Constant(value))
