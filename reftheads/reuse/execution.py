"""Running a model on what a cone says must be computed: the way of a batch, once it is known what may be left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from reftheads.graph.intervention import IGNORE
from reftheads.graph.selection import Selection
from reftheads.graph.tokens import Tokens
from reftheads.reuse.cone import Cone
from reftheads.reuse.eligibility import Eligibility
from reftheads.reuse.facts import Facts
from reftheads.reuse.frozen import inputs_of
from reftheads.reuse.layout import Rows
from reftheads.reuse.prefix_cache import cache_of, growing
from reftheads.reuse.recorder import Recorded, Recorder
from reftheads.reuse.split import OURS, Split, shifted
from reftheads.reuse.store import ActivationStore
from reftheads.reuse.vocabulary import losses_of, token_losses
from reftheads.runtime.acting import read
from reftheads.runtime.hooks import ending, in_this_thread
from reftheads.runtime.interventions import RUN
from reftheads.runtime.output import extend, replaced
from reftheads.runtime.passes import Acting, Frame, HookKey, Replayed, Run, by_place
from reftheads.runtime.roster import acting_on, by_name, equal_shares, nodes_of
from reftheads.runtime.scope import Call

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class _Batch:
    """A batch on its way: what it is made of, and what is known of it.

    Attributes:
        given: as it came, without what is `None`.
        rows: how its rows are divided.
        run: of the nodes inside the cone; the constant readers have read already.
        inputs: of the model: of the whole batch, or of what is left of it.
        targets: of heads.
    """

    given: dict[str, Any]
    rows: Rows
    run: Run
    inputs: dict[str, Any]
    targets: dict[str, Tensor]


class Execution:
    """Runs a model with intervention graphs within a cone, and takes what is outside of it from a store.

    Args:
        facts: of the model.
        eligibility: what of it can be left out.
        store: where the base model's activations are kept; `None` records them anew for every batch.
    """

    def __init__(self, facts: Facts, eligibility: Eligibility, store: ActivationStore | None):
        self.facts = facts
        self.eligibility = eligibility
        self.split = Split(facts, eligibility)
        self.recorder = Recorder(facts, store)

    def through(
        self, call: Call, cone: Cone, given: dict[str, Any], recorded: Recorded | None = None, whole: bool = False
    ) -> Any:
        """Return the model's output for a batch, by the way that computes the least of it.

        Args:
            recorded: of the batch; left out, it is found in the store, or recorded now.
            whole: whether the model runs to its end, though there may be no labels that ask for it.
        """
        prepared = self._prepared(call, cone, given, recorded, whole)
        if whole and "labels" not in given:
            return self._through_base(prepared)
        if "labels" not in given and not cone.elsewhere:
            if cone.inside:
                self._through_stack(cone, prepared)
            return extend(BaseModelOutput(), by_name(self.facts.layer, call, prepared.run.readings), prepared.targets)
        lm_head = self.eligibility.lm_head
        if "labels" not in given or lm_head is None:
            return self._through_base(prepared)
        return self._through_label_rows(call, lm_head, prepared)

    def _prepared(
        self, call: Call, cone: Cone, given: dict[str, Any], recorded: Recorded | None, whole: bool
    ) -> _Batch:
        rows = self.split.rows(cone, given, call)
        above = bool(cone.inside) or cone.elsewhere or "labels" in given or whole
        recorded = recorded or self.recorder.rows(cone, rows, above)
        run = self._run(call, cone, rows, recorded)
        targets = {name: given[name] for name in self.facts.targets & given.keys()}
        inputs = {name: value for name, value in given.items() if name not in {*OURS, *targets}}
        if rows.divided and above:
            targets |= {name: rows.layout.pick(target) for name, target in self.split.by_token(given).items()}
            inputs = inputs_of(self.facts, rows.layout.pick(given["input_ids"]), rows.layout)
            past, room = rows.layout.past, rows.layout.real.shape[1]
            cache = cache_of(recorded.past, past, room, len(self.facts.blocks))
            inputs |= {"past_key_values": cache, "use_cache": True}
        return _Batch(given, rows, run, inputs, targets)

    def _run(self, call: Call, cone: Cone, rows: Rows, recorded: Recorded) -> Run:
        facts, layout = self.facts, rows.layout
        nodes = list(nodes_of(facts.layer, facts.info.path, call))
        every = [
            act
            for act in acting_on(facts.layer, nodes, call, layout.columns)
            if act.planned.node.positions not in rows.silent
        ]
        run = Run(
            facts.info.path,
            Frame(0, None, None, None),
            by_place(act for act in every if act.planned not in recorded.read),
            (layout.real.shape[0], layout.real.shape[1]),
            masks={rule: layout.pick(mask) & layout.real for rule, mask in rows.masks.items()},
            replayed=None if recorded.hidden is None else self._replayed(cone, _laid_out(recorded.hidden, rows)),
        )
        for act in every:
            if act.planned in recorded.read:
                _read(run, act, rows, recorded.read[act.planned])
        return run

    def _replayed(self, cone: Cone, hidden: Float[Tensor, "rows computed width"]) -> Replayed:
        self.facts.layer.hold_blocks(self.facts.info, self.facts.base)
        return Replayed(cone.cut, self.eligibility.as_block_output(hidden))

    # --- the ways through the model ---------------------------------------------------------------------------

    def _through_stack(self, cone: Cone, batch: _Batch) -> None:
        """Let all readers read; the pass ends with the last one."""
        inputs = {name: value for name, value in batch.inputs.items() if name in self.facts.arguments}
        places: list[HookKey] = [(p.address.module, p.address.side) for p in cone.inside if not p.edits]
        readings = batch.run.readings
        every = len(readings) + len(places)
        with ending(self.facts.base, places, lambda: len(readings) == every):
            self.facts.stack(**inputs, **{RUN: batch.run})

    def _through_base(self, batch: _Batch) -> Any:
        """Return what the whole model gives: without labels, or with a loss that looks at all logits."""
        ours = {name: batch.given[name] for name in OURS if name in batch.given}
        return self.facts.base(**batch.inputs, **batch.targets, **ours, **{RUN: batch.run})

    def _through_label_rows(self, call: Call, lm_head: nn.Module, batch: _Batch) -> Any:
        """Return the model's output with its loss, logits being computed where there is a label alone."""
        layout, labels = batch.rows.layout, batch.given["labels"]
        wanted = layout.pick(shifted(labels)).masked_fill(~layout.real.to(labels.device), IGNORE).flatten()
        where = (wanted != IGNORE).nonzero()[:, 0]
        projection = lm_head if isinstance(lm_head, nn.Linear) and self.eligibility.gives_projection else None
        at_labels: list[Tensor] = []
        handle = lm_head.register_forward_pre_hook(
            in_this_thread(partial(_only, where, at_labels, projection is not None))
        )
        try:
            out = self.facts.base(**batch.inputs, **batch.targets, **{RUN: batch.run})
        finally:
            handle.remove()
        of_labels = wanted[where]
        if projection is None:
            of_tokens = losses_of(out.logits[0], of_labels)
        else:
            of_tokens = token_losses(at_labels[0], of_labels, projection)
        adapters = equal_shares(self.facts.layer, call, len(labels))
        counts = [len(where)]
        if adapters:  # rows come one adapter after the other
            share = wanted.numel() // len(adapters)
            counts = torch.bincount(where // share, minlength=len(adapters)).tolist()
        items = batch.given.get("num_items_in_batch")
        losses = [_mean(part, items) for part in of_tokens.split(counts)]
        loss = losses[0]
        if adapters:
            scales = [1 if items is not None else count / max(len(where), 1) for count in counts]
            loss = torch.stack([part * scale for part, scale in zip(losses, scales, strict=True)]).sum()
        heads = out.get("head_loss")
        values: dict[str, Any] = {"loss": loss if heads is None else loss + heads, "logits": None}
        values |= {"past_key_values": None} if hasattr(out, "past_key_values") else {}
        by_adapter = {"adapter_loss": dict(zip(adapters, losses, strict=True))} if adapters else {}
        return replaced(out, **values, **by_adapter)

    def prefilled(
        self,
        cone: Cone,
        input_ids: Int[Tensor, "rows columns"],
        attention_mask: Bool[Tensor, "rows columns"] | None = None,
    ) -> Any:
        """Return a cache of the columns before the first that a node looks at, for `generate`; `None`: there is none.

        Args:
            input_ids, attention_mask: prompts padded at the left.
        """
        ids = input_ids.cpu()
        real = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
        if real.shape != ids.shape or bool((real[:, 1:] < real[:, :-1]).any()):
            return None
        tokens = Tokens.of((ids.shape[0], ids.shape[1]), 0, real, None, ids)
        needed = torch.stack([planned.node.positions.mask(tokens) for planned in cone.nodes]).any(0).any(0)
        past = int(torch.cat([needed.int()[:-1], needed.new_ones(1).int()]).argmax())
        rows = [row[mask[:past].bool()] for row, mask in zip(input_ids[:, :past], real, strict=True)]
        if not any(map(len, rows)):
            return None
        return growing(self.recorder.prefixes(rows), past, self.facts.base.config)


def _read(run: Run, act: Acting, rows: Rows, seen: Sequence[Float[Tensor, "selected width"]]) -> None:
    """Let a constant reader read what was recorded of the tokens that it selects."""
    rule = act.planned.node.positions
    mask = rows.masks[rule].to(seen[0].device)
    selection = Selection() if bool(mask.all()) and rule.bound is None else rule.pick(mask)
    if selection is None:
        return
    if act.share is None and act.rows is not None:
        selection = selection.rows(act.rows.to(mask.device), mask.shape[1])
    if selection.columns is None:
        h = seen[0].new_zeros((*mask.shape, seen[0].shape[-1]))
        h[mask] = torch.cat(list(seen))
    else:
        h = pad_sequence(list(seen), batch_first=True)
        h = F.pad(h, (0, 0, 0, selection.columns.shape[1] - h.shape[1]))
    if act.share is not None:
        h, selection = h[act.share], selection.of(act.share)
    read(run, act, h, selection, mask.shape[1])


def _only(
    where: Int[Tensor, " labelled"], at_labels: list[Tensor], apart: bool, module: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor]:
    """Keep the hidden states of tokens with a label, and let the projection see them, or none where it comes later."""
    hidden = args[0].flatten(0, 1)[where.to(args[0].device)]
    at_labels.append(hidden)
    return (hidden[None, :0] if apart else hidden[None],)


def _mean(losses: Float[Tensor, " labelled"], items: int | Tensor | None) -> Float[Tensor, ""]:
    """Return the mean over the labelled tokens, or over so many; 0 where there are none."""
    if not len(losses):
        return losses.sum()
    return losses.mean() if items is None else losses.sum() / torch.as_tensor(items, device=losses.device)


def _laid_out(hidden: list[Float[Tensor, "tokens width"]], rows: Rows) -> Float[Tensor, "rows computed width"]:
    """Return [tokens width] of each row as one tensor; what fills up the rows is zero."""
    if rows.divided:
        return pad_sequence(hidden, batch_first=True)
    real = rows.layout.real.to(hidden[0].device)
    out = hidden[0].new_zeros((*real.shape, hidden[0].shape[-1]))
    out[real] = torch.cat(hidden)
    return out
