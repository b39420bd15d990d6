"""Where the tokens of a batch lie when only a part of them is computed.

A row's real tokens are a prefix, which is known, and the rest. The rests of all rows are computed as one
pass, padded at the right; the prefixes before them are in a cache, padded at the left. Each row is then
without a gap, and every distance between two of its tokens is the true one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reftheads.graph.positions import Positions

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


@dataclass(frozen=True)
class Layout:
    """The computed part of a batch. All tensors lie on the CPU.

    Attributes:
        columns: of every computed token, its column in the batch.
        real: whether it is one; the others fill up the rows.
        prefixes: of every row, how many real tokens come before its computed part.
    """

    columns: Int[Tensor, "rows computed"]
    real: Bool[Tensor, "rows computed"]
    prefixes: tuple[int, ...]

    @classmethod
    def whole(cls, mask: Bool[Tensor, "rows columns"]) -> Layout:
        """Return a layout in which everything is computed, each token where it stands in the batch."""
        return cls(torch.arange(mask.shape[1]).expand_as(mask), mask, (0,) * mask.shape[0])

    @classmethod
    def behind(cls, prefixes: Sequence[int], lengths: Sequence[int], starts: Sequence[int]) -> Layout:
        """Return what follows the prefix of each row.

        Args:
            prefixes: tokens before the computed part, at least one fewer than there are.
            lengths: real tokens of each row.
            starts: the column of each row's first token.
        """
        before, total, start = (torch.tensor(values)[:, None] for values in (prefixes, lengths, starts))
        steps = torch.arange(int((total - before).max()))
        real = steps < total - before
        return cls(start + torch.minimum(before + steps, total - 1).clamp(min=0), real, tuple(prefixes))

    @property
    def past(self) -> int:
        """Return how many columns the cache has."""
        return max(self.prefixes)

    @property
    def attention_mask(self) -> Int[Tensor, "rows all_columns"]:
        """Return the mask over the cache and the computed part."""
        before = torch.arange(self.past) >= self.past - torch.tensor(self.prefixes)[:, None]
        return torch.cat([before, self.real], dim=1).long()

    @property
    def position_ids(self) -> Int[Tensor, "rows computed"]:
        """Return how many real tokens come before each computed one."""
        count = self.real.sum(1, keepdim=True)
        steps = torch.minimum(torch.arange(self.real.shape[1]), (count - 1).clamp(min=0))
        return torch.tensor(self.prefixes)[:, None] + steps

    def pick(self, values: Tensor) -> Tensor:
        """Return [rows computed …] of the batch's [rows columns …]."""
        columns = self.columns.to(values.device)
        return values[torch.arange(len(columns), device=values.device)[:, None], columns]


@dataclass(frozen=True)
class Rows:
    """The rows of a batch and how they are divided.

    Attributes:
        fed: what the stack is fed of the batch, by argument, on the model's device.
        ids: of every row, all that the stack is fed of its real tokens.
        layout: the computed part.
        masks: of every rule, what it selects of the batch; on the CPU.
        silent: the rules whose nodes neither edit nor read in such a batch.
        starts, lengths: the column of each row's first real token; how many there are, those left out that come
            behind all that is looked at.
        divided: whether prefixes are left out. What is computed stands where it stood otherwise.
    """

    fed: dict[str, Tensor]
    ids: list[bytes]
    layout: Layout
    masks: dict[Positions, Bool[Tensor, "rows columns"]]
    silent: frozenset[Positions]
    starts: list[int]
    lengths: list[int]
    divided: bool

    @property
    def tokens(self) -> list[Int[Tensor, " tokens"]]:
        """Return the real tokens of rows that are divided."""
        every = zip(self.fed["input_ids"], self.starts, self.lengths, strict=True)
        return [row[start : start + length] for row, start, length in every]

    def selected(self, rule: Positions) -> list[Int[Tensor, " selected"]]:
        """Return the tokens that a rule selects, counted from the first column that has one."""
        return [mask[start:].nonzero()[:, 0] for mask, start in zip(self.masks[rule], self.starts, strict=True)]

    def of(self, some: Sequence[int]) -> Rows:
        """Return some of the rows."""
        starts, lengths, prefixes = (
            [values[i] for i in some] for values in (self.starts, self.lengths, self.layout.prefixes)
        )
        index = list(some)
        layout = Layout.behind(prefixes, lengths, starts) if self.divided else Layout.whole(self.layout.real[index])
        fed = {name: values[index] for name, values in self.fed.items()}
        masks = {rule: mask[index] for rule, mask in self.masks.items()}
        ids = [self.ids[i] for i in some]
        return Rows(fed, ids, layout, masks, self.silent, starts, lengths, self.divided)
