"""What the heads of a model predict for many rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reftheads._utils.eval_mode import evaluating
from reftheads.adapter.model import InterventionModel
from reftheads.architectures.structure import arguments
from reftheads.data.collator import Collator
from reftheads.reuse.store import ActivationStore

if TYPE_CHECKING:
    from jaxtyping import Float


def predict(
    model: InterventionModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[str | Mapping[str, Any]],
    *,
    batch_size: int = 64,
) -> dict[str, Float[Tensor, "rows outputs"] | list[Float[Tensor, "tokens outputs"]]]:
    """Return the predictions of every head, by its name, on the CPU and in the order of the rows.

    The model is in evaluation mode for it. Rows of like length share a batch, and nothing is computed that no head
    looks at. A head that makes one prediction per row gives a tensor, with NaN in rows in which it selects no token; a
    head at several tokens gives a tensor for each row.

    Args:
        rows: as for training, without targets; what the model does not take is left alone. Or texts.
        batch_size: rows per pass through the model.

    Raises:
        ValueError: no rows, a batch size below 1, or no head that acts.

    Example:
        ```python
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> head = rh.Node(rh.LinearHead(3), layer=2, positions="l1", name="mood")
        >>> model = rh.InterventionModel(base, rh.InterventionGraph(head))
        >>> rh.predict(model, tokenizer, ["What a day!", "No."])["mood"].shape
        torch.Size([2, 3])
        ```
    """
    if not rows or batch_size < 1:
        raise ValueError(f"give at least one text, or row with its input_ids, got {len(rows)}, batch_size={batch_size}")
    taken = {*arguments(model.get_base_model()), "prompt_mask"}
    encoded = [
        {name: value for name, value in (tokenizer(row) if isinstance(row, str) else row).items() if name in taken}
        for row in rows
    ]
    predictions: dict[str, list[Tensor]] = {}
    single: dict[str, bool] = {}
    with torch.no_grad(), evaluating(model), reusing_where_possible(model):
        for indices, batch in batches(encoded, tokenizer, batch_size, device_of(model), "predicting"):
            out = model(**batch)
            for name, value in (out.get("predictions") or {}).items():
                single[name] = value.ndim == 2
                per_row = predictions.setdefault(name, [torch.empty(0)] * len(rows))
                for i, of_row, real in zip(indices, value.cpu(), out.selected[name].cpu(), strict=True):
                    per_row[i] = of_row.masked_fill(~real, float("nan")) if single[name] else of_row[real]
    if not predictions:
        raise ValueError(
            "no head acts: add a node such as rh.Node(rh.LinearHead(2), layer=-1), or switch its adapter on"
        )
    return {name: torch.stack(per_row) if single[name] else per_row for name, per_row in predictions.items()}


def device_of(model: nn.Module) -> torch.device:
    """Return where a model takes its input: where its first weights are, of those that are kept in memory."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def batches(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, size: int, device: torch.device, what: str
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield batches of rows of like length, the longest first, with their indices; `what` names the progress bar."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    collate = Collator(tokenizer)
    for start in tracked(range(0, len(order), size), what):
        indices = order[start : start + size]
        yield indices, {name: value.to(device) for name, value in collate([rows[i] for i in indices]).items()}


def tracked(steps: Sequence[Any], what: str) -> Iterable[Any]:
    """Return the steps, with a progress bar where somebody looks on."""
    console = Console(stderr=True)
    return track(steps, what, console=console, transient=True, disable=not console.is_terminal)


def reusing_where_possible(model: InterventionModel, store: ActivationStore | None = None) -> AbstractContextManager:
    """Enter `model.reusing`, or nothing for a model in which nothing can be reused."""
    try:
        return model.reusing(model.replay(store))
    except ValueError:  # a model with several stacks of blocks, which always runs as a whole
        return nullcontext()
