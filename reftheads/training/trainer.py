"""A transformers Trainer that knows intervention graphs."""

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from reftheads.adapter.model import InterventionModel
from reftheads.architectures.structure import own_modules
from reftheads.data.collator import Collator, prompts_only
from reftheads.data.rows import column_names, column_values, complete_dataset, count_rows
from reftheads.data.targets import check_column
from reftheads.graph.intervention import IGNORE, Head
from reftheads.reuse.budget import choose_store
from reftheads.reuse.forecast import Forecast, describe
from reftheads.reuse.replay import Replay
from reftheads.reuse.store import ActivationStore
from reftheads.runtime.interventions import Interventions
from reftheads.runtime.node_module import NodeModule

_BASE = "base"  # folder of a checkpoint
_SAMPLE = 64  # rows by which the size of a store is estimated


class InterventionTrainer(Trainer):
    """`transformers.Trainer` with what an `InterventionModel` needs besides.

    * Batches are padded by `Collator`, and keep `prompt_mask` and the heads' target columns.
    * The loss of a head is a mean over the targets of a batch, and under gradient accumulation and on several devices
      the mean of these means; each is logged as `loss_<name>`, and `evaluate` gives each as `eval_loss_<name>`, both
      means over all targets.
    * `predict_with_generate` feeds the prompts alone and compares what is generated from them.
    * A node with a learning rate of its own, such as `LinearHead(…, lr=1e-3)`, gets a parameter group of its own.
    * Checkpoints hold the base model's weights too, in a folder `base`, if any of them is trained.
    * A loss that is not finite stops the training before it reaches the weights.
    * A step computes only what the graph can change, and takes the rest from a store; see
      `InterventionModel.reusing`. What is reused is `reuse_summary`; how often the store had what was wanted, and
      how large it is, is logged beside the loss.

    Args:
        model: the model to train.
        args: as for `Trainer`; its `predict_with_generate`, if it has one, counts as well.
        train_dataset, eval_dataset: rows as from `encode_pairs` or `encode_chat`.
        processing_class: the tokenizer.
        predict_with_generate: whether evaluation and prediction generate. `compute_metrics` then gets
            new tokens as predictions and labels as label ids, both padded with -100.
        generation_kwargs: for `model.generate`; greedy, at most 64 new tokens, if left out.
        reuse: where the activations of the frozen base model are kept: "memory"; "disk", in the folder `activations`
            of `args.output_dir`; "off" takes the plain path; "auto" takes memory if what is to be kept of the
            rows seems to fit into half of what is free and a row is seen more than once, else keeps nothing, which
            still spares the backward pass outside of the graph's cone. Or an `ActivationStore`, which several
            trainers may share.
        kwargs: go to `Trainer`.

    Raises:
        ValueError: an empty dataset; a head whose target is no column of `train_dataset`, where its columns
            are known before it is run through and `Collator` makes the batches, a target there that its loss has no
            meaning for (with its row and value), or none in any row; a tokenizer without pad token.
        FloatingPointError: a loss that is NaN or infinite.
    """

    model: InterventionModel  # type: ignore[assignment]

    def __init__(
        self,
        model: InterventionModel,
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
        if reuse not in ("auto", "memory", "disk", "off") and not isinstance(reuse, ActivationStore):
            raise ValueError(f"reuse must be 'auto', 'memory', 'disk', 'off' or an ActivationStore, got {reuse!r}")
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if hasattr(dataset, "__len__") and len(dataset) == 0:  # type: ignore[arg-type]
                raise ValueError(f"{name} is empty: give at least one row, as from encode_pairs")
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
        self._trained, self._evaluated = _MeanLosses(), _MeanLosses()  # of heads, since the last log
        self._replay: Replay | None = None
        self._described: tuple[nn.Module, bool] | None = None  # the base model of `reuse_summary`, and its mode
        self._wants_logits = self.label_smoother is not None or self.compute_loss_func is not None
        if self._wants_logits and reuse != "off":
            self.reuse_summary = "reuse  nothing: the loss is computed from all logits"
        layer = next(module for module in model.modules() if isinstance(module, Interventions))
        self._target_names = list(dict.fromkeys(name for plan in layer.plans.values() for name in plan.targets))
        columns = column_names(train_dataset)
        if columns is not None and isinstance(data_collator, Collator):  # a collator of one's own may make columns
            for target in (target for name in layer.active_adapters for target in layer.plans[name].targets):
                if target not in columns:
                    raise ValueError(
                        f"the target {target!r} of a head is no column of train_dataset, which has "
                        f"{', '.join(columns)}: add it to the rows, or give the head target=None"
                    )
            heads = [p.node.intervention for name in layer.active_adapters for p in layer.plans[name].nodes]
            for head in heads:
                if isinstance(head, Head) and head.target is not None:
                    _check_targets(head, train_dataset, "train_dataset")
                    _check_targets(head, eval_dataset, "eval_dataset")

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            assert self._signature_columns is not None
            self._signature_columns += ["prompt_mask", *self._target_names]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        own_rates(optimizer, self.model)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        base: Any = self.model.get_base_model()
        if any(p.requires_grad for _, module in own_modules(base) for p in module.parameters(recurse=False)):
            base.save_pretrained(os.path.join(output_dir or str(self.args.output_dir), _BASE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_base(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_base(str(self.state.best_model_checkpoint))

    def _load_base(self, checkpoint: str) -> None:
        folder, base = os.path.join(checkpoint, _BASE), self.model.get_base_model()
        if os.path.isdir(folder):
            widest = reduce(torch.promote_types, {p.dtype for p in base.parameters() if p.is_floating_point()})
            saved: Any = type(base).from_pretrained(folder, dtype=widest)  # type: ignore[attr-defined]
            base.load_state_dict(saved.state_dict(), strict=False)  # which lacks the graph

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        with self._reusing(model, inputs):
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        (self._trained if model.training else self._evaluated).add(outputs)  # type: ignore[arg-type]
        heads: Tensor | None = outputs.get("head_loss")  # type: ignore[union-attr]
        if heads is not None and num_items_in_batch is not None and self.model_accepts_loss_kwargs and model.training:
            # the base model's loss is divided by the items of all batches and devices; the heads' are means of one
            devices = self.args.n_gpu if self.args.n_gpu > 1 else self.accelerator.num_processes // self.get_tp_size()
            scale = devices if self.args.average_tokens_across_devices else 1
            loss = loss - heads * (scale - 1 / self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
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
            if self._replay is not None and self._replay.eligibility.why_plain() is not None:
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
        if replay.eligibility.why_plain() is not None:
            self.reuse_summary = describe(replay)
            return replay
        with self.accelerator.autocast():
            difference = replay.differs(model, inputs)
        if difference is not None:
            self.reuse_summary = f"reuse  nothing: {difference}"
            return None
        batches = self._sample()
        self.reuse_summary = describe(replay, batches)
        rows: Any = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        size = Forecast.of(replay, batches).bytes_of(count_rows(rows)) if batches else None
        store, why = choose_store(
            self.reuse,  # type: ignore[arg-type]
            size,
            folder=os.path.join(str(self.args.output_dir), "activations"),
            seen_once=bool(batches) and self._seen_once(len(rows)),
            device=self.args.device,
        )
        self.reuse_summary += f"\nstore    {why}"
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            print(self.reuse_summary)
        return replay.kept_in(store)

    def _sample(self) -> list[dict[str, Tensor]]:
        """Some batches of the rows that are trained on, or else evaluated."""
        rows: Any = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        if isinstance(rows, IterableDataset | dict) or not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
            return []
        collate = self._get_collator_with_removed_columns(self.data_collator)
        size = self.args.train_batch_size
        with _same_random_numbers():
            some = [rows[i] for i in range(0, len(rows), max(len(rows) // _SAMPLE, 1))[:_SAMPLE]]
            batches = [collate(some[i : i + size]) for i in range(0, len(some), size)]
        return [self._prepare_inputs(batch) for batch in batches]

    def _seen_once(self, rows: int) -> bool:
        """Whether training ends before it comes to a row for the second time."""
        if self.args.max_steps <= 0:
            return self.args.num_train_epochs <= 1
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return self.args.max_steps * step <= rows

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._evaluated = _MeanLosses()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        losses = self._evaluated.take(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_loss_{name}": loss for name, loss in losses.items()})  # type: ignore[union-attr]
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
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
        pad = self.processing_class.pad_token_id
        seq2seq = self.model.config.is_encoder_decoder
        prompts = (
            {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
            if seq2seq
            else prompts_only(inputs, pad)  # type: ignore[arg-type]
        )
        generate = self.accelerator.unwrap_model(model).generate
        with torch.no_grad(), self._reusing(model, inputs):
            ids = generate(**prompts, pad_token_id=pad, **self.generation_kwargs)  # type: ignore[operator]
        new = ids if seq2seq else ids[:, prompts["input_ids"].shape[1] :]
        ends = (new == self.processing_class.eos_token_id).long()
        behind = (ends.cumsum(1) - ends > 0) | ((new == pad) & (ends == 0))  # all but the end itself
        return loss, torch.where(behind, IGNORE, new), inputs.get("labels")


class _MeanLosses:
    """The losses of heads over several batches, each a mean over the targets."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # of losses, and how many

    def add(self, output: Mapping[str, Any]) -> None:
        for name, loss in (output.get("losses") or {}).items():
            count = output["counts"][name]
            sums = torch.stack([loss.detach().float() * count, count.float()])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means so far, over all processes, without heads that had no target; begins anew."""
        names = sorted(set(gather_object(list(self._sums))))
        none = torch.zeros(2, device=accelerator.device)
        sums = {name: accelerator.reduce(self._sums.get(name, none)) for name in names}
        self._sums = {}
        return {name: float(loss / count) for name, (loss, count) in sums.items() if count > 0}


def own_rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Gives the parameters of nodes with a learning rate of their own a group with that rate."""
    nodes = [module for module in model.modules() if isinstance(module, NodeModule)]
    rates = {
        id(p): node.intervention.lr for node in nodes if node.intervention.lr is not None for p in node.parameters()
    }
    for group in list(optimizer.param_groups):
        for rate in dict.fromkeys(rates[id(p)] for p in group["params"] if id(p) in rates):
            options = {name: value for name, value in group.items() if name != "params"}
            moved = [p for p in group["params"] if rates.get(id(p)) == rate]
            group["params"] = [p for p in group["params"] if rates.get(id(p)) != rate]
            optimizer.add_param_group({**options, "params": moved, "lr": rate})


def _check_targets(head: Head, dataset: Any, name: str) -> None:
    """Raise `ValueError` for a row whose target cannot be, or if no row has one; on the CPU, before training."""
    column = column_values(dataset, str(head.target))
    if column and not check_column(head, column, f"row {{row}} of {name}"):
        raise ValueError(
            f"no row of {name} has a target {head.target!r}: fill the column, or give the head target=None"
        )


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Within, random numbers may be drawn that change none of those that come later."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
