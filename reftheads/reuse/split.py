"""How little of a batch has to be computed: which tokens of its rows a node or a label looks at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reftheads.graph.node import IGNORE, Head, Node, Reader
from reftheads.reuse.cone import Cone
from reftheads.reuse.eligibility import Limits
from reftheads.reuse.fingerprint import content, content_of_ids
from reftheads.reuse.layout import Layout, Rows
from reftheads.runtime.passes import Call

WORTH = 8  # prefixes are left out where they make at least one in so many of a batch's tokens

OURS = ("labels", "prompt_mask", "num_items_in_batch")


class Division:
    """Divides the rows of batches into a prefix that nobody looks at, and the rest.

    Args:
        limits: of the model that the batches are for.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.layer = limits.layer
        self.info = limits.info

    @property
    def targets(self) -> set[str]:
        """The columns of a batch that heads are trained on."""
        return {name for plan in self.layer.plans.values() for name in plan.targets}

    def by_token(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The targets of a batch of which each column has its own."""
        shape = batch["input_ids"].shape
        wide = {head.target for head in self._heads() if head.target_width is not None}
        given = {name: batch[name] for name in self.targets & batch.keys()}
        return {name: t for name, t in given.items() if t.shape[:2] == shape and t.ndim == 2 + (name in wide)}

    def _heads(self) -> list[Head]:
        every = (p.node.intervention for plan in self.layer.plans.values() for p in plan.nodes)
        return [what for what in every if isinstance(what, Head)]

    def understands(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch is one of tokens, row by row, and asks for nothing but losses and predictions."""
        fed, mask = self.fed(batch), batch.get("attention_mask")
        ids = fed.get("input_ids")
        if not isinstance(ids, Tensor) or not ids.numel() or (isinstance(mask, Tensor) and mask.shape != ids.shape):
            return False
        rest = batch.keys() - {*fed, *self.targets, *OURS}
        if rest and not (self.limits.seq2seq and all(name.startswith("decoder_") for name in rest)):
            return False
        if self._judges_padding(batch.get("labels"), mask):
            return False
        return all(isinstance(value, Tensor) and len(value) == len(ids) for value in fed.values())

    def _judges_padding(self, labels: Tensor | None, mask: Tensor | None) -> bool:
        """Whether the model's own loss looks at what it computes of padding."""
        if self.limits.seq2seq or labels is None or mask is None:
            return False
        if labels.shape != mask.shape:
            return not self.info.causal and not bool(mask[:, 0].all())  # what classifies a row is its first column
        judged = shifted(labels) != IGNORE
        if self.limits.lm_head is None:
            judged = judged | (labels != IGNORE)
        return bool((judged & (mask == 0)).any())

    def fed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the stack is fed."""
        names = (self.limits.recorder.arguments & batch.keys()) - {*OURS, *self.targets}
        return {name: batch[name] for name in sorted(names)}

    def rows(self, cone: Cone, batch: Mapping[str, Any]) -> Rows:
        """How little of each row has to be computed."""
        fed = self.fed(batch)
        host = {name: value.cpu() for name, value in batch.items() if isinstance(value, Tensor)}
        ids = host["input_ids"]
        real = host["attention_mask"].bool() if "attention_mask" in host else torch.ones_like(ids, dtype=torch.bool)
        masks = self._masks(cone, host)
        starts = real.int().argmax(1)
        parts = self._parts(cone, host, masks, real, starts) if self._simple(host, real) else None
        if parts is None:
            rows = [b"".join(name.encode() + _of_row(host[name], real, i) for name in fed) for i in range(len(real))]
            return Rows(fed, rows, Layout.whole(real), masks, starts.tolist(), real.sum(1).tolist(), divided=False)
        first, last = starts.tolist(), parts[1].tolist()
        rows = [content_of_ids(row[start : start + n]) for row, start, n in zip(ids, first, last, strict=True)]
        return Rows(fed, rows, Layout.behind(parts[0].tolist(), last, first), masks, first, last, divided=True)

    def _masks(self, cone: Cone, host: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """By the id of each rule in the stack, what it selects of a batch."""
        rules = {id(p.node.positions): p.node.positions for p in (*cone.constant, *cone.inside)}
        call = Call(
            host.get("labels"), host.get("prompt_mask"), {name: host[name] for name in self.targets & host.keys()}
        )
        rows, columns = host["input_ids"].shape
        with self.layer.calling(call):
            frame = self.layer.frame(self.info, host, (rows, columns), list(rules.values()))
        tokens = frame.tokens(torch.empty(rows, columns, 0))
        return {key: rule.mask(tokens) for key, rule in rules.items()}

    def _simple(self, host: Mapping[str, Tensor], real: Tensor) -> bool:
        """Whether each row is one run of tokens, whose positions count from its first, and nothing else is fed."""
        if self.fed(host).keys() - {"input_ids", "attention_mask", "position_ids"} or not bool(real.any(1).all()):
            return False
        ranks = real.long().cumsum(1) - 1
        if bool((real[:, 1:] & ~real[:, :-1] & (ranks[:, 1:] > 0)).any()):
            return False
        positions = host.get("position_ids", torch.arange(real.shape[1]).expand_as(real))
        return positions.shape == real.shape and bool((positions == ranks)[real].all())

    def _parts(
        self, cone: Cone, host: Mapping[str, Tensor], masks: Mapping[int, Tensor], real: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """How many tokens of each row come before all that a node or a label looks at, and before the end of that.

        `None` where it is not worth it.
        """
        if self.limits.why_no_prefix(cone) is not None or self._by_columns(cone, host):
            return None
        looked_at = [masks[id(p.node.positions)] for p in cone.inside]
        if "labels" in host:
            looked_at.append(shifted(host["labels"]) != IGNORE)
        needed = torch.stack(looked_at).any(0)
        first = torch.where(needed.any(1), needed.int().argmax(1), real.shape[1])
        seen = torch.stack([needed, *(masks[id(p.node.positions)] for p in cone.constant)]).any(0) & real
        slots = [p.node.positions.bound or 0 for p in cone.inside if not p.edits]
        room = max((n + 1 for n in slots if n > 1), default=1)  # else slots would be columns, see `Positions.pick`
        last = (seen * torch.arange(1, real.shape[1] + 1)).amax(1) - starts
        lengths = last.clamp(min=room).minimum(real.sum(1))
        prefixes = (first - starts).minimum(lengths - room).clamp(min=0)
        return (prefixes, lengths) if int(prefixes.sum()) * WORTH >= int(lengths.sum()) else None

    def _by_columns(self, cone: Cone, host: Mapping[str, Tensor]) -> bool:
        """Whether several tokens a row of a constant reader meet targets, or a gate, of those that are computed."""
        sources = {planned.node.source for planned in cone.inside}
        if any(head.shift and head.target in host for head in self._heads()):
            return True  # the target of the last token that is computed stands behind it
        several = [p.node for p in cone.constant if p.node.positions.bound != 1 and not _pools(p.node)]
        return any(node.name in sources or getattr(node.intervention, "target", None) in host for node in several)


def _pools(node: Node) -> bool:
    return isinstance(node.intervention, Reader) and node.intervention.pools


def shifted(labels: Tensor) -> Tensor:
    """The label that each column predicts."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def _of_row(value: Tensor, real: Tensor, i: int) -> bytes:
    """The content of one row, without its padding; with where its tokens stand, if that is not at the beginning."""
    if value.shape != real.shape:
        return content(value[i])
    first = real[i].nonzero()[:, 0]
    at_beginning = len(first) == 0 or int(first[-1]) == len(first) - 1
    return content(value[i][real[i]]) + (b"" if at_beginning else content(first))
