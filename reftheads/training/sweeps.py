"""One graph trained with many learning rates and from many seeds, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from reftheads._utils.deprecation import renamed, reordered
from reftheads.adapter.model import InterventionModel
from reftheads.graph.graph import InterventionGraph
from reftheads.training.side_by_side import SideBySideTrainer, Trial


@reordered("base", "graph", "args", graph=InterventionGraph)
@renamed(train_dataset="rows", eval_dataset="eval_rows", processing_class="tokenizer")
def sweep(
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Any,
    graph: InterventionGraph,
    args: TrainingArguments,
    *,
    eval_rows: Any = None,
    learning_rates: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    **kwargs: Any,
) -> tuple[InterventionModel, list[Trial]]:
    """Train the same graph with every learning rate and from every seed, all of these trials in each step.

    What the base model computes of a batch below and before the graph's cone of influence is recorded once. Above it,
    the rows of all trials go through the base model as one batch, and the weights of each node are stacked. Every trial
    has its own learning rate, optimiser state and clipping of gradients. Its weights are those of a run of its own with
    `args.learning_rate` set to its rate, and with the same order of the data; dropout in nodes draws other numbers. A
    node with `lr` keeps that rate in every trial.

    Where the base model can reuse nothing (see `InterventionModel.reuse_summary`) the trials take turns in every
    step, with the same result.

    Args:
        base: the base model; the graph is compiled into it once for every trial.
        tokenizer: as the trainer's `processing_class`; `None` where `data_collator` makes the batches.
        rows: what is learnt, as the trainer's `train_dataset`.
        graph: what every trial trains.
        args: as for `InterventionTrainer`, with the order of the data by its seed.
        eval_rows: by which the trials are compared, as the trainer's `eval_dataset`.
        learning_rates: left out, `args.learning_rate` alone.
        seeds: from which the parameters are made.
        kwargs: go to `InterventionTrainer`, such as `reuse`: an `ActivationStore` serves several sweeps.

    Returns:
        The model, with the best trial's adapter active (by its loss in evaluation, else in the end of training), and
        the trials in the order of learning rates, and of seeds within each.

    Raises:
        ValueError: no seed.

    Example:
        ```python
        >>> import tempfile
        >>> import reftheads as rh
        >>> from transformers import TrainingArguments
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> rows = rh.encode_pairs(tokenizer, ["Tell me about owls."], ["Owls hoot."])
        >>> graph = rh.InterventionGraph(rh.Node(rh.LoReFT(4), layer=3, positions="l1"))
        >>> options = {"save_strategy": "no", "report_to": [], "disable_tqdm": True}
        >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=2, **options)
        >>> model, trials = rh.sweep(base, tokenizer, rows, graph, args, learning_rates=[1e-3, 1e-2], seeds=[0, 1])
        {'train_runtime': ...}
        >>> [(trial.adapter_name, trial.learning_rate, trial.seed) for trial in trials][1:3]
        [('trial_1', 0.001, 1), ('trial_2', 0.01, 0)]
        ```
    """
    rates = list(learning_rates) or [args.learning_rate]
    trials = [
        Trial(f"trial_{len(seeds) * i + j}", rate, seed) for i, rate in enumerate(rates) for j, seed in enumerate(seeds)
    ]
    if not trials:
        raise ValueError("a sweep needs at least one seed")
    model: InterventionModel | None = None
    for trial in trials:
        torch.manual_seed(trial.seed)
        if model is None:
            model = InterventionModel(base, graph, adapter_name=trial.adapter_name)
        else:
            model.add_adapter(trial.adapter_name, graph)
    assert model is not None
    trainer = SideBySideTrainer(model, args, trials, train_dataset=rows, processing_class=tokenizer, **kwargs)
    trainer.train()
    trainer.note_losses()
    for trial in trials if eval_rows is not None else ():
        model.set_adapter(trial.adapter_name)
        trial.eval_loss = trainer.evaluate(eval_rows)["eval_loss"]
    best = min(trials, key=lambda trial: trial.losses[-1] if trial.eval_loss is None else trial.eval_loss)
    model.set_adapter(best.adapter_name)
    return model, trials
