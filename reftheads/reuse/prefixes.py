"""Keys and values of what rows begin with: found by content, else computed; shared where rows agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reftheads.reuse.facts import Facts
from reftheads.reuse.frozen import FILLED, Capture, Tap, inputs_of, run_frozen
from reftheads.reuse.layout import Layout, Rows
from reftheads.reuse.prefix_cache import Piece, cache_of, pieces_of
from reftheads.reuse.shelf import Entry, Shelf

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SHARED = 32  # tokens: what rows have in common at their beginning is kept in multiples of so many


class Prefixes:
    """The prefixes of rows of one model, on one shelf.

    A row is known by its content, eight bytes a token. A prefix is made of pieces, of which the first may be shared
    with other rows.

    Args:
        facts: of the model.
        shelf: where pieces are kept.
    """

    def __init__(self, facts: Facts, shelf: Shelf):
        self.facts = facts
        self.shelf = shelf

    def find(self, row: bytes, length: int, first: int) -> list[Piece] | None:
        """Return a row's first `length` tokens from block `first` on; `None` where some of it is missing."""
        pieces: list[Piece] = []
        while length:
            entry = self.shelf.get(self._key(row, length))
            if entry is None or int(entry["first"]) > first:
                return None
            pieces.insert(0, Piece(entry["keys"], entry["values"], int(entry["first"])).since(first))
            length = int(entry["start"])
        return pieces

    def compute(
        self,
        rows: Sequence[bytes],
        tokens: Sequence[Int[Tensor, " tokens"]],
        limits: Sequence[int],
        first: int,
        taps: Mapping[Any, Tap] | None = None,
    ) -> tuple[list[list[Piece]], list[int], dict[Any, Float[Tensor, "rows columns width"]]]:
        """Compute prefixes in all blocks, and keep them from block `first` on.

        Args:
            rows: their rows' content.
            tokens: of each prefix.
            limits: how many tokens of each need not be computed, if they are known from other rows.
            taps: what else is wanted of the pass.

        Returns:
            The pieces of each prefix, how many of its tokens were not computed, and what was tapped from there on.
        """
        known = [self._longest(row, limit) for row, limit in zip(rows, limits, strict=True)]
        starts = [sum(map(len, pieces)) for pieces in known]
        rests = [row[start:] for row, start in zip(tokens, starts, strict=True)]
        new, tapped = self._pass(rests, known, taps or {})
        if first < len(self.facts.blocks):
            entries = zip(rows, tokens, starts, new, strict=True)
            self.shelf.put(
                {
                    self._key(row, len(prefix)): _entry(piece.since(first), start)
                    for row, prefix, start, piece in entries
                    if len(piece)
                }
            )
        pieces = [[*old, piece] if len(piece) else old for old, piece in zip(known, new, strict=True)]
        return pieces, starts, tapped

    def share(self, rows: Rows, limit: int) -> None:
        """Compute once what all rows begin with, up to `limit` tokens, and keep it, if that is long enough."""
        if len(rows.ids) < 2 or self.shelf.store is None:
            return
        prefixes = [t[:p] for t, p in zip(rows.tokens, rows.layout.prefixes, strict=True)]
        columns = pad_sequence(prefixes, batch_first=True, padding_value=-1).cpu()
        alike = (columns == columns[0]).all(0) & (columns[0] >= 0)
        common = min(_count(takewhile(bool, alike)), limit) // SHARED * SHARED
        known = self._longest(rows.ids[0], common)
        start = sum(map(len, known))
        if common > start:
            [piece], _ = self._pass([prefixes[0][start:common]], [known], {})
            self.shelf.put({self._key(rows.ids[0], common): _entry(piece, start)})

    def _longest(self, row: bytes, limit: int) -> list[Piece]:
        """Return the longest known beginning of a row that rows share, in all blocks."""
        for length in range(limit // SHARED * SHARED, 0, -SHARED):
            if self._key(row, length) in self.shelf:
                pieces = self.find(row, length, 0)
                if pieces is not None:
                    return pieces
        return []

    def _key(self, row: bytes, length: int) -> str:
        return self.shelf.key("prefix", row[: 8 * length])

    def _pass(
        self, tokens: Sequence[Int[Tensor, " tokens"]], known: Sequence[Sequence[Piece]], taps: Mapping[Any, Tap]
    ) -> tuple[list[Piece], dict[Any, Float[Tensor, "rows columns width"]]]:
        """Return keys and values of `tokens` behind what is known, in all blocks, and what is tapped there."""
        lengths = [len(row) for row in tokens]
        if not any(lengths):
            return [Piece(torch.empty(0, 0, 0, 0), torch.empty(0, 0, 0, 0), 0) for _ in tokens], {}
        before = [sum(map(len, pieces)) for pieces in known]
        layout = Layout.behind(before, [b + n for b, n in zip(before, lengths, strict=True)], [0] * len(before))
        ids = pad_sequence(list(tokens), batch_first=True)
        capture = Capture({FILLED, *taps})
        filled = partial(capture.take, FILLED, ids)
        cache = cache_of(known, layout.past, ids.shape[1], len(self.facts.blocks), filled)
        tapped = run_frozen(self.facts, capture, taps, inputs_of(self.facts, ids, layout), cache)
        return pieces_of(cache, layout.past, lengths, 0), tapped


def _entry(piece: Piece, start: int) -> Entry:
    return {
        "keys": piece.keys, "values": piece.values, "first": torch.tensor(piece.first), "start": torch.tensor(start)
    }  # fmt: skip


def _count(items: Iterable[Any]) -> int:
    return sum(1 for _ in items)
