"""What a model returns when its graph reads: the base model's output with further fields."""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

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


def extend(
    output: Any, readings: dict[str, Reading], targets: dict[str, Tensor], labels: Tensor | None = None
) -> ModelOutput:
    """Adds to a model's output, as further fields of the same class of output:

    * `predictions[name]`: what a head predicts, [batch outputs] for one token a row, else
      [batch slots outputs];
    * `losses[name]`: its loss, where the batch holds its target;
    * `counts[name]`: of how many targets that is the mean;
    * `head_loss`: their weighted sum, which is added to `loss`, the model's own for `labels`;
    * `collected[name]`: activations read by `Collect`;
    * `selected[name]`: Bool[batch slots], which slots hold a token; the others are zero.

    Raises:
        ValueError: a model that was asked to return a tuple, a target that is not a tensor of
            matching shape, or, on the CPU, holds what the head's loss has no meaning for.
    """
    if not isinstance(output, ModelOutput):
        raise ValueError("a graph that reads needs a named output: leave return_dict=False out")
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
    values = {f.name: getattr(output, f.name) for f in fields(output)}  # type: ignore[arg-type]
    loss = values.get("loss")
    if loss is not None and isinstance(labels, Tensor):
        values["loss"] = loss = or_zero(loss, labels)
    if total is not None:
        values["loss"] = total if loss is None else loss + total
    selected = {name: reading.valid for name, reading in readings.items()}
    extra = {
        "predictions": predictions, "losses": losses, "counts": counts, "collected": collected, "selected": selected
    }  # fmt: skip
    values |= {name: value or None for name, value in extra.items()}
    return _extended(type(output))(**values, head_loss=total)


def or_zero_without_labels(output: Any, labels: Tensor) -> Any:
    """Return a model's output, with a loss of 0 instead of NaN where no label is a target."""
    loss = output.get("loss") if isinstance(output, ModelOutput) else None
    return replaced(output, loss=or_zero(loss, labels)) if isinstance(loss, Tensor) else output


def replaced(output: ModelOutput, **values: Any) -> ModelOutput:
    """Return the same output with other values in some fields, also in those that `extend` knows."""
    known = {f.name: getattr(output, f.name) for f in fields(output)}  # type: ignore[arg-type]
    cls = type(output) if values.keys() <= known.keys() else _extended(type(output))
    return cls(**known | values)


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


_EXTENDED: dict[type[ModelOutput], type[ModelOutput]] = {}  # no lru_cache, which torch.compile looks through


def _extended(cls: type[ModelOutput]) -> type[ModelOutput]:
    """Return the class of output with our fields; the same one every time."""
    if cls not in _EXTENDED:
        own: list[Any] = [("loss", Any, None)] if "loss" not in {f.name for f in fields(cls)} else []  # type: ignore[arg-type]
        own += [(name, Any, None) for name in FIELDS]
        _EXTENDED[cls] = make_dataclass(f"Intervened{cls.__name__}", own, bases=(cls,))
    return _EXTENDED[cls]
