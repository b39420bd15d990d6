"""The loss of the next tokens, a few tokens at a time: logits are never there all at once, and none are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CHUNK = 128
"""Tokens whose logits are there at the same time: of 50,000 words in float32, 25 MB."""


def token_losses(
    hidden: Float[Tensor, "tokens width"], labels: Int[Tensor, " tokens"], lm_head: nn.Module
) -> Float[Tensor, " tokens"]:
    """Return −log softmax(lm_head(h))[label] of each token, in float32 at least.

    A token's loss depends on its own hidden state alone, so that its gradient ∂loss/∂h [width] is all that the
    backward pass needs; it is computed together with the loss, chunk by chunk, and the logits are dropped.

    Args:
        lm_head: a projection of each token by itself, of which nothing is trained.
    """
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _TokenLosses.apply(hidden, labels, lm_head)  # type: ignore[return-value]
    chunks = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    return torch.cat([losses_of(lm_head(h), of_chunk) for h, of_chunk in chunks])


class _TokenLosses(torch.autograd.Function):
    """Computes losses and, together with them, their gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, lm_head: nn.Module) -> Tensor:
        losses, gradients = [], []
        for h, of_chunk in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                of_tokens = losses_of(lm_head(h), of_chunk)
                gradients += torch.autograd.grad(of_tokens.sum(), h)
            losses.append(of_tokens.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_losses: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradients,) = ctx.saved_tensors
        return gradients * of_losses[:, None].to(gradients.dtype), None, None


def losses_of(logits: Float[Tensor, "tokens vocabulary"], labels: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Return −log softmax(logits)[label] of each token, in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels.to(logits.device), reduction="none")
