"""Which heads a projection's features belong to, seen by changing them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftheads.architectures.sample import Inputs
from reftheads.architectures.small_pass import rows_unlike, run

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

    def change(module: nn.Module, args: tuple, output: Any) -> Any:
        index = torch.tensor(list(columns), device=output.device)
        return output.index_copy(-1, index, output[..., index].flip(-1) + 1)

    plain = _entering(model, part, out)
    changed = None if plain is None else _entering(model, part, out, projection, change)
    if plain is None or changed is None:
        return None
    apart = (plain - changed).abs().flatten(0, -2).amax(0)
    noise = 20 * torch.finfo(apart.dtype).eps * float(plain.abs().max())
    return frozenset((apart > noise).nonzero().flatten().tolist())


def _entering(
    model: nn.Module, part: str, out: str, hooked: str = "", hook: Callable[..., Any] | None = None
) -> Float[Tensor, "... features"] | None:
    """Return what enters `out` in a small pass; `None` if it is not called just once.

    Args:
        hook: a forward hook of the module at `hooked`.
    """
    entered: list[Tensor] = []

    def begin(_: Inputs) -> None:
        entered.clear()

    def note(module: nn.Module, args: tuple) -> None:
        entered.append(args[0].detach().clone())

    handles = [model.get_submodule(out).register_forward_pre_hook(note)]
    handles += [] if hook is None else [model.get_submodule(hooked).register_forward_hook(hook)]
    try:
        finished = run(model, part, *rows_unlike(), begin)
    finally:
        for handle in handles:
            handle.remove()
    return entered[0] if finished and len(entered) == 1 else None
