"""What a frozen base model computes, run once without gradient and kept in a store.

Three things are kept of a row: the keys and values of its prefix, the hidden states that leave the last block
that no edit reaches, and what constant readers see. All are found by the row's content.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from reftheads.architectures.addresses import StackInfo, arguments
from reftheads.reuse.cone import Cone
from reftheads.reuse.fingerprint import Fingerprint, content, content_of_ids, digest
from reftheads.reuse.layout import Layout, Rows
from reftheads.reuse.prefix_cache import Piece, cache_of, pieces_of
from reftheads.reuse.store import ActivationStore
from reftheads.runtime.hooks import Done, attach
from reftheads.runtime.interventions import Interventions
from reftheads.runtime.plan import PlannedNode

SHARED = 32  # tokens: what rows have in common at their beginning is kept in multiples of so many

Entry = dict[str, Tensor]
Place = PlannedNode | None  # a constant reader; None: the last block that no edit reaches


@dataclass(frozen=True)
class Recorded:
    """What the base model computes of some rows, row by row."""

    hidden: list[Tensor] | None  # [tokens width], of the computed part of each row
    read: dict[PlannedNode, list[Tensor]]  # [tokens width], of the tokens that a reader selects
    past: list[list[Piece]]  # the prefix


@dataclass
class _Capture:
    """What a pass without gradient is run for."""

    wanted: set[Any]
    got: dict[Any, Tensor] = field(default_factory=dict)

    def take(self, name: Any, h: Tensor) -> None:
        self.got[name] = h.detach()
        if self.wanted <= self.got.keys():
            raise Done


class Recorder:
    """Runs the frozen stack of a model, and remembers.

    Args:
        base: the model, in which graphs are compiled.
        layer: its interventions, which do not act while this runs.
        info: the stack.
        store: where the activations are kept; `None` keeps none.
    """

    def __init__(self, base: nn.Module, layer: Interventions, info: StackInfo, store: ActivationStore | None):
        self.base = base
        self.layer = layer
        self.stack = base.get_submodule(info.path)
        self.arguments = frozenset(arguments(self.stack))
        self.blocks = info.blocks
        self.store = store
        self.fingerprint = Fingerprint(base)

    def rows(self, cone: Cone, rows: Rows, above: bool) -> Recorded:
        """Everything of `rows` that is needed below and before the cone; rows that are alike are computed once.

        Args:
            above: whether anything runs above `cone.cut`, so that its hidden states are needed.
        """
        settings = self._settings()
        keys = self._keys(settings, cone, rows, above)
        of_readers = (of_rows for place, of_rows in keys.items() if place is not None)
        alike = list(zip(rows.ids, rows.layout.prefixes, *of_readers, strict=True))
        unique = {row: j for j, row in enumerate(dict.fromkeys(alike))}
        if len(unique) == len(alike):
            return self._rows(cone, rows, keys, settings)
        some = [alike.index(row) for row in unique]
        own = {place: [of_rows[i] for i in some] for place, of_rows in keys.items()}
        one = self._rows(cone, rows.of(some), own, settings)
        index = [unique[row] for row in alike]
        hidden = None if one.hidden is None else [one.hidden[j] for j in index]
        read = {reader: [seen[j] for j in index] for reader, seen in one.read.items()}
        return Recorded(hidden, read, [one.past[j] for j in index])

    def _keys(self, settings: str, cone: Cone, rows: Rows, above: bool) -> dict[Place, list[str]]:
        """Under which keys hidden states, and what constant readers see, are kept, row by row."""
        keys: dict[Place, list[str]] = {}
        if above and cone.cut:
            keys[None] = [
                digest(settings, cone.cut, p, ids) for p, ids in zip(rows.layout.prefixes, rows.ids, strict=True)
            ]
        for reader in cone.constant:
            where = f"{reader.address.module} {reader.address.side} {reader.address.columns}"
            keys[reader] = [
                digest(settings, where, content(selected), ids)
                for selected, ids in zip(rows.selected(reader.node.positions), rows.ids, strict=True)
            ]
        return keys

    def _rows(self, cone: Cone, rows: Rows, keys: Mapping[Place, list[str]], settings: str) -> Recorded:
        found: dict[Place, list[Entry | None]] = {place: [self._get(key) for key in keys[place]] for place in keys}
        past: list[list[Piece] | None] = [[] for _ in rows.ids]
        if rows.divided and cone.cut < len(self.blocks):
            past = [
                self._prefix(settings, ids, p, cone.cut) for ids, p in zip(rows.ids, rows.layout.prefixes, strict=True)
            ]
        missing = [
            i
            for i, pieces in enumerate(past)
            if pieces is None or any(entries[i] is None for entries in found.values())
        ]
        if missing:
            some = rows.of(missing)
            compute = self._divided if rows.divided else self._whole
            computed, pieces = compute(cone, some, keys, settings)
            for j, i in enumerate(missing):
                past[i] = pieces[j]
                for place in keys:
                    found[place][i] = {"h": computed[place][j]}
            self._put({keys[place][i]: found[place][i] for place in keys for i in missing})
        seen = {place: [entry["h"] for entry in entries if entry is not None] for place, entries in found.items()}
        return Recorded(seen.pop(None, None), seen, [pieces or [] for pieces in past])  # type: ignore[arg-type]

    def prefixes(self, tokens: Sequence[Tensor]) -> list[list[Piece]]:
        """The keys and values of all tokens of some rows, in all blocks."""
        settings = self._settings()
        ids = [content_of_ids(row) for row in tokens]
        past = [self._prefix(settings, key, len(row), 0) for key, row in zip(ids, tokens, strict=True)]
        missing = [i for i, pieces in enumerate(past) if pieces is None]
        if missing:
            lengths = [len(tokens[i]) for i in missing]
            own, _, _ = self._new(settings, [ids[i] for i in missing], [tokens[i] for i in missing], lengths, 0)
            for i, pieces in zip(missing, own, strict=True):
                past[i] = pieces
        return [pieces or [] for pieces in past]

    @cached_property
    def keeps_pieces(self) -> bool:
        """Whether all blocks keep keys and values of one shape for a token; one token shows it."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(self.stack.parameters()).device)
        cache = cache_of([[]], 0, 1, len(self.blocks))
        self._run(None, _Capture({"filled"}), self.inputs(ids, Layout.behind([0], [1], [0])), cache)
        try:
            pieces_of(cache, 0, [1], 0)
        except ValueError:
            return False
        return True

    def _settings(self) -> str:
        device = self.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return digest(str(self.fingerprint), str(autocast))

    def _get(self, key: str) -> Entry | None:
        entry = None if self.store is None else self.store.get(key)
        if entry is None:
            return None
        # numbers are for the host; a store may keep the rest elsewhere
        return {name: t.to(self.device, non_blocking=True) if t.ndim else t for name, t in entry.items()}

    @property
    def device(self) -> torch.device:
        """Where the stack runs."""
        return next((p.device for p in self.stack.parameters()), torch.device("cpu"))

    def _put(self, entries: Mapping[str, Any]) -> None:
        if self.store is not None and entries:
            self.store.put(entries)

    # --- rows as they are -----------------------------------------------------------------------------------

    def _whole(
        self, cone: Cone, rows: Rows, places: Collection[Place], settings: str
    ) -> tuple[dict[Place, list[Tensor]], list[list[Piece]]]:
        got = self._run(cone, _Capture(set(places)), rows.fed)
        masks = {p: rows.layout.real if p is None else rows.masks[id(p.node.positions)] for p in places}
        return {p: [h[mask.to(h.device)] for h, mask in zip(got[p], masks[p], strict=True)] for p in places}, [
            [] for _ in rows.ids
        ]

    # --- rows with a prefix ---------------------------------------------------------------------------------

    def _divided(
        self, cone: Cone, rows: Rows, places: Collection[Place], settings: str
    ) -> tuple[dict[Place, list[Tensor]], list[list[Piece]]]:
        tokens, prefixes = rows.tokens, rows.layout.prefixes
        # a constant reader must see its tokens go by
        limits = [min((int(s.min()) for s in found if len(s)), default=n) for found, n in self._selected(cone, rows)]
        self._share(rows, min(limits), settings)
        past, start, before = self._new(
            settings,
            rows.ids,
            [row[:p] for row, p in zip(tokens, prefixes, strict=True)],
            list(map(min, prefixes, limits)),
            cone.cut,
            cone,
            {place for place in places if place is not None},
        )
        out: dict[Place, list[Tensor]] = {}
        if places:
            inputs = self.inputs(rows.layout.pick(rows.fed["input_ids"]), rows.layout)
            room = rows.layout.columns.shape[1]
            cache = cache_of(past, rows.layout.past, room, len(self.blocks))
            got = self._run(cone, _Capture(set(places)), inputs, cache)
            rests = [n - p for n, p in zip(rows.lengths, prefixes, strict=True)]
            for place in places:
                out[place] = [h[:n] for h, n in zip(got[place], rests, strict=True)]
                if place is not None:
                    for i, selected in enumerate(rows.selected(place.node.positions)):
                        first = before[place][i, : prefixes[i] - start[i]] if place in before else out[place][i][:0]
                        seen = torch.cat([first, out[place][i]])
                        out[place][i] = seen[selected.to(seen.device) - (prefixes[i] - len(first))]
        return out, [[piece.since(cone.cut) for piece in pieces] for pieces in past]

    @staticmethod
    def _selected(cone: Cone, rows: Rows) -> list[tuple[list[Tensor], int]]:
        """Of every row, what each constant reader selects; and its length."""
        every = [rows.selected(reader.node.positions) for reader in cone.constant]
        return [([found[i] for found in every], n) for i, n in enumerate(rows.lengths)]

    def _share(self, rows: Rows, limit: int, settings: str) -> None:
        """Computes once what all rows begin with, and keeps it, if that is long enough."""
        if len(rows.ids) < 2 or self.store is None:
            return
        prefixes = [t[:p] for t, p in zip(rows.tokens, rows.layout.prefixes, strict=True)]
        same = pad_sequence(prefixes, batch_first=True, padding_value=-1).cpu()
        common = sum(1 for _ in takewhile(bool, (same == same[0]).all(0) & (same[0] >= 0)))
        common = min(common, limit) // SHARED * SHARED
        known = self._longest(settings, rows.ids[0], common)
        at = sum(map(len, known))
        if common > at:
            [piece], _ = self._pass(None, [prefixes[0][at:common]], [known], ())
            self._put({self._prefix_key(settings, rows.ids[0], common): _entry(piece, at)})

    def _longest(self, settings: str, ids: bytes, limit: int) -> list[Piece]:
        """The keys and values in all blocks of the longest known beginning of a row that rows share."""
        for length in range(limit // SHARED * SHARED, 0, -SHARED) if self.store is not None else ():
            assert self.store is not None
            if self._prefix_key(settings, ids, length) in self.store:
                pieces = self._prefix(settings, ids, length, 0)
                if pieces is not None:
                    return pieces
        return []

    def _prefix(self, settings: str, ids: bytes, length: int, first: int) -> list[Piece] | None:
        """The keys and values of a row's first tokens, from block `first` on; `None` where some are missing."""
        pieces: list[Piece] = []
        while length:
            entry = self._get(self._prefix_key(settings, ids, length))
            if entry is None or int(entry["first"]) > first:
                return None
            pieces.insert(0, Piece(entry["keys"], entry["values"], int(entry["first"])).since(first))
            length = int(entry["start"])
        return pieces

    @staticmethod
    def _prefix_key(settings: str, ids: bytes, length: int) -> str:
        return digest(settings, "prefix", ids[: 8 * length])  # ids are integers of 64 bits

    def _new(
        self,
        settings: str,
        ids: Sequence[bytes],
        tokens: Sequence[Tensor],
        limits: Sequence[int],
        first: int,
        cone: Cone | None = None,
        readers: Collection[PlannedNode] = (),
    ) -> tuple[list[list[Piece]], list[int], dict[Any, Tensor]]:
        """The keys and values of prefixes that are not known, in all blocks; those from block `first` on are kept.

        Args:
            limits: how many tokens of each prefix need not be computed, if they are known from other rows.

        Returns:
            The pieces of each prefix, how many tokens were not computed, and what `readers` see from there on.
        """
        known = [self._longest(settings, row, limit) for row, limit in zip(ids, limits, strict=True)]
        start = [sum(map(len, pieces)) for pieces in known]
        new, seen = self._pass(cone, [row[c:] for row, c in zip(tokens, start, strict=True)], known, readers)
        if first < len(self.blocks):
            self._put(
                {
                    self._prefix_key(settings, row, len(prefix)): _entry(piece.since(first), c)
                    for row, prefix, c, piece in zip(ids, tokens, start, new, strict=True)
                    if len(piece)
                }
            )
        past = [[*old, piece] if len(piece) else old for old, piece in zip(known, new, strict=True)]
        return past, start, seen

    def _pass(
        self,
        cone: Cone | None,
        tokens: Sequence[Tensor],
        known: Sequence[Sequence[Piece]],
        readers: Collection[PlannedNode],
    ) -> tuple[list[Piece], dict[Any, Tensor]]:
        """The keys and values of `tokens` behind what is known, in all blocks, and what readers see there."""
        lengths = [len(row) for row in tokens]
        if not any(lengths):
            return [Piece(torch.empty(0, 0, 0, 0), torch.empty(0, 0, 0, 0), 0) for _ in tokens], {}
        before = [sum(map(len, pieces)) for pieces in known]
        layout = Layout.behind(before, [b + n for b, n in zip(before, lengths, strict=True)], [0] * len(before))
        ids = pad_sequence(list(tokens), batch_first=True)
        capture = _Capture({"filled", *readers})
        filled = partial(capture.take, "filled", ids)
        cache = cache_of(known, layout.past, ids.shape[1], len(self.blocks), filled)
        got = self._run(cone, capture, self.inputs(ids, layout), cache)
        return pieces_of(cache, layout.past, lengths, 0), got

    def inputs(self, ids: Tensor, layout: Layout) -> dict[str, Tensor]:
        """What the stack is fed for the computed part of rows."""
        inputs = {"input_ids": ids, "attention_mask": layout.attention_mask.to(ids.device)}
        if "position_ids" in self.arguments:
            inputs["position_ids"] = layout.position_ids.to(ids.device)
        return inputs

    def _run(
        self, cone: Cone | None, capture: _Capture, inputs: Mapping[str, Tensor], cache: Any = None
    ) -> dict[Any, Tensor]:
        """Runs the stack, no further than needed, with no node acting."""
        shape = next(iter(inputs.values())).shape
        with ExitStack() as on_exit, torch.no_grad(), self.layer.silent():
            for place in capture.wanted - {"filled"}:
                if place is None:
                    assert cone is not None
                    path, side, index = cone.stack.blocks[cone.cut - 1], "output", slice(None)
                else:
                    path, side, index = place.address.module, place.address.side, place.address.index
                take = partial(_take, capture, place, shape, index)
                on_exit.callback(attach(self.base.get_submodule(path), side, take).remove)
            try:
                self.stack(**inputs, **({} if cache is None else {"past_key_values": cache, "use_cache": True}))
            except Done:
                pass
        return capture.got


def _take(capture: _Capture, place: Any, shape: Sequence[int], index: Any, h: Tensor, x: Tensor) -> None:
    if h.ndim == 2:
        h = h.unflatten(0, (shape[0], shape[1]))
    capture.take(place, h[..., index])


def _entry(piece: Piece, start: int) -> Entry:
    return {
        "keys": piece.keys, "values": piece.values, "first": torch.tensor(piece.first), "start": torch.tensor(start)
    }  # fmt: skip
