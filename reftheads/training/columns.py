"""Whether datasets have the columns that the heads of a model are trained on."""

from typing import Any

from reftheads.data.rows import column_names, column_values
from reftheads.data.targets import check_column
from reftheads.graph.intervention import Head
from reftheads.runtime.interventions import Interventions


def check_columns(layer: Interventions, train_dataset: Any, eval_dataset: Any) -> None:
    """Raise `ValueError` for a target of a head that acts which is no column, or holds what cannot be; see `Collator`.

    On the CPU, before training. A dataset that only running through it would show is not looked at.
    """
    columns = column_names(train_dataset)
    if columns is None:
        return
    plans = [layer.plans[name] for name in layer.active_adapters]
    for target in (target for plan in plans for target in plan.targets):
        if target not in columns:
            raise ValueError(
                f"the target {target!r} of a head is no column of train_dataset, which has "
                f"{', '.join(columns)}: add it to the rows, or give the head target=None"
            )
    for head in (planned.node.intervention for plan in plans for planned in plan.nodes):
        if isinstance(head, Head) and head.target is not None:
            _check_targets(head, train_dataset, "train_dataset")
            _check_targets(head, eval_dataset, "eval_dataset")


def _check_targets(head: Head, dataset: Any, name: str) -> None:
    """Raise `ValueError` for a row whose target cannot be, or if no row has one."""
    column = column_values(dataset, str(head.target))
    if column and not check_column(head, column, f"row {{row}} of {name}"):
        raise ValueError(
            f"no row of {name} has a target {head.target!r}: fill the column, or give the head target=None"
        )
