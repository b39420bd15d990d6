"""Calls in their old form: they work as before, and a warning at the caller's line says the new form."""

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def deprecate(old: str, new: str) -> None:
    """Warn that `old` is written as `new` now, at the line that called the function in which this stands."""
    level, frame = 3, sys._getframe(2)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:  # the wrappers below
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{old} is deprecated: use {new}", DeprecationWarning, stacklevel=level)


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Take keywords by their old names too: `@renamed(folder="directory")`.

    Raises:
        TypeError: in a call, a keyword by both of its names.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in names.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(f"{function.__qualname__}() got {new}=… and its old name {old}=…: leave {old} out")
                deprecate(f"{old}=… of {_called(function)}", f"{new}=…")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def reordered(*old: str, **sign: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Take positional arguments in their old order too.

    Args:
        old: the names of the arguments in their old order, from the first one on.
        sign: one of these names and the type of its values, by which calls in the old order are known.
    """
    [(told_by, kind)] = sign.items()

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        names = [p.name for p in signature(function).parameters.values() if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
        old_form, new_form = (", ".join(name for name in order if name != "cls") for order in (old, names))

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            by_name = dict(zip(old, args, strict=False))
            possible = 1 < len(args) <= len(old) and not by_name.keys() & kwargs.keys()
            if not possible or not isinstance({**by_name, **kwargs}.get(told_by), kind):
                return function(*args, **kwargs)
            called = _called(function)
            deprecate(f"{called}({old_form})", f"{called}({new_form})")
            return function(**by_name, **kwargs)  # type: ignore[call-arg]

        return call

    return decorate


def _called(function: Callable) -> str:
    return function.__qualname__.removesuffix(".__init__")
