"""Which heads a projection's features belong to, seen by changing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftheads.architectures.probe import ROWS, TOKENS, remembered, run
from reftheads.architectures.sample import Inputs

if TYPE_CHECKING:
    from jaxtyping import Float


def heads_changed(
    model: nn.Module, part: str, projection: str, columns: Sequence[int], out: str
) -> frozenset[int] | None:
    """Return the features that enter a module `out` otherwise when some that leave `projection` are changed.

    Names do not tell in which order a fused projection has its queries, keys and values; two small passes through the
    model do, one as it is, one with other values in these columns.

    Args:
        part: path of the module to run: the model itself, or a part with inputs of its own.

    Returns:
        `None` where the pass does not reach both modules.
    """
    what = ("heads", part, projection, tuple(columns), out)
    return remembered(model, what, lambda: _heads_changed(model, part, projection, columns, out))


def _heads_changed(
    model: nn.Module, part: str, projection: str, columns: Sequence[int], out: str
) -> frozenset[int] | None:
    entered: list[Float[Tensor, "... features"]] = []

    def change(module: nn.Module, args: tuple, output: Any) -> Any:
        index = torch.tensor(list(columns), device=output.device)
        return output.index_copy(-1, index, output[..., index].flip(-1) + 1)

    def note(module: nn.Module, args: tuple) -> None:
        entered.append(args[0].detach().clone())

    def pass_through() -> bool:
        count = len(entered)
        ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS)

        def begin(_: Inputs) -> None:
            del entered[count:]

        return run(model, part, ids, ids.flip(0), begin) and len(entered) == count + 1

    seen = model.get_submodule(out).register_forward_pre_hook(note)
    try:
        if not pass_through():
            return None
        changed = model.get_submodule(projection).register_forward_hook(change)
        try:
            reached = pass_through()
        finally:
            changed.remove()
    finally:
        seen.remove()
    if not reached:
        return None
    apart = (entered[0] - entered[1]).abs().flatten(0, -2).amax(0)
    noise = 20 * torch.finfo(apart.dtype).eps * float(entered[0].abs().max())
    return frozenset((apart > noise).nonzero().flatten().tolist())
