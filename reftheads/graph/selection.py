"""The tokens that a rule selected, as tensors: taking them out of hidden states and putting new ones in their place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reftheads._utils.lazy import cached

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Selection:
    """Hold the selected tokens of one chunk, in one of three forms.

    * `mask` and `columns` both `None`: every token of the chunk.
    * `mask`: the tokens where it holds.
    * `columns`, `valid`: each row's selected columns in rising order, then slots that are not valid. The
      columns of a row differ from each other, so a scatter is exact.
    """

    mask: Bool[Tensor, "batch chunk"] | None = None
    columns: Int[Tensor, "batch slots"] | None = None
    valid: Bool[Tensor, "batch slots"] | None = None
    _flat: dict[int, Int[Tensor, " all_slots"]] = field(init=False, repr=False, compare=False, default_factory=dict)

    @cached
    def _kept(self) -> Bool[Tensor, "batch slots 1"]:
        """Return which slots hold a selected token."""
        valid = self.mask if self.columns is None else self.valid
        assert valid is not None
        return valid[..., None]

    def _indices(self, chunk: int) -> Int[Tensor, " all_slots"]:
        """Return where the slots' tokens lie in rows of this many columns that stand one after the other."""
        if chunk not in self._flat:
            assert self.columns is not None
            rows = torch.arange(self.columns.shape[0], device=self.columns.device)[:, None]
            self._flat[chunk] = (rows * chunk + self.columns).flatten()
        return self._flat[chunk]

    def rows(self, keep: Bool[Tensor, " batch"], chunk: int) -> Selection:
        """Return the same selection in the rows where `keep` holds, nothing in the others."""
        if self.columns is not None:
            assert self.valid is not None
            return Selection(columns=self.columns, valid=self.valid & keep[:, None])
        mask = keep[:, None].expand(-1, chunk)
        return Selection(mask=mask if self.mask is None else self.mask & mask)

    def of(self, share: slice) -> Selection:
        """Return the selection of some of the rows, for a tensor that has no others."""
        mask, columns, valid = (None if t is None else t[share] for t in (self.mask, self.columns, self.valid))
        return Selection(mask, columns, valid)

    def gather(self, h: Float[Tensor, "batch chunk width"]) -> Float[Tensor, "batch slots width"]:
        """Return the selected tokens, or `h` where slots are columns."""
        if self.columns is None:
            return h
        return h.flatten(0, 1).index_select(0, self._indices(h.shape[1])).view(*self.columns.shape, -1)

    def scatter(
        self,
        h: Float[Tensor, "batch chunk width"],
        picked: Float[Tensor, "batch slots width"],
        new: Float[Tensor, "batch slots width"],
    ) -> Float[Tensor, "batch chunk width"]:
        """Return `h` with `new` in place of `picked = gather(h)` at the selected tokens; others stay bit for bit."""
        if self.columns is None:
            return new if self.mask is None else torch.where(self._kept, new, h)
        new = torch.where(self._kept, new, picked).flatten(0, 1)
        return h.flatten(0, 1).index_copy(0, self._indices(h.shape[1]), new).view_as(h)

    def validity(self, h: Float[Tensor, "batch chunk width"]) -> Bool[Tensor, "batch slots"]:
        """Return which slots of `gather(h)` hold a selected token."""
        if self.columns is not None:
            assert self.valid is not None
            return self.valid
        return h.new_ones(h.shape[:2], dtype=torch.bool) if self.mask is None else self.mask
