"""Interventions as JSON values, and back."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from reftheads.graph.intervention import Constant, Intervention


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
        ValueError: no imported module defines a type of this name.
    """
    known = {cls.__name__: cls for cls in _concrete(Intervention)}
    if name not in known:
        raise ValueError(
            f"unknown type of node {name!r}: known are {', '.join(sorted(known))}. "
            "If it is your own, import the module that defines it first"
        )
    values = {}
    for option, value in options.items():
        if isinstance(value, dict) and "constant" in value:
            value = Constant(torch.zeros(value["constant"]))
        elif isinstance(value, dict) and "type" in value:
            value = intervention_from_dict(value["type"], value.get("options", {}))
        elif isinstance(value, list):
            value = tuple(value)
        values[option] = value
    return known[name](**values)


def _concrete(cls: type) -> list[type]:
    """Return a class and those that derive from it, without abstract and private ones."""
    classes = [] if getattr(cls, "__abstractmethods__", None) or cls.__name__.startswith("_") else [cls]
    return classes + [derived for subclass in cls.__subclasses__() for derived in _concrete(subclass)]
