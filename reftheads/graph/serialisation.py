"""Interventions as JSON values, and back: what a file says is checked before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from reftheads._utils.showing import shown
from reftheads.graph.intervention import Constant, Intervention

_LONGEST = 1000  # letters of a word
_DEEPEST = 32  # a gate in a gate in a gate takes two levels each


def intervention_to_dict(intervention: Intervention) -> dict[str, Any]:
    """Return the name of a type and its options; defaults are left out, and the numbers of constants."""
    options = {}
    for f in fields(intervention):  # type: ignore[arg-type]
        value = getattr(intervention, f.name)
        if isinstance(value, Constant):
            options[f.name] = {"constant": list(value.value.shape)}
        elif isinstance(value, Intervention):
            options[f.name] = intervention_to_dict(value)
        elif value != f.default:
            options[f.name] = value
    return {"type": type(intervention).__name__, **({"options": options} if options else {})}


def intervention_from_dict(name: str, options: Mapping[str, Any]) -> Intervention:
    """Make an intervention of a type that some imported module defines.

    Raises:
        ValueError: no imported module defines a type of this name; options that it does not have, or misses, or whose
            values are of other types.
    """
    known = {cls.__name__: cls for cls in _concrete(Intervention)}
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"unknown type of node {shown(name)}: known are {', '.join(sorted(known))}. "
            "If it is your own, import the module that defines it first"
        )
    cls = known[name]
    _check_options(cls, options)
    return cls(**{option: _read(value) for option, value in options.items()})


def check_depth(value: Any, what: str) -> None:
    """Raise `ValueError` for JSON values that are nested deeper than any graph is; `what` is how the error calls it."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _within(outer)]
        if not level:
            return
    raise ValueError(f"{what} is nested more than {_DEEPEST} deep, as no graph of nodes is")


def fits(value: Any, hint: Any) -> bool:
    """Return whether a JSON value can stand for an option that is annotated like this; what JSON lacks always can."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in get_args(hint))
    if isinstance(value, str) and len(value) > _LONGEST:
        return False
    if hint is bool or hint is str or hint is NoneType:
        return isinstance(value, hint)
    if hint is int or hint is float:
        return _is_number(value) and (hint is float or isinstance(value, int))
    if hint is Constant:
        return isinstance(value, Mapping) and value.keys() == {"constant"} and _is_shape(value["constant"])
    if isinstance(hint, type) and issubclass(hint, Intervention):
        return isinstance(value, Mapping) and "type" in value and value.keys() <= {"type", "options"}
    if (origin or hint) in (tuple, list):
        items = set(get_args(hint)) - {...}
        item = items.pop() if len(items) == 1 else Any
        return isinstance(value, list | tuple) and all(fits(v, item) for v in value)
    if (origin or hint) is dict:
        return isinstance(value, Mapping)
    return hint is Any or not isinstance(hint, type) or issubclass(hint, type(value))


@lru_cache(maxsize=1024)
def types_of(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name; `Any` where an annotation cannot be looked up."""
    try:
        hints = get_type_hints(cls)
    except (NameError, TypeError, AttributeError):  # imported for type checkers alone, or defined in a function
        hints = {}
    return {f.name: hints.get(f.name, Any) for f in fields(cls) if f.init}


def in_words(hint: Any) -> str:
    """Return a type as errors call it."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _check_options(cls: type, options: Any) -> None:
    """Raise `ValueError` unless these are options of a type of node, of the types that it says."""
    types = types_of(cls)
    if not isinstance(options, Mapping):
        raise ValueError(f"the options of {cls.__name__} must be an object, got {shown(options)}")
    for option, value in options.items():
        if option not in types:
            raise ValueError(f"{cls.__name__} has no option {shown(option)}: it has {', '.join(types) or 'none'}")
        if not fits(value, types[option]):
            raise ValueError(f"{option} of {cls.__name__} must be {in_words(types[option])}, got {shown(value)}")
    needed = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    missing = [option for option in needed if option not in options]
    if missing:
        raise ValueError(f"{cls.__name__} needs the option {missing[0]!r}, which is not there")


def _read(value: Any) -> Any:
    """Return the value of an option, of what stands for it in JSON."""
    if isinstance(value, Mapping) and "constant" in value:
        return Constant.of_shape(value["constant"])
    if isinstance(value, Mapping) and "type" in value:
        return intervention_from_dict(value["type"], value.get("options", {}))
    return tuple(value) if isinstance(value, list) else value


def _within(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -(2**63) <= value < 2**63 if isinstance(value, int) else math.isfinite(value)


def _is_shape(value: Any) -> bool:
    """Return whether this is the shape of a tensor that some machine could hold."""
    sizes = value if isinstance(value, list | tuple) and len(value) <= 8 else [-1]
    return all(fits(size, int) and size >= 0 for size in sizes) and math.prod(sizes) < 2**40


def _concrete(cls: type) -> list[type]:
    """Return a class and those that derive from it, without abstract and private ones."""
    classes = [] if getattr(cls, "__abstractmethods__", None) or cls.__name__.startswith("_") else [cls]
    return classes + [derived for subclass in cls.__subclasses__() for derived in _concrete(subclass)]
