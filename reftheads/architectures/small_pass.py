"""A small pass through a model, and what each of its modules is given and returns in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftheads._utils.eval_mode import evaluating
from reftheads._utils.kept import nothing_kept
from reftheads._utils.packing import unpacked
from reftheads._utils.random_numbers import same_random_numbers
from reftheads.architectures.paths import CHILD, arguments
from reftheads.architectures.sample import Inputs, samples

if TYPE_CHECKING:
    from jaxtyping import Int

ROWS, TOKENS = 3, 7  # neither is a likely width, number of heads or length of a window


def rows_apart() -> tuple[Int[Tensor, "rows tokens"], Int[Tensor, "rows tokens"]]:
    """Return numbers of tokens of an input and of an answer, in which one row each has another last token."""
    ids = torch.arange(TOKENS).repeat(ROWS, 1)
    answer = ids.clone()
    ids[1, -1], answer[2, -1] = TOKENS, TOKENS
    return ids, answer


def rows_unlike() -> tuple[Int[Tensor, "rows tokens"], Int[Tensor, "rows tokens"]]:
    """Return numbers of tokens of an input and of an answer, of which no two are the same."""
    ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS)
    return ids, ids.flip(0)


def run(
    model: nn.Module,
    part: str,
    ids: Int[Tensor, "rows tokens"],
    answer: Int[Tensor, "rows tokens"],
    begin: Callable[[Inputs], None],
) -> bool:
    """Run a part of a model on the first of the samples that it takes, and return whether there was one.

    Args:
        begin: called with the sample before every attempt.
    """
    module = model.get_submodule(part)
    silent = getattr(getattr(model, CHILD, None), "silent", nullcontext)  # what acts already is not the model's own
    with torch.no_grad(), nothing_kept(model), evaluating(model), unpacked(model), same_random_numbers(), silent():
        torch.manual_seed(0)
        for inputs in samples(module, ids, answer):
            begin(inputs)
            with suppress(Exception):  # whatever it does not like about the sample
                module(**inputs)
                return True
    return False


@contextmanager
def listening(
    modules: Iterable[tuple[str, nn.Module]],
    before: Callable[[str, nn.Module, Tensor | None], None],
    after: Callable[[str, Tensor | None], None],
) -> Iterator[None]:
    """Within, tell of every call of modules which hidden states they are given and which they return.

    Args:
        modules: with their paths.
        before: called with path, module and what its first argument is, see `hidden`.
        after: called with path and what it returns.
    """

    def given(path: str, first: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        before(path, module, hidden(args[0] if args else kwargs.get(first)))

    def returned(path: str, module: nn.Module, args: tuple, output: Any) -> None:
        after(path, hidden(output))

    with ExitStack() as hooks:
        for path, module in modules:
            first = next(iter(arguments(module)), "")
            hooks.callback(module.register_forward_pre_hook(partial(given, path, first), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(partial(returned, path)).remove)
        yield


def hidden(value: Any) -> Tensor | None:
    """Return what is taken for hidden states: a tensor of numbers, or the first element of a tuple or list."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    elif isinstance(value, dict) and value:  # an output of transformers
        value = next(iter(value.values()))
    return value if isinstance(value, Tensor) and value.is_floating_point() else None
