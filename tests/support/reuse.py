"""Trainings that reuse activations, or compute everything, and what became of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import reftheads as rh
from reftheads.reuse.store import ActivationStore
from support.training import arguments, edits, head, llama, weights

BOTH = rh.InterventionGraph(head(0, "below"), *edits("l2"), head(2, "above"))
READING = rh.InterventionGraph(head(0, "low"), head(2, "high"))


def trainer_of(
    tokenizer: Any,
    rows: Any,
    folder: Path,
    reuse: Any,
    graph: rh.InterventionGraph = BOTH,
    dtype: torch.dtype = torch.float32,
    base: Callable[[], Any] = llama,
    wrap: Callable[..., Any] = rh.InterventionModel,
    trainer: type[rh.InterventionTrainer] = rh.InterventionTrainer,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> rh.InterventionTrainer:
    """Return a trainer of `graph` on rows; a column of labels that no head wants is left out."""
    made = base().to(dtype)
    torch.manual_seed(0)
    model = wrap(made, graph).to(dtype)
    # Adam divides by the gradient's size, so that what it makes of rounding is as large as what it learns
    optimiser = {"optim": "adamw_torch"} if dtype == torch.float64 else {"optim": "sgd", "learning_rate": 0.1}
    args = arguments(folder, **{"max_steps": -1, "num_train_epochs": 3} | optimiser | dict(options or {}))
    if not {node.name for node in graph} & {"below", "low"}:  # a column that nobody knows takes the plain path
        rows = without(rows, "label")
        more |= {"eval_dataset": without(more.get("eval_dataset"), "label")}
    reuse = ActivationStore(2**28) if reuse == "store" else reuse
    more = {"processing_class": tokenizer} | more
    return trainer(model, args, train_dataset=rows, reuse=reuse, **more)


def without(rows: Any, name: str) -> Any:
    """Rows without a column; a dataset of another type as it is."""
    return [{n: v for n, v in row.items() if n != name} for row in rows] if isinstance(rows, list) else rows


def fit(*given: Any, resume: str | None = None, **options: Any) -> rh.InterventionTrainer:
    """Train by what `trainer_of` gives, and return the trainer."""
    made = trainer_of(*given, **options)
    made.train(resume_from_checkpoint=resume)
    return made


def apart(one: Any, two: Any) -> float:
    """The largest difference of two sets of trained weights, relative to the largest of each tensor."""
    a, b = (weights(trained.model) for trained in (one, two))
    assert a.keys() == b.keys() and a
    return max(float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp(min=1e-3)) for n in a)


def store_of(trainer: rh.InterventionTrainer) -> ActivationStore:
    """Return the store that a training has used."""
    assert trainer._replay is not None and trainer._replay.store is not None
    return trainer._replay.store


def losses(trainer: rh.InterventionTrainer, name: str = "loss") -> list[float]:
    """Return what a training has logged under a name."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
