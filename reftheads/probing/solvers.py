"""Training a stack of probes: by gradient descent, all at once, or by a solver, one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from reftheads.interventions.heads import MappingHead
from reftheads.probing.stacks import Stack, Weights
from reftheads.probing.targets import TRAIN, VALIDATION

if TYPE_CHECKING:
    from jaxtyping import Int


def descend(
    stack: Stack,
    part: Int[Tensor, "seeds N"],
    seeds: Sequence[int],
    lr: float,
    weight_decay: float,
    epochs: int,
    patience: int,
    batch_size: int,
) -> tuple[Weights, Int[Tensor, "P M"]]:
    """Minimise all losses by AdamW, under which they are independent; return the weights that did best, and when.

    Returns:
        The weights of every member from the epoch of its least loss in validation, and these epochs.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    p = stack.begin(seeds)
    rate = lr if stack.head.lr is None else stack.head.lr
    optimiser = torch.optim.AdamW(p.values(), lr=rate, weight_decay=weight_decay, fused=True)
    train, known = (part == TRAIN).any(0).nonzero()[:, 0], (part == VALIDATION).any(0).nonzero()[:, 0]
    learns, knows = (stack.of_members(part == which).to(stack.x.dtype) for which in (TRAIN, VALIDATION))
    generator = torch.Generator().manual_seed(seeds[0])
    shape = stack.y.shape[:2]
    best, kept = stack.x.new_full(shape, math.inf), {name: w.detach().clone() for name, w in p.items()}
    best_epoch, done = torch.full(shape, epochs, device=best.device), torch.zeros_like(best, dtype=torch.bool)
    for epoch in range(1, epochs + 1):
        order = train[torch.randperm(len(train), generator=generator).to(train.device)]
        for items in order.split(batch_size):
            loss, weight = stack.losses(p, items, learns)
            loss = (loss * (weight / weight.sum(-1, keepdim=True).clamp(min=1e-12))).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of probes is {loss.item()} in epoch {epoch}: lower the learning rate")
        if not len(known):
            continue
        now = stack.mean_loss(p, known, knows)
        better = (now < best) & ~done
        best = torch.where(better, now, best)
        best_epoch[better] = epoch
        kept = {n: torch.where(better[(..., *[None] * (w.ndim - 2))], w.detach(), kept[n]) for n, w in p.items()}
        done |= epoch - best_epoch >= patience
        if bool(done.all()):
            break
    return (kept if len(known) else {name: w.detach() for name, w in p.items()}), best_epoch


CLOSED = ("cross_entropy", "bce", "mse", "mse_of_each")


def solve(stack: Stack, part: Int[Tensor, "seeds N"], strength: float) -> tuple[Weights, Int[Tensor, "P M"]]:
    """Solve for the weights of every member, one after the other; return them, and 0 epochs."""
    solutions: list[tuple[Any, Any]] = []
    for x, of_site in zip(stack.x, stack.y, strict=True):
        whole = x.double().cpu().numpy()
        for y, train in zip(of_site, stack.of_members(part == TRAIN), strict=True):
            solutions.append(_closed(stack.head, whole[train.cpu()], y[train].cpu().numpy(), strength))
    shape = stack.y.shape[:2]
    W, b = (torch.from_numpy(np.stack(each)).to(stack.x).unflatten(0, shape) for each in zip(*solutions, strict=True))
    return {"W": W, **({"b": b} if stack.head.bias else {})}, torch.zeros(shape, dtype=torch.long)


def _closed(head: MappingHead, x: Any, y: Any, strength: float) -> tuple[Any, Any]:
    """Return the W and b that minimise the mean loss + ½ strength · |W|²."""
    from sklearn.linear_model import LogisticRegression, Ridge

    if head.loss in ("mse", "mse_of_each"):
        if np.isnan(y).any():
            raise ValueError(f"a closed form needs every target of {head.target!r} in a row: use method='sgd'")
        ridge = Ridge(alpha=strength * len(x) / 2, fit_intercept=head.bias).fit(x, y)
        return np.atleast_2d(ridge.coef_), np.broadcast_to(ridge.intercept_, (head.outputs,))
    classes = np.arange(max(head.outputs, 2))
    missing = np.setdiff1d(classes, y)
    if len(missing) or np.setdiff1d(y, classes).size:
        raise ValueError(
            f"a closed form of {head.loss!r} needs rows of each class, from 0 to {classes[-1]}, and whole numbers "
            f"as targets: {f'class {missing[0]} is missing' if len(missing) else 'some lie between'}. Use method='sgd'"
        )
    weights = np.ones(len(classes)) if head.class_weights is None else np.array(head.class_weights)
    halves = head.outputs == 2  # a weight w of scikit-learn stands for -w/2 and w/2, whose squares are half of its own
    C = (1 + halves) / (strength * weights[y.astype(int)].sum())
    fit = LogisticRegression(
        C=C, fit_intercept=head.bias, class_weight=dict(zip(classes, weights, strict=True)), max_iter=1000
    ).fit(x, y.astype(int))
    W, b = fit.coef_, np.broadcast_to(fit.intercept_, (len(fit.coef_),))
    return (np.concatenate([-W / 2, W / 2]), np.concatenate([-b / 2, b / 2])) if halves else (W, b)
