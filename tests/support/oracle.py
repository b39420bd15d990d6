"""What an edit should do, said as simply as possible: one row at a time, no padding, no cache, columns in lists.

And a language model's loss without rounding, for comparisons in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss import loss_utils

from reftheads.reuse import frozen, vocabulary
from support import rules

Formula = Callable[[Tensor], Tensor]
"""Hidden states [tokens width] -> edited hidden states, for every token."""

Change = Callable[[Tensor, int], Tensor]
"""Hidden states [tokens width] of one row and the length of its prompt -> hidden states that go on."""


def columns(rule: str, prompt: int, total: int) -> list[int]:
    """The columns that a rule means in a row of `total` tokens of which the first `prompt` are the prompt."""
    return rules.selected(rule, range(total), range(prompt))


def at(rule: str, formula: Formula) -> Change:
    """The change that applies `formula` at the tokens of `rule` and leaves the others alone."""

    def change(h: Tensor, prompt: int) -> Tensor:
        new, edited = h.clone(), formula(h)
        for column in columns(rule, prompt, len(h)):
            new[column] = edited[column]
        return new

    return change


def loreft(node: nn.Module) -> Formula:
    """h + Rᵀ(Wh + b − Rh) with the weights of `node`."""
    r, w, b = (getattr(node, letter).detach() for letter in ("R", "W", "b"))
    return lambda h: h + (h @ w.T + b - h @ r.T) @ r


def adding(v: Tensor) -> Formula:
    """h + v."""
    return lambda h: h + v


def logits(
    base: nn.Module, changes: Sequence[tuple[str, Change]], ids: Sequence[int], prompt: int, **inputs: Tensor
) -> Tensor:
    """[tokens vocabulary]: what the unhooked `base` says of one row when `changes` are made at the outputs of
    the named modules."""

    def hook(change: Change) -> Callable:
        def after(module, args, output):
            h = output if isinstance(output, Tensor) else output[0]
            new = change(h[0], prompt)[None]
            return new if isinstance(output, Tensor) else (new, *output[1:])

        return after

    handles = [base.get_submodule(path).register_forward_hook(hook(change)) for path, change in changes]
    try:
        with torch.no_grad():
            return base(input_ids=torch.tensor([list(ids)]), use_cache=False, **inputs).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def pad(rows: Sequence[Sequence[int]], side: str) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `position_ids` of rows padded on one side."""
    width = max(map(len, rows))
    empty = [[0] * (width - len(row)) for row in rows]
    joined = [(gap, list(row)) if side == "left" else (list(row), gap) for row, gap in zip(rows, empty, strict=True)]
    ids = torch.tensor([a + b for a, b in joined])
    sizes = [(len(gap), len(row)) for row, gap in zip(rows, empty, strict=True)]
    mask = torch.tensor([[0] * g + [1] * r if side == "left" else [1] * r + [0] * g for g, r in sizes])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def real(values: Tensor, mask: Tensor) -> list[Tensor]:
    """Of every row of [rows columns …], what lies at real tokens."""
    return [row[there.bool()] for row, there in zip(values, mask, strict=True)]


def exact_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Any = None,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' loss of a causal language model, without its conversion to float32."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    loss = F.cross_entropy(logits.reshape(-1, vocab_size), shift_labels.reshape(-1), reduction="sum")
    return loss / ((shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


_UPCAST = vocabulary.as_the_loss_takes_them


@contextmanager
def causal_loss(function: Any) -> Iterator[None]:
    """Within, causal language models have this loss, and it is taken for the usual one."""
    exact = function is exact_loss  # which takes logits as they are
    upcast = (lambda logits: logits) if exact else _UPCAST
    with (
        mock.patch.object(vocabulary, "as_the_loss_takes_them", upcast),
        mock.patch.dict(loss_utils.LOSS_MAPPING, ForCausalLM=function),
        mock.patch.object(frozen, "ForCausalLMLoss", function),
    ):
        yield
