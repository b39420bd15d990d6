"""Masks among predictions, which a Trainer pads with -100 where rows of batches or processes differ in length.

As a truth value -100 is true, so masks go through an evaluation as numbers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_numbers(predictions: Any) -> Any:
    """Return predictions with masks as numbers of 8 bits, in any nesting of tuples, lists and dicts."""
    return _each(predictions, lambda value: value.to(torch.int8) if value.dtype == torch.bool else value)


def as_masks(predictions: Any) -> Any:
    """Return predictions whose numbers of 8 bits are masks again, false on padding."""
    return _each(predictions, lambda value: value > 0 if value.dtype in (torch.int8, np.int8) else value)


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _each(part, change) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_each(part, change) for part in value])
    return change(value) if isinstance(value, Tensor | np.ndarray) else value
