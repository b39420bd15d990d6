"""How little of a batch has to be computed: which tokens of its rows a node or a label looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reftheads.graph.intervention import IGNORE, Reader
from reftheads.graph.node import Node
from reftheads.graph.positions import Positions
from reftheads.reuse.cone import Cone
from reftheads.reuse.eligibility import Eligibility
from reftheads.reuse.facts import Facts
from reftheads.reuse.fingerprint import content, content_of_ids
from reftheads.reuse.layout import Layout, Rows
from reftheads.runtime.frame import frame_of
from reftheads.runtime.scope import Call

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

WORTH = 8  # prefixes are left out where they make at least one in so many of a batch's tokens

OURS = ("labels", "prompt_mask", "num_items_in_batch")

Masks = dict[Positions, "Bool[Tensor, 'rows columns']"]


class Split:
    """Divides the rows of batches into a prefix that nobody looks at, and the rest.

    Args:
        facts: of the model that the batches are for.
        eligibility: what of it can be left out.
    """

    def __init__(self, facts: Facts, eligibility: Eligibility):
        self.facts = facts
        self.eligibility = eligibility

    def by_token(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the targets of a batch of which each column has its own."""
        shape = batch["input_ids"].shape
        wide = {head.target for head in self.facts.heads if head.target_width is not None}
        targets = {name: batch[name] for name in self.facts.targets & batch.keys()}
        return {name: t for name, t in targets.items() if t.shape[:2] == shape and t.ndim == 2 + (name in wide)}

    def understands(self, batch: Mapping[str, Any]) -> bool:
        """Return whether a batch is one of tokens, row by row, and asks for nothing but losses and predictions."""
        fed, mask = self.fed(batch), batch.get("attention_mask")
        ids = fed.get("input_ids")
        if not isinstance(ids, Tensor) or not ids.numel() or (isinstance(mask, Tensor) and mask.shape != ids.shape):
            return False
        rest = batch.keys() - {*fed, *self.facts.targets, *OURS}
        if rest and not (self.facts.seq2seq and all(name.startswith("decoder_") for name in rest)):
            return False
        if self._judges_padding(batch.get("labels"), mask):
            return False
        return all(isinstance(value, Tensor) and len(value) == len(ids) for value in fed.values())

    def _judges_padding(self, labels: Tensor | None, mask: Tensor | None) -> bool:
        """Return whether the model's own loss looks at what it computes of padding."""
        if self.facts.seq2seq or labels is None or mask is None:
            return False
        if labels.shape != mask.shape:
            # what classifies a row is its first column
            return not self.facts.causal and not bool(mask[:, 0].all())
        judged = shifted(labels) != IGNORE
        if self.eligibility.lm_head is None:
            judged = judged | (labels != IGNORE)
        return bool((judged & (mask == 0)).any())

    def fed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of a batch the stack is fed."""
        names = (self.facts.arguments & batch.keys()) - {*OURS, *self.facts.targets}
        return {name: batch[name] for name in sorted(names)}

    def rows(self, cone: Cone, batch: Mapping[str, Any], call: Call | None = None) -> Rows:
        """Return the rows of a batch with how little of each has to be computed.

        Args:
            call: the one that the batch is for; left out, one that begins here and now.
        """
        fed = self.fed(batch)
        host = {name: value.cpu() for name, value in batch.items() if isinstance(value, Tensor)}
        ids = host["input_ids"]
        real = host["attention_mask"].bool() if "attention_mask" in host else torch.ones_like(ids, dtype=torch.bool)
        masks, silent = self._masks(cone, host, call or self.facts.layer.new_call())
        starts = real.int().argmax(1)
        parts = self._parts(cone, host, masks, real, starts) if self._simple(host, real) else None
        if parts is None:
            rows = [b"".join(name.encode() + _of_row(host[name], real, i) for name in fed) for i in range(len(real))]
            layout, lengths = Layout.whole(real), real.sum(1).tolist()
            return Rows(fed, rows, layout, masks, silent, starts.tolist(), lengths, divided=False)
        prefixes, lengths = parts
        first, last = starts.tolist(), lengths.tolist()
        rows = [content_of_ids(row[start : start + n]) for row, start, n in zip(ids, first, last, strict=True)]
        return Rows(fed, rows, Layout.behind(prefixes.tolist(), last, first), masks, silent, first, last, divided=True)

    def _masks(self, cone: Cone, host: Mapping[str, Tensor], call: Call) -> tuple[Masks, frozenset[Positions]]:
        """Return what each rule in the stack selects of a batch, and the rules that select nothing of any."""
        facts = self.facts
        rules = list(dict.fromkeys(planned.node.positions for planned in cone.nodes))
        targets = {name: host[name] for name in facts.targets & host.keys()}
        call = replace(call, labels=host.get("labels"), prompt_mask=host.get("prompt_mask"), targets=targets)
        rows, columns = host["input_ids"].shape
        frame = frame_of(facts.layer.kind, facts.info, call, host, (rows, columns), rules)
        tokens = frame.tokens(torch.empty(rows, columns, 0))
        return {rule: rule.mask(tokens) for rule in rules}, frozenset(r for r in rules if r.nothing_in(tokens))

    def _simple(self, host: Mapping[str, Tensor], real: Bool[Tensor, "rows columns"]) -> bool:
        """Return whether each row is one run of tokens, whose positions count from its first, and no more is fed."""
        if self.fed(host).keys() - {"input_ids", "attention_mask", "position_ids"} or not bool(real.any(1).all()):
            return False
        ranks = real.long().cumsum(1) - 1
        if bool((real[:, 1:] & ~real[:, :-1] & (ranks[:, 1:] > 0)).any()):
            return False
        positions = host.get("position_ids", torch.arange(real.shape[1]).expand_as(real))
        return positions.shape == real.shape and bool((positions == ranks)[real].all())

    def _parts(
        self,
        cone: Cone,
        host: Mapping[str, Tensor],
        masks: Masks,
        real: Bool[Tensor, "rows columns"],
        starts: Int[Tensor, " rows"],
    ) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]] | None:
        """Return how many tokens of each row come before all that is looked at, and before the end of that.

        What looks is a node or a label. `None` where leaving prefixes out is not possible or not worth it.
        """
        if self.eligibility.why_no_prefix(cone) is not None or self._by_columns(cone, host):
            return None
        looked_at = [masks[p.node.positions] for p in cone.inside]
        if "labels" in host:
            looked_at.append(shifted(host["labels"]) != IGNORE)
        needed = torch.stack(looked_at).any(0)
        first = torch.where(needed.any(1), needed.int().argmax(1), real.shape[1])
        seen = torch.stack([needed, *(masks[p.node.positions] for p in cone.constant)]).any(0) & real
        slots = [p.node.positions.bound for p in cone.inside if not p.edits]
        # else slots would be columns, see `Positions.pick`, or the one column of a rule without a bound a slot
        room = max((2 if n is None else n + 1 for n in slots if n != 1), default=1)
        last = (seen * torch.arange(1, real.shape[1] + 1)).amax(1) - starts
        lengths = last.clamp(min=room).minimum(real.sum(1))
        prefixes = (first - starts).minimum(lengths - room).clamp(min=0)
        return (prefixes, lengths) if int(prefixes.sum()) * WORTH >= int(lengths.sum()) else None

    def _by_columns(self, cone: Cone, host: Mapping[str, Tensor]) -> bool:
        """Return whether what a constant reader sees meets targets, or a gate, of the tokens that are computed."""
        sources = {planned.node.source for planned in cone.inside}
        by_token = self.by_token(host).keys()
        if any(head.shift and head.target in host for head in self.facts.heads):
            return True  # the target of the last token that is computed stands behind it
        readers = [planned.node for planned in cone.constant]
        several = [node for node in readers if node.positions.bound != 1 and not _pools(node)]
        targets = {_target(node) for node in several} & host.keys() | {_target(node) for node in readers} & by_token
        return bool(targets) or any(node.name in sources for node in several)


def _target(node: Node) -> str | None:
    return getattr(node.intervention, "target", None)


def _pools(node: Node) -> bool:
    return isinstance(node.intervention, Reader) and node.intervention.pools


def shifted(labels: Int[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
    """Return the label that each column predicts."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def _of_row(value: Tensor, real: Tensor, i: int) -> bytes:
    """Return the content of one row, without its padding; with where its tokens stand, if not at the beginning."""
    if value.shape != real.shape:
        return content(value[i])
    first = real[i].nonzero()[:, 0]
    at_beginning = len(first) == 0 or int(first[-1]) == len(first) - 1
    return content(value[i][real[i]]) + (b"" if at_beginning else content(first))
