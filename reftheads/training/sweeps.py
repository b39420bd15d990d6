"""Many adapters trained side by side on one pass over the base model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from reftheads._utils.deprecation import deprecate, renamed, reordered
from reftheads.adapter.model import InterventionModel
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.intervention import Head
from reftheads.training.rates import own_rates
from reftheads.training.trainer import InterventionTrainer


@dataclass
class Trial:
    """Hold what became of one adapter of a sweep.

    Attributes:
        adapter_name: under which it is in the model.
        learning_rate, seed: what it was trained and begun with.
        losses: its training loss, a mean for every time that the trainer logs.
        eval_loss: its loss on the rows for evaluation; `None` without such rows.

    Example:
        ```python
        >>> from reftheads.training import Trial
        >>> trials = [Trial("trial_0", 1e-2, 0, [0.9, 0.4], 0.5), Trial("trial_1", 1e-3, 0, [0.9, 0.7], 0.8)]
        >>> min(trials, key=lambda trial: trial.eval_loss).learning_rate
        0.01
        ```
    """

    adapter_name: str
    learning_rate: float
    seed: int
    losses: list[float] = field(default_factory=list)
    eval_loss: float | None = None

    @property
    def adapter(self) -> str:
        """Return `adapter_name`, which replaces it."""
        deprecate("Trial.adapter", "Trial.adapter_name")
        return self.adapter_name


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
    trainer = _SweepTrainer(model, args, trials, train_dataset=rows, processing_class=tokenizer, **kwargs)
    trainer.train()
    trainer.note_losses()
    for trial in trials if eval_rows is not None else ():
        model.set_adapter(trial.adapter_name)
        trial.eval_loss = trainer.evaluate(eval_rows)["eval_loss"]
    best = min(trials, key=lambda trial: trial.losses[-1] if trial.eval_loss is None else trial.eval_loss)
    model.set_adapter(best.adapter_name)
    return model, trials


class _SweepTrainer(InterventionTrainer):
    """Train all adapters of a model at once, every one as if it were alone."""

    def __init__(self, model: InterventionModel, args: TrainingArguments, trials: Sequence[Trial], **kwargs: Any):
        model.tuner.layer.set_adapter([trial.adapter_name for trial in trials])
        super().__init__(model, args, **kwargs)
        self.trials = trials
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        self._counted = 0

    def _parameters_of(self, trial: Trial) -> dict[str, nn.Parameter]:
        prefix = f"base_model.model.interventions.rh_nodes.{trial.adapter_name}."
        return {name: p for name, p in self.model.named_parameters() if name.startswith(prefix) and p.requires_grad}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        decayed = set(self.get_decay_parameter_names(self.model))
        groups = []
        for trial in self.trials:
            named = self._parameters_of(trial)
            for names, decay in ((decayed, self.args.weight_decay), (named.keys() - decayed, 0.0)):
                parameters = [p for name, p in named.items() if name in names]
                if parameters:
                    groups.append({"params": parameters, "lr": trial.learning_rate, "weight_decay": decay})
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[arg-type]
        self.optimizer = kind(groups, **options)
        own_rates(self.optimizer, self.model)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        limit = self.args.max_grad_norm
        nodes = self.model.tuner.layer.rh_nodes
        norms = [self.accelerator.clip_grad_norm_(nodes[t.adapter_name].parameters(), limit) for t in self.trials]
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
                trial.adapter_name: super(_SweepTrainer, self).compute_loss(
                    model, {**inputs, "adapter_names": [trial.adapter_name] * rows}, False, num_items_in_batch
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
        """Return the loss of every trial from one pass; `None` where the base model can reuse nothing."""
        names = [trial.adapter_name for trial in self.trials]
        with self._reusing(model, inputs):
            if self._replay is None or self._replay.why_plain() is not None or len(names) == 1:
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
            parts = [] if out.get("adapter_loss") is None else [out.adapter_loss[name]]
            for node in self.model.plan(name).graph:
                head, key = node.intervention, f"{name}/{node.name}"
                if isinstance(head, Head) and key in (out.get("losses") or {}):
                    stored = self.model.node(str(node.name), name).stored()
                    parts.append(head.weighted(out.losses[key], out.counts[key], stored) / scale)
            losses[name] = torch.stack(parts).sum()
        return losses

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for name in logs.keys() & {"loss", "train_loss"}:  # sums over the trials so far
            logs[name] /= len(self.trials)
        if "loss" in logs:
            self.note_losses()
        super().log(logs, *args, **kwargs)

    def note_losses(self) -> None:
        """Give every trial its mean loss of the steps since the last time."""
        steps = self.state.global_step - self._counted
        for trial in self.trials if steps else ():
            trial.losses.append(float(self._sums.pop(trial.adapter_name)) / steps)
        self._counted = self.state.global_step
