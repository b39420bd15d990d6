"""Representation finetuning: low-rank edits of the hidden state, and scale-and-bias.

ReFT: Wu et al. 2024, https://arxiv.org/abs/2404.03592. RED: Wu et al. 2024,
https://arxiv.org/abs/2402.15179.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from reftheads._utils.lazy import cached
from reftheads.graph.intervention import Context, Edit, Params, Shape, keep_name_of_dtype, read_dtype

if TYPE_CHECKING:
    from jaxtyping import Float


def orthonormalise(m: Float[Tensor, "*nodes rank width"]) -> Float[Tensor, "*nodes rank width"]:
    """Return R with the row space of M, which has full rank, and R Rᵀ = I, in float32 or finer.

    R = L⁻¹M with the Cholesky factor L Lᵀ = M Mᵀ, computed in float64 where the device has it: the
    thin QR decomposition of Mᵀ with a positive diagonal, to about 1e-16 · cond(M)². It costs
    O(rank² · width), is M itself where M is orthonormal already, and does not change when M is scaled, so
    that weight decay leaves R alone.
    """
    wide = m.float() if m.device.type == "mps" else m.double()
    factor, _ = torch.linalg.cholesky_ex(wide @ wide.mT)
    return torch.linalg.solve_triangular(factor, wide, upper=False).to(torch.promote_types(m.dtype, torch.float32))


@dataclass(frozen=True)
class LowRank(Edit):
    """Edit in a subspace of low rank, as the ReFT family does: h ↦ h + Pᵀ(source − target).

    P is R, whose rows are orthonormal at all times, or a free matrix; the source is act(Wh + b) or a
    constant b; the target is Ph or nothing. Stored are P [rank width], or M [rank width] of which R is
    the orthonormalisation; W [rank width]; b [rank].

    Args:
        rank: number of rows of P, at most the width.
        act_fn: name of an activation of transformers, applied to Wh + b.
        dropout: probability, on the edited hidden states in training mode, where pyreft has it.
        bias: whether Wh has a bias b.
        dtype: of the parameters and of the computation, such as `torch.bfloat16` or its name; the name is kept.
        init: "orthogonal" starts at random as pyreft does, "identity" at an edit that changes nothing.

    Raises:
        ValueError: a rank below 1 or, at compile time, over the width; an unknown or unfit option.

    Example:
        ```python
        >>> import torch
        >>> from reftheads.graph import Context, Shape
        >>> from reftheads.interventions import LowRank
        >>> edit, h = LowRank(rank=2, init="identity"), torch.randn(1, 3, 8)
        >>> p = edit.parameters(Shape(width=8))
        >>> torch.allclose(edit.edit({**p, **edit.derive(p)}, h, Context()), h, atol=1e-5)
        True
        ```
    """

    rank: int
    act_fn: str | None = None
    dropout: float = 0.0
    bias: bool = True
    dtype: str | torch.dtype = "float32"
    init: Literal["orthogonal", "identity"] = "orthogonal"

    orthonormal: ClassVar[bool] = True
    reads: ClassVar[bool] = True  # the source is act(Wh + b) rather than b
    subtracts: ClassVar[bool] = True  # the target is Ph rather than nothing

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank of {kind} must be a positive integer, got {self.rank!r}")
        if self.act_fn is not None and self.act_fn not in ACT2FN:
            raise ValueError(f"unknown act_fn {self.act_fn!r}: use one of {', '.join(sorted(ACT2FN))}")
        if self.init not in ("orthogonal", "identity"):
            raise ValueError(f"init must be 'orthogonal' or 'identity', got {self.init!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        if not self.reads and (self.act_fn is not None or not self.bias):
            raise ValueError(f"{kind} has the constant b alone as its source: leave act_fn and bias out")
        if self.init == "identity" and self.subtracts and (not self.reads or self.act_fn is not None):
            raise ValueError(f"{kind} with act_fn={self.act_fn!r} is never the identity: use init='orthogonal'")
        keep_name_of_dtype(self)

    @property
    def letters(self) -> dict[str, str]:  # type: ignore[override]
        return {"R": "M"} if self.orthonormal else {}

    @cached
    def derives_from(self) -> tuple[str, ...]:  # type: ignore[override]
        return (("M", "W") if self._one_product else ("M",)) if self.orthonormal else ()

    def derive(self, p: Params) -> Params:
        if not self.orthonormal:
            return {}
        r = orthonormalise(p["M"])
        return {"R": r, "D": p["W"] - r.to(p["W"].dtype)} if self._one_product else {"R": r}

    def check_parameters(self, p: Params) -> None:
        if not self.orthonormal:
            return
        r = orthonormalise(p["M"]).double()
        if not torch.allclose(r @ r.mT, torch.eye(self.rank, dtype=r.dtype, device=r.device), atol=1e-3):
            raise ValueError(
                f"M of a {type(self).__name__} must have {self.rank} rows that are independent, so that there is an "
                "orthonormal R of the same span: these are not"
            )

    @cached
    def _one_product(self) -> bool:
        """Return whether Wh − Rh can be had as Dh with D = W − R."""
        return self.reads and self.subtracts and self.act_fn is None

    def parameters(self, shape: Shape) -> dict[str, Tensor]:
        if self.rank > shape.width:
            raise ValueError(f"rank {self.rank} is over the width {shape.width} of the hidden states there")
        dtype = read_dtype(self.dtype)
        m = torch.empty(self.rank, shape.width)
        if self.orthonormal:
            nn.init.orthogonal_(m)
        else:
            nn.init.kaiming_uniform_(m, a=5**0.5)
        parameters: dict[str, Tensor] = {"M" if self.orthonormal else "P": nn.Parameter(m.to(dtype))}
        limit = shape.width**-0.5
        if self.reads:
            w = torch.empty(self.rank, shape.width).uniform_(-limit, limit).to(dtype)
            if self.init == "identity":
                target = orthonormalise(parameters["M"]) if self.orthonormal else parameters["P"]
                w = target.detach().to(dtype) if self.subtracts else torch.zeros_like(w)
            parameters["W"] = nn.Parameter(w)
        if self.bias:
            b = torch.empty(self.rank).uniform_(-limit, limit) if self.reads else torch.rand(self.rank)
            if self.init == "identity":
                b = torch.zeros_like(b)
            parameters["b"] = nn.Parameter(b.to(dtype))
        return parameters

    def edit(
        self, p: Params, h: Float[Tensor, "batch slots width"], context: Context
    ) -> Float[Tensor, "batch slots width"]:
        projection, b = p["R"] if self.orthonormal else p["P"], p.get("b")
        if projection.dtype != h.dtype:
            projection = projection.to(h.dtype)
        difference = p.get("D")
        if difference is not None:
            coefficients = F.linear(h, difference, b)
        elif not self.reads:
            coefficients = p["b"] - h @ projection.mT if self.subtracts else p["b"].expand(*h.shape[:-1], -1)
        else:
            coefficients = F.linear(h, p["W"], b)
            if self.act_fn is not None:
                coefficients = ACT2FN[self.act_fn](coefficients)
            if self.subtracts:
                coefficients = coefficients - h @ projection.mT
        edited = h + coefficients @ projection
        return F.dropout(edited, self.dropout) if self.dropout and context.training else edited


@dataclass(frozen=True)
class LoReFT(LowRank):
    """Edit by low-rank linear subspace ReFT: h ↦ h + Rᵀ(Wh + b − Rh), R Rᵀ = I (the paper's equation 2).

    `rank` is the number of directions that are edited. `LowRank` explains the other options and the errors.

    Example:
        ```python
        >>> import reftheads as rh
        >>> base, _ = rh.load_base("tiny-chat")
        >>> graph = rh.InterventionGraph(rh.Node(rh.LoReFT(rank=4), layer=2, positions="l1", name="edit"))
        >>> rh.InterventionModel(base, graph).node("edit").W.shape
        torch.Size([4, 192])
        ```
    """


@dataclass(frozen=True)
class NoReFT(LowRank):
    """Edit as LoReFT does, by a projection that is free: h ↦ h + Pᵀ(Wh + b − Ph).

    Its options, and what it raises, are those of `LowRank`.

    Example:
        ```python
        >>> import reftheads as rh
        >>> rh.NoReFT(rank=4, act_fn="relu").orthonormal
        False
        ```
    """

    orthonormal: ClassVar[bool] = False


@dataclass(frozen=True)
class DiReFT(LowRank):
    """Edit as LoReFT does, without the difference: h ↦ h + Rᵀ(Wh + b), R Rᵀ = I.

    Its options, and what it raises, are those of `LowRank`.

    Example:
        ```python
        >>> import reftheads as rh
        >>> print(rh.Node(rh.DiReFT(rank=4, dropout=0.1), layer=2).intervention)
        DiReFT(rank=4, dropout=0.1)
        ```
    """

    subtracts: ClassVar[bool] = False


@dataclass(frozen=True)
class NoDiReFT(LowRank):
    """Edit as DiReFT does, by a projection that is free: h ↦ h + Pᵀ(Wh + b) (the paper's equation 3).

    Its options, and what it raises, are those of `LowRank`.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.graph import Shape
        >>> list(rh.NoDiReFT(rank=4).parameters(Shape(width=32)))
        ['P', 'W', 'b']
        ```
    """

    orthonormal: ClassVar[bool] = False
    subtracts: ClassVar[bool] = False


@dataclass(frozen=True)
class ConsReFT(LowRank):
    """Edit as LoReFT does, with a constant source: h ↦ h + Rᵀ(b − Rh), R Rᵀ = I.

    Its options, and what it raises, are those of `LowRank`.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.graph import Shape
        >>> list(rh.ConsReFT(rank=4).parameters(Shape(width=32)))  # R is derived from M
        ['M', 'b']
        ```
    """

    reads: ClassVar[bool] = False


@dataclass(frozen=True)
class LobiReFT(LowRank):
    """Add a low-rank bias: h ↦ h + Rᵀb, R Rᵀ = I.

    Its options, and what it raises, are those of `LowRank`.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.graph import Shape
        >>> sum(p.numel() for p in rh.LobiReFT(rank=4).parameters(Shape(width=32)).values())
        132
        ```
    """

    reads: ClassVar[bool] = False
    subtracts: ClassVar[bool] = False


@dataclass(frozen=True)
class ScaleAndBias(Edit):
    """Edit by scale and bias (RED): h ↦ s ⊙ h + b, starting at the identity (s = 1, b = 0).

    Args:
        dtype: of the parameters and of the computation, such as `torch.bfloat16` or its name; the name is kept.

    Example:
        ```python
        >>> import reftheads as rh
        >>> graph = rh.InterventionGraph(rh.Node(rh.ScaleAndBias(), layer=2, component="mlp_output", name="red"))
        >>> model = rh.InterventionModel(rh.load_base("tiny-chat")[0], graph)
        >>> model.node("red").s.shape
        torch.Size([192])
        ```
    """

    dtype: str | torch.dtype = "float32"

    def __post_init__(self) -> None:
        keep_name_of_dtype(self)

    def parameters(self, shape: Shape) -> dict[str, Tensor]:
        dtype = read_dtype(self.dtype)
        return {
            "s": nn.Parameter(torch.ones(shape.width, dtype=dtype)),
            "b": nn.Parameter(torch.zeros(shape.width, dtype=dtype)),
        }

    def edit(self, p: Params, h: Tensor, context: Context) -> Tensor:
        return h * p["s"] + p["b"]
