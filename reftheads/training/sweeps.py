"""Many adapters trained side by side on one pass over the base model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from reftheads.adapter.model import InterventionModel
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.intervention import Head
from reftheads.training.trainer import InterventionTrainer, own_rates


@dataclass
class Trial:
    """One adapter of a sweep.

    Attributes:
        adapter: its name in the model.
        learning_rate, seed: what it was trained and begun with.
        losses: its training loss, a mean for every time that the trainer logs.
        eval_loss: its loss on the rows for evaluation; `None` without such rows.
    """

    adapter: str
    learning_rate: float
    seed: int
    losses: list[float] = field(default_factory=list)
    eval_loss: float | None = None


def sweep(
    base: nn.Module,
    graph: InterventionGraph,
    args: TrainingArguments,
    *,
    train_dataset: Any,
    eval_dataset: Any = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    learning_rates: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    **kwargs: Any,
) -> tuple[InterventionModel, list[Trial]]:
    """Trains the same graph with every learning rate and from every seed, all of them in each step.

    The rows of a batch are taken once for every trial; what the base model computes of them below and before the
    graph's cone of influence is recorded once, and above it the trials' rows go through the base model as one
    batch, each node with its weights stacked. Every trial has its own learning rate, optimiser state and clipping of
    gradients. Its weights are those of a run of its own with `args.learning_rate` set to its rate, and with the same
    order of the data; dropout in nodes draws other numbers. A node with `lr` keeps that rate in every trial.

    Where the base model can reuse nothing (see `InterventionModel.plan_summary`) the trials take turns in every
    step, with the same result.

    Args:
        base: the base model; the graph is compiled into it once for every trial.
        args: as for `InterventionTrainer`, with the order of the data by its seed.
        train_dataset, eval_dataset, processing_class: as for `InterventionTrainer`.
        learning_rates: left out, `args.learning_rate` alone.
        seeds: from which the parameters are made.
        kwargs: go to `InterventionTrainer`, such as `reuse`: an `ActivationStore` serves several sweeps.

    Returns:
        The model, with the best trial's adapter active (by its loss in evaluation, else in the end of training), and
        the trials in the order of learning rates, and of seeds within each.

    Raises:
        ValueError: no seed.
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
            model = InterventionModel(base, graph, adapter_name=trial.adapter)
        else:
            model.add_adapter(trial.adapter, graph)
    assert model is not None
    trainer = _SweepTrainer(
        model, args, trials, train_dataset=train_dataset, processing_class=processing_class, **kwargs
    )
    trainer.train()
    trainer.note_losses()
    for trial in trials if eval_dataset is not None else ():
        model.set_adapter(trial.adapter)
        trial.eval_loss = trainer.evaluate(eval_dataset)["eval_loss"]
    best = min(trials, key=lambda trial: trial.losses[-1] if trial.eval_loss is None else trial.eval_loss)
    model.set_adapter(best.adapter)
    return model, trials


class _SweepTrainer(InterventionTrainer):
    """Trains all adapters of a model at once, every one as if it were alone."""

    def __init__(self, model: InterventionModel, args: TrainingArguments, trials: Sequence[Trial], **kwargs: Any):
        model.tuner.layer.set_adapter([trial.adapter for trial in trials])
        super().__init__(model, args, **kwargs)
        self.trials = trials
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        self._counted = 0

    def _own(self, trial: Trial) -> dict[str, nn.Parameter]:
        prefix = f"base_model.model.interventions.rh_nodes.{trial.adapter}."
        return {name: p for name, p in self.model.named_parameters() if name.startswith(prefix) and p.requires_grad}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        decayed = set(self.get_decay_parameter_names(self.model))
        groups = [
            {"params": parameters, "lr": trial.learning_rate, "weight_decay": decay}
            for trial in self.trials
            for decays, decay in ((True, self.args.weight_decay), (False, 0.0))
            if (parameters := [p for name, p in self._own(trial).items() if (name in decayed) == decays])
        ]
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[arg-type]
        self.optimizer = kind(groups, **options)
        own_rates(self.optimizer, self.model)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        limit = self.args.max_grad_norm
        nodes = self.model.tuner.layer.rh_nodes
        norms = [self.accelerator.clip_grad_norm_(nodes[t.adapter].parameters(), limit) for t in self.trials]
        return torch.stack([torch.as_tensor(norm) for norm in norms]).max()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rows = len(inputs["input_ids"])
        losses = self._together(model, inputs, rows, num_items_in_batch)
        if losses is None:
            losses = {
                trial.adapter: super(_SweepTrainer, self).compute_loss(
                    model, {**inputs, "adapter_names": [trial.adapter] * rows}, False, num_items_in_batch
                )
                for trial in self.trials
            }
        # without a number of items, the Trainer divides what it is given
        whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None or self.compute_loss_func is not None
        parts = 1 if whole else self.current_gradient_accumulation_steps
        for name, loss in losses.items():
            self._sums[name] = self._sums[name].to(loss.device) + loss.detach() / parts
        total = torch.stack(list(losses.values())).sum()
        return (total, {"loss": total}) if return_outputs else total

    def _together(
        self, model: nn.Module, inputs: dict[str, Any], rows: int, num_items: Tensor | int | None
    ) -> dict[str, Tensor] | None:
        """The loss of every trial from one pass; `None` where the base model can reuse nothing."""
        names = [trial.adapter for trial in self.trials]
        with self._reusing(model, inputs):
            if self._replay is None or self._replay.eligibility.why_plain() is not None or len(names) == 1:
                return None
            batch = {name: value.repeat(len(names), *[1] * (value.ndim - 1)) for name, value in inputs.items()}
            options = (
                {} if num_items is None or not self.model_accepts_loss_kwargs else {"num_items_in_batch": num_items}
            )
            out = model(**batch, **options, adapter_names=[name for name in names for _ in range(rows)])
        if "labels" in inputs and out.get("adapter_loss") is None:
            return None
        scale = self.current_gradient_accumulation_steps if options else 1
        losses = {}
        for name in names:
            heads = [
                head.weighted(out.losses[key], out.counts[key], self.model.node(str(node.name), name).stored()) / scale
                for node in self.model.plan(name).graph
                if isinstance(head := node.intervention, Head)
                and (key := f"{name}/{node.name}") in (out.get("losses") or {})
            ]
            own = [] if out.get("adapter_loss") is None else [out.adapter_loss[name]]
            losses[name] = torch.stack([*own, *heads]).sum()
        return losses

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for name in logs.keys() & {"loss", "train_loss"}:  # sums over the trials so far
            logs[name] /= len(self.trials)
        if "loss" in logs:
            self.note_losses()
        super().log(logs, *args, **kwargs)

    def note_losses(self) -> None:
        """Gives every trial its mean loss of the steps since the last time."""
        steps = self.state.global_step - self._counted
        for trial in self.trials if steps else ():
            trial.losses.append(float(self._sums.pop(trial.adapter)) / steps)
        self._counted = self.state.global_step
