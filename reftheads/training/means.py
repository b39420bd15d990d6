"""The losses of heads over many batches and processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from reftheads.graph.intervention import IGNORE


class MeanLosses:
    """Average the loss of each head over all targets of several batches."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # by head: the sum of its losses, and of how many targets

    def add(self, output: Mapping[str, Any]) -> None:
        """Count the `losses` of a model's output, each a mean over `counts` targets."""
        for name, loss in (output.get("losses") or {}).items():
            count = output["counts"][name]
            sums = torch.stack([loss.detach().float() * count, count.float()])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means so far, over all processes and without heads that had no target, and begin anew."""
        names = sorted(set(gather_object(list(self._sums))))
        none = torch.zeros(2, device=accelerator.device)
        sums = {name: accelerator.reduce(self._sums.get(name, none)) for name in names}
        self._sums = {}
        return {name: float(loss / count) for name, (loss, count) in sums.items() if count > 0}


def without_repeated(inputs: dict[str, Any], targets: Sequence[str], accelerator: Accelerator) -> dict[str, Any]:
    """Return a batch of an evaluation without the targets of rows that only fill up the last one of several processes.

    Args:
        targets: names of those columns of the batch.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return inputs
    kept = {}
    for name, target in inputs.items():
        if name in targets and isinstance(target, Tensor):
            row = torch.arange(len(target), device=target.device) + accelerator.process_index * len(target)
            repeated = (row >= state.remainder).view(-1, *[1] * (target.ndim - 1))
            kept[name] = target.masked_fill(repeated, float("nan") if target.is_floating_point() else IGNORE)
    return inputs | kept
