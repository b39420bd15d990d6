"""Keys and values of tokens that are not computed again, for a pass over those that follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Piece:
    """Keys and values of consecutive tokens of one row, of the blocks from `first` on."""

    keys: Float[Tensor, "blocks heads tokens key_width"]
    values: Float[Tensor, "blocks heads tokens value_width"]
    first: int

    def __len__(self) -> int:
        return self.keys.shape[2]

    def since(self, first: int) -> Piece:
        """Return the piece of the blocks from `first` on."""
        return Piece(self.keys[first - self.first :], self.values[first - self.first :], first)


class _Append(torch.autograd.Function):
    """Writes what is new behind `past` columns; the gradient is that of the new columns alone."""

    @staticmethod
    def forward(ctx: Any, room: Tensor, new: Tensor, past: int) -> Tensor:
        ctx.past = past
        ctx.mark_dirty(room)
        room[:, :, past:] = new
        return room

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        return None, gradient[:, :, ctx.past :], None


class _Layer(DynamicLayer):
    """The keys and values of one block: those of `past` columns, and room for those of the pass."""

    def __init__(self, past: int, keys: Tensor | None, values: Tensor | None, filled: Callable[[], None] | None):
        super().__init__()
        self.past = past
        self.keys, self.values = keys, values
        self.filled = filled
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        if self.keys is None:
            self.keys, self.values = key_states, value_states
        else:
            self.keys = _Append.apply(self.keys, key_states, self.past)
            self.values = _Append.apply(self.values, value_states, self.past)
        if self.filled is not None:
            self.filled()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.past


def cache_of(
    rows: Sequence[Sequence[Piece]], past: int, room: int, blocks: int, filled: Callable[[], None] | None = None
) -> DynamicCache:
    """Return a cache whose columns hold each row's pieces, padded at the left.

    Args:
        rows: the pieces of each row, in the order of its tokens. Blocks that they lack must not run.
        past: columns of the pieces.
        room: columns of the pass.
        blocks: of the model.
        filled: is called when the last block has added its keys and values.
    """
    known = [piece for pieces in rows for piece in pieces]
    first = max((piece.first for piece in known), default=0)
    cache = DynamicCache()
    cache.layers = []
    for block in range(blocks):
        keys = values = None
        if known and block >= first:
            keys, values = (
                _columns([[getattr(p, name)[block - p.first] for p in pieces] for pieces in rows], past, room)
                for name in ("keys", "values")
            )
        cache.layers.append(_Layer(past, keys, values, filled if block == blocks - 1 else None))
    return cache


def growing(rows: Sequence[Sequence[Piece]], past: int, config: Any) -> DynamicCache:
    """Return a cache as `generate` makes it: of all blocks, each row's pieces padded at the left to `past` columns.

    Args:
        config: of the model, which says where a block looks no further than a window.
    """
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    for block, layer in enumerate(cache_of(rows, past, 0, max(len(p.keys) for pieces in rows for p in pieces)).layers):
        cache.update(layer.keys, layer.values, block)  # type: ignore[union-attr]
    return cache


def _columns(rows: Sequence[Sequence[Tensor]], past: int, room: int) -> Tensor:
    """Return [rows heads past+room width] of rows' [heads tokens width] pieces, the room as it comes."""
    one = next(piece for pieces in rows for piece in pieces)
    out = one.new_empty((len(rows), one.shape[0], past + room, one.shape[2]))
    for row, pieces in zip(out, rows, strict=True):
        at = past - sum(piece.shape[1] for piece in pieces)
        row[:, :at] = 0
        for piece in pieces:
            row[:, at : at + piece.shape[1]] = piece
            at += piece.shape[1]
    return out


def pieces_of(cache: DynamicCache, past: int, lengths: Sequence[int], first: int) -> list[Piece]:
    """Return the keys and values that a pass has added, row by row: `lengths` tokens after `past` columns.

    Raises:
        ValueError: a cache that holds something else than keys and values of every token.
    """
    columns = slice(past, None)
    stacked = []
    for name in ("keys", "values"):
        tensors = [getattr(layer, name, None) for layer in cache.layers[first:]]
        known = [t for t in tensors if isinstance(t, Tensor) and t.ndim == 4]
        if len(known) < len(tensors) or len({t.shape for t in known}) > 1:
            raise ValueError("the blocks of this model do not keep keys and values of one shape for every token")
        stacked.append(torch.stack([t[:, :, columns] for t in known]))
    keys, values = stacked
    return [Piece(keys[:, row, :, :n], values[:, row, :, :n], first) for row, n in enumerate(lengths)]
