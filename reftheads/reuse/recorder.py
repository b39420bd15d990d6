"""What a frozen base model computes, run once without gradient and kept in a store.

Three things are kept of a row: the keys and values of its prefix, the hidden states that leave the last block
that no edit reaches, and what constant readers see. All are found by the row's content.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reftheads.reuse.cone import Cone
from reftheads.reuse.facts import Facts
from reftheads.reuse.fingerprint import content, content_of_ids
from reftheads.reuse.frozen import Capture, Tap, inputs_of, run_frozen
from reftheads.reuse.layout import Rows
from reftheads.reuse.prefix_cache import Piece, cache_of
from reftheads.reuse.prefixes import Prefixes
from reftheads.reuse.shelf import Entry, Shelf
from reftheads.reuse.store import ActivationStore
from reftheads.runtime.plan import PlannedNode

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Place = PlannedNode | None  # a constant reader; None: the last block that no edit reaches


@dataclass(frozen=True)
class Recorded:
    """What the base model computes of some rows, row by row.

    Attributes:
        hidden: what leaves the last block below the cone, of the computed part of each row; `None`: not needed.
        read: of the tokens that a constant reader selects, what it sees.
        past: the pieces of each row's prefix.
    """

    hidden: list[Float[Tensor, "tokens width"]] | None
    read: dict[PlannedNode, list[Float[Tensor, "selected width"]]]
    past: list[list[Piece]]


class Recorder:
    """Runs the frozen stack of a model on rows that nobody has seen, and remembers.

    Args:
        facts: of the model.
        store: where the activations are kept; `None` keeps none.
    """

    def __init__(self, facts: Facts, store: ActivationStore | None):
        self.facts = facts
        self.store = store

    def rows(self, cone: Cone, rows: Rows, above: bool) -> Recorded:
        """Return all of `rows` that is needed below and before the cone; rows that are alike are computed once.

        Args:
            above: whether anything runs above `cone.cut`, so that its hidden states are needed.
        """
        shelf = Shelf(self.facts, self.store)
        keys = _keys(shelf, cone, rows, above)
        of_readers = (of_rows for place, of_rows in keys.items() if place is not None)
        alike = list(zip(rows.ids, rows.layout.prefixes, *of_readers, strict=True))
        unique = {row: j for j, row in enumerate(dict.fromkeys(alike))}
        if len(unique) == len(alike):
            return self._rows(shelf, cone, rows, keys)
        firsts = [alike.index(row) for row in unique]
        keys = {place: [of_rows[i] for i in firsts] for place, of_rows in keys.items()}
        once = self._rows(shelf, cone, rows.of(firsts), keys)
        index = [unique[row] for row in alike]
        hidden = None if once.hidden is None else [once.hidden[j] for j in index]
        read = {reader: [seen[j] for j in index] for reader, seen in once.read.items()}
        return Recorded(hidden, read, [once.past[j] for j in index])

    def _rows(self, shelf: Shelf, cone: Cone, rows: Rows, keys: Mapping[Place, list[str]]) -> Recorded:
        entries: dict[Place, list[Entry | None]] = {place: [shelf.get(key) for key in keys[place]] for place in keys}
        past: list[list[Piece] | None] = [[] for _ in rows.ids]
        prefixes = Prefixes(self.facts, shelf)
        if rows.divided and cone.cut < len(self.facts.blocks):
            every = zip(rows.ids, rows.layout.prefixes, strict=True)
            past = [prefixes.find(row, length, cone.cut) for row, length in every]
        missing = [
            i
            for i, pieces in enumerate(past)
            if pieces is None or any(of_rows[i] is None for of_rows in entries.values())
        ]
        if missing:
            of_missing = rows.of(missing)
            if rows.divided:
                computed, pieces = self._divided(prefixes, cone, of_missing, keys)
            else:
                computed, pieces = self._whole(cone, of_missing, keys), [[] for _ in missing]
            for j, i in enumerate(missing):
                past[i] = pieces[j]
                for place in keys:
                    entries[place][i] = {"h": computed[place][j]}
            shelf.put({keys[place][i]: entries[place][i] for place in keys for i in missing})
        seen = {place: [entry["h"] for entry in of_rows if entry is not None] for place, of_rows in entries.items()}
        return Recorded(seen.pop(None, None), seen, [pieces or [] for pieces in past])  # type: ignore[arg-type]

    def prefixes(self, tokens: Sequence[Int[Tensor, " tokens"]]) -> list[list[Piece]]:
        """Return the keys and values of all tokens of some rows, in all blocks."""
        prefixes = Prefixes(self.facts, Shelf(self.facts, self.store))
        rows = [content_of_ids(row) for row in tokens]
        past = [prefixes.find(row, len(ids), 0) for row, ids in zip(rows, tokens, strict=True)]
        missing = [i for i, pieces in enumerate(past) if pieces is None]
        if missing:
            ids = [tokens[i] for i in missing]
            computed, _, _ = prefixes.compute([rows[i] for i in missing], ids, [len(row) for row in ids], 0)
            for i, pieces in zip(missing, computed, strict=True):
                past[i] = pieces
        return [pieces or [] for pieces in past]

    def _whole(
        self, cone: Cone, rows: Rows, places: Collection[Place]
    ) -> dict[Place, list[Float[Tensor, "tokens width"]]]:
        """Return what is at each place in rows without a prefix: of all tokens, or of those that a reader selects."""
        taps = {place: _tap(cone, place) for place in places}
        tapped = run_frozen(self.facts, Capture(set(places)), taps, rows.fed)
        masks = {p: rows.layout.real if p is None else rows.masks[p.node.positions] for p in places}
        return {p: [h[mask.to(h.device)] for h, mask in zip(tapped[p], masks[p], strict=True)] for p in places}

    def _divided(
        self, prefixes: Prefixes, cone: Cone, rows: Rows, places: Collection[Place]
    ) -> tuple[dict[Place, list[Float[Tensor, "tokens width"]]], list[list[Piece]]]:
        """Return what is at each place in rows with a prefix, and the pieces of these."""
        lengths = rows.layout.prefixes
        readers = [place for place in places if place is not None]
        limits = _before_readers(cone, rows)
        prefixes.share(rows, min(limits))
        tokens = [row[:length] for row, length in zip(rows.tokens, lengths, strict=True)]
        taps = {place: _tap(cone, place) for place in readers}
        past, starts, before = prefixes.compute(rows.ids, tokens, list(map(min, lengths, limits)), cone.cut, taps)
        pieces_above = [[piece.since(cone.cut) for piece in pieces] for pieces in past]
        if not places:
            return {}, pieces_above
        inputs = inputs_of(self.facts, rows.layout.pick(rows.fed["input_ids"]), rows.layout)
        cache = cache_of(past, rows.layout.past, rows.layout.columns.shape[1], len(self.facts.blocks))
        taps = {place: _tap(cone, place) for place in places}
        behind = run_frozen(self.facts, Capture(set(places)), taps, inputs, cache)
        rests = [n - p for n, p in zip(rows.lengths, lengths, strict=True)]
        out = {place: [h[:n] for h, n in zip(behind[place], rests, strict=True)] for place in places}
        for reader in readers:
            for i, selected in enumerate(rows.selected(reader.node.positions)):
                rest = out[reader][i]
                first = before[reader][i, : lengths[i] - starts[i]] if reader in before else rest[:0]
                seen = torch.cat([first, rest])
                out[reader][i] = seen[selected.to(seen.device) - (lengths[i] - len(first))]
        return out, pieces_above


def _keys(shelf: Shelf, cone: Cone, rows: Rows, above: bool) -> dict[Place, list[str]]:
    """Return under which keys hidden states, and what constant readers see, are kept, row by row."""
    keys: dict[Place, list[str]] = {}
    if above and cone.cut:
        every = zip(rows.layout.prefixes, rows.ids, strict=True)
        keys[None] = [shelf.key(cone.cut, prefix, row) for prefix, row in every]
    for reader in cone.constant:
        where = f"{reader.address.module} {reader.address.side} {reader.address.columns}"
        every = zip(rows.selected(reader.node.positions), rows.ids, strict=True)
        keys[reader] = [shelf.key(where, content(selected), row) for selected, row in every]
    return keys


def _tap(cone: Cone, place: Place) -> Tap:
    if place is None:
        return Tap(cone.stack.blocks[cone.cut - 1], "output")
    return Tap(place.address.module, place.address.side, place.address.index)


def _before_readers(cone: Cone, rows: Rows) -> list[int]:
    """Return how many tokens of each row no constant reader looks at: the others it must see go by."""
    selected = [rows.selected(reader.node.positions) for reader in cone.constant]
    return [
        min((int(of_rows[i].min()) for of_rows in selected if len(of_rows[i])), default=length)
        for i, length in enumerate(rows.lengths)
    ]
