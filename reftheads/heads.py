"""Reading nodes with a loss: probes, classifiers, regressors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from reftheads.losses import losses, masked_mean
from reftheads.nodes import Context, Head, Params, Shape, read_dtype

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class LinearHead(Head):
    """A linear map of the hidden states: W h + b. It never changes the logits.

    Args:
        outputs: classes of a classifier, or 1 for a regression.
        target: column of the batch that holds the targets: [batch] where the positions select one token
            a row, else [batch sequence]. `None`: a head that predicts and is not trained here.
        loss: name of a loss: one of `reftheads.losses`.
        detach: makes it a probe: no gradient reaches the model.
        weight: factor of its loss in the total.
        bias: whether there is a b.
        dtype: of the parameters and of the computation.

    Raises:
        ValueError: no outputs, an unknown loss or one that does not go with the number of outputs; in a
            forward pass, a target of a shape that fits neither case.
    """

    outputs: int
    target: str | None = None
    loss: str = "cross_entropy"
    detach: bool = False
    weight: float = 1.0
    bias: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.outputs, int) or self.outputs < 1:
            raise ValueError(f"outputs of a LinearHead must be a positive integer, got {self.outputs!r}")
        if self.loss not in losses:
            raise ValueError(f"unknown loss {self.loss!r}: use one of {', '.join(losses)}")
        if self.outputs > 1 and self.loss in ("mse", "bce"):
            raise ValueError(f"loss {self.loss!r} is for outputs=1, got outputs={self.outputs}")
        if self.outputs == 1 and self.loss == "cross_entropy" and self.target is not None:
            raise ValueError("cross_entropy over one class is always 0: use loss='mse', loss='bce' or more outputs")
        read_dtype(self.dtype)

    def parameters(self, shape: Shape) -> dict[str, Tensor]:
        linear = nn.Linear(shape.width, self.outputs, bias=self.bias, dtype=read_dtype(self.dtype))
        return {"W": linear.weight, **({"b": linear.bias} if self.bias else {})}

    def read(
        self, p: Params, h: Float[Tensor, "batch slots width"], context: Context
    ) -> Float[Tensor, "batch slots outputs"]:
        return F.linear(h, p["W"], p.get("b"))

    def loss_of(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return masked_mean(losses[self.loss], prediction, target, valid)
