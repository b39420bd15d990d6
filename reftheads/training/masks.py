"""Masks among predictions, which a Trainer pads with -100 where rows of batches or processes differ in length.

As a truth value -100 is true. So masks go through an evaluation as numbers, and come out of it as masks.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction


class MasksInMetrics(Trainer):
    """Give metrics, and who asks for predictions, masks that are false on padding."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        own = metrics, preprocess = self.compute_metrics, self.preprocess_logits_for_metrics
        if metrics is not None:
            self.compute_metrics = partial(_compute_metrics, metrics)
        if preprocess is not None:
            self.preprocess_logits_for_metrics = partial(_preprocess, preprocess)
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = own
        return output._replace(predictions=_masks(output.predictions))

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Any, Any]:
        loss, predictions, labels = super().prediction_step(*args, **kwargs)
        return loss, _numbers(predictions), labels


def _compute_metrics(own: Callable[..., Any], predicted: EvalPrediction, **kwargs: Any) -> Any:
    predictions = _masks(predicted.predictions)
    return own(EvalPrediction(predictions, predicted.label_ids, predicted.inputs, predicted.losses), **kwargs)


def _preprocess(own: Callable[..., Any], predictions: Any, labels: Any) -> Any:
    return _numbers(own(_masks(predictions), labels))


def _numbers(predictions: Any) -> Any:
    """Return predictions with masks as numbers of 8 bits."""
    return _each(predictions, lambda value: value.to(torch.int8) if value.dtype == torch.bool else value)


def _masks(predictions: Any) -> Any:
    """Return predictions whose numbers of 8 bits are masks again, false on padding."""
    return _each(predictions, lambda value: value > 0 if value.dtype in (torch.int8, np.int8) else value)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return any nesting of tuples, lists and dicts with each tensor or array changed."""
    if isinstance(value, Mapping):
        return {name: _each(part, change) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_each(part, change) for part in value])
    return change(value) if isinstance(value, Tensor | np.ndarray) else value
