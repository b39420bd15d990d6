"""Computing only the cone of influence: what no parameter can change is recorded once and replayed.

A batch goes through `Replay` in four steps:

1. its rows are divided into a prefix that no node and no label looks at, and the rest (`Division`);
2. a `Recorder` gives what the base model computes below and before the cone, from its store or anew;
3. the rest of the rows goes through the model, the blocks below the cone giving what was recorded, and no further
   than somebody looks (`_run`);
4. logits are computed where there is a label, and the losses of the model and of its heads are added.

The result is that of the plain path. Where that cannot be promised, a batch takes the plain path, or leaves out the
part that cannot; `Limits` says why.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from reftheads._utils.eval_mode import evaluating
from reftheads.graph.node import IGNORE
from reftheads.graph.positions import Selection, Tokens
from reftheads.interventions.losses import or_zero
from reftheads.reuse.cone import Cone
from reftheads.reuse.eligibility import NO_EDIT, Limits, fed_stack
from reftheads.reuse.layout import Rows
from reftheads.reuse.prefix_cache import cache_of, growing
from reftheads.reuse.recorder import Recorded, Recorder
from reftheads.reuse.split import OURS, Division, shifted
from reftheads.reuse.store import ActivationStore
from reftheads.runtime.hooks import Done, ending
from reftheads.runtime.interventions import Interventions
from reftheads.runtime.output import extend, replaced
from reftheads.runtime.passes import Acting, Call, HookKey, Run
from reftheads.runtime.plan import Plan


class Replay:
    """Runs a model with intervention graphs on what they can change alone.

    Args:
        base: the base model, in which graphs are compiled.
        layer: its interventions.
        store: where the base model's activations are kept; `None` records them anew for every batch, still without
            gradient and without keeping what a backward pass would need.

    Raises:
        ValueError: a model without one stack of blocks that is fed its input.
    """

    def __init__(self, base: nn.Module, layer: Interventions, store: ActivationStore | None = None):
        self.base = base
        self.layer = layer
        self.info = fed_stack(base, layer.seq2seq)
        self.recorder = Recorder(base, layer, self.info, store)
        self.limits = Limits(base, layer, self.info, self.recorder)
        self.division = Division(self.limits)
        self.stack = self.recorder.stack
        self.blocks = [base.get_submodule(path) for path in self.info.blocks]
        self._cone: tuple[list[Plan], Cone] | None = None
        self._gives: int | None = None  # elements of the tuple that a block returns; 0: a tensor

    @property
    def store(self) -> ActivationStore | None:
        """Where activations are kept."""
        return self.recorder.store

    def differs(self, model: nn.Module, batch: Mapping[str, Any]) -> str | None:
        """Whether the loss of a batch comes out otherwise than on the plain path, and how; `None` if it does not.

        It does for no architecture that this was tested on; this is for the others. It runs without gradient, without
        the nodes' dropout, and leaves the random numbers as they were.
        """
        try:
            with torch.no_grad(), torch.random.fork_rng(enabled=True), evaluating(self.layer):
                plain = model(**batch)
                replayed = self(batch)
        except Exception as error:  # whatever an unknown architecture makes of a pass in two parts
            return f"this model cannot run in parts ({error})"
        if replayed is None:
            return self.limits.why_plain() or "a batch holds more than tokens, their labels and targets of heads"
        if plain.get("loss") is None:
            return None
        a, b = float(plain["loss"]), float(replayed["loss"])
        device = self.recorder.device.type
        computed = self.limits.dtypes
        computed |= {torch.get_autocast_dtype(device)} if torch.is_autocast_enabled(device) else set()
        tolerance = max(1e-4, 4 * max((torch.finfo(dtype).eps for dtype in computed), default=0))
        if abs(a - b) > tolerance * max(abs(a), 1):
            return f"the loss would be {b:.6g} instead of {a:.6g}"
        return None

    # --- what can be reused ---------------------------------------------------------------------------------

    @property
    def cone(self) -> Cone:
        """Of the adapters that act now, as far as it can be used."""
        plans = self._plans
        if self._cone is None or len(plans) != len(self._cone[0]) or any(map(operator.is_not, plans, self._cone[0])):
            cone = Cone.of([planned for plan in plans for planned in plan.nodes], self.info)
            if self.limits.why_no_layers(cone) is not None:
                cone = replace(cone, cut=0, constant=(), inside=cone.nodes)
            self._cone = plans, cone
        return self._cone[1]

    @property
    def _plans(self) -> list[Plan]:
        names = dict.fromkeys(self.layer.adapter_names or self.layer.active_adapters)
        return [self.layer.plans[name] for name in names if name in self.layer.plans]

    # --- one batch ------------------------------------------------------------------------------------------

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """The model's output for a batch, with losses and without logits; `None` where it must take the plain path.

        `loss`, `losses` and `head_loss` are those of the plain path, and so is what is read by rules that select a
        bounded number of tokens. Other rules give the tokens that were computed.
        """
        batch = {name: value for name, value in batch.items() if value is not None}
        if self.limits.why_plain() is not None or not self.division.understands(batch):
            return None
        cone = self.cone
        rows = self.division.rows(cone, batch)
        above = bool(cone.inside) or cone.elsewhere or "labels" in batch
        recorded = self.recorder.rows(cone, rows, above)
        run = self._prepare(cone, rows, recorded)
        targets = {name: batch[name] for name in self.division.targets & batch.keys()}
        if not above:
            return extend(BaseModelOutput(), Call(readings=run.readings).named(), targets)
        return self._run(cone, rows, recorded, run, batch, targets)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """A cache of the columns before the first that a node looks at, to begin `generate` with; `None`: none can be.

        Args:
            input_ids, attention_mask: [rows columns], prompts padded at the left.
        """
        cone = self.cone
        if self.limits.why_plain() is not None or self.limits.why_no_prefix(cone) not in (None, NO_EDIT):
            return None
        ids = input_ids.cpu()
        real = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
        if real.shape != ids.shape or bool((real[:, 1:] < real[:, :-1]).any()):
            return None
        tokens = Tokens.of((ids.shape[0], ids.shape[1]), 0, real, None, ids)
        needed = torch.stack([planned.node.positions.mask(tokens) for planned in cone.nodes]).any(0).any(0)
        past = int(torch.cat([needed.int()[:-1], needed.new_ones(1).int()]).argmax())
        rows = [row[mask[:past].bool()] for row, mask in zip(input_ids[:, :past], real, strict=True)]
        return growing(self.recorder.prefixes(rows), past) if any(map(len, rows)) else None

    # --- 3. the part that the graph can change --------------------------------------------------------------

    def _prepare(self, cone: Cone, rows: Rows, recorded: Recorded) -> Run:
        """The run of the nodes inside the cone, in which the constant readers have read already."""
        acting: dict[HookKey, list[Acting]] = {}
        constant: list[Acting] = []
        for act in self.layer.acting(list(self.layer.nodes_of(self.info.path)), rows.layout.columns):
            if act.planned in recorded.read:
                constant.append(act)
            else:
                acting.setdefault((act.planned.address.module, act.planned.address.side), []).append(act)
        layout = rows.layout
        masks = {rule: layout.pick(mask) & layout.real for rule, mask in rows.masks.items()}
        shape = (layout.real.shape[0], layout.real.shape[1])
        run = Run(self.layer.frame(self.info, {}, None, []), acting, shape, masks=masks)
        for act in constant:
            self._read(run, act, rows, recorded.read[act.planned])
        return run

    def _read(self, run: Run, act: Acting, rows: Rows, seen: Sequence[Tensor]) -> None:
        rule = act.planned.node.positions
        mask = rows.masks[id(rule)].to(seen[0].device)
        selection = Selection() if bool(mask.all()) and rule.bound is None else rule.pick(mask)
        if selection is None:
            return
        if act.rows is not None:
            selection = selection.rows(act.rows.to(mask.device), mask.shape[1])
        if selection.columns is None:
            h = seen[0].new_zeros((*mask.shape, seen[0].shape[-1]))
            h[mask] = torch.cat(list(seen))
        else:
            h = pad_sequence(list(seen), batch_first=True)
            h = F.pad(h, (0, 0, 0, selection.columns.shape[1] - h.shape[1]))
        self.layer.read(run, act, h, selection, mask.shape[1])

    def _run(
        self, cone: Cone, rows: Rows, recorded: Recorded, run: Run, batch: dict[str, Any], targets: dict[str, Tensor]
    ) -> Any:
        labels = batch.get("labels")
        inputs = {name: value for name, value in batch.items() if name not in {*OURS, *targets}}
        if rows.divided:
            by_token = self.division.by_token(batch)
            targets = targets | {name: rows.layout.pick(t) for name, t in by_token.items()}
            inputs: dict[str, Any] = self.recorder.inputs(rows.layout.pick(batch["input_ids"]), rows.layout)
            past, room = rows.layout.past, rows.layout.real.shape[1]
            inputs |= {"past_key_values": cache_of(recorded.past, past, room, len(self.blocks)), "use_cache": True}
        with ExitStack() as within:
            if recorded.hidden is not None:
                within.enter_context(self._skipping(cone.cut, _laid_out(recorded.hidden, rows), inputs))
            within.enter_context(self.layer.running({self.info.path: run}))
            if labels is None and not cone.elsewhere:
                inputs = {name: value for name, value in inputs.items() if name in self.recorder.arguments}
                readers = [planned.address for planned in cone.inside if not planned.edits]
                every = len(run.readings) + len(readers)
                with ending(self.base, ((a.module, a.side) for a in readers), lambda: len(run.readings) == every):
                    self.stack(**inputs)
                return extend(BaseModelOutput(), Call(readings=run.readings).named(), targets)
            given = {name: batch[name] for name in OURS if name in batch}
            if labels is None or self.limits.lm_head is None:
                return self.base(**inputs, **targets, **given)
            return self._with_label_rows(self.limits.lm_head, rows, inputs, targets, **given)

    @contextmanager
    def _skipping(self, cut: int, hidden: Tensor, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Within, the first `cut` blocks give `hidden` and compute nothing."""
        given = _Given(hidden, self._block_gives(inputs))
        skipped = self.blocks[:cut]
        before = [block.__dict__.get("forward") for block in skipped]
        for block in skipped:
            block.forward = given
        try:
            yield
        finally:
            for block, forward in zip(skipped, before, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    def _block_gives(self, inputs: Mapping[str, Any]) -> int:
        """How many elements the tuple has that a block returns; 0 for a tensor. One row is enough to see."""
        if self._gives is None:
            row = {name: value[:1] for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
            row["attention_mask"] = torch.ones_like(row["input_ids"])
            handle = self.blocks[0].register_forward_hook(self._see, prepend=True)
            try:
                with torch.no_grad(), self.layer.silent():
                    self.stack(**row)
            except Done:
                pass
            finally:
                handle.remove()
        assert self._gives is not None
        return self._gives

    def _see(self, block: nn.Module, args: Any, output: Any) -> None:
        self._gives = len(output) if isinstance(output, tuple) else 0
        raise Done

    # --- 4. the losses --------------------------------------------------------------------------------------

    def _with_label_rows(
        self,
        lm_head: nn.Module,
        rows: Rows,
        inputs: Mapping[str, Any],
        targets: Mapping[str, Tensor],
        labels: Tensor,
        prompt_mask: Tensor | None = None,
        **loss_options: Any,
    ) -> Any:
        """The model's output with its loss, logits being computed where there is a label alone."""
        layout = rows.layout
        wanted = layout.pick(shifted(labels)).masked_fill(~layout.real.to(labels.device), IGNORE).flatten()
        where = (wanted != IGNORE).nonzero()[:, 0]
        handle = lm_head.register_forward_pre_hook(partial(_only, where))
        try:
            out = self.base(**inputs, **targets)
        finally:
            handle.remove()
        adapters = self.layer.side_by_side(labels)
        counts = [len(where)]
        if adapters:  # rows come one adapter after the other
            share = wanted.numel() // len(adapters)
            counts = torch.bincount(where // share, minlength=len(adapters)).tolist()
        parts = [
            or_zero(
                self.base.loss_function(  # type: ignore[operator]
                    logits=logits, labels=None, vocab_size=logits.shape[-1], shift_labels=of_logits, **loss_options
                ),
                of_logits,
            )
            for logits, of_logits in zip(out.logits.split(counts, 1), wanted[where].split(counts), strict=True)
        ]
        loss = parts[0]
        if adapters:
            scales = [1 if "num_items_in_batch" in loss_options else count / len(where) for count in counts]
            loss = torch.stack([part * scale for part, scale in zip(parts, scales, strict=True) if scale]).sum()
        heads = out.get("head_loss")
        values: dict[str, Any] = {"loss": loss if heads is None else loss + heads, "logits": None}
        values |= {"past_key_values": None} if hasattr(out, "past_key_values") else {}
        by_adapter = {"adapter_loss": dict(zip(adapters, parts, strict=True))} if adapters else {}
        return replaced(out, **values, **by_adapter)


class _Given:
    """A block's forward that gives what the block is known to give."""

    def __init__(self, hidden: Tensor, elements: int):
        self.output = (hidden, *[None] * (elements - 1)) if elements else hidden

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


def _only(where: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (args[0].flatten(0, 1)[where.to(args[0].device)][None],)


def _laid_out(hidden: list[Tensor], rows: Rows) -> Tensor:
    """[tokens width] of each row -> [rows computed width]; what fills up the rows is zero."""
    if rows.divided:
        return pad_sequence(hidden, batch_first=True)
    real = rows.layout.real.to(hidden[0].device)
    out = hidden[0].new_zeros((*real.shape, hidden[0].shape[-1]))
    out[real] = torch.cat(hidden)
    return out
