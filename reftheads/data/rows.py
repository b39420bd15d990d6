"""Rows and datasets of them: tasks are mixed, what a row lacks is filled in, columns are looked up."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import IterableDataset

from reftheads.graph.intervention import IGNORE

INPUTS = ("input_ids", "attention_mask", "prompt_mask", "token_type_ids", "position_ids")
"""Columns of a row that say what the model is fed, so that -100 means nothing in them."""

LEARNT = ("completion_mask", "assistant_masks")
"""Columns that mark what is learnt: of TRL, and of `apply_chat_template(…, return_assistant_tokens_mask=True)`."""

Row = Mapping[str, Any]


def mix(
    tasks: Mapping[str, Sequence[Row]],
    weights: Mapping[str, float] | None = None,
    *,
    temperature: float = 1.0,
    length: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Mix the rows of several tasks into one dataset, each task with its share; targets of other tasks are missing.

    A task that has fewer rows than its share repeats them, all of them equally often but for one; of a task that has
    more, some are left out.

    Args:
        tasks: rows by the name of their task.
        weights: shares of the tasks, in proportion; left out, the numbers of rows to the power of 1/temperature
            (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.5.2).
        temperature: 1 is in proportion to the numbers of rows; the higher, the more equal the shares.
        length: how many rows there are to be; left out, as many as all tasks have.
        seed: of the order, and of the choice of rows.

    Returns:
        Rows that all have the same columns, see `complete`.

    Raises:
        ValueError: no tasks, a task without rows, weights that are not positive or not those of the tasks, pairs.

    Example:
        ```python
        >>> import reftheads as rh
        >>> moods = [{"input_ids": [5, 6], "mood": 1}] * 3
        >>> topics = [{"input_ids": [7], "topic": 2}]
        >>> rows = rh.mix({"moods": moods, "topics": topics}, weights={"moods": 1, "topics": 1}, seed=1)
        >>> sorted((row["mood"], row["topic"]) for row in rows)
        [(-100, 2), (-100, 2), (1, -100), (1, -100)]
        ```
    """
    if any(not isinstance(row, Mapping) for rows in tasks.values() for row in rows):
        raise ValueError("mix takes rows, not pairs of rows: train a task of preferences alone")
    if not tasks or not all(len(rows) for rows in tasks.values()):
        raise ValueError(f"give at least one task, and rows for each: got { ({t: len(r) for t, r in tasks.items()}) }")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    weights = weights or {task: len(rows) ** (1 / temperature) for task, rows in tasks.items()}
    if weights.keys() != tasks.keys() or not all(weight > 0 for weight in weights.values()):
        raise ValueError(f"weights must give a positive number to each of {', '.join(tasks)}, got {dict(weights)}")
    length = sum(map(len, tasks.values())) if length is None else length
    shares = list(accumulate(weights[task] for task in tasks))
    ends = [round(length * share / shares[-1]) for share in shares]
    order = random.Random(seed)
    chosen: list[Row] = []
    for rows, end in zip(tasks.values(), ends, strict=True):
        while len(chosen) < end:
            chosen += order.sample(list(rows), min(len(rows), end - len(chosen)))
    order.shuffle(chosen)
    return complete(chosen)


def complete(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Give every row all columns that any of them has; what a row lacks, or has as `None`, is no target there.

    No target is -100, or NaN if any of the column's numbers is a float, in the shape that targets have in other rows.
    Masks that are missing say that all tokens are real, and that the prompt ends before the first label. The masks
    `completion_mask` and `assistant_masks` become labels: the tokens that all of a row's masks mark.

    Raises:
        ValueError: a column of the input, such as `token_type_ids`, that only some rows have; a mask of what is learnt
            that marks nothing, or has another length than the row.

    Example:
        ```python
        >>> from reftheads.data import complete
        >>> complete([{"input_ids": [5, 6], "stars": 4.5}, {"input_ids": [7], "mood": [1]}])
        [{'input_ids': [5, 6], 'stars': 4.5, 'mood': [-100, -100]}, {'input_ids': [7], 'stars': nan, 'mood': [1]}]
        ```
    """
    rows = [_labelled(row) for row in rows]
    columns: dict[str, list[tuple[Any, int]]] = {}  # every value with its row's number of tokens
    for row in rows:
        for name, value in row.items():
            if value is not None:
                columns.setdefault(name, []).append((value, len(row["input_ids"])))
    filling = {name: _filling(name, values) for name, values in columns.items() if len(values) < len(rows)}
    return [{name: filling[name](row) if row.get(name) is None else row[name] for name in columns} for row in rows]


def _filling(name: str, column: Sequence[tuple[Any, int]]) -> Callable[[Row], Any]:
    """Return what fills a column in a row that lacks it.

    Args:
        column: the values of the rows that have it, each with the number of tokens of its row.
    """
    if name == "prompt_mask":
        return lambda row: prompt_mask([IGNORE] * len(row["input_ids"]) if row.get("labels") is None else row["labels"])
    if name == "attention_mask":
        return lambda row: [1] * len(row["input_ids"])
    if name in INPUTS:
        raise ValueError(f"some rows have {name!r} and some do not: give it to all of them, or to none")
    if is_text(column[0][0]):
        return lambda row: None
    values = [torch.as_tensor(value) for value, _ in column]
    none: float = float("nan") if any(value.is_floating_point() for value in values) else IGNORE
    if not values[0].ndim:
        return lambda row: none
    by_token = all(len(value) == tokens for value, (_, tokens) in zip(values, column, strict=True))
    count, *width = values[0].shape
    return lambda row: torch.full([len(row["input_ids"]) if by_token else count, *width], none).tolist()


def _labelled(row: Row) -> Row:
    """Return a row whose labels are what masks of TRL and of chat templates mark; a row without them as it is.

    In a conversation of several answers that are marked, the prompt ends before the first of them, since all of them
    are learnt and an edit reaches only what comes after it.
    """
    masks = {name: row[name] for name in LEARNT if row.get(name) is not None}
    if not masks:
        return row
    labels = list(row["input_ids"] if row.get("labels") is None else row["labels"])
    for name, mask in masks.items():
        if len(mask) != len(labels):
            raise ValueError(f"{name} has {len(mask)} entries in a row of {len(labels)} tokens: give one a token")
        labels = [int(label) if learnt else IGNORE for label, learnt in zip(labels, mask, strict=True)]
    if all(label == IGNORE for label in labels):
        raise ValueError(
            f"{' and '.join(masks)} mark no token of a row that is learnt: leave it out if it was cut before its "
            "answer; if all rows are so, the chat template has no {% generation %} around answers: use encode_chat"
        )
    return {**{name: value for name, value in row.items() if name not in LEARNT}, "labels": labels}


def is_text(value: Any) -> bool:
    """Return whether a value is text, or such as messages are made of: no tensor can hold it."""
    if isinstance(value, list | tuple):
        return any(map(is_text, value[:1]))
    return isinstance(value, str | bytes | Mapping)


def prompt_mask(labels: Sequence[int]) -> list[int]:
    """Return 1 for every token of a row before its first label, then 0."""
    answer = next((i for i, label in enumerate(labels) if label != IGNORE), len(labels))
    return [1] * answer + [0] * (len(labels) - answer)


def flat(rows: Iterable[Any]) -> list[Any]:
    """Return the rows of a dataset, those of pairs one by one."""
    return [row for item in rows for row in (item if isinstance(item, list | tuple) else [item])]


# --- datasets ----------------------------------------------------------------------------------------------


def complete_dataset(dataset: Any) -> Any:
    """Return a list of rows with what they lack filled in, see `complete`; any other dataset as it is."""
    of_rows = isinstance(dataset, list | tuple) and all(isinstance(row, Mapping) for row in dataset)
    return complete(dataset) if of_rows else dataset


def count_rows(dataset: Any) -> int:
    """Return how many rows a dataset has, those of pairs one by one."""
    return len(flat(dataset)) if isinstance(dataset, list | tuple) else len(dataset)


def column_names(dataset: Any) -> list[str] | None:
    """Return the names of a dataset's columns; `None` if only running through it would show them."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return getattr(dataset, "column_names", None)
    if isinstance(dataset, list | tuple):
        rows = flat(dataset)
        return list(dict.fromkeys(name for row in rows for name in row)) if isinstance(rows[0], Mapping) else None
    row = dataset[0]
    return list(row) if isinstance(row, Mapping) else None


def column_values(dataset: Any, name: str) -> list[Any] | None:
    """Return a column of a dataset; `None` if there is none, or only running through all rows would show it."""
    if isinstance(dataset, list | tuple):
        return [row.get(name) for row in flat(dataset)]
    return list(dataset[name]) if name in (getattr(dataset, "column_names", None) or ()) else None
