"""What was edited in the tokens whose keys and values a cache holds.

A cache outlives the call that filled it: it is handed to the next `generate`, copied, cropped. So what is known of it
goes with it, as an attribute. Within `generate`, a pass may go on with a cache that was filled for another prompt; if
nodes would act on other tokens of it now than they did then, it gives another result than without the cache, and is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from reftheads.graph.positions import Positions
from reftheads.graph.tokens import Tokens
from reftheads.runtime.passes import Acting, Frame, NodeKey, Prompt, Run, SideBySide

if TYPE_CHECKING:
    from jaxtyping import Bool

CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
ATTRIBUTE = "interventions_trace"  # of a cache

Acted = Mapping[tuple[str, str, float], tuple[Positions, Tensor | None]]
"""Of each node that changes what follows, and its strength: its rule and the rows that it is meant for; `None`: all."""


@dataclass(frozen=True)
class Span:
    """Columns that one pass added to a cache, and what acted on them."""

    frame: Frame
    rows: int
    columns: int
    acted: Acted

    def ids(self, start: int, stop: int) -> Tensor | None:
        """Return the tokens in some of the columns, counted from the beginning of the cache."""
        ids, first = self.frame.input_ids, int(self.frame.past)
        return None if ids is None else ids[:, start - first : stop - first]


@dataclass(eq=False)
class Trace:
    """What is known of a cache.

    Attributes:
        spans: what was added to it, the newest last; of other columns nothing was edited.
        continues: the prompt that it was last filled for, within `generate`.
    """

    spans: list[Span] = field(default_factory=list)
    continues: Prompt | None = None

    def stretches(self, past: int) -> Iterator[tuple[Span | None, int, int]]:
        """Yield the columns of a cache, in stretches that one pass added; `None` stands for a pass without edits."""
        owners: list[int | None] = [None] * past
        for number, span in enumerate(self.spans):
            first = int(span.frame.past)
            for column in range(first, min(first + span.columns, past)):
                owners[column] = number
        for number, columns in groupby(range(past), owners.__getitem__):
            stretch = list(columns)
            yield None if number is None else self.spans[number], stretch[0], stretch[-1] + 1


def cache_in(values: Mapping[str, Any]) -> Any:
    """Return what of these arguments, or of this output, says how an earlier pass ended; `None` if nothing does."""
    return next((values[name] for name in CACHES if values.get(name) is not None), None)


def length_of(cache: Any) -> int | Tensor | None:
    """Return how many columns a cache holds: of a static one, as a tensor; `None` of a state that does not say."""
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        return None
    try:
        return cache.get_seq_length()
    except ValueError:  # all its layers are recurrent
        return None if cache.has_previous_state() else 0


def trace_of(cache: Any) -> Trace | None:
    """Return what is known of a cache."""
    return getattr(cache, ATTRIBUTE, None)


def leave_trace(run: Run, cache: Any) -> None:
    """Note in a cache what acted in the pass that has just added to it."""
    if not isinstance(cache, Cache) or run.shape is None or run.masks is not None:
        return
    trace = trace_of(cache)
    if trace is None or (isinstance(run.frame.past, int) and run.frame.past == 0):
        trace = Trace()
        setattr(cache, ATTRIBUTE, trace)
    trace.continues = run.continues
    trace.spans.append(Span(run.frame, *run.shape, _acted_in(run)))


def refuse_other_edits(run: Run, cache: Any, text: Tensor | None) -> None:
    """Raise `ValueError` if nodes would have acted on other tokens of a cache than they did.

    Args:
        run: the pass that goes on with the cache.
        text: the tokens of all columns, where they are known.
    """
    if not isinstance(cache, Cache):
        return
    trace = trace_of(cache) or Trace()
    if trace.continues is not None and trace.continues is run.continues:
        return
    past, now = int(run.frame.past), _acted_in(run)
    for span, start, stop in trace.stretches(past):
        ids = text[:, start:stop] if span is None and text is not None else span and span.ids(start, stop)
        rows = run.shape[0] if run.shape is not None else 0
        after = _selected(now, run.frame, (rows, start, stop), ids)
        before = {} if span is None else _selected(span.acted, span.frame, (span.rows, start, stop), ids)
        for key in after.keys() | before.keys():
            nothing = torch.zeros((rows, stop - start), dtype=torch.bool)
            old, new = (masks.get(key, nothing).cpu() for masks in (before, after))
            old = old.repeat_interleave(max(rows // len(old), 1), 0)
            if not torch.equal(old, new):
                raise ValueError(
                    f"node {key[1]!r} of adapter {key[0]!r} would act on other tokens of the cache than when it was "
                    "filled, for another prompt, by another adapter or at another strength, and what is in it cannot "
                    "be edited any more: leave past_key_values out, or fill it with prompt_mask, a mask over the whole "
                    "of this prompt"
                )


def _acted_in(run: Run) -> Acted:
    """Return the edits of a pass, and the readers that some of them look at."""
    nodes = [node for nodes in run.acting.values() for node in nodes if not node.planned.sees_other_tokens]
    sources = {(node.key[0], str(node.planned.node.source)) for node in nodes if node.source is not None}
    acted: dict[tuple[str, str, float], tuple[Positions, Tensor | None]] = {}
    for node in nodes:
        for key, rows in _keys(node, 0 if run.shape is None else run.shape[0]):
            if node.planned.edits or key in sources:
                acted[(*key, node.strength)] = (node.planned.node.positions, rows)
    return acted


def _keys(node: Acting, rows: int) -> Iterator[tuple[NodeKey, Tensor | None]]:
    """Yield the node of every adapter, with the rows that are its own."""
    if not isinstance(node.module, SideBySide):
        yield node.key, node.rows
        return
    share = rows // len(node.module.modules)
    for i, key in enumerate(node.module.modules):
        yield key, torch.arange(rows) // share == i


def _selected(
    acted: Acted, frame: Frame, where: tuple[int, int, int], ids: Tensor | None
) -> dict[tuple[str, str, float], Bool[Tensor, "rows columns"]]:
    """Return what each node selects in some columns, by where the prompt of a pass ends."""
    rows, start, stop = where
    masks = {}
    for key, (positions, own) in acted.items():
        parts = (frame.attention_mask, frame.prompt_mask, ids)
        mask, prompt, tokens = (None if t is None else t.cpu() for t in parts)
        selected = positions.mask(Tokens.of((rows, stop - start), start, mask, prompt, tokens))
        masks[key] = selected if own is None else selected & own.cpu()[:, None]
    return masks
