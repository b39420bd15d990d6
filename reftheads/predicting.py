"""What the heads of a model predict for many rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reftheads.data import Collator
from reftheads.model import InterventionModel
from reftheads.modes import evaluating
from reftheads.replay import Replay
from reftheads.store import ActivationStore

if TYPE_CHECKING:
    from jaxtyping import Float


def predict(
    model: InterventionModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[str | Mapping[str, Any]],
    *,
    batch_size: int = 64,
) -> dict[str, Float[Tensor, "rows outputs"] | list[Float[Tensor, "tokens outputs"]]]:
    """The predictions of every head, in evaluation mode, on the CPU, in the order of the rows.

    Rows of like length share a batch, and nothing is computed that no head looks at. A head that predicts one thing a
    row gives a tensor, with NaN in rows in which it selects no token; one at several tokens gives a tensor for each
    row.

    Args:
        rows: as for training, targets left out or not; or texts.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("no rows to predict: give at least one text, or a row with its input_ids")
    encoded = [dict(tokenizer(row)) if isinstance(row, str) else row for row in rows]
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]["input_ids"]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    collate = Collator(tokenizer)
    found: dict[str, list[Tensor]] = {}
    single: dict[str, bool] = {}
    console = Console(stderr=True)
    with torch.no_grad(), evaluating(model), reusing_where_possible(model):
        for some in track(batches, "predicting", console=console, transient=True, disable=not console.is_terminal):
            batch = {name: value.to(model.device) for name, value in collate([encoded[i] for i in some]).items()}
            out = model(**batch)
            for name, value in (out.get("predictions") or {}).items():
                single[name] = value.ndim == 2
                valid = out.selected[name]
                per_row = found.setdefault(name, [torch.empty(0)] * len(rows))
                for i, own, real in zip(some, value.cpu(), valid.cpu(), strict=True):
                    per_row[i] = own.masked_fill(~real, float("nan")) if single[name] else own[real]
    return {name: torch.stack(per_row) if single[name] else per_row for name, per_row in found.items()}


def reusing_where_possible(model: InterventionModel, store: ActivationStore | None = None) -> AbstractContextManager:
    """As `model.reusing`, and the plain path of a model in which nothing can be reused."""
    try:
        return model.reusing(Replay(model.get_base_model(), model.tuner.layer, store))
    except ValueError:  # a model with several stacks of blocks, which always runs as a whole
        return nullcontext()
