"""What a model returns when its graph reads: the base model's output with further fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reftheads.graph.intervention import Head, Params, Reader
from reftheads.interventions.losses import or_zero

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped

FIELDS = ("predictions", "losses", "counts", "collected", "selected", "head_loss", "adapter_loss")


@dataclass(frozen=True)
class Reading:
    """What a node read in one pass, zero in slots that are not valid."""

    reader: Reader
    value: Float[Tensor, "batch slots outputs"]  # before what is done to it for users
    valid: Bool[Tensor, "batch slots"]
    columns: Int[Tensor, "batch slots"] | None  # where they lie in the pass; None: slots are its columns
    length: int  # columns of the pass
    single: bool  # one token a row, by its rule
    p: Params  # of the node

    @property
    def shown(self) -> Float[Tensor, "batch *slots outputs"]:
        """Return it as users see it: without the dimension of slots where there is one slot only."""
        value = self.reader.shown(self.value)
        if value is not self.value:
            value = value.masked_fill(~self.valid[..., None], 0)
        return value[:, 0] if self.single and value.shape[1] == 1 else value


def extend(output: Any, readings: dict[str, Reading], targets: dict[str, Tensor], labels: Tensor | None = None) -> Any:
    """Return a model's output with what was read in it, as further fields or keys of the same type:

    * `predictions[name]`: what a head predicts, [batch outputs] for one token a row, else
      [batch slots outputs];
    * `losses[name]`: its loss, where the batch holds its target;
    * `counts[name]`: of how many targets that is the mean;
    * `head_loss`: their weighted sum, which is added to `loss`, the model's own for `labels`;
    * `collected[name]`: activations read by `Collect`;
    * `selected[name]`: Bool[batch slots], which slots hold a token; the others are zero.

    A tuple, as by `return_dict=False`, or a list has these at its end, in this order and without what is missing; its
    loss comes first.

    Raises:
        ValueError: an output without names or items, or with a field of one of these names; a target that is not a
            tensor of matching shape, or, on the CPU, holds what the head's loss has no meaning for.
    """
    _check(output)
    named = not isinstance(output, tuple | list)
    if named:
        loss = _values(output).get("loss")
    else:
        loss = output[0] if len(output) and isinstance(output[0], Tensor) and output[0].ndim == 0 else None
        output = output if loss is None else output[1:]
    fields_read = _fields(readings, targets)
    if loss is not None and isinstance(labels, Tensor):
        loss = or_zero(loss, labels)
    head_loss = fields_read["head_loss"]
    if head_loss is not None:
        loss = head_loss if loss is None else loss + head_loss
    if named:
        return replaced(output, loss=loss, **fields_read)
    elements = [loss, *output, *fields_read.values()]
    own = range(1, 1 + len(output))
    return type(output)([value for i, value in enumerate(elements) if value is not None or i in own])


def replaced(output: Any, **values: Any) -> Any:
    """Return the same output, a dataclass or a mapping, with other values, also of fields that it does not have."""
    if not is_dataclass(output):
        copied: Any = copy(output)
        for name, value in values.items():
            if value is not None or name in copied:
                copied[name] = value
        return copied
    names = {f.name for f in fields(output)}
    cls = type(output) if values.keys() <= names else _extended(type(output))
    made: Any = cls(**{f.name: getattr(output, f.name) for f in fields(output) if f.init} | values)  # type: ignore[operator]
    for name in [f.name for f in fields(output) if not f.init and f.name not in values]:
        object.__setattr__(made, name, getattr(output, name))
    if isinstance(output, Mapping):  # a ModelOutput may have items that are no fields of its class
        for name in [name for name in output if name not in names and name not in values]:
            made[name] = output[name]
    return made


def with_hidden(output: Any, touch: Callable[[Tensor, Tensor], Tensor | None], x: Tensor) -> Any:
    """Return what a module gave after `touch(h, x)` of its first element; `None` if that leaves it as it is.

    Args:
        output: a tensor, or any kind of tuple, list, dataclass or mapping, whose type is kept.
        x: what entered the module.
    """
    if isinstance(output, Tensor):
        return touch(output, x)
    if isinstance(output, Mapping):
        name = str(next(iter(output)))
        new = touch(output[name], x)
        return None if new is None else replaced(output, **{name: new})
    new = touch(output[0], x)
    if new is None:
        return None
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: new})
    return type(output)([new, *output[1:]])


def _check(output: Any) -> None:
    """Raise `ValueError` for an output to which nothing can be added without a loss."""
    if isinstance(output, tuple | list):
        if not hasattr(output, "_fields"):
            return
    elif isinstance(output, Mapping) or is_dataclass(output):
        taken = [name for name in FIELDS if name in _values(output)]
        if not taken:
            return
        raise ValueError(
            f"the model's own output has {taken[0]!r}, under which a graph that reads gives what it has read: give "
            "that field of the model another name"
        )
    raise ValueError(
        f"a graph that reads adds to what the model returns, and a {type(output).__name__} has no room: return a "
        "ModelOutput, a dict, a dataclass or a plain tuple, its loss first"
    )


def _values(output: Any) -> dict[str, Any]:
    """Return what an output with names holds, by name."""
    own = {f.name: getattr(output, f.name) for f in fields(output)} if is_dataclass(output) else {}
    return {**output, **own} if isinstance(output, Mapping) else own


def _fields(readings: dict[str, Reading], targets: dict[str, Tensor]) -> dict[str, Any]:
    """Return what `extend` adds, by the names of the fields; `None` where there is nothing."""
    predictions, losses, counts, collected = {}, {}, {}, {}
    total: Tensor | None = None
    for name, reading in readings.items():
        head = reading.reader
        if not isinstance(head, Head):
            collected[name] = reading.shown
            continue
        predictions[name] = reading.shown
        if head.target in targets:
            losses[name], counts[name] = _loss(name, head, reading, targets[head.target])
            weighted = head.weighted(losses[name], counts[name], reading.p)
            total = weighted if total is None else total + weighted
    selected = {name: reading.valid for name, reading in readings.items()}
    by_name = {
        "predictions": predictions, "losses": losses, "counts": counts, "collected": collected, "selected": selected
    }  # fmt: skip
    return {**{name: value or None for name, value in by_name.items()}, "head_loss": total}


def or_zero_without_labels(output: Any, labels: Tensor) -> Any:
    """Return a model's output, with a loss of 0 instead of NaN where no label is a target."""
    loss = _values(output).get("loss") if is_dataclass(output) or isinstance(output, Mapping) else None
    return replaced(output, loss=or_zero(loss, labels)) if isinstance(loss, Tensor) else output


def _loss(
    name: str, head: Head, reading: Reading, target: Shaped[Tensor, "batch ..."]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    valid = reading.valid
    if not isinstance(target, Tensor) or target.is_complex():
        raise ValueError(f"target {head.target!r} of head {name!r} must be a tensor of numbers, got {target!r}")
    width = () if head.target_width is None else (head.target_width,)
    shaped = target[:, None] if target.ndim == 1 + len(width) and valid.shape[1] == 1 else target
    columns = (len(valid), reading.length)
    shaped = shaped.to(valid.device)
    if head.shift:
        if shaped.shape[:2] != columns:
            raise ValueError(
                f"head {name!r} has shift=True, so its target {head.target!r} must have the shape {columns} of the "
                f"input (rows, columns), got {tuple(target.shape)}: give one target a token, or leave shift out"
            )
        shaped = shaped.roll(-1, 1)
        at = torch.arange(reading.length, device=valid.device) if reading.columns is None else reading.columns
        valid = valid & (at < reading.length - 1)
    if reading.columns is not None and shaped.shape[:2] == columns:
        shaped = shaped[torch.arange(len(valid), device=valid.device)[:, None], reading.columns]
    if shaped.shape != (*valid.shape, *width):
        raise ValueError(
            f"target {head.target!r} of head {name!r} has shape {tuple(target.shape)}, but the input "
            f"{columns} (rows, columns), of which the head reads {valid.shape[1]} a row: give one "
            "target a column, or one a token that it reads" + (f", each of {width[0]} numbers" if width else "")
        )
    if shaped.device.type == "cpu":  # elsewhere a look at the values would wait for the device
        head.check(shaped, valid=valid)
    counts = head.given(shaped) & (valid[..., None] if width else valid)
    return head.loss_of(reading.value, shaped, valid), counts.sum()


_EXTENDED: dict[type, type] = {}  # no lru_cache, which torch.compile looks through


def _extended(cls: Any) -> type:
    """Return the class of output with our fields; the same one every time."""
    if cls not in _EXTENDED:
        own: list[Any] = [("loss", Any, None)] if "loss" not in {f.name for f in fields(cls)} else []
        own += [(name, Any, None) for name in FIELDS]
        frozen = cls.__dataclass_params__.frozen
        _EXTENDED[cls] = make_dataclass(f"Intervened{cls.__name__}", own, bases=(cls,), frozen=frozen)
    return _EXTENDED[cls]
