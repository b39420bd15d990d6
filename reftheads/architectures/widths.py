"""How wide the input and the output of a module are, by its attributes and those of its parts."""

from collections.abc import Iterable, Sequence

from torch import nn

from reftheads.architectures.names import ATTENDS, ATTENTION_OUT, DOWN, UP, is_norm
from reftheads.architectures.paths import first_child
from reftheads.graph.site import Side

Columns = range | tuple[int, ...] | None


def width_of(module: nn.Module, side: Side) -> int | None:
    """Return how many features enter or leave a module; `None` if that cannot be told.

    It goes by the module's attributes, since quantised weights have other shapes.
    """
    declared = first_int(module, ("in_features", "nx") if side == "input" else ("out_features", "nf"))
    if declared is not None:
        return declared
    if isinstance(module, nn.Embedding):
        return module.embedding_dim if side == "output" else None
    shape = getattr(module, "normalized_shape", None)
    if shape is None and is_norm(module):
        shape = getattr(getattr(module, "weight", None), "shape", ())
    if shape:
        return shape[-1]
    for firsts, lasts in ((ATTENDS, ATTENTION_OUT), (UP, DOWN)):
        first, last = first_child(module, firsts), first_child(module, lasts)
        if first and last:
            return width_of(module.get_submodule(first if side == "input" else last), side)
    weighted = [c for c in module.children() if next(c.parameters(), None) is not None]
    alone = len(weighted) == 1 and not module._parameters  # a projection with its activation or dropout
    return width_of(weighted[0], side) if alone else None


def known_width(projection: nn.Module, side: Side) -> int:
    """Return how many features enter or leave a projection. Raise `ValueError` if that cannot be told."""
    width = width_of(projection, side)
    if width is None:
        raise ValueError(f"cannot tell the {side} width of a projection of class {type(projection).__name__}")
    return width


def index_in_range(value: int, count: int, what: str, place: str) -> int:
    """Return a number of a layer or head counted from 0. Raise `ValueError` if there is none of this number."""
    if not -count <= value < count:
        raise ValueError(f"{what} {value} is out of range: {place} has {what}s 0 to {count - 1} (or {-count} to -1)")
    return value % count


def as_range(columns: Sequence[int]) -> range | tuple[int, ...]:
    """Return columns as a range if they are one, so that they can be sliced."""
    whole = range(columns[0], columns[0] + len(columns))
    return whole if list(columns) == list(whole) else tuple(columns)


def first_int(owner: object, names: Iterable[str]) -> int | None:
    """Return the first of these attributes that is an integer."""
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int):
            return value
    return None
