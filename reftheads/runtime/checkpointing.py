"""Activation checkpointing: what is computed a second time, during backward, sees what it saw the first time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from reftheads.runtime.scope import Call, call_of


def keep_calls(layer: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Let blocks that are set to be recomputed see the call of their first pass then."""
    for block in blocks:
        checkpoint: Any = getattr(block, "_gradient_checkpointing_func", None)
        if block.gradient_checkpointing and checkpoint is not None and not isinstance(checkpoint, KeepCall):
            block._gradient_checkpointing_func = KeepCall(layer, checkpoint)  # type: ignore[assignment]


def keep_no_calls(blocks: Iterable[nn.Module]) -> None:
    """Give blocks their own checkpoint functions back."""
    for block in blocks:
        function = getattr(block, "_gradient_checkpointing_func", None)
        if isinstance(function, KeepCall):
            block._gradient_checkpointing_func = function.checkpoint  # type: ignore[assignment]


class KeepCall:
    """A checkpoint function under which a block that is recomputed sees the call and the run of its first pass.

    Other passes may lie in between, and backward may compute it in a thread of its own.

    It never uses reentrant checkpointing, which hides from autograd whatever a block takes and gives other than
    by its arguments: parameters of nodes, and what they read.
    """

    def __init__(self, layer: nn.Module, checkpoint: Callable[..., Any]):
        self.layer = layer
        self.checkpoint = checkpoint
        reentrant = isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant", False)
        self.options = {"use_reentrant": False} if reentrant else {}

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = call_of(self.layer)
        if call is not None:  # its runs go when the pass ends
            function = functools.partial(_within, replace(call, runs=dict(call.runs)), function)
        return self.checkpoint(function, *args, **kwargs, **self.options)


def _within(call: Call, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with replace(call):  # one object for each time: two threads may recompute blocks of one call
        return function(*args, **kwargs)
