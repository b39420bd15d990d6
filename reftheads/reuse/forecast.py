"""What reuse spares, before it is tried: floating-point operations of a training step, and bytes to keep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import nn

from reftheads.architectures.addresses import locate
from reftheads.graph.graph import render
from reftheads.graph.intervention import IGNORE
from reftheads.graph.site import Site, Stack
from reftheads.reuse.cone import Cone
from reftheads.reuse.layout import Rows
from reftheads.reuse.replay import Replay


@dataclass(frozen=True)
class Forecast:
    """Say what reuse spares of some batches together.

    Attributes:
        plain: floating-point operations of a plain training step: forward, and backward down to the first edit.
        recording: of a step that computes what is kept.
        replaying: of a step that finds it.
        stored: bytes that are kept.
        rows: how many rows the batches have.
    """

    plain: float
    recording: float
    replaying: float
    stored: int
    rows: int

    @classmethod
    def of(cls, replay: Replay, batches: Iterable[Mapping[str, Any]]) -> Forecast:
        """Count the model's matrix products and attention; nodes, norms, activations, optimiser are left out."""
        cone = replay.cone
        costs = _Costs.of(replay)
        parts = [costs.of_batch(cone, replay.split.rows(cone, batch), batch) for batch in batches]
        plain, recording, replaying, stored, rows = (sum(values) for values in zip(*parts, strict=True))
        return cls(plain, recording, replaying, int(stored), int(rows))

    def bytes_of(self, rows: int) -> int:
        """Return how many bytes are to be kept of so many rows like these."""
        return self.stored * rows // self.rows


@dataclass(frozen=True)
class _Costs:
    blocks: int
    causal: bool
    token: float  # of a token in a block, but for its attention
    seen: float  # of a token in a block, for every token that it sees
    logits: float  # of a token's logits
    kept: int  # bytes of a token's keys and values in a block
    width: int  # bytes of a token's hidden state

    @classmethod
    def of(cls, replay: Replay) -> _Costs:
        base, info = replay.facts.base, replay.facts.info
        head = replay.eligibility.lm_head
        dtype = replay.facts.dtype
        stack: Stack | None = "encoder" if replay.facts.seq2seq else None
        width = locate(base, Site(0, "block_input", stack=stack)).width
        try:
            kept = 2 * locate(base, Site(0, "key_output", stack=stack)).width
        except ValueError:  # fused in a way that is not known
            kept = 2 * width
        config = getattr(base, "config", None)
        return cls(
            blocks=len(replay.facts.blocks),
            causal=info.causal,
            token=2 * sum(_weights(block, config) for block in replay.facts.blocks) / len(replay.facts.blocks),
            seen=4 * width,
            logits=0 if head is None else 2 * _weights(head, config),
            kept=kept * dtype.itemsize,
            width=width * dtype.itemsize,
        )

    def of_batch(self, cone: Cone, rows: Rows, batch: Mapping[str, Any]) -> tuple[float, float, float, int, int]:
        """Return operations of a plain, a recording and a replaying step, bytes, and rows."""
        labels = batch.get("labels")
        labelled = 0 if labels is None or not self.logits else int((labels[:, 1:] != IGNORE).sum())
        above = bool(cone.inside) or cone.elsewhere or labels is not None  # whether anything is fed what is kept
        learns = cone.first is not None
        trained = self.blocks - cone.cut if learns else 0
        n, p = sum(rows.lengths), sum(rows.layout.prefixes)
        count, columns = rows.fed["input_ids"].shape  # padding is computed as well
        past = rows.layout.past
        everything = count * self._block(columns, 0)
        rest = count * self._block(past + rows.layout.columns.shape[1], past)
        plain = everything * (self.blocks + trained) + count * columns * self.logits * (1 + learns)
        replaying = rest * ((self.blocks - cone.cut) * above + trained) + labelled * self.logits * (1 + learns)
        below = max(cone.cut if above else 0, cone.deepest_constant)
        prefixes = count * self._block(past, 0) * (self.blocks - 1)  # of the last block, keys and values alone
        recording = replaying + prefixes + rest * below
        seen = sum(len(found) for reader in cone.constant for found in rows.selected(reader.node.positions))
        kept = p * self.kept * (self.blocks - cone.cut) + seen * self.width
        kept += (n - p) * self.width if cone.cut and above else 0
        return plain, recording, replaying, kept, len(rows.ids)

    def _block(self, length: int, prefix: int) -> float:
        """Return the operations of a row's tokens from `prefix` on, in one block."""
        tokens = length - prefix
        seen = (length * (length + 1) - prefix * (prefix + 1)) / 2 if self.causal else tokens * length
        return tokens * self.token + seen * self.seen


def _weights(module: nn.Module, config: Any) -> float:
    """Return how many weights a token is multiplied by."""
    total = 0.0
    for parameter in module.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
        if len(shape) == 2:
            total += math.prod(shape)
        elif len(shape) == 3:  # experts, of which a token goes through some
            total += math.prod(shape[1:]) * (getattr(config, "num_experts_per_tok", None) or 1)
    return total


def describe(replay: Replay, batches: Iterable[Mapping[str, Any]] = ()) -> str:
    """Return what is reused, what is not and why; with batches, what that makes of a training step."""
    table = Table(box=None, show_header=False, pad_edge=False)
    plain = replay.why_plain()
    if plain is not None:
        table.add_row("reuse", f"nothing: {plain}")
        return render(table)
    cone = replay.cone
    blocks = len(replay.facts.blocks)
    no_prefix, no_layers = replay.eligibility.why_no_prefix(cone), replay.eligibility.why_no_layers(cone)
    table.add_row(
        "prefix", f"not reused: {no_prefix}" if no_prefix else "keys and values before the first edit and label"
    )
    if no_layers or not cone.cut:
        where = "not reused: " + (no_layers or f"{cone.first.node.site} comes before the end of the first block")  # type: ignore[union-attr]
    else:
        first = "no edit" if cone.first is None else f"the first edit is at {cone.first.node.site}"
        where = f"{cone.cut} of {blocks} blocks are replayed: {first}"
    table.add_row("layers", where)
    if cone.constant:
        names = ", ".join(str(planned.node.name) for planned in cone.constant)
        table.add_row("readers", f"what {names} read{'s' if len(cone.constant) == 1 else ''} is kept")
    table.add_row(
        "logits", "where there is a label" if replay.eligibility.lm_head is not None else "as the base model has them"
    )
    if replay.facts.causal and replay.facts.layer.kind.generative:
        no_generation = replay.why_no_generation()
        begins = "generate begins with what is kept of them"
        table.add_row("prompts", f"not reused by generate: {no_generation}" if no_generation else begins)
    batches = list(batches)
    if batches:
        forecast = Forecast.of(replay, batches)
        recording, replaying = (f"{work / forecast.plain:.1%}" for work in (forecast.recording, forecast.replaying))
        table.add_row("a step", f"{replaying} of a plain step's operations, {recording} while it is recorded")
        table.add_row("to keep", f"{forecast.stored / forecast.rows / 1e6:.3g} MB a row")
    return render(table)
