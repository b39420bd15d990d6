"""Losses by name, one value an item; the masking of items without a target is done here, once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100

Loss = Callable[[Tensor, Tensor], Tensor]
"""`loss(prediction: [items outputs], target: [items]) -> [items]`."""


def _cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target.long(), ignore_index=IGNORE, reduction="none")


def _mse(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.squeeze(-1) - target).square()


def _bce(prediction: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(prediction.squeeze(-1), target.clamp(min=0), reduction="none")


losses: dict[str, Loss] = {"cross_entropy": _cross_entropy, "mse": _mse, "bce": _bce}
"""The known losses; add your own under a new name before a graph uses it."""


def masked_mean(loss: Loss, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """The mean of `loss` over the items that count; zero where there are none.

    An item counts where `valid` holds and its target is given: not `IGNORE` for integers, not NaN for
    floats.

    Args:
        prediction: [… outputs].
        target: […].
        valid: Bool[…].
    """
    if target.is_floating_point():
        counts = valid & ~target.isnan()
        target = torch.where(counts, target, torch.zeros_like(target))
    else:
        counts = valid & (target != IGNORE)
        target = torch.where(counts, target, torch.full_like(target, IGNORE))
    if loss is not _cross_entropy:
        target = target.to(prediction.dtype)
    items = loss(prediction.flatten(0, -2), target.flatten())
    counts = counts.flatten()
    return torch.where(counts, items, torch.zeros_like(items)).sum() / counts.sum().clamp(min=1)
