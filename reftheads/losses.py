"""Losses by name, one value an item; the masking of items without a target is done here, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped

IGNORE = -100

Loss: TypeAlias = "Callable[[Float[Tensor, 'items outputs'], Shaped[Tensor, ' items']], Float[Tensor, ' items']]"
"""`loss(prediction, target)`, one value an item; targets have the dtype that the batch gives them."""


def _cross_entropy(
    prediction: Float[Tensor, "items classes"], target: Shaped[Tensor, " items"]
) -> Float[Tensor, " items"]:
    return F.cross_entropy(prediction, target.long(), reduction="none")


def _mse(prediction: Float[Tensor, "items 1"], target: Shaped[Tensor, " items"]) -> Float[Tensor, " items"]:
    return (prediction.squeeze(-1) - target.to(prediction.dtype)).square()


def _bce(prediction: Float[Tensor, "items 1"], target: Shaped[Tensor, " items"]) -> Float[Tensor, " items"]:
    return F.binary_cross_entropy_with_logits(prediction.squeeze(-1), target.to(prediction.dtype), reduction="none")


losses: dict[str, Loss] = {"cross_entropy": _cross_entropy, "mse": _mse, "bce": _bce}
"""The known losses; add your own under a new name before a graph uses it."""


def masked_mean(
    loss: Loss,
    prediction: Float[Tensor, "*items outputs"],
    target: Shaped[Tensor, "*items"],
    valid: Bool[Tensor, "*items"],
) -> Float[Tensor, ""]:
    """The mean of `loss` over the items that count; zero where there are none.

    An item counts where `valid` holds and its target is given: not `IGNORE` for integers, not NaN for
    floats.
    """
    missing = target.isnan() if target.is_floating_point() else target == IGNORE
    counts = (valid & ~missing).flatten()
    # 0 is a class of every classification; a prediction that is filled here gets no gradient, not even NaN
    prediction = prediction.flatten(0, -2).masked_fill(~counts[:, None], 0)
    items = loss(prediction, target.flatten().masked_fill(~counts, 0))
    return items.masked_fill(~counts, 0).sum() / counts.sum().clamp(min=1)
