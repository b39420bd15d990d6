"""Many adapters trained side by side on one pass over the base model, each as if it were alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from reftheads._utils.deprecation import deprecate
from reftheads.adapter.model import InterventionModel
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


class SideBySideTrainer(InterventionTrainer):
    """Train all adapters of a model at once, every one as if it were alone.

    The rows of a batch go through the base model once for each adapter, all in one pass. Adapters of one graph have
    the weights of each node stacked; of several graphs, each node acts on its own rows.

    Args:
        model: has the adapters.
        trials: one for each of them.
    """

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
        losses = self.kept(self._losses(model, inputs, num_items_in_batch))
        # without a number of items, the Trainer divides what it is given
        whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None or self.compute_loss_func is not None
        parts = 1 if whole else self.current_gradient_accumulation_steps
        for name, loss in losses.items():
            self._sums[name] = self._sums[name].to(loss.device) + loss.detach() / parts
        total = torch.stack(list(losses.values())).sum()
        return (total, {"loss": total}) if return_outputs else total

    def kept(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of the trials that go on, by adapter, of those of all: here every one does."""
        return losses

    @torch.no_grad()
    def losses_on(self, eval_rows: Any) -> dict[str, float]:
        """Return by adapter what `evaluate` calls `eval_loss`, of all trials in one pass a batch."""
        self.model.eval()
        sums: dict[str, float] = defaultdict(float)
        rows = 0
        for batch in self.get_eval_dataloader(eval_rows):
            inputs: dict[str, Any] = self._prepare_inputs(batch)
            count = len(inputs["input_ids"])
            with self.compute_loss_context_manager():
                losses = self._losses(self.model, inputs, None)
            for name, loss in losses.items():
                sums[name] += float(loss) * count
            rows += count
        return {name: total / rows for name, total in sums.items()}

    def _losses(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> dict[str, Tensor]:
        """Return the loss of every trial: from one pass or, where the base model can reuse nothing, in turns."""
        rows = len(inputs["input_ids"])
        losses = self._together(model, inputs, rows, num_items)
        if losses is not None:
            return losses
        return {
            trial.adapter_name: super(SideBySideTrainer, self).compute_loss(
                model, {**inputs, "adapter_names": [trial.adapter_name] * rows}, False, num_items
            )
            for trial in self.trials
        }

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
                head, read = node.intervention, out.get("losses") or {}
                key = f"{name}/{node.name}"
                key = key if key in read else str(node.name)  # where no other adapter has a head of that name
                if isinstance(head, Head) and key in read:
                    stored = self.model.node(str(node.name), name).stored()
                    parts.append(head.weighted(read[key], out.counts[key], stored) / scale)
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
