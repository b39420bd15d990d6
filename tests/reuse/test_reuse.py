"""What a trainer reuses of the frozen base model: it ends with the weights of one that computes everything."""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import peft
import psutil
import pytest
import torch
import transformers as tf
from support.models import tiny_gpt2
from support.oracle import causal_loss, exact_loss
from support.processes import run_together
from support.reuse import BOTH, READING, apart, fit, losses, store_of, trainer_of, without
from support.training import arguments, edits, llama, rows_of
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import reftheads as rh
from reftheads.reuse.store import ActivationStore
from reftheads.training import trainer as trainer_module

KINDS = ["memory", "disk", "auto", "store"]


@pytest.fixture
def rows(tokenizer) -> list[dict[str, Any]]:
    return rows_of(tokenizer)


@contextmanager
def widths(model: nn.Module, block: int = 0) -> Iterator[list[int]]:
    """How many columns each pass through a block computes; a block that is skipped is called all the same."""
    seen: list[int] = []
    inside = model.get_submodule(f"base_model.model.model.layers.{block}.mlp")
    handle = inside.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    try:
        yield seen
    finally:
        handle.remove()


# --- the same weights -------------------------------------------------------------------------------------

SCHEDULES = {
    "as it is": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
    "evaluation first": {"eval_strategy": "epoch", "eval_on_start": True},
    "weight decay": {"weight_decay": 0.1, "max_grad_norm": 0.1},
    "activation checkpointing": {"gradient_checkpointing": True},
    "the older checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "all rows at once": {"per_device_train_batch_size": 10},
    "one by one": {"per_device_train_batch_size": 1},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reuse_trains_the_same_weights(tokenizer, rows, tmp_path, schedule):
    options = {"options": SCHEDULES[schedule], "eval_dataset": rows_of(tokenizer, 5, seed=1)}
    off = fit(tokenizer, rows, tmp_path / "off", "off", **options)
    for reuse in KINDS if schedule == "as it is" else ["memory"]:
        trained = fit(tokenizer, rows, tmp_path / reuse, reuse, **options)
        assert apart(off, trained) < 1e-5, reuse
        assert losses(trained) == pytest.approx(losses(off), rel=1e-4)
        assert losses(trained, "eval_loss") == pytest.approx(losses(off, "eval_loss"), rel=1e-4)
        assert store_of(trained).hits > store_of(trained).misses > 0


@pytest.mark.parametrize("graph", [edits(), edits("f1+l1"), edits("all"), edits("f7+l7"), BOTH, READING], ids=str)
def test_reuse_trains_the_same_weights_in_float64_up_to_its_rounding(tokenizer, rows, tmp_path, graph):
    options = {"gradient_accumulation_steps": 2}
    with causal_loss(exact_loss):
        off, memory = (
            fit(tokenizer, rows, tmp_path / reuse, reuse, graph, torch.float64, options=options)
            for reuse in ("off", "memory")
        )
    assert apart(off, memory) < 1e-9
    assert store_of(memory).hits > 0


def test_heads_of_rows_without_labels_train_the_same(tokenizer, rows, tmp_path):
    rows = without(rows, "labels")
    off, memory = (fit(tokenizer, rows, tmp_path / reuse, reuse, READING) for reuse in ("off", "memory"))
    assert apart(off, memory) < 1e-5
    assert store_of(memory).misses == 2 * len(rows)


@pytest.mark.parametrize("graph", [BOTH, edits("f1+l1")], ids=["both", "ends"])
def test_autocast_is_on_where_something_is_recorded_as_elsewhere(tokenizer, rows, tmp_path, graph):
    off, memory, full = (
        fit(tokenizer, rows, tmp_path / reuse, reuse, graph, options={"bf16": bf16, "max_steps": 6})
        for reuse, bf16 in (("off", True), ("memory", True), ("off", False))
    )
    assert losses(memory)[0] == pytest.approx(losses(off)[0], rel=5e-3)
    assert losses(memory) == pytest.approx(losses(off), rel=3e-2)
    assert apart(off, memory) < 5e-2
    assert losses(off) != pytest.approx(losses(full), rel=1e-6)  # else nothing of this says anything
    assert store_of(memory).hits > 0
    stored = {value.dtype for entry in store_of(memory)._memory.values() for value in entry.values() if value.ndim}
    assert torch.bfloat16 in stored or graph is not BOTH


def test_autocast_alone_makes_no_model_run_otherwise_in_parts(tokenizer, rows, tmp_path):
    rows = rows * 4
    trained = fit(
        tokenizer, rows, tmp_path, "memory", options={"bf16": True, "max_steps": 1, "per_device_train_batch_size": 40},
        base=lambda: llama(initializer_range=1.0),
    )  # fmt: skip
    assert "nothing" not in trained.reuse_summary


def test_dropout_of_nodes_draws_the_same_whatever_keeps_the_activations(tokenizer, rows, tmp_path):
    graph = edits(dropout=0.3)
    one, *others = (fit(tokenizer, rows, tmp_path / reuse, reuse, graph) for reuse in ("memory", "disk", "auto"))
    assert all(apart(one, other) == 0 for other in others)
    assert all(torch.isfinite(torch.tensor(losses(one))))


def test_dropout_of_nodes_draws_as_without_reuse_where_rows_are_many(tokenizer, tmp_path):
    rows = rows_of(tokenizer, 64)  # else a plain pass computes an edit for all tokens, which draws more numbers
    options = {"per_device_train_batch_size": 32}
    off, memory = (
        fit(tokenizer, rows, tmp_path / reuse, reuse, edits(dropout=0.3), options=options)
        for reuse in ("off", "memory")
    )
    assert apart(off, memory) < 1e-5


def test_the_best_model_is_loaded_at_the_end_and_evaluated_from_the_store(tokenizer, rows, tmp_path):
    options = {
        "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 4, "eval_steps": 4, "learning_rate": 0.05,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    evaluated = rows_of(tokenizer, 5, seed=1)
    off, memory = (
        fit(tokenizer, rows, tmp_path / reuse, reuse, options=options, eval_dataset=evaluated)
        for reuse in ("off", "memory")
    )
    assert off.state.best_global_step == memory.state.best_global_step < off.state.global_step
    assert apart(off, memory) < 1e-5
    misses = store_of(memory).misses
    assert memory.evaluate()["eval_loss"] == pytest.approx(off.evaluate()["eval_loss"], rel=1e-4)
    assert store_of(memory).misses == misses


@pytest.mark.parametrize("reuse", ["memory", "disk"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tokenizer, rows, tmp_path, reuse):
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = fit(tokenizer, rows, tmp_path, reuse, options=options)
    resumed = fit(tokenizer, rows, tmp_path, reuse, options=options, resume=str(tmp_path / "checkpoint-8"))
    assert apart(whole, resumed) < 1e-5
    assert apart(whole, fit(tokenizer, rows, tmp_path / "off", "off", options=options)) < 1e-5
    assert (store_of(resumed).misses == 0) == (reuse == "disk")


def test_several_trainers_share_a_store(tokenizer, rows, tmp_path):
    store = ActivationStore(2**28)
    fit(tokenizer, rows, tmp_path / "a", store)
    misses = store.misses
    again = fit(tokenizer, rows, tmp_path / "b", store, options={"learning_rate": 0.05})
    assert store.misses == misses and store.hits > 0
    assert apart(again, fit(tokenizer, rows, tmp_path / "c", "off", options={"learning_rate": 0.05})) < 1e-5


def test_two_adapters_that_take_turns_train_the_same(tokenizer, rows, tmp_path):
    trained = []
    for reuse in ("off", "memory"):
        made = trainer_of(tokenizer, rows, tmp_path / reuse, reuse, options={"num_train_epochs": 1})
        made.model.add_adapter("two", edits("f1"))
        for name in ("two", "default"):
            made.model.set_adapter(name)
            made.optimizer = made.lr_scheduler = None
            made.train()
        made.model.set_adapter(["default", "two"])
        trained.append(made)
    assert apart(*trained) < 1e-5


def test_another_model_in_the_same_trainer_is_not_taken_for_the_first(tokenizer, rows, tmp_path):
    trained = []
    for reuse in ("off", "memory"):
        made = fit(tokenizer, rows, tmp_path / reuse, reuse, options={"num_train_epochs": 1})
        other = rh.InterventionModel(llama(initializer_range=0.2), BOTH)
        made.model = made.model_wrapped = other
        made.optimizer = made.lr_scheduler = None
        made.train()
        trained.append(made)
    assert apart(*trained) < 1e-5
    assert store_of(trained[1]).misses > 0


# --- random numbers, logs ---------------------------------------------------------------------------------


def test_reuse_leaves_the_order_of_the_data_and_all_random_numbers_as_they_are(tokenizer, rows, tmp_path):
    class Recording(rh.InterventionTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            state = torch.get_rng_state().sum().item(), random.getstate()[1][-1], np.random.get_state()[2]
            seen.append((inputs["input_ids"].tolist(), drawn[-1], *state))
            return super().training_step(model, inputs, *args, **kwargs)

    def collate(batch):  # augments, as collators do that mask tokens
        drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
        return rh.Collator(tokenizer)(batch)

    sequences = []
    for reuse in ("off", *KINDS):
        seen: list[Any] = []
        drawn: list[Any] = []
        fit(tokenizer, rows, tmp_path / reuse, reuse, data_collator=collate, trainer=Recording)
        sequences.append(seen)
    assert len({str(batch[0]) for batch in sequences[0]}) > len(rows) / 2  # shuffled anew in every epoch
    for reuse, sequence in zip(KINDS, sequences[1:], strict=True):
        assert sequence == sequences[0], reuse


def test_what_was_reused_stands_beside_the_loss(tokenizer, rows, tmp_path):
    trained = fit(tokenizer, rows, tmp_path, "memory", options={"max_steps": 20})
    logged = [entry for entry in trained.state.log_history if "loss" in entry]
    hits, misses, taken = ([e[f"reuse_{name}"] for e in logged] for name in ("hits", "misses", "bytes"))
    epoch = next(i for i, entry in enumerate(logged) if entry["epoch"] >= 1)
    assert misses[0] > 0 and misses[epoch] == misses[-1] and taken[epoch] == taken[-1] > 0
    assert misses == sorted(misses) and hits == sorted(hits) and hits[-1] > hits[epoch]
    off = fit(tokenizer, rows, tmp_path, "off", options={"max_steps": 2})
    assert not any(name.startswith("reuse_") for entry in off.state.log_history for name in entry)
    assert off.reuse_summary == ""


# --- what is chosen ---------------------------------------------------------------------------------------


def test_auto_takes_memory_where_rows_are_seen_again(tokenizer, rows, tmp_path, capsys):
    trained = fit(tokenizer, rows, tmp_path, "auto", options={"disable_tqdm": False})
    assert "store    memory: about 0.0 MB is to be kept, " in trained.reuse_summary
    assert trained.reuse_summary in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"num_train_epochs": 1}, {"max_steps": 5}, {"max_steps": 2}], ids=str)
def test_auto_keeps_nothing_of_rows_that_are_seen_once(tokenizer, rows, tmp_path, options):
    trained = fit(tokenizer, rows, tmp_path / "auto", "auto", options=options)
    assert "store    none: every row is seen once" in trained.reuse_summary
    assert trained._replay is not None and trained._replay.store is None
    assert apart(trained, fit(tokenizer, rows, tmp_path / "off", "off", options=options)) < 1e-5
    more = fit(tokenizer, rows, tmp_path / "more", "auto", options={"max_steps": 6})
    assert "store    memory" in more.reuse_summary


def test_auto_keeps_nothing_that_does_not_fit(tokenizer, rows, tmp_path, monkeypatch):
    free = psutil.virtual_memory()._replace(available=4000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    trained = fit(tokenizer, rows, tmp_path / "auto", "auto")
    assert "store    none: about 0.0 MB is to be kept, 0.0 MB may be taken; reuse='disk' keeps" in trained.reuse_summary
    assert apart(trained, fit(tokenizer, rows, tmp_path / "off", "off")) < 1e-5
    forced = fit(tokenizer, rows, tmp_path / "memory", "memory")
    assert 0 < store_of(forced).bytes <= 2000 and store_of(forced).evictions > 0
    assert apart(forced, trained) < 1e-5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert store_of(fit(tokenizer, rows, tmp_path / "four", "memory")).budget == 500


def gpt2_with_dropout() -> Any:
    return tiny_gpt2(vocab_size=31, initializer_range=0.3, eos_token_id=1)


def test_a_base_with_dropout_is_trained_in_full(tokenizer, rows, tmp_path):
    off, auto = (fit(tokenizer, rows, tmp_path / r, r, base=gpt2_with_dropout) for r in ("off", "auto"))
    assert "nothing: the base model has dropout in training mode" in auto.reuse_summary
    assert "load_base(…, dropout=False)" in auto.reuse_summary
    assert apart(off, auto) == 0


def test_an_evaluation_before_the_training_hides_no_dropout(tokenizer, rows, tmp_path):
    options = {"eval_on_start": True, "eval_strategy": "epoch"}
    off, auto = (
        fit(tokenizer, rows, tmp_path / r, r, base=gpt2_with_dropout, options=options, eval_dataset=rows)
        for r in ("off", "auto")
    )
    assert "nothing: the base model has dropout" in auto.reuse_summary
    assert apart(off, auto) < 1e-6
    assert losses(auto, "eval_loss") == pytest.approx(losses(off, "eval_loss"), rel=1e-5)


def test_a_wrong_name_is_an_error(tokenizer, rows, tmp_path):
    for wrong in ("ram", None, True):
        with pytest.raises(ValueError, match="reuse must be 'auto', 'memory', 'disk', 'off' or an ActivationStore"):
            trainer_of(tokenizer, rows, tmp_path, wrong)


def test_a_plain_peft_model_trains_in_full_and_the_summary_says_so(tokenizer, rows, tmp_path):
    def wrap(base, graph):
        return peft.get_peft_model(base, rh.InterventionConfig(graph=graph))

    plain = fit(tokenizer, rows, tmp_path / "a", "memory", wrap=wrap)
    assert plain.reuse_summary == "reuse  nothing: the model is a PeftModel, no InterventionModel"
    assert apart(plain, fit(tokenizer, rows, tmp_path / "b", "off")) == 0


@pytest.mark.parametrize("graph", [edits(), edits("f7+l7"), READING, BOTH], ids=["edit", "f7+l7", "heads", "both"])
def test_the_forecast_of_what_is_to_keep_is_what_is_kept(tokenizer, tmp_path, graph):
    rows = rows_of(tokenizer, 200)
    trained = fit(tokenizer, rows, tmp_path, "memory", graph, options={"per_device_train_batch_size": 8})
    forecast = trainer_module.Forecast.of(trained._replay, trained._sample())
    assert store_of(trained).bytes == pytest.approx(forecast.stored / forecast.rows * len(rows), rel=0.2)


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("reuse", KINDS)
def test_rows_that_are_streamed_train_the_same(tokenizer, rows, tmp_path, reuse):
    options = {"max_steps": 10}
    streams = [Stream(rows), Stream(rows)]
    off, reused = (
        fit(tokenizer, stream, tmp_path / r, r, options=options)
        for r, stream in zip(("off", reuse), streams, strict=True)
    )
    assert apart(off, reused) < 1e-5
    if reuse == "auto":
        assert "store    none: how many rows there are is not known" in reused.reuse_summary
    else:
        assert store_of(reused).hits > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_is_of_the_rows_to_evaluate(tokenizer, rows, tmp_path, workers):
    evaluated = rows_of(tokenizer, 5, seed=1)
    options = {"max_steps": 2, "dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    off, auto = (
        fit(tokenizer, rows, tmp_path / r, r, options=options, eval_dataset=evaluated).evaluate()
        for r in ("off", "auto")
    )
    assert auto["eval_loss"] == pytest.approx(off["eval_loss"], rel=1e-5)


def test_a_column_that_is_not_understood_is_said_and_trains_in_full(tokenizer, rows, tmp_path):
    rows = [{**row, "label": 1} for row in rows]
    off, memory = (
        fit(tokenizer, Stream(rows), tmp_path / r, r, edits(), options={"max_steps": 3}) for r in ("off", "memory")
    )
    assert memory.reuse_summary.startswith("reuse  nothing: a batch holds more than tokens")
    assert apart(off, memory) == 0


# --- on disk ----------------------------------------------------------------------------------------------


def test_a_second_trainer_in_the_same_folder_starts_warm(tokenizer, rows, tmp_path):
    first = fit(tokenizer, rows, tmp_path, "disk")
    assert f"store    disk: about 0.0 MB in {tmp_path / 'activations'}" in first.reuse_summary
    second = fit(tokenizer, rows, tmp_path, "disk")
    assert store_of(second).misses == 0 < store_of(second).hits
    assert apart(first, second) == 0


def test_what_is_damaged_on_disk_is_computed_again(tokenizer, rows, tmp_path):
    first = fit(tokenizer, rows, tmp_path, "disk")
    files = sorted((tmp_path / "activations").glob("*.safetensors"))
    for file, end in zip(files[1:3], (None, -20), strict=True):  # a byte is wrong; the end is missing
        content = bytearray(file.read_bytes())
        content[-40] ^= 0xFF
        file.write_bytes(content[:end])
    second = fit(tokenizer, rows, tmp_path, "disk")
    assert store_of(second).recomputed == 2 and store_of(second).misses > 0
    assert apart(first, second) < 1e-5
    assert store_of(fit(tokenizer, rows, tmp_path, "disk")).misses == 0


# --- what is computed in full -----------------------------------------------------------------------------


class Counting(tf.models.llama.modeling_llama.LlamaAttention):
    """Adds how many tokens the pass has, as no attention does."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(hidden_states, *args, **kwargs)
        return out + hidden_states.shape[1], weights


def counting_llama() -> Any:
    base = llama()
    for block in base.model.layers:
        block.self_attn.__class__ = Counting
    return base


class Refusing(tf.models.llama.modeling_llama.LlamaAttention):
    """Refuses a cache that is not empty."""

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length():
            raise RuntimeError("no cache, please")
        return super().forward(*args, past_key_values=past_key_values, **kwargs)


def refusing_llama() -> Any:
    base = llama()
    for block in base.model.layers:
        block.self_attn.__class__ = Refusing
    return base


@pytest.mark.parametrize(
    "base, reason, layers",
    [
        (counting_llama, "the loss would be", "not reused"),
        (refusing_llama, "fail .RuntimeError: no cache, please", "2 of 3"),
    ],
)
def test_a_model_that_runs_otherwise_in_parts_is_found(tokenizer, rows, tmp_path, base, reason, layers):
    off, memory = (fit(tokenizer, rows, tmp_path / r, r, base=base) for r in ("off", "memory"))
    assert re.search(f"prefix +not reused: .*{reason}", memory.reuse_summary)
    assert re.search(f"layers +{layers}", memory.reuse_summary)
    assert apart(off, memory) < 1e-5


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return exact_loss(outputs["logits"], labels, outputs["logits"].shape[-1], num_items_in_batch) * 2


@pytest.mark.parametrize(
    "options, more",
    [({"label_smoothing_factor": 0.2}, {}), ({}, {"compute_loss_func": own_loss})],
    ids=["label", "own"],
)
def test_a_loss_of_the_logits_is_computed_in_full(tokenizer, rows, tmp_path, options, more):
    off, memory = (
        fit(tokenizer, rows, tmp_path / r, r, edits(), options=options, eval_dataset=rows, **more)
        for r in ("off", "memory")
    )
    assert apart(off, memory) == 0 and memory._replay is None
    assert memory.reuse_summary == "reuse  nothing: the loss is computed from all logits"
    assert off.evaluate()["eval_loss"] == memory.evaluate()["eval_loss"]


def test_metrics_see_all_logits_and_training_reuses_all_the_same(tokenizer, rows, tmp_path):
    def metrics(predicted):
        return {"sum": float(np.abs(predicted.predictions[0]).sum()), "rows": len(predicted.label_ids)}

    options = {"eval_strategy": "epoch", "num_train_epochs": 2}
    off, memory = (
        fit(tokenizer, rows, tmp_path / r, r, edits(), options=options, eval_dataset=rows[:4], compute_metrics=metrics)
        for r in ("off", "memory")
    )
    assert losses(memory, "eval_sum") == pytest.approx(losses(off, "eval_sum"), rel=1e-4) and losses(off, "eval_sum")
    assert apart(off, memory) < 1e-5 and store_of(memory).hits > 0


def test_an_evaluation_of_the_loss_alone_reuses(tokenizer, rows, tmp_path):
    trained = fit(tokenizer, rows, tmp_path, "memory", eval_dataset=rows)
    with widths(trained.model) as seen:
        assert trained.evaluate()["eval_loss"] > 0
        assert not seen
        predicted = trained.predict(rows[:4])
        assert seen and predicted.predictions is not None


def test_generation_in_evaluations_reuses_the_prompts(tokenizer, rows, tmp_path):
    options = {"predict_with_generate": True, "generation_kwargs": {"max_new_tokens": 3}, "eval_dataset": rows}
    results = []
    for reuse in ("off", "memory"):
        trained = fit(
            tokenizer, rows, tmp_path / reuse, reuse, edits(), **options,
            compute_metrics=lambda predicted: {"sum": int(predicted.predictions.sum())},
        )  # fmt: skip
        results.append([trained.evaluate() for _ in range(2)])
    for a, b in zip(*results, strict=True):
        assert a["eval_sum"] == b["eval_sum"] and a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-5)
    misses, hits = store_of(trained).misses, store_of(trained).hits
    with widths(trained.model) as seen:
        trained.evaluate()
    assert store_of(trained).misses == misses and store_of(trained).hits > hits
    assert max(seen) == 1  # the last token of a prompt, and one after the other


# --- several processes ------------------------------------------------------------------------------------

PROGRAM = """
import sys, torch, transformers
from pathlib import Path
from support.processes import leave
from support.reuse import fit, store_of
from support.training import rows_of
torch.set_num_threads(1)
folder = Path(sys.argv[1])
tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
rows = rows_of(tokenizer, 11)
options = {"ddp_backend": "gloo", "gradient_accumulation_steps": 2, "eval_strategy": "epoch", "num_train_epochs": 4}
for reuse in sys.argv[2:]:
    made = fit(tokenizer, rows, folder / reuse, reuse, options=options, eval_dataset=rows)
    assert made.args.world_size == 2 and made.args.parallel_mode.value == "distributed", made.args.parallel_mode
    if reuse != "off":
        assert store_of(made).hits > 0
    if made.args.process_index == 0:
        torch.save({n: p.detach() for n, p in made.model.named_parameters() if p.requires_grad}, folder / f"{reuse}.pt")
leave()
"""


@pytest.mark.slow
def test_two_processes_train_the_same_weights(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    run_together(PROGRAM, tmp_path, "off", "memory", "disk")
    off, *others = (torch.load(tmp_path / f"{reuse}.pt", weights_only=True) for reuse in ("off", "memory", "disk"))
    for other in others:
        for name, value in off.items():
            assert float((other[name] - value).abs().max() / value.abs().max()) < 1e-5, name


# --- models without dropout -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_model_trains_with_reuse(tmp_path):
    trained = []
    for reuse in ("off", "auto"):
        base, tokenizer = rh.load_base("tiny-chat", dropout=False)
        pairs = [("Tell me about butter.", "a b"), ("What are flamingos?", "c"), ("Describe weddings.", "d e f")]
        turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
        torch.manual_seed(0)
        model = rh.InterventionModel(base, edits())
        rows = rh.encode_chat(tokenizer, turns)
        args = arguments(tmp_path / reuse, max_steps=6)
        made = rh.InterventionTrainer(model, args, train_dataset=rows, processing_class=tokenizer, reuse=reuse)
        made.train()
        trained.append(made)
    assert apart(*trained) < 1e-5
    assert store_of(trained[1]).hits > 0


def tiny_bert() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=31, **shape, initializer_range=0.3, num_labels=2))


@pytest.mark.parametrize("make", [tiny_bert, gpt2_with_dropout])
def test_a_saved_model_is_loaded_without_its_dropout_and_reused(tokenizer, rows, tmp_path, make):
    make().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    auto = tf.AutoModelForSequenceClassification if make is tiny_bert else None
    with_dropout, _ = rh.load_base(str(tmp_path / "base"), auto_class=auto)
    assert any(isinstance(m, nn.Dropout) and m.p == 0.1 for m in with_dropout.modules())

    def base():
        made, _ = rh.load_base(str(tmp_path / "base"), auto_class=auto, dropout=False, dtype=torch.float32)
        return made

    assert not any(isinstance(m, nn.Dropout) and m.p for m in base().modules())
    graph = edits("f1") if make is tiny_bert else edits()
    if make is tiny_bert:
        names = ("input_ids", "attention_mask")
        rows = [{n: row[n] for n in names} | {"labels": row["label"]} for row in rows]
    off, memory = (fit(tokenizer, rows, tmp_path / r, r, graph, base=base) for r in ("off", "memory"))
    assert "2 of 3 blocks are replayed" in memory.reuse_summary
    assert apart(off, memory) < 1e-5 and store_of(memory).hits > 0


# --- memory -----------------------------------------------------------------------------------------------


def kept_for_backward(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps while a loss is computed, each storage counted once, and the weights not at all."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("positions, most", [("l1", 0.5), ("f1+l1", 0.95), ("all", 0.95)])
def test_less_is_kept_for_the_backward_pass_even_without_a_store(tokenizer, rows, positions, most):
    model = rh.InterventionModel(llama(), edits(positions)).train()
    batch = rh.Collator(tokenizer)(without(rows, "label"))
    plain = kept_for_backward(model, lambda: model(**batch).loss)
    with model.reusing(None) as used:
        assert used.why_plain() is None  # compared beforehand
        reused = kept_for_backward(model, lambda: model(**batch).loss)
    assert reused < most * plain
