"""What a model returns when its graph reads: the base model's output with further fields."""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.utils.generic import ModelOutput

from reftheads.nodes import Head, Reader

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped

FIELDS = ("predictions", "losses", "collected", "selected", "head_loss", "adapter_loss")


@dataclass(frozen=True)
class Reading:
    """What a node read in one pass, zero in slots that are not valid."""

    reader: Reader
    value: Float[Tensor, "batch slots outputs"]
    valid: Bool[Tensor, "batch slots"]
    columns: Int[Tensor, "batch slots"] | None  # where they lie in the pass; None: slots are its columns
    length: int  # columns of the pass
    single: bool  # one token a row, by its rule

    @property
    def shown(self) -> Float[Tensor, "batch *slots outputs"]:
        """As users see it: without the dimension of slots where there is one slot only."""
        return self.value[:, 0] if self.single and self.value.shape[1] == 1 else self.value


def extend(output: Any, readings: dict[str, Reading], targets: dict[str, Tensor]) -> ModelOutput:
    """Adds to a model's output, as further fields of the same class of output:

    * `predictions[name]`: what a head predicts, [batch outputs] for one token a row, else
      [batch slots outputs];
    * `losses[name]`: its loss, where the batch holds its target;
    * `head_loss`: their weighted sum, which is added to `loss`;
    * `collected[name]`: activations read by `Collect`;
    * `selected[name]`: Bool[batch slots], which slots hold a token; the others are zero.

    Raises:
        ValueError: a model that was asked to return a tuple, or a target that is not a tensor of
            matching shape.
    """
    if not isinstance(output, ModelOutput):
        raise ValueError("a graph that reads needs a named output: leave return_dict=False out")
    predictions, losses, collected = {}, {}, {}
    for name, reading in readings.items():
        if not isinstance(reading.reader, Head):
            collected[name] = reading.shown
            continue
        predictions[name] = reading.shown
        if reading.reader.target in targets:
            losses[name] = _loss(name, reading, targets[reading.reader.target])
    values = {f.name: getattr(output, f.name) for f in fields(output)}  # type: ignore[arg-type]
    total = None
    if losses:
        total = sum(reading.reader.weight * losses[name] for name, reading in readings.items() if name in losses)  # type: ignore[union-attr]
        loss = values.get("loss")
        values["loss"] = total if loss is None else loss + total
    selected = {name: reading.valid for name, reading in readings.items()}
    extra = {"predictions": predictions, "losses": losses, "collected": collected, "selected": selected}
    values |= {name: value or None for name, value in extra.items()}
    return _extended(type(output))(**values, head_loss=total)


def replaced(output: ModelOutput, **values: Any) -> ModelOutput:
    """The same output with other values in some fields, also in those that `extend` knows."""
    known = {f.name: getattr(output, f.name) for f in fields(output)}  # type: ignore[arg-type]
    cls = type(output) if values.keys() <= known.keys() else _extended(type(output))
    return cls(**known | values)


def _loss(name: str, reading: Reading, target: Shaped[Tensor, "batch ..."]) -> Float[Tensor, ""]:
    assert isinstance(reading.reader, Head)
    valid = reading.valid
    target = target.to(valid.device)
    shaped = target[:, None] if target.ndim == 1 and valid.shape[1] == 1 else target
    if reading.columns is not None and shaped.shape == (len(valid), reading.length):
        shaped = shaped.gather(1, reading.columns)
    if shaped.shape != valid.shape:
        raise ValueError(
            f"target {reading.reader.target!r} of head {name!r} has shape {tuple(target.shape)}, but the input "
            f"{(len(valid), reading.length)} (rows, columns), of which the head reads {valid.shape[1]} a row: give one "
            "target a column, or one a token that it reads"
        )
    return reading.reader.loss_of(reading.value, shaped, valid)


@cache
def _extended(cls: type[ModelOutput]) -> type[ModelOutput]:
    missing: list[Any] = [("loss", Any, None)] if "loss" not in {f.name for f in fields(cls)} else []  # type: ignore[arg-type]
    missing += [(name, Any, None) for name in FIELDS]
    return make_dataclass(f"Intervened{cls.__name__}", missing, bases=(cls,))
