"""What is known of the batches of a dataset before it is run through."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from reftheads._utils.random_numbers import same_random_numbers

_ROWS = 64  # enough to estimate lengths by


def sampled_batches(dataset: Any, collate: Callable[[list], Any], size: int) -> list[Any]:
    """Return batches of rows that are spread evenly over a dataset; none if its rows are not at hand.

    No random number that is drawn later changes, whatever the dataset and `collate` draw.

    Args:
        collate: makes a batch of rows.
        size: rows per batch.
    """
    listed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not listed or isinstance(dataset, IterableDataset | dict):
        return []
    with same_random_numbers():
        rows = [dataset[i] for i in range(0, len(dataset), max(len(dataset) // _ROWS, 1))[:_ROWS]]
        return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def seen_once(args: TrainingArguments, rows: int) -> bool:
    """Return whether training ends before it comes to a row for the second time."""
    if args.max_steps <= 0:
        return args.num_train_epochs <= 1
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.max_steps * step <= rows
