"""Reading and replacing the one tensor at an address, whatever a module takes and returns."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reftheads.graph.site import Side

Touch = Callable[[Tensor, Tensor], Tensor | None]
"""What a hook calls: `touch(h, x)` with the tensor at the address and the tensor that entered the module
(the same one, on the input side). It returns the new tensor, or `None` to leave everything as it is."""


def attach(module: nn.Module, side: Side, touch: Touch) -> RemovableHandle:
    """Calls `touch` with the hidden states that enter or leave `module` at every forward pass.

    The hidden states are the module's first argument (by position or by name), or its output, or the
    first element of its output tuple. On the output side `touch` comes before the hooks that are there
    already, so that hidden states recorded by transformers are those that go on. The hook stays until
    its handle is removed, and follows a deep copy of the model if `touch` does (a bound method does, a
    closure does not).
    """
    tap = _Tap(touch, next(iter(inspect.signature(module.forward).parameters)))
    if side == "input":
        return module.register_forward_pre_hook(tap.before, with_kwargs=True)
    return module.register_forward_hook(tap.after, prepend=True, with_kwargs=True)


class Done(Exception):
    """Ends a pass of which all that was wanted is known."""


@contextmanager
def ending(base: nn.Module, places: Iterable[tuple[str, Side]], over: Callable[[], bool]) -> Iterator[None]:
    """Within, a pass ends at one of these places, modules by their path and side, as soon as `over()` holds there."""

    def end(*args: Any) -> None:
        if over():
            raise Done

    with ExitStack() as hooks, suppress(Done):
        for path, side in places:
            module = base.get_submodule(path)
            hook = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            hooks.callback(hook(end).remove)
        yield


class _Tap:
    def __init__(self, touch: Touch, first_argument: str):
        self.touch = touch
        self.first_argument = first_argument

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        h = args[0] if args else kwargs[self.first_argument]
        new = self.touch(h, h)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, self.first_argument: new})

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output):
        x = args[0] if args else kwargs[self.first_argument]
        if isinstance(output, Tensor):
            return self.touch(output, x)
        new = self.touch(output[0], x)
        return None if new is None else (new, *output[1:])
