"""LoRA as a node: Hu et al. 2021, https://arxiv.org/abs/2106.09685."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reftheads.graph.intervention import Context, Edit, Params, Shape, keep_name_of_dtype, read_dtype

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class LoRA(Edit):
    """Add a low-rank map of what entered a linear module to what left it: h ↦ h + (α/r) · B A x; B starts at zero.

    It sits beside the module and never touches its weight, so that it works alike on `nn.Linear`,
    `Conv1D`, a fused projection's columns and quantised layers, and on chosen tokens.

    Args:
        rank: r, rows of A [r input_width] and columns of B [width r].
        alpha: α; the same as the rank if left out.
        dropout: probability, on x in training mode.
        dtype: of the parameters and of the computation, such as `torch.bfloat16` or its name; the name is kept.

    Raises:
        ValueError: a rank below 1 or, at compile time, over a width; an unfit dropout or dtype.

    Example:
        ```python
        >>> import reftheads as rh
        >>> lora = rh.Node(rh.LoRA(rank=4, alpha=8), layer=3, component="value_output", positions="prompt", name="lora")
        >>> model = rh.InterventionModel(rh.load_base("tiny-chat")[0], rh.InterventionGraph(lora))
        >>> model.node("lora").A.shape, lora.intervention.scaling
        (torch.Size([4, 192]), 2.0)
        ```
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    dtype: str | torch.dtype = "float32"
    needs_linear = True

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank of LoRA must be a positive integer, got {self.rank!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        keep_name_of_dtype(self)

    @property
    def scaling(self) -> float:
        """Return α/r."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    def parameters(self, shape: Shape) -> dict[str, Tensor]:
        assert shape.input_width is not None
        if self.rank > min(shape.width, shape.input_width):
            raise ValueError(f"rank {self.rank} is over the widths {shape.input_width} → {shape.width} of the module")
        a = torch.empty(self.rank, shape.input_width)
        nn.init.kaiming_uniform_(a, a=5**0.5)
        dtype = read_dtype(self.dtype)
        return {"A": nn.Parameter(a.to(dtype)), "B": nn.Parameter(torch.zeros(shape.width, self.rank, dtype=dtype))}

    def edit(
        self, p: Params, h: Float[Tensor, "batch slots width"], context: Context
    ) -> Float[Tensor, "batch slots width"]:
        assert context.x is not None
        x = F.dropout(context.x, self.dropout, context.training)
        return h + self.scaling * F.linear(F.linear(x, p["A"]), p["B"])
