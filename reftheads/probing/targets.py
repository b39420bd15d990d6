"""The targets of rows, and which rows train, validate and judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from reftheads.data.targets import check_items, read_target
from reftheads.interventions.heads import MappingHead
from reftheads.runtime.plan import PlannedNode

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped

TRAIN, VALIDATION, TEST = 0, 1, 2


@dataclass(frozen=True)
class Column:
    """Hold the targets in a column of all rows, one after the other: its items."""

    name: str
    values: Shaped[Tensor, "items ..."]
    row: Int[Tensor, " items"]
    index: list[int | list[int]]  # of each row: its items, in the shape that its target has; -1 for none

    @classmethod
    def of(cls, head: MappingHead, rows: Sequence[Mapping[str, Any]]) -> Column:
        name = str(head.target)
        targets = [read_target(head, row.get(name), f"row {i}") for i, row in enumerate(rows)]
        first = next((target for target in targets if target is not None), None)
        if first is None:
            raise ValueError(f"no row has a target {name!r}: they have {', '.join(rows[0])}")
        width = () if head.target_width is None else (head.target_width,)
        by_token = first.ndim > len(width)
        index, values, row_of = [], [], []
        for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
            if target is None:
                index.append([-1] * len(row["input_ids"]) if by_token else -1)
                continue
            if target.ndim != by_token + len(width):
                raise ValueError(
                    f"target {name!r} in row {i} has the shape {tuple(target.shape)}: give "
                    f"{'one per token' if by_token else 'one per row, as in the other rows'}"
                    + (f", each of {width[0]} numbers" if width else "")
                )
            target = target if by_token else target[None]
            items = list(range(len(row_of), len(row_of) + len(target)))
            index.append(items if by_token else items[0])
            values.append(target)
            row_of += [i] * len(target)
        return cls(name, torch.cat(values), torch.tensor(row_of), index)

    @property
    def by_token(self) -> bool:
        return isinstance(self.index[0], list)

    def check(self, head: MappingHead) -> None:
        """Raise `ValueError` for a target that the head's loss has no meaning for, or if there is none."""
        if not check_items(head, self.values, self.row):
            raise ValueError(f"no row has a target {self.name!r}: all that stands there stands for none")

    def types(self, control: str, rows: Sequence[Mapping[str, Any]], shift: bool) -> Int[Tensor, " items"]:
        """Return the number of each item's type: that of its value in the column `control`."""
        of_items: list[Any] = []
        for i, (index, row) in enumerate(zip(self.index, rows, strict=True)):
            if index == -1 or (isinstance(index, list) and index[:1] == [-1]):
                continue
            value = row.get(control)
            value = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
            if isinstance(index, int) and value is not None and not isinstance(value, list | tuple):
                of_items.append(value)
            elif isinstance(index, list) and isinstance(value, list | tuple) and len(value) == len(index):
                of_items += [value[0], *value[:-1]] if shift else value
            elif isinstance(index, list) and value is not None and not isinstance(value, list | tuple):
                of_items += [value] * len(index)
            else:
                wanted = "one a row, or one a target" if isinstance(index, list) else "one a row"
                raise ValueError(
                    f"control {control!r} in row {i} is {value!r:.80}, and the target {self.name!r} needs {wanted}: "
                    "name a column that says of what kind each target's text is, such as the entity that it is about"
                )
        numbers: dict[Any, int] = {}
        return torch.tensor([numbers.setdefault(value, len(numbers)) for value in of_items])


def parts_of(
    planned: Sequence[PlannedNode],
    columns: Mapping[str, Column],
    rows: int,
    judged: int,
    held_out: float,
    validation: float,
    seeds: Sequence[int],
) -> Int[Tensor, "seeds rows"]:
    """Say what each row is for: `rows` are divided anew for every seed, and the `judged` ones come after them."""
    classes = next(filter(None, (_classes(p, columns, rows) for p in planned)), None)
    parts = torch.full((len(seeds), rows + judged), TEST)
    for part, seed in zip(parts, seeds, strict=True):
        rest = np.arange(rows)
        if not judged:
            rest, _ = _split(rest, held_out, classes, seed)
        train, known = _split(rest, validation, classes, seed) if validation else (rest, rest[:0])
        part[train], part[known] = TRAIN, VALIDATION
    return parts


def _classes(planned: PlannedNode, columns: Mapping[str, Column], rows: int) -> list[int] | None:
    """Return the class of every row, if that is what a head predicts."""
    head = planned.node.intervention
    assert isinstance(head, MappingHead)
    column = columns[str(head.target)]
    values = column.values[:rows]
    complete = not column.by_token and values.ndim == 1 and column.row[:rows].tolist() == list(range(rows))
    if head.kind not in ("classes", "probabilities") or not complete:
        return None
    return values.round().int().tolist()


def _split(rows: Any, fraction: float, classes: list[int] | None, seed: int) -> Any:
    from sklearn.model_selection import train_test_split

    strata = None if classes is None else np.array(classes)[rows]
    if strata is not None:
        counts = np.unique(strata, return_counts=True)[1]
        if counts.min() < 2 or min(fraction, 1 - fraction) * len(rows) < len(counts):  # too few to give each its share
            strata = None
    return train_test_split(rows, test_size=fraction, random_state=seed, stratify=strata)
