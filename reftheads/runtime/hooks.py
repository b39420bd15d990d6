"""Where a graph takes hold of a model: the one tensor at an address, and the calls of a method of one instance."""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reftheads.graph.site import Side
from reftheads.runtime.output import with_hidden

Touch = Callable[[Tensor, Tensor], Tensor | None]
"""What a hook calls: `touch(h, x)` with the tensor at the address and the tensor that entered the module
(the same one, on the input side). It returns the new tensor, or `None` to leave everything as it is."""


def attach(module: nn.Module, side: Side, touch: Touch) -> RemovableHandle:
    """Calls `touch` with the hidden states that enter or leave `module` at every forward pass.

    The hidden states are the module's first argument (by position or by name), or its output, or the
    first element of what it gives, whose type stays. On the output side `touch` comes before the hooks that are there
    already, so that hidden states recorded by transformers are those that go on. The hook stays until
    its handle is removed, and follows a deep copy of the model if `touch` does (a bound method does, a
    closure does not).
    """
    tap = _Tap(touch, next(iter(inspect.signature(module.forward).parameters)))
    if side == "input":
        return module.register_forward_pre_hook(tap.before, with_kwargs=True)
    return module.register_forward_hook(tap.after, prepend=True, with_kwargs=True)


class Around:
    """Stands in for a method of one instance: a call goes to `around(method, args, kwargs)`.

    It has the method's signature, and is copied and pickled with its module.
    """

    def __init__(self, module: nn.Module, name: str, around: Callable[[Callable, tuple, dict[str, Any]], Any]):
        self.module = module
        self.name = name
        self.around: Callable[[Callable, tuple, dict[str, Any]], Any] | None = around
        self.before: Any = None  # what stood in for it already, such as a hook of accelerate
        self.take_place()

    def take_place(self) -> None:
        """Stand in for the method, above whatever does so already."""
        self.before = self.module.__dict__.get(self.name)
        self.module.__dict__[self.name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.around is None:  # it was removed while something else stood above it
            return self.method(*args, **kwargs)
        return self.around(self.method, args, kwargs)

    @property
    def lost(self) -> bool:
        """Whether a call of the method goes by another way, since somebody has given the module an older one."""
        current: Any = self.module.__dict__.get(self.name)
        while current is not None and current is not self:
            current = current.before if isinstance(current, Around) else getattr(current, "__wrapped__", None)
        return current is None

    @property
    def method(self) -> Callable[..., Any]:
        """Return what is stood in for; looked up at each call, since sharding gives a module another class."""
        return self.before or partial(getattr(type(self.module), self.name), self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.method)

    @property
    def __code__(self) -> Any:  # torch.export asks for it
        return inspect.unwrap(getattr(type(self.module), self.name)).__code__

    def remove(self) -> None:
        """Give the method its place back; where something else stands above this and keeps it, it does nothing more."""
        self.around = None
        if self.module.__dict__.get(self.name) is not self:
            return
        del self.module.__dict__[self.name]
        if self.before is not None:
            self.module.__dict__[self.name] = self.before


def take_places_again(holds: Iterable[Iterable[Any]]) -> None:
    """Let what stands in for methods do so again where others have given these back, as accelerate's hooks do."""
    for hold in _lost(holds):
        hold.take_place()


def refuse_lost(holds: Iterable[Iterable[Any]]) -> None:
    """Raise `RuntimeError` if others have given a method back that was stood in for: its calls would miss the graph."""
    for hold in _lost(holds):
        raise RuntimeError(
            f"{hold.name!r} of a {type(hold.module).__name__} was replaced after a graph was compiled into the "
            "model, such as by hooks of accelerate that were removed: call the PeftModel, which takes hold again"
        )


def _lost(holds: Iterable[Iterable[Any]]) -> Iterable[Around]:
    """Return what stands in for methods that others have given back; nothing while torch.compile traces."""
    if torch.compiler.is_compiling():
        return ()
    return [hold for hold in chain.from_iterable(holds) if isinstance(hold, Around) and hold.lost]


class Done(Exception):
    """Ends a pass of which all that was wanted is known."""


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that acts in the thread that made it: passes of others go through the same modules."""
    owner = threading.get_ident()

    def act(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == owner else None

    return act


@contextmanager
def ending(base: nn.Module, places: Iterable[tuple[str, Side]], over: Callable[[], bool]) -> Iterator[None]:
    """Within, a pass ends at one of these places, modules by their path and side, as soon as `over()` holds there."""

    def end(*args: Any) -> None:
        if over():
            raise Done

    hook = in_this_thread(end)
    with ExitStack() as hooks, suppress(Done):
        for path, side in places:
            module = base.get_submodule(path)
            register = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            hooks.callback(register(hook).remove)
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
        return with_hidden(output, self.touch, x)
