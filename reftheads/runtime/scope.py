"""What a call knows, for as long as it lasts.

Nothing of a call is kept in the modules that all callers of a model share. There are two carriers:

* a `Block` says what holds for the calls made within a `with` block, such as `disable_adapter()`, or within one
  `generate`. Blocks live in a context variable, so that threads and coroutines do not see each other's; what all
  blocks around a call say together is its `Scope`;
* a `Call` is one call of a base model: what it was given, which adapters act in it, the runs of its stacks and what
  they read. A forward pass begins and ends in one thread, so it lies in a slot of that thread.

Both go when their block or call ends, however it ends. A block that has ended holds nowhere, also not in contexts
that were copied from within it; a generator may end it in another thread than the one that began it.

`torch.compile` can look into a slot of a thread, and guards on what it finds there; into a context variable it cannot
look. So open blocks are listed, and a compiled call looks for its own while there are any.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftheads.runtime.lineage import Generation
from reftheads.runtime.output import Reading
from reftheads.runtime.passes import NodeKey, Prompt, Run

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, Shaped


@dataclass(frozen=True)
class Scope:
    """What holds for the calls of one model made within a block.

    Attributes:
        layer: the interventions of that model.
        adapters: which ones act, whatever `set_adapter` does meanwhile; `None`: those that are active when a call
            begins.
        adapter_names: of every row of a batch, its adapter; `None`: all adapters act on all rows.
        disabled: whether no node acts.
        strengths: of nodes that act more or less than they learnt to; 0 leaves one out.
        generation: what `generate` started from, within it.
        replay: what computes a call in the model's place, within `reusing`.
    """

    layer: nn.Module
    adapters: tuple[str, ...] | None = None
    adapter_names: tuple[str, ...] | None = None
    disabled: bool = False
    strengths: Mapping[NodeKey, float] = field(default_factory=dict)
    generation: Generation | None = None
    replay: Any = None


@dataclass(eq=False)
class Block:
    """A `with` block that says something of the calls of one model.

    Attributes:
        layer: the interventions of that model.
        changes: fields of a `Scope` that are other than around the block.
        outer: the block around this one, which may be another model's.
        over: whether it has ended.
    """

    layer: nn.Module
    changes: dict[str, Any]
    outer: Block | None
    over: bool = False


class _Thread(threading.local):
    """The call in progress in a thread."""

    def __init__(self) -> None:  # once in every thread, so that a compiled function can guard on what it holds
        self.call: Call | None = None


_BLOCK: ContextVar[Block | None] = ContextVar("reftheads_block", default=None)
_OPEN: dict[int, None] = {}  # blocks of any thread, by id
_THREAD = _Thread()


def scope_of(layer: nn.Module) -> Scope:
    """Return what holds for calls of a model that begin here and now."""
    if torch.compiler.is_compiling() and not _OPEN:
        return Scope(layer)
    changes: dict[str, Any] = {}
    for block in _blocks_of(layer):
        changes = block.changes | changes  # what an inner block says counts more
    return Scope(layer, **changes)


def _blocks_of(layer: nn.Module) -> Iterator[Block]:
    """Yield the open blocks of a model around what runs here, the innermost first."""
    block = _BLOCK.get()
    while block is not None:
        if block.layer is layer and not block.over:
            yield block
        block = block.outer


def generation_around() -> Generation | None:
    """Return the innermost `generate` around what runs here, of any model."""
    block = _BLOCK.get()
    while block is not None and (block.over or "generation" not in block.changes):
        block = block.outer
    return None if block is None else block.changes["generation"]


@contextmanager
def entering(layer: nn.Module, **changes: Any) -> Iterator[None]:
    """Within, what holds for calls of a model is as it was around the block, with these changes.

    Args:
        changes: fields of a `Scope`.
    """
    block = Block(layer, changes, _BLOCK.get())
    _OPEN[id(block)] = None
    _BLOCK.set(block)
    try:
        yield
    finally:
        block.over = True
        del _OPEN[id(block)]
        innermost = _BLOCK.get()
        while innermost is not None and innermost.over:
            innermost = innermost.outer
        _BLOCK.set(innermost)


def change_from_here(layer: nn.Module, **changes: Any) -> None:
    """Change what holds for calls of a model within the innermost block that is open."""
    block = next(_blocks_of(layer))
    block.changes = block.changes | changes


@dataclass
class Call:
    """One call of a base model, or of a stack alone. `with call:` makes it the one in progress in this thread.

    Attributes:
        layer: the interventions of the model.
        adapters: which ones act, in their order.
        adapter_names: of every row, its adapter; `None`: all adapters act on all rows.
        disabled: whether no node acts.
        strengths: of nodes that act more or less than they learnt to.
        training: whether the model is in training mode.
        generation: what `generate` started from, if the call is made within it.
        continues: the prompt that it continues then.
        labels, prompt_mask, targets: what it was given that concerns the graph.
        inputs: what the base model was given, by the names of its arguments; `None` where a stack was called alone.
        handed: runs of stacks that were made beforehand, by path.
        runs: of the stacks that are running, by path.
        readings: what has been read so far.
        outer: the call within which it was made.
    """

    layer: nn.Module
    adapters: tuple[str, ...]
    adapter_names: tuple[str, ...] | None
    disabled: bool
    training: bool
    strengths: Mapping[NodeKey, float] = field(default_factory=dict)
    generation: Generation | None = None
    continues: Prompt | None = None
    labels: Int[Tensor, "rows ..."] | None = None
    prompt_mask: Bool[Tensor, "rows columns"] | None = None
    targets: dict[str, Shaped[Tensor, "rows ..."]] = field(default_factory=dict)
    inputs: Mapping[str, Any] | None = None
    handed: dict[str, Run] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    readings: dict[NodeKey, Reading] = field(default_factory=dict)
    outer: Call | None = None

    def __enter__(self) -> Call:
        self.outer = _THREAD.call
        _THREAD.call = self
        return self

    def __exit__(self, *error: object) -> None:
        _THREAD.call = self.outer


def call_of(layer: nn.Module) -> Call | None:
    """Return the call of a model that is in progress in this thread."""
    call = _THREAD.call
    while call is not None and call.layer is not layer:
        call = call.outer
    return call
