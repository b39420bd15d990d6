"""Some candidates, trained side by side and judged on rows held out."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from reftheads._utils.eval_mode import evaluating
from reftheads.adapter.model import InterventionModel
from reftheads.data.rows import count_rows
from reftheads.reuse.store import ActivationStore
from reftheads.training.side_by_side import SideBySideTrainer, Trial
from reftheads.tuning.journal import finite
from reftheads.tuning.space import Candidate

Metric = Callable[[InterventionModel, Any, Any], float]
"""Judges a model, in evaluation mode, by a tokenizer and rows held out."""


@dataclass
class Passes:
    """Trains candidates side by side in one base model.

    Attributes:
        base, tokenizer, rows, eval_rows, args: as for `sweep`.
        metric: judges in place of the loss.
        seed: from which the parameters of every candidate are made.
        store: what all passes share.
    """

    base: nn.Module
    tokenizer: PreTrainedTokenizerBase
    rows: Any
    eval_rows: Any
    args: TrainingArguments
    metric: Metric | None
    seed: int
    store: ActivationStore = field(default_factory=ActivationStore)
    _model: InterventionModel | None = None

    def train(self, candidates: Sequence[Candidate], steps: int) -> tuple[dict[int, float | None], float]:
        """Train candidates from the start for some steps; return their scores by number, and the seconds of a step.

        A score is `None` if it is no number, or the loss of a step was none.
        """
        trials = [Trial(adapter_name(c, steps), c.learning_rate, self.seed) for c in candidates]
        model = self._with([(trial.adapter_name, c) for trial, c in zip(trials, candidates, strict=True)])
        clock = _Clock()
        trainer = _Trainer(
            model, for_steps(self.args, steps), list(trials), train_dataset=self.rows, processing_class=self.tokenizer,
            callbacks=[clock], reuse=self.store,
        )  # fmt: skip
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)
        try:
            trainer.train()
        except _NoneLeft:
            return dict.fromkeys((c.number for c in candidates), None), clock.step
        scores = self._scores(trainer)
        numbered = zip(candidates, trials, strict=True)
        return {c.number: finite(scores.get(trial.adapter_name, math.nan)) for c, trial in numbered}, clock.step

    def _scores(self, trainer: _Trainer) -> dict[str, float]:
        if self.metric is None:
            return trainer.losses_on(self.eval_rows)
        scores = {}
        for name in [trial.adapter_name for trial in trainer.trials]:
            trainer.model.set_adapter(name)
            with torch.no_grad(), evaluating(trainer.model):
                scores[name] = float(self.metric(trainer.model, self.tokenizer, self.eval_rows))
        return scores

    def _with(self, named: Sequence[tuple[str, Candidate]]) -> InterventionModel:
        """Return the base model with these candidates as adapters, and no other ones."""
        before = [] if self._model is None else list(self._model.peft_config)
        for name, candidate in named:
            torch.manual_seed(self.seed)
            if self._model is None:
                self._model = InterventionModel(self.base, candidate.graph, adapter_name=name)
            else:
                self._model.add_adapter(name, candidate.graph)
        assert self._model is not None
        for name in before:
            self._model.delete_adapter(name)
        return self._model

    def save(self, name: str, folder: Path) -> None:
        """Write the weights of an adapter of the last pass into a folder of its name."""
        assert self._model is not None
        self._model.save_pretrained(folder.parent, selected_adapters=[name])

    def end(self) -> None:
        """Leave the base model without adapters."""
        if self._model is not None:
            self._model.unload()
            self._model = None


def adapter_name(candidate: Candidate, steps: int) -> str:
    """Return how the model calls a candidate that is trained for some steps."""
    return f"candidate_{candidate.number}_{steps}"


def steps_of(args: TrainingArguments, rows: Any) -> int:
    """Return how many steps a training has."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(count_rows(rows) / args.train_batch_size)
    return max(math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1)), 1)


def for_steps(args: TrainingArguments, steps: int) -> TrainingArguments:
    """Return arguments for so many steps, of which nothing is logged, saved or judged."""
    args = copy.copy(args)
    args.max_steps = steps
    args.save_strategy, args.load_best_model_at_end = SaveStrategy.NO, False
    args.logging_strategy = args.eval_strategy = IntervalStrategy.NO
    return args


class _NoneLeft(Exception):
    """The losses of all candidates are NaN or infinite."""


class _Trainer(SideBySideTrainer):
    """Train side by side, and leave out whose loss is no number, before it reaches any weight."""

    def kept(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        good = {name: loss for name, loss in losses.items() if bool(torch.isfinite(loss))}
        if len(good) < len(losses):
            self.trials = [trial for trial in self.trials if trial.adapter_name in good]
        if not good:
            raise _NoneLeft
        return good


class _Clock(TrainerCallback):
    """Take the time of a step: the median of all but the first, which records and compares."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @property
    def step(self) -> float:
        later = sorted(self.seconds[1:] or self.seconds)
        return later[len(later) // 2] if later else 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)
