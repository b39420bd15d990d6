"""Types of one's own, as docs/nodes.md tells users to write them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reftheads.graph import Edit, Reader


@dataclass(frozen=True)
class Shift(Edit):
    """h ↦ h + c · Σs · u, with s what a source gives, where there is one, and 1 for Σs otherwise."""

    c: float = 1.0
    reads_source = True

    def parameters(self, shape: Any) -> dict[str, Tensor]:
        """Make u."""
        return {"u": nn.Parameter(torch.zeros(shape.width))}

    def edit(self, p: Any, h: Tensor, context: Any) -> Tensor:
        """Shift every token."""
        factor = 1 if context.source is None else context.source.sum(-1, keepdim=True)
        return h + self.c * factor * p["u"]


@dataclass(frozen=True)
class Norm(Reader):
    """The length of h."""

    outputs = 1
    detach = False

    def parameters(self, shape: Any) -> dict[str, Tensor]:
        """Nothing is trained."""
        return {}

    def read(self, p: Any, h: Tensor, context: Any) -> Tensor:
        """Read every token."""
        return (h.square().sum(-1, keepdim=True) + 1e-3).sqrt()
