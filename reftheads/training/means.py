"""The losses of heads over many batches and processes."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


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
