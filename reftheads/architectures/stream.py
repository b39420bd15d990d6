"""The residual stream of a block: which modules add to it, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reftheads.architectures.names import is_norm
from reftheads.architectures.sample import Inputs
from reftheads.architectures.small_pass import listening, rows_unlike, run

if TYPE_CHECKING:
    from jaxtyping import Float

FEATURES = 64  # of a stream that are looked at; each is fitted by itself

Addition = frozenset[str]
"""Paths in a block of the modules whose one output is added to the residual stream; several where one wraps another."""

Step = tuple[Addition, ...]
"""What is added at once: one addition, or two where a block has its halves side by side."""


def steps_of_blocks(model: nn.Module, part: str, blocks: Sequence[str]) -> dict[str, tuple[Step, ...] | None]:
    """Return how the residual stream grows in each block.

    A block takes the stream x and gives y. Between them it goes from step to step: x + c·a follows x, where a is the
    output of a module and c a number for each feature, or the sum of two such, or what a norm makes of x. The steps
    are found in the tensors of one small pass through the model, since names do not tell.

    Args:
        part: path of the module to run: the model itself, or a part with inputs of its own.

    Returns:
        By path of the block the steps that add; `None` where no steps lead from x to y. Blocks that did not run are
        left out, and so are those that run several times.
    """
    watched = {path: _Block() for path in blocks}

    def begin(_: Inputs) -> None:
        for block in watched.values():
            block.begin()

    with ExitStack() as hooks:
        for path, block in watched.items():
            hooks.enter_context(listening(model.get_submodule(path).named_modules(), block.before, block.after))
        run(model, part, *rows_unlike(), begin)  # no two tokens alike, so that no numbers are fitted by chance
    return {path: block.steps for path, block in watched.items() if block.calls == 1}


@dataclass(frozen=True)
class _Tensor:
    """What entered or left a module of a block, token by token, and when."""

    path: str
    time: int
    value: Float[Tensor, "tokens width"]
    norm: bool = False


class _Block:
    """Collects what goes through the modules of one block in a pass, and finds the steps when the block is done."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what an attempt showed that came to nothing."""
        self.calls = 0
        self.steps: tuple[Step, ...] | None = None
        self.entered: list[_Tensor] = []
        self.left: list[_Tensor] = []
        self.time = 0
        self.x: Tensor | None = None

    def before(self, path: str, module: nn.Module, entered: Tensor | None) -> None:
        """Note what a module of the block, or the block itself, is given."""
        self.time += 1
        if not path:
            self.calls += 1
            self.entered, self.left = [], []
            self.x = None if entered is None else entered.clone()
        elif (value := self._by_token(entered)) is not None:
            self.entered.append(_Tensor(path, self.time, value, is_norm(module)))

    def after(self, path: str, left: Tensor | None) -> None:
        """Note what a module returns; of the block itself, find the steps."""
        self.time += 1
        value = self._by_token(left)
        if path and value is not None:
            self.left.append(_Tensor(path, self.time, value))
        elif not path:
            x = self._by_token(self.x)
            found = None if x is None or value is None else _follow(x, value, self.entered, self.left)
            self.steps = None if found is None else tuple(found)
            self.entered, self.left, self.x = [], [], None

    def _by_token(self, h: Tensor | None) -> Float[Tensor, "tokens width"] | None:
        """Return some features of hidden states of the stream's size, as a row for each token; `None` for others."""
        if h is None or self.x is None or h.numel() != self.x.numel() or h.shape[-1] != self.x.shape[-1]:
            return None
        some = h.detach()[..., :: max(h.shape[-1] // FEATURES, 1)]
        return some.reshape(-1, some.shape[-1]).to(self.x.device, torch.float64, copy=True)


def _follow(x: Tensor, y: Tensor, entered: Sequence[_Tensor], left: Sequence[_Tensor]) -> list[Step] | None:
    """Return the steps that lead from x to y, through tensors that entered a module; `None` if there are none."""
    alone = _Search(y, entered, left, at_once=1).steps_from(x, 0)
    return _Search(y, entered, left, at_once=2).steps_from(x, 0) if alone is None else alone


class _Search:
    """Looks for the steps from one tensor of a block to another, with so many additions at once."""

    def __init__(self, y: Tensor, entered: Sequence[_Tensor], left: Sequence[_Tensor], at_once: int):
        self.y = y
        self.entered = entered
        self.left = left
        self.at_once = at_once
        self.tried: set[tuple[int, int]] = set()

    def steps_from(self, x: Tensor, time: int) -> list[Step] | None:
        """Return the steps from x, which is there at some time, to y."""
        if (id(x), time) in self.tried or len(self.tried) > 200:
            return None
        self.tried.add((id(x), time))
        last = self._step(x, self.y, self.left)
        if last is not None:
            return [last] if last else []
        for target in self.entered:
            if target.time <= time or _equal(x, target.value):
                continue
            step = self._step(x, target.value, [t for t in self.left if t.time < target.time])
            rest = self.steps_from(target.value, target.time) if step else None
            if step and rest is not None:
                return [step, *rest]
        return self._behind_a_norm(x, time)

    def _behind_a_norm(self, x: Tensor, time: int) -> list[Step] | None:
        for norm in self.entered:
            if not norm.norm or norm.time < time or not _equal(x, norm.value):
                continue
            after = next((t for t in self.left if t.path == norm.path and t.time > norm.time), None)
            steps = None if after is None else self.steps_from(after.value, after.time)
            if steps is not None:
                return steps
        return None

    def _step(self, x: Tensor, y: Tensor, left: Sequence[_Tensor]) -> Step | None:
        """Return which outputs make y of x when they are added; none where both are the same, `None` if none do."""
        added = y - x
        allowed = _noise(x, y)
        if added.abs().max() <= allowed:
            return ()
        # an output that is y itself adds nothing: it is where y comes from
        outputs = [t for t in left if t.value.abs().max() > allowed and not _equal(t.value, y)]
        distinct = [t for i, t in enumerate(outputs) if not any(_equal(t.value, u.value) for u in outputs[:i])]
        for number in range(1, self.at_once + 1):
            for chosen in combinations(distinct, number):
                if _fits(added, [t.value for t in chosen], allowed):
                    return tuple(self._alike(t) for t in chosen)
        return None

    def _alike(self, output: _Tensor) -> Addition:
        return frozenset(t.path for t in self.left if _equal(t.value, output.value))


def _fits(added: Tensor, outputs: Sequence[Tensor], allowed: Tensor) -> bool:
    """Return whether a tensor is a sum of others, each times a number for every feature that is not always zero."""
    columns = torch.stack(list(outputs), -1).transpose(0, 1)  # [width tokens outputs]
    scales = torch.linalg.lstsq(columns, added.T[..., None]).solution
    left_over = added.T[..., None] - columns @ scales
    return bool(left_over.abs().max() <= allowed) and bool((scales.abs() > 1e-6).any(0).all())


def _noise(*values: Tensor) -> Tensor:
    """Return how far two sums of such values may lie apart by rounding."""
    return 1e-5 * torch.stack([value.abs().max() for value in values]).max()


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-6 * one.abs().max())
