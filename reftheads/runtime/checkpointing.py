"""Activation checkpointing: what is computed a second time, during backward, sees what it saw the first time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from reftheads.runtime.passes import Run


class HoldsRuns(Protocol):
    """Who knows the run of each stack while a pass lasts."""

    runs: dict[str, Run]


class KeepRun:
    """A checkpoint function under which a block sees the run of its first pass when it is recomputed.

    It never uses reentrant checkpointing, which hides from autograd whatever a block takes and gives other than
    by its arguments: parameters of nodes, and what they read.
    """

    def __init__(self, holder: HoldsRuns, stack: str, checkpoint: Callable[..., Any]):
        self.holder = holder
        self.stack = stack
        self.checkpoint = checkpoint
        reentrant = isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant", False)
        self.options = {"use_reentrant": False} if reentrant else {}

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = self.holder.runs.get(self.stack)
        return self.checkpoint(functools.partial(self._with, run, function), *args, **kwargs, **self.options)

    def _with(self, run: Run | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        runs = self.holder.runs
        before = runs.pop(self.stack, None)
        if run is not None:
            runs[self.stack] = run
        try:
            return function(*args, **kwargs)
        finally:
            runs.pop(self.stack, None)
            if before is not None:
                runs[self.stack] = before
