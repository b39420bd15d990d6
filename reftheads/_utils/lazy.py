"""Attributes that are worked out when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Value = TypeVar("Value")


class cached(Generic[Value]):  # noqa: N801, since it is used as a decorator
    """Make a method an attribute that is worked out once, as `functools.cached_property` does from Python 3.12 on.

    Before that, the standard one holds a lock meanwhile: other threads wait there, whatever object's value they want,
    and `torch.compile` cannot enter it. Here two threads may work out a value twice.
    """

    def __init__(self, method: Callable[[Any], Value]):
        self.method = method
        self.name = method.__name__
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> cached[Value]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...
    def __get__(self, instance: object | None, owner: type) -> Any:
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.method(instance)
        return value
