"""Losses by name, one value an item; which items count, and how much, is decided here, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from reftheads.graph.intervention import IGNORE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped


Kind: TypeAlias = Literal["classes", "probabilities", "numbers", "pairs"]
ItemLoss: TypeAlias = "Callable[[Float[Tensor, 'items outputs'], Shaped[Tensor, ' items']], Float[Tensor, ' items']]"
"""`loss(prediction, target)`, one value an item; targets have the dtype that the batch gives them."""


@dataclass(frozen=True)
class Loss:
    """Describe a loss by its value of each item and by what it says of targets.

    A plain function of one's own is a loss of which nothing else is known.

    Attributes:
        items: `items(prediction, target)` gives the value of each item.
        kind: what the targets are: classes 0, 1, …; probabilities, 0 and 1 among them; any numbers; or pairs, k and -k.
            `None`: not known.
        outputs: how many a head must have; `None`: any number.
        each: whether every output has a target of its own: [items outputs] instead of [items].
        activated: whether it compares the prediction as users see it, after the head's activation.
        counts: which items make up the mean, of those that have a target; `None`: all.

    Example:
        ```python
        >>> import torch
        >>> import reftheads as rh
        >>> from reftheads.interventions import Loss
        >>> def hinge(z, y):  # y is 0 or 1
        ...     return torch.relu(1 - (2 * y - 1) * z[:, 0])
        >>> rh.losses["hinge"] = Loss(hinge, kind="probabilities", outputs=1)
        >>> rh.LinearHead(1, target="mood", loss="hinge").kind
        'probabilities'
        >>> del rh.losses["hinge"]
        ```
    """

    items: ItemLoss
    kind: Kind | None = None
    outputs: int | None = None
    each: bool = False
    activated: bool = False
    counts: Callable[[Shaped[Tensor, " items"]], Bool[Tensor, " items"]] | None = None

    @classmethod
    def of(cls, loss: Loss | ItemLoss) -> Loss:
        """Return the loss itself, or that of a plain function."""
        return loss if isinstance(loss, Loss) else cls(loss, activated=True)

    def __call__(
        self, prediction: Float[Tensor, "items outputs"], target: Shaped[Tensor, " items"]
    ) -> Float[Tensor, " items"]:
        return self.items(prediction, target)

    def given(self, target: Shaped[Tensor, "*items"], ignore: int = IGNORE) -> Bool[Tensor, "*items"]:
        """Return where there is a target: no NaN, no pair 0, and not `ignore` where that cannot be a target itself."""
        there = ~target.isnan() if target.is_floating_point() else torch.ones_like(target, dtype=torch.bool)
        if self.kind == "pairs":
            return there & (target != 0)
        if self.kind in ("classes", "probabilities") or not target.is_floating_point():
            there = there & (target != ignore)
        return there

    def wrong(self, target: Shaped[Tensor, "*items"], outputs: int) -> tuple[Bool[Tensor, "*items"], str]:
        """Return which of these targets cannot be, and what is allowed."""
        whole = target == target.round() if target.is_floating_point() else torch.ones_like(target, dtype=torch.bool)
        if self.kind == "classes":
            return ~(whole & (target >= 0) & (target < outputs)), f"a whole number from 0 to {outputs - 1}"
        if self.kind == "probabilities":
            return ~((target >= 0) & (target <= 1)), "0, 1 or a probability between them"
        if self.kind == "pairs":
            return ~(whole & target.isfinite()), "k for what was chosen in pair k, -k for what was rejected, 0 for none"
        return target.isinf(), "a finite number"


def _number(target: Shaped[Tensor, " items"], prediction: Tensor) -> Float[Tensor, " items"]:
    """Return targets in the dtype of the prediction."""
    return target.to(prediction.dtype)


def _cross_entropy(
    prediction: Float[Tensor, "items classes"], target: Shaped[Tensor, " items"]
) -> Float[Tensor, " items"]:
    return F.cross_entropy(prediction, target.long(), reduction="none")


def _bce(prediction: Float[Tensor, "items 1"], target: Shaped[Tensor, " items"]) -> Float[Tensor, " items"]:
    return F.binary_cross_entropy_with_logits(prediction.squeeze(-1), _number(target, prediction), reduction="none")


def _mse(prediction: Float[Tensor, "items 1"], target: Shaped[Tensor, " items"]) -> Float[Tensor, " items"]:
    return (prediction.squeeze(-1) - _number(target, prediction)).square()


def _mae(prediction: Float[Tensor, "items 1"], target: Shaped[Tensor, " items"]) -> Float[Tensor, " items"]:
    return (prediction.squeeze(-1) - _number(target, prediction)).abs()


def _huber(prediction: Float[Tensor, "items 1"], target: Shaped[Tensor, " items"]) -> Float[Tensor, " items"]:
    """Return ½e² where the error |e| ≤ 1, else |e| − ½ (Huber 1964)."""
    return F.huber_loss(prediction.squeeze(-1), _number(target, prediction), reduction="none")


def _gaussian_nll(prediction: Float[Tensor, "items 2"], target: Shaped[Tensor, " items"]) -> Float[Tensor, " items"]:
    """Return ½(v + (y − m)² e⁻ᵛ) of the outputs m, a mean, and v, a log-variance (Nix and Weigend 1994)."""
    mean, log_variance = prediction.unbind(-1)
    return 0.5 * (log_variance + (_number(target, prediction) - mean).square() * (-log_variance).exp())


def quantile_loss(
    quantiles: tuple[float, ...], prediction: Float[Tensor, "items quantiles"], target: Shaped[Tensor, " items"]
) -> Float[Tensor, " items"]:
    """Return the mean over quantiles q of max(q·e, (q − 1)·e), e = y − prediction (Koenker and Bassett 1978)."""
    q = prediction.new_tensor(quantiles)
    error = _number(target, prediction)[:, None] - prediction
    return torch.maximum(q * error, (q - 1) * error).mean(-1)


def _partners(target: Shaped[Tensor, " items"]) -> Bool[Tensor, "items items"]:
    """Return whether item i was chosen in the pair in which item j was rejected, at [i, j]."""
    return (target[:, None] > 0) & (target[:, None] == -target[None, :])


def _bradley_terry(prediction: Float[Tensor, "items 1"], target: Shaped[Tensor, " items"]) -> Float[Tensor, " items"]:
    """Return −log σ(r of the chosen − r of the rejected) for what was chosen (Bradley and Terry 1952)."""
    reward = prediction.squeeze(-1)
    return -F.logsigmoid(reward - reward[_partners(target).int().argmax(1)])


def _has_partner(target: Shaped[Tensor, " items"]) -> Bool[Tensor, " items"]:
    """Return which items were chosen, with what was rejected in the same batch."""
    return _partners(target).any(1)


losses: dict[str, Loss | ItemLoss] = {
    "cross_entropy": Loss(_cross_entropy, "classes"),
    "bce": Loss(_bce, "probabilities", outputs=1),
    "multi_label": Loss(_bce, "probabilities", each=True),
    "mse": Loss(_mse, "numbers", outputs=1, activated=True),
    "mse_of_each": Loss(_mse, "numbers", each=True, activated=True),
    "mae": Loss(_mae, "numbers", outputs=1, activated=True),
    "huber": Loss(_huber, "numbers", outputs=1, activated=True),
    "gaussian_nll": Loss(_gaussian_nll, "numbers", outputs=2),
    "quantile": Loss(partial(quantile_loss, (0.5,)), "numbers", activated=True),
    "bradley_terry": Loss(_bradley_terry, "pairs", outputs=1, counts=_has_partner),
}
"""Look up a loss by its name; add your own under a new one before a graph uses it: a function, or a `Loss`.

A function gets predictions [items outputs] and targets [items], and returns one value per item.

Example:
    ```python
    >>> import reftheads as rh
    >>> rh.losses["cubic"] = lambda z, y: (z[:, 0] - y).abs() ** 3
    >>> rh.LinearHead(outputs=1, target="stars", loss="cubic").loss
    'cubic'
    >>> del rh.losses["cubic"]
    ```
"""


def or_zero(loss: Float[Tensor, ""], labels: Shaped[Tensor, "*items"]) -> Float[Tensor, ""]:
    """Return a model's own loss; 0 where no label is a target, of which transformers makes NaN."""
    return torch.where((labels != IGNORE).any().to(loss.device), loss, torch.zeros_like(loss))


def masked_mean(
    loss: Loss | ItemLoss,
    prediction: Float[Tensor, "*items outputs"],
    target: Shaped[Tensor, "*items"] | Shaped[Tensor, "*items outputs"],
    valid: Bool[Tensor, "*items"],
    ignore: int = IGNORE,
    class_weights: tuple[float, ...] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean of `loss` over the items that count; zero where there are none.

    An item counts where `valid` holds, it has a target (see `Loss.given`) and the loss counts it. With
    `class_weights` w it is Σ wᵢlᵢ / Σ wᵢ over the items, by their classes, as torch's cross-entropy has it.
    """
    loss = Loss.of(loss)
    if loss.each:
        prediction, valid = prediction.unsqueeze(-1), valid.unsqueeze(-1).expand(target.shape)
    counts = (valid & loss.given(target, ignore)).flatten()
    # 0 is a class of every classification; a prediction that is filled here gets no gradient, not even NaN
    prediction = prediction.flatten(0, -2).masked_fill(~counts[:, None], 0)
    target = target.flatten().masked_fill(~counts, 0)
    if loss.counts is not None:
        counts = counts & loss.counts(target)
    items = loss(prediction, target).masked_fill(~counts, 0)
    if class_weights is None:
        return items.sum() / counts.sum().clamp(min=1)
    weights = prediction.new_tensor(class_weights)[target.long()].masked_fill(~counts, 0)
    total = weights.sum()
    return (items * weights).sum() / total.where(total > 0, 1)
