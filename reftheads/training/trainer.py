"""A transformers Trainer that knows intervention graphs."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from reftheads.adapter.model import InterventionModel
from reftheads.data.collator import Collator
from reftheads.data.rows import LEARNT, complete_dataset, count_rows
from reftheads.reuse.budget import choose_store
from reftheads.reuse.forecast import Forecast, describe
from reftheads.reuse.replay import Replay
from reftheads.reuse.store import ActivationStore
from reftheads.runtime.interventions import Interventions
from reftheads.training.answers import generated_answers
from reftheads.training.base_weights import SavesBase
from reftheads.training.checkpoints import WholeCheckpoints
from reftheads.training.columns import check_columns
from reftheads.training.masks import MasksInMetrics
from reftheads.training.means import MeanLosses, without_repeated
from reftheads.training.rates import own_rates
from reftheads.training.sampling import sampled_batches, seen_once


class InterventionTrainer(SavesBase, WholeCheckpoints, MasksInMetrics):
    """Train an `InterventionModel` as `transformers.Trainer` does, with what it needs besides.

    * Batches are padded by `Collator`, and keep `prompt_mask` and the heads' target columns.
    * A head's loss is the mean over a batch's targets; under gradient accumulation and on several devices, the mean of
      these. It is logged as `loss_<name>`, and by `evaluate` as `eval_loss_<name>`; both are means over all targets.
    * With `predict_with_generate`, the prompts alone are fed, and what is generated from them is compared.
    * A node with its own learning rate, such as `LinearHead(…, lr=1e-3)`, gets its own parameter group.
    * Checkpoints hold the base model's weights too, in a folder `base`, if any of them is trained. Each is there as a
      whole or not at all, whenever the process is killed, so that `resume_from_checkpoint=True` goes on.
    * Masks among predictions, such as `selected`, are false on padding when they come to `compute_metrics`.
    * A step computes only what the graph can change, and takes the rest from a store; see
      `InterventionModel.reusing`. `reuse_summary` says what is reused; how often the store had what was wanted, and
      how large it is, is logged beside the loss.

    Args:
        model, args: as for `Trainer`; `args.predict_with_generate`, if there is one, counts as well.
        train_dataset, eval_dataset: rows as from `encode_pairs` or `encode_chat`.
        processing_class: the tokenizer.
        predict_with_generate: whether evaluation and prediction generate. `compute_metrics` then gets new tokens as
            predictions and labels as label ids, both padded with -100.
        generation_kwargs: for `model.generate`; if left out, it is greedy and generates at most 64 new tokens.
        reuse: where the activations of the frozen base model are kept: "memory"; "disk", in the folder `activations`
            of `args.output_dir`; nowhere, "off", where every step is a plain one; or "auto": in memory if they seem to
            fit into half of what is free and a row is seen more than once, else nowhere, which still spares the
            backward pass outside of the graph's cone. Or an `ActivationStore`, which several trainers may share.
        kwargs: for `Trainer`.

    Raises:
        ValueError: an empty dataset; a tokenizer without pad token; and, where `Collator` makes the batches and the
            columns are known before training, a head's target that is no column of `train_dataset`, that its loss has
            no meaning for (the error names row and value), or that is in no row.
        FloatingPointError: a loss that is NaN or infinite, before it reaches the weights.

    Example:
        ```python
        >>> import tempfile
        >>> import reftheads as rh
        >>> from transformers import TrainingArguments
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> model = rh.InterventionModel(base, rh.InterventionGraph.over(rh.LoReFT(rank=4), [3], positions="l1"))
        >>> rows = rh.encode_pairs(tokenizer, ["Hi!"] * 8, ["hello"] * 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, max_steps=5, learning_rate=0.01, report_to="none", disable_tqdm=True)
        ...     result = rh.InterventionTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
        {'train_runtime': ...}
        >>> result.global_step
        5
        ```
    """

    model: InterventionModel  # type: ignore[assignment]

    def __init__(
        self,
        model: InterventionModel | None = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Any = None,
        predict_with_generate: bool = False,
        generation_kwargs: dict[str, Any] | None = None,
        reuse: Literal["auto", "memory", "disk", "off"] | ActivationStore = "auto",
        **kwargs: Any,
    ):
        _check_arguments(reuse, train_dataset=train_dataset, eval_dataset=eval_dataset)
        if data_collator is None and processing_class is not None:
            data_collator = Collator(processing_class)
            # a batch without any row of a task has the columns of the others: all processes, and all steps, are alike
            train_dataset, eval_dataset = map(complete_dataset, (train_dataset, eval_dataset))
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.predict_with_generate = predict_with_generate or getattr(self.args, "predict_with_generate", False)
        self.generation_kwargs = {"max_new_tokens": 64, "do_sample": False, **(generation_kwargs or {})}
        self.reuse = reuse
        self.reuse_summary = ""
        self._trained, self._evaluated = MeanLosses(), MeanLosses()  # of heads, since the last log
        self._replay: Replay | None = None
        self._described: tuple[nn.Module, bool] | None = None  # the base model of `reuse_summary`, and its mode
        self._wants_logits = self.label_smoother is not None or self.compute_loss_func is not None
        if self._wants_logits and reuse != "off":
            self.reuse_summary = "reuse  nothing: the loss is computed from all logits"
        if isinstance(data_collator, Collator):  # a collator of one's own may make columns
            check_columns(_layer_of(self.model), train_dataset, eval_dataset)

    @property
    def _target_names(self) -> list[str]:
        plans = _layer_of(self.model).plans.values()
        return list(dict.fromkeys(name for plan in plans for name in plan.targets))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make the model anew by `model_init`, as `Trainer` does before each training."""
        self._signature_columns = None  # its heads may have other targets
        return super().call_model_init(trial)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            assert self._signature_columns is not None
            learnt = LEARNT if isinstance(self.data_collator, Collator) else ()
            self._signature_columns += ["prompt_mask", *learnt, *self._target_names]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer, with a parameter group for each node that has its own learning rate."""
        optimizer = super().create_optimizer(model)
        own_rates(optimizer, self.model)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, computed within the cone alone, and the model's output if that is asked for."""
        with self._reusing(model, inputs):
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        named: Mapping[str, Any] = outputs if isinstance(outputs, Mapping) else {}
        if not named and inputs.keys() & self._target_names:
            raise ValueError("the losses of heads have names, and this model gives a tuple: let it give a dict")
        (self._trained if model.training else self._evaluated).add(named)
        heads: Tensor | None = named.get("head_loss")
        if heads is not None and num_items_in_batch is not None and self.model_accepts_loss_kwargs:
            # the base model's loss is divided by the items of all batches and devices; the heads' are means of one
            devices = self.args.n_gpu if self.args.n_gpu > 1 else self.accelerator.num_processes // self.get_tp_size()
            scale = devices if self.args.average_tokens_across_devices else 1
            batches = self.current_gradient_accumulation_steps if model.training else 1
            loss = loss - heads * (scale - 1 / batches)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what is given and, beside a training loss, the mean loss of each head and the counters of the store."""
        if "loss" in logs:
            logs |= {f"loss_{name}": loss for name, loss in self._trained.take(self.accelerator).items()}
            store = self._replay.store if self._replay is not None else None
            logs |= {} if store is None else {f"reuse_{name}": float(n) for name, n in store.counters().items()}
        super().log(logs, *args, **kwargs)

    # --- computing the cone alone ---------------------------------------------------------------------------

    def _reusing(self, model: nn.Module, inputs: Mapping[str, Any]) -> AbstractContextManager:
        if self.reuse == "off" or self._wants_logits:
            return nullcontext()
        own = self.accelerator.unwrap_model(model)
        if not isinstance(own, InterventionModel) or isinstance(model, nn.DataParallel):
            self.reuse_summary = f"reuse  nothing: the model is a {type(model).__name__}, no InterventionModel"
            return nullcontext()
        if self._described is None or self._described[0] is not own.get_base_model():
            self._replay = self._new_replay(own, inputs)
            self._described = own.get_base_model(), own.training
        elif own.training and not self._described[1]:  # described before an evaluation; dropout may be active now
            if self._replay is not None and self._replay.why_plain() is not None:
                self.reuse_summary = describe(self._replay)
            self._described = self._described[0], True
        return nullcontext() if self._replay is None else own.reusing(self._replay)

    def _new_replay(self, model: InterventionModel, inputs: Mapping[str, Any]) -> Replay | None:
        """Chooses where activations are kept, says so, and makes sure that nothing comes out differently."""
        try:
            replay = model.replay()
        except ValueError as error:
            self.reuse_summary = f"reuse  nothing: {error}"
            return None
        with self.accelerator.autocast():  # as the steps compute, whose comparison with the plain path is known then
            if replay.why_plain() is not None:
                self.reuse_summary = describe(replay)
                return replay
            if not replay.split.understands(inputs):
                self.reuse_summary = "reuse  nothing: a batch holds more than tokens, their labels and targets of heads"
                return None
            batches = self._sample()
            self.reuse_summary = describe(replay, batches)
        rows: Any = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        size = Forecast.of(replay, batches).bytes_of(count_rows(rows)) if batches else None
        store, why = choose_store(
            self.reuse,  # type: ignore[arg-type]
            size,
            folder=os.path.join(str(self.args.output_dir), "activations"),
            seen_once=bool(batches) and seen_once(self.args, len(rows)),
            device=self.args.device,
        )
        self.reuse_summary += f"\nstore    {why}"
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            print(self.reuse_summary)
        return replay.kept_in(store)

    def _sample(self) -> list[dict[str, Tensor]]:
        """Return some batches of the rows that are trained on, or else evaluated; none if they are not at hand."""
        rows: Any = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        collate = self._get_collator_with_removed_columns(self.data_collator)
        batches = sampled_batches(rows, collate, self.args.train_batch_size)
        return [self._prepare_inputs(batch) for batch in batches]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as `Trainer` does, and add the mean loss of each head to the metrics."""
        self._evaluated = MeanLosses()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        losses = self._evaluated.take(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_loss_{name}": loss for name, loss in losses.items()})  # type: ignore[union-attr]
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute loss and gradients of a batch; raise `FloatingPointError` for a loss that is not finite."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step}, so training stops before it reaches the "
                "weights: lower the learning rate, or look at the rows of this batch"
            )
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return loss, predictions (logits, or generated tokens) and labels of a batch."""
        inputs = without_repeated(inputs, self._target_names, self.accelerator)
        self.label_names = [name for name in dict.fromkeys(["labels", *self._target_names]) if name in inputs]
        if not self.predict_with_generate or prediction_loss_only:
            before, self._wants_logits = self._wants_logits, self._wants_logits or not prediction_loss_only
            try:
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            finally:
                self._wants_logits = before
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        assert isinstance(self.processing_class, PreTrainedTokenizerBase)
        with self._reusing(model, inputs):
            unwrapped = self.accelerator.unwrap_model(model)
            answers = generated_answers(unwrapped, inputs, self.processing_class, **self.generation_kwargs)
        return loss, answers, inputs.get("labels")


def _layer_of(model: nn.Module) -> Interventions:
    return next(module for module in model.modules() if isinstance(module, Interventions))


def _check_arguments(reuse: Any, **datasets: Any) -> None:
    """Raise `ValueError` for a `reuse` that there is not, or a dataset without rows."""
    if reuse not in ("auto", "memory", "disk", "off") and not isinstance(reuse, ActivationStore):
        raise ValueError(f"reuse must be 'auto', 'memory', 'disk', 'off' or an ActivationStore, got {reuse!r}")
    for name, dataset in datasets.items():
        if hasattr(dataset, "__len__") and len(dataset) == 0:
            raise ValueError(f"{name} is empty: give at least one row, as from encode_pairs")
