"""Dotted paths in the tree of a model's modules."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from torch import nn

CHILD = "interventions"  # of a base model: under its name lie the nodes' parameters, in weights as well


def within(path: str, ancestor: str) -> bool:
    """Return whether a module is another one or lies in it; the path of the model itself is ""."""
    return not ancestor or f"{path}.".startswith(f"{ancestor}.")


def parent(path: str) -> str:
    """Return the path of the module that a module lies in."""
    return path.rpartition(".")[0]


def leaf(path: str) -> str:
    """Return the last name of a path."""
    return path.rpartition(".")[2]


def join(*parts: str) -> str:
    """Return parts of a path as one; empty ones leave no dot."""
    return ".".join(part for part in parts if part)


def ancestors_of(path: str) -> Iterator[str]:
    """Yield the paths of the modules that a module lies in, the nearest first and the model itself last."""
    while path:
        path = parent(path)
        yield path


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path; `None` if there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def child(module: nn.Module, name: str) -> nn.Module | None:
    """Return a direct child of a module; `None` if it has none of this name."""
    return module._modules.get(name)


def first_child(module: nn.Module, names: Iterable[str]) -> str | None:
    """Return the first of these names that a direct child of the module has; `None` if none has any."""
    return next((name for name in names if child(module, name) is not None), None)


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model with their paths, without the parameters of a graph that was compiled into it."""
    for path, module in model.named_modules():
        if path.split(".")[0] != CHILD:
            yield path, module


def arguments(module: nn.Module) -> list[str]:
    """Return the names of what a module's forward takes, in order."""
    return list(inspect.signature(module.forward).parameters)


def token_embeddings(model: nn.Module) -> Any:
    """Return the embeddings of a model's tokens; `None` if it has none, as some say by an error of their own."""
    with suppress(Exception):
        return model.get_input_embeddings()  # type: ignore[operator]
    return None
