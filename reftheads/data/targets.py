"""The targets of rows: whether a head can be trained on them, asked of a column before anything runs.

What the values of a target may be is the head's to say (`Head.check`, `Head.given`). A target is a number, or a list
of numbers: a number per token, or per output, or both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reftheads.graph.intervention import Head

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped


def read_target(head: Head, value: Any, where: str) -> Shaped[Tensor, ...] | None:
    """Return what a row has as the target of a head; `None` where it has `None`.

    Args:
        where: names the row in an error.

    Raises:
        ValueError: no number, nor a list of numbers; another number of them per prediction than the head needs.
    """
    if value is None:
        return None
    try:
        target = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"target {head.target!r} in {where} is {value!r}: give a number, or a list of numbers"
        ) from None
    if head.target_width is not None and (target.ndim == 0 or target.shape[-1] != head.target_width):
        raise ValueError(
            f"target {head.target!r} in {where} is {value!r}: give {head.target_width} numbers, one per output"
        )
    return target


def check_items(
    head: Head,
    values: Shaped[Tensor, "items ..."],
    row: Int[Tensor, " items"],
    where: str = "row {row}",
) -> bool:
    """Return whether any of these values is a target, after all of them were found possible.

    Args:
        values: the targets of all rows, one after the other.
        row: the number of each value's row, rising.
        where: names a row in an error, with its number put in.

    Raises:
        ValueError: a value that the head's loss has no meaning for.
    """
    try:
        head.check(values)
    except ValueError:  # of all values at once, which does not know rows
        rows, counts = row.unique_consecutive(return_counts=True)
        for i, of_row in zip(rows.tolist(), values.split(counts.tolist()), strict=True):
            head.check(of_row, where.format(row=i))
        raise
    return bool(head.given(values).any())


def check_column(head: Head, column: Sequence[Any], where: str = "row {row}") -> bool:
    """Return whether any row has a target in a column, after all of them were found possible.

    Args:
        column: what each row has there.
        where: names a row in an error, with its number put in.

    Raises:
        ValueError: what is no target, or has no meaning for the head's loss.
    """
    width = () if head.target_width is None else (head.target_width,)
    if not width and all(isinstance(value, int | float) for value in column):
        return check_items(head, torch.tensor(column), torch.arange(len(column)), where)
    read = (read_target(head, value, where.format(row=i)) for i, value in enumerate(column))
    by_row = {i: target.reshape(-1, *width) for i, target in enumerate(read) if target is not None}
    if not by_row:
        return False
    rows, counts = torch.tensor(list(by_row)), torch.tensor([len(target) for target in by_row.values()])
    return check_items(head, torch.cat(list(by_row.values())), rows.repeat_interleave(counts), where)
