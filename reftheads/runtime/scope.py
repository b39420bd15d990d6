"""What a call knows, for as long as it lasts.

Nothing of a call is kept in the modules that all callers of a model share. There are two carriers:

* a `Scope` says what holds for the calls made within a `with` block, such as `disable_adapter()`, or within one
  `generate`. It lives in a context variable, so that threads and coroutines do not see each other's;
* a `Call` is one call of a base model: what it was given, which adapters act in it, the runs of its stacks and what
  they read. A forward pass begins and ends in one thread, so it lives in a slot of that thread.

Both go when their block or call ends, however it ends.

`torch.compile` can look into a slot of a thread, and guards on what it finds there; into a context variable it cannot
look. So the scopes that any context still holds are counted, and a compiled call looks for one while there are any.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftheads.runtime.output import Reading
from reftheads.runtime.passes import Generation, NodeKey, Run

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
        generation: what `generate` started from, within it.
        replay: what computes a call in the model's place, within `reusing`.
        outer: the scope around this one, which may be another model's.
    """

    layer: nn.Module
    adapters: tuple[str, ...] | None = None
    adapter_names: tuple[str, ...] | None = None
    disabled: bool = False
    generation: Generation | None = None
    replay: Any = None
    outer: Scope | None = None


class _Thread(threading.local):
    """The call in progress in a thread."""

    def __init__(self) -> None:  # once in every thread, so that a compiled function can guard on what it holds
        self.call: Call | None = None


_SCOPE: ContextVar[Scope | None] = ContextVar("reftheads_scope", default=None)
_ALIVE: dict[int, None] = {}  # scopes that some context holds; contexts are copied, so one may outlive its block
_THREAD = _Thread()


def scope_of(layer: nn.Module) -> Scope:
    """Return what holds for calls of a model that begin here and now."""
    if torch.compiler.is_compiling() and not _ALIVE:
        return Scope(layer)
    return _innermost(layer)


def _innermost(layer: nn.Module) -> Scope:
    scope = _SCOPE.get()
    while scope is not None and scope.layer is not layer:
        scope = scope.outer
    return Scope(layer) if scope is None else scope


@contextmanager
def entering(layer: nn.Module, **changes: Any) -> Iterator[None]:
    """Within, what holds for calls of a model is as it was around the block, with these changes.

    Args:
        changes: fields of a `Scope`.
    """
    scope = replace(_innermost(layer), outer=_SCOPE.get(), **changes)
    token = _set(scope)
    try:
        yield
    finally:
        # a generator that is resumed in another context has left this one's behind already
        with suppress(ValueError):
            _SCOPE.reset(token)


def change_from_here(layer: nn.Module, **changes: Any) -> None:
    """Change what holds for calls of a model within the innermost block that is open."""
    _set(replace(_innermost(layer), **changes))


def _set(scope: Scope) -> Token[Scope | None]:
    _ALIVE[id(scope)] = None
    weakref.finalize(scope, _ALIVE.pop, id(scope), None)
    return _SCOPE.set(scope)


@dataclass
class Call:
    """One call of a base model, or of a stack alone. `with call:` makes it the one in progress in this thread.

    Attributes:
        layer: the interventions of the model.
        adapters: which ones act, in their order.
        adapter_names: of every row, its adapter; `None`: all adapters act on all rows.
        disabled: whether no node acts.
        training: whether the model is in training mode.
        generation: what `generate` started from, if the call is a pass of it.
        labels, prompt_mask, targets: what it was given that concerns the graph.
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
    generation: Generation | None = None
    labels: Int[Tensor, "rows ..."] | None = None
    prompt_mask: Bool[Tensor, "rows columns"] | None = None
    targets: dict[str, Shaped[Tensor, "rows ..."]] = field(default_factory=dict)
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
