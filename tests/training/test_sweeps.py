"""Adapters that are trained side by side: each becomes what it becomes in a run of its own."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import randomise, tiny_llama, tiny_t5
from support.oracle import causal_loss, exact_loss
from support.training import arguments, llama, rows_of
from torch import Tensor, nn

import reftheads as rh
from reftheads.reuse.eligibility import Eligibility
from reftheads.reuse.store import ActivationStore
from reftheads.training import Trial

RATES, SEEDS = (2e-2, 3e-3), (0, 1)


def edits(rank: int = 2, dtype: str = "float32", **options: Any) -> rh.InterventionGraph:
    return rh.InterventionGraph.over(rh.LoReFT(rank=rank, dtype=dtype, **options), [1, 2], positions="l2")


def head(
    layer: int, name: str, detach: bool = False, outputs: int = 2, target: str | None = "label", weight: Any = 0.5
) -> rh.Node:
    what = rh.LinearHead(outputs=outputs, target=target, weight=weight, detach=detach, dtype="float64")
    return rh.Node(what, layer=layer, positions="l1", name=name)


def mixed(detach: bool) -> rh.InterventionGraph:
    """Edits of two kinds, two of which share their weights; a head below them, and one that sees them."""
    tied = rh.LoReFT(rank=2, dtype="float64")
    return rh.InterventionGraph(
        head(0, "below", detach),
        rh.Node(rh.LoRA(rank=2, dtype="float64"), 1, "query_output", positions="generated", name="lora"),
        rh.Node(tied, 1, positions="l1", name="one", share="both"),
        rh.Node(tied, 2, positions="f1+l1", name="two", share="both"),
        head(2, "above", detach),
    )


GATED = rh.InterventionGraph(
    head(0, "gate", outputs=1, target=None),
    rh.Node(rh.Gated(rh.LoReFT(rank=2, dtype="float64")), 1, positions="l2", name="gated", source="gate"),
    rh.Node(rh.LoReFT(rank=2, dtype="float64"), 2, positions="l1", name="free"),
)
HEADS = rh.InterventionGraph(head(0, "low"), head(2, "high", weight="uncertainty"))
DOUBLE = edits(dtype="float64")


@dataclass
class Setting:
    """What a sweep and the runs that it stands for have in common."""

    tokenizer: Any
    rows: list[dict[str, Any]]
    folder: Path
    graph: rh.InterventionGraph = DOUBLE
    dtype: torch.dtype = torch.float64
    base: Callable[[], Any] = llama

    def sweep(self, rates: Sequence[float] = RATES, seeds: Sequence[int] = SEEDS, **options: Any):
        more = {name: options.pop(name) for name in ("base", "reuse", "eval_rows") if name in options}
        args = arguments(self.folder / "sweep", **{"logging_steps": 2} | options)
        base = more.pop("base", None) or self.base().to(self.dtype)
        more = {"learning_rates": rates, "seeds": seeds, "reuse": "memory"} | more
        return rh.sweep(base, self.tokenizer, self.rows, self.graph, args, **more)

    def alone(self, trial: Trial, **options: Any) -> rh.InterventionTrainer:
        """The run that a trial stands for, on the plain path."""
        more = {"eval_dataset": options.pop("eval_rows")} if "eval_rows" in options else {}
        base = self.base().to(self.dtype)
        torch.manual_seed(trial.seed)
        model = rh.InterventionModel(base, self.graph)
        args = arguments(
            self.folder / trial.adapter_name, **{"logging_steps": 2} | options | {"learning_rate": trial.learning_rate}
        )
        given = {"train_dataset": self.rows, "processing_class": self.tokenizer} | more
        trainer = rh.InterventionTrainer(model, args, reuse="off", **given)
        trainer.train()
        return trainer

    def check(self, tolerance: float, **options: Any) -> list[rh.InterventionTrainer]:
        """Every trial of a sweep has the weights and the losses of a run of its own."""
        model, trials = self.sweep(**options)
        runs = [self.alone(trial, **options) for trial in trials]
        for trial, run in zip(trials, runs, strict=True):
            assert apart(model, trial, run.model) < tolerance, trial
            assert trial.losses == pytest.approx(logged(run, "loss"), rel=1e-5)
        assert len({tuple(trial.losses) for trial in trials}) == len(trials)
        return runs


def apart(model: rh.InterventionModel, trial: Trial, other: rh.InterventionModel) -> float:
    """The largest difference between a trial's weights and those of a run of its own, relative to each tensor."""
    nodes, own = model.tuner.layer.rh_nodes[trial.adapter_name], other.tuner.layer.rh_nodes["default"]
    a, b = (dict(module.named_parameters()) for module in (nodes, own))
    assert a.keys() == b.keys() and a
    return max(float(((a[name] - b[name]).abs().max() / b[name].abs().max()).detach()) for name in a)


def logged(run: rh.InterventionTrainer, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


def without(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != column} for row in rows]


@contextmanager
def calls(model: nn.Module, blocks: int = 3) -> Iterator[list[list[tuple[int, int, bool]]]]:
    """For every block: rows, columns and whether there will be a backward pass, of all calls that compute it."""
    layers = model.get_submodule("model.layers")
    seen: list[list[tuple[int, int, bool]]] = [[] for _ in range(blocks)]
    handles = [
        layers[i].mlp.register_forward_hook(
            lambda module, args, out, i=i: seen[i].append((out.shape[0], out.shape[1], torch.is_grad_enabled()))
        )
        for i in range(blocks)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture
def rows(tokenizer) -> list[dict[str, Any]]:
    """Ten ragged ones."""
    return without(rows_of(tokenizer), "label")


@pytest.fixture
def labelled(tokenizer) -> list[dict[str, Any]]:
    return rows_of(tokenizer)


@pytest.fixture
def setting(tokenizer, rows, tmp_path) -> Setting:
    return Setting(tokenizer, rows, tmp_path)


@pytest.fixture(autouse=True, scope="module")
def quickly_and_in_float64() -> Iterator[None]:
    gc.freeze()  # every run collects garbage, and else would look through all that was ever imported
    with causal_loss(exact_loss):
        yield
    gc.unfreeze()


# --- a sweep is so many runs ------------------------------------------------------------------------------

SCHEDULES = {
    "as it is": {},
    "weight decay": {"weight_decay": 0.1},
    "clipping": {"max_grad_norm": 0.02},
    "no clipping": {"max_grad_norm": 0.0},
    "accumulation": {"gradient_accumulation_steps": 3},
    "warmup": {"warmup_steps": 3, "lr_scheduler_type": "cosine"},
}
ALL_AT_ONCE = {name: value for options in SCHEDULES.values() for name, value in options.items()} | {
    "max_grad_norm": 0.02
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_trials_are_runs_of_their_own_in_float64_up_to_its_rounding(setting, schedule):
    runs = setting.check(1e-9, **SCHEDULES[schedule])
    if schedule == "clipping":  # else the limit would say nothing
        assert all(min(logged(run, "grad_norm")) > 0.02 for run in runs)


def test_what_a_trainer_does_not_decay_is_not_decayed_in_a_sweep(setting):
    what = rh.LoReFT(rank=2, dtype="float64")
    setting.graph = rh.InterventionGraph(
        *(rh.Node(what, i, positions="l1", name=n) for i, n in ((1, "a"), (2, "bias")))
    )
    run = setting.check(1e-9, weight_decay=0.5)[0]
    names = run.get_decay_parameter_names(run.model)
    assert any(".a." in name for name in names) and not any(".bias." in name for name in names)


@pytest.mark.parametrize("options", [{}, ALL_AT_ONCE], ids=["as it is", "all at once"])
def test_trials_are_runs_of_their_own_in_float32(setting, options):
    setting.graph, setting.dtype = edits(), torch.float32
    setting.check(1e-5, **options)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("detach", [True, False], ids=["probes", "heads"])
def test_edits_of_several_kinds_tied_nodes_and_heads_are_trained_side_by_side(setting, labelled, detach, accumulated):
    setting.graph, setting.rows = mixed(detach), labelled
    setting.check(1e-9, gradient_accumulation_steps=accumulated)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_heads_are_trained_side_by_side_on_rows_without_labels(setting, labelled, accumulated):
    setting.graph, setting.rows = HEADS, without(labelled, "labels")
    setting.check(1e-9, gradient_accumulation_steps=accumulated)


def test_a_gate_and_its_source_are_trained_side_by_side(setting):
    setting.graph = GATED
    setting.check(1e-9)


def test_a_gate_and_another_edit_at_one_site_act_in_the_order_of_the_graph_in_every_trial(setting):
    setting.graph = rh.InterventionGraph(
        head(0, "gate", outputs=1, target=None),
        rh.Node(rh.Gated(rh.LoReFT(rank=2, dtype="float64")), 1, positions="l2", name="gated", source="gate"),
        rh.Node(rh.LoReFT(rank=2, dtype="float64"), 1, positions="l2", name="beside"),
    )
    setting.check(1e-9)


def test_one_trial_is_one_run(setting):
    model, [trial] = setting.sweep(rates=(), seeds=[5], learning_rate=7e-3)
    assert (trial.adapter_name, trial.learning_rate, trial.seed) == ("trial_0", 7e-3, 5)
    assert model.active_adapter == "trial_0"
    assert apart(model, trial, setting.alone(trial).model) < 1e-9


def test_rows_that_are_left_over_make_a_smaller_batch(setting):
    setting.check(1e-9, per_device_train_batch_size=4, max_steps=-1, num_train_epochs=2)


# --- where nothing can be reused, the trials take turns ---------------------------------------------------


def encoder_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same tokens as questions and answers of an encoder-decoder model."""
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"][-3:]} for row in rows]


def t5() -> Any:
    return tiny_t5(vocab_size=31, dropout_rate=0.0)


@pytest.mark.parametrize("why", ["dropout", "reuse is off", "smoothed labels", "a loss of the model's own"])
def test_trials_that_take_turns_are_runs_of_their_own(setting, monkeypatch, why):
    options: dict[str, Any] = {"gradient_accumulation_steps": 2}
    if why == "dropout":  # which would make equal weights a matter of chance
        monkeypatch.setattr(
            Eligibility, "why_plain", lambda self, call=None: "the base model has dropout in training mode"
        )
    if why == "smoothed labels":
        options["label_smoothing_factor"] = 0.1
    if why == "a loss of the model's own":
        setting.base, setting.rows = t5, encoder_rows(setting.rows)
        setting.graph = rh.InterventionGraph.over(rh.LoReFT(rank=2, dtype="float64"), [1, 2], "f1+l1", stack="encoder")
    if why != "reuse is off":
        setting.check(1e-9, **options)
        return
    model, trials = setting.sweep(reuse="off", **options)
    assert all(apart(model, trial, setting.alone(trial, **options).model) < 1e-9 for trial in trials)


# --- what a sweep gives back ------------------------------------------------------------------------------


def test_a_sweep_without_seeds_is_an_error(setting):
    with pytest.raises(ValueError, match="at least one seed"):
        setting.sweep(seeds=[])


def test_trials_come_by_rate_and_by_seed_and_the_best_one_is_active(setting, tokenizer):
    evaluated = without(rows_of(tokenizer, 5, seed=1), "label")
    model, trials = setting.sweep(eval_rows=evaluated)
    assert [(t.adapter_name, t.learning_rate, t.seed) for t in trials] == [
        ("trial_0", RATES[0], 0), ("trial_1", RATES[0], 1), ("trial_2", RATES[1], 0), ("trial_3", RATES[1], 1)
    ]  # fmt: skip
    for trial in trials:
        run = setting.alone(trial, eval_rows=evaluated)
        assert trial.eval_loss == pytest.approx(run.evaluate()["eval_loss"], rel=1e-9)
    best = min(trials, key=lambda trial: trial.eval_loss or 0)
    assert model.active_adapter == best.adapter_name
    assert model.tuner.layer.active_adapters == [best.adapter_name]
    assert {name.split("rh_nodes.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        best.adapter_name
    }
    batch = rh.Collator(tokenizer)(evaluated)
    with torch.no_grad():
        assert model.eval()(**batch).loss.item() == pytest.approx(best.eval_loss, rel=0.2)  # by rows, not by batches


def test_the_best_is_that_of_the_last_losses_where_nothing_is_evaluated(setting):
    model, trials = setting.sweep()
    assert all(trial.eval_loss is None for trial in trials)
    assert model.active_adapter == min(trials, key=lambda trial: trial.losses[-1]).adapter_name


@pytest.mark.parametrize(
    "options, ends",
    [
        ({"logging_steps": 2}, [2, 4, 6]),
        ({"logging_steps": 4}, [4, 6]),
        ({"logging_strategy": "epoch"}, [5, 6]),
        ({"logging_strategy": "no"}, [6]),
    ],
    ids=["every second step", "rarely", "by epoch", "never"],
)
def test_a_trial_has_a_loss_for_every_time_that_the_trainer_logs_and_one_for_what_follows(setting, options, ends):
    _, trials = setting.sweep(**options)
    every = [logged(setting.alone(trial, logging_steps=1), "loss") for trial in trials]
    means = [[sum(e[a:b]) / (b - a) for a, b in zip([0, *ends], ends, strict=False)] for e in every]
    assert [trial.losses for trial in trials] == [pytest.approx(mean, rel=1e-5) for mean in means]


def test_the_loss_that_is_logged_is_the_mean_of_the_trials(setting, capsys):
    _, trials = setting.sweep(logging_steps=6)
    shown = [line for line in capsys.readouterr().out.splitlines() if "loss'" in line]
    mean = sum(trial.losses[0] for trial in trials) / len(trials)
    assert len(shown) == 2 and f"'loss': '{mean:.4g}'" in shown[0] and f"'train_loss': '{mean:.4g}'" in shown[1]


def test_adapters_of_a_sweep_are_saved_and_loaded(setting, rows, tokenizer, tmp_path):
    model, trials = setting.sweep()
    model.save_pretrained(tmp_path / "saved", selected_adapters=["trial_1", "trial_2"])
    assert {path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()} == {"trial_1", "trial_2"}
    batch = rh.Collator(tokenizer)(rows)
    for trial in trials[1:3]:
        loaded = rh.InterventionModel.from_pretrained(llama().double(), tmp_path / "saved" / trial.adapter_name)
        assert apart(model, trial, loaded) == 0
        model.set_adapter(trial.adapter_name)
        assert torch.equal(model.eval()(**batch).logits, loaded.eval()(**batch).logits)


# --- what it spares ---------------------------------------------------------------------------------------


def counted(setting: Setting, store: ActivationStore, **options: Any) -> list[list[tuple[int, int, bool]]]:
    base = llama().double()
    with calls(base) as seen:
        setting.sweep(base=base, reuse=store, **options)
    return seen


def test_a_step_is_one_pass_of_all_trials_above_the_cut_and_rows_are_recorded_once_below(setting):
    assert edits().nodes[0].site.layer == 1  # block_output: blocks 0 and 1 are below
    one, four = ActivationStore(2**28), ActivationStore(2**28)
    of_one = counted(setting, one, rates=[1e-2], seeds=[0], max_steps=-1, num_train_epochs=1)
    of_four = counted(setting, four, max_steps=-1, num_train_epochs=3)
    trained = [(rows, columns) for rows, columns, gradient in of_four[2] if gradient and rows > 3]  # 3: to compare
    assert [rows for rows, _ in trained] == [4 * 2] * 15
    assert all(columns <= 8 for _, columns in trained)  # two tokens, and answers of 5 at most
    assert not any(gradient for below in of_four[:2] for rows, _, gradient in below if rows > 3)
    assert of_one[:2] == of_four[:2]
    assert (one.misses, len(one), one.bytes) == (four.misses, len(four), four.bytes)
    assert four.hits > 0


def test_a_store_serves_sweeps_of_several_ranks(setting):
    store, base, misses = ActivationStore(2**28), llama().double(), []
    for rank in (1, 3):
        setting.graph = edits(rank, "float64")
        model, trials = setting.sweep(base=base, reuse=store, max_steps=10)
        misses.append(store.misses)
        assert all(apart(model, trial, setting.alone(trial, max_steps=10).model) < 1e-9 for trial in trials)
        base = model.unload()
    assert misses[0] == misses[1] >= len(setting.rows)


# --- rows of several adapters in one plain pass -----------------------------------------------------------

NAMES = ["default", "b", "c"]
PLAIN = rh.InterventionGraph(
    rh.Node(rh.Collect(), 0, positions="f2", name="seen"),
    *mixed(False),
    rh.Node(rh.NoReFT(rank=2, dtype="float64"), 2, "mlp_output", positions="all", name="every"),
    rh.Node(rh.Collect(), 2, positions="l1", name="last"),
)


def several(graphs: Sequence[rh.InterventionGraph]) -> rh.InterventionModel:
    model = rh.InterventionModel(tiny_llama(initializer_range=0.3).double(), graphs[0])
    for name, graph in zip(NAMES[1:], graphs[1:], strict=True):
        model.add_adapter(name, graph)
    trainable(model)
    randomise(model.tuner.layer)
    return model.train()


def trainable(model: rh.InterventionModel) -> None:
    for p in model.tuner.layer.parameters():
        p.requires_grad_(True)


def batch_for(names: Sequence[str]) -> dict[str, Tensor]:
    """A row for each name, ragged, padded at the right."""
    generator = torch.Generator().manual_seed(3)
    lengths = [(12, 9), (9, 7), (14, 11), (7, 4), (10, 7), (8, 6)][: len(names)]
    ids = torch.randint(3, 50, (len(names), 14), generator=generator)
    mask = torch.stack([torch.arange(14) < n for n, _ in lengths]).long()
    prompt = torch.stack([torch.arange(14) < p for _, p in lengths]).long()
    labels = ids.masked_fill((mask - prompt) == 0, -100)
    label = torch.randint(2, (len(names),), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "prompt_mask": prompt, "labels": labels, "label": label}


def rows_in(batch: dict[str, Tensor], where: list[int]) -> dict[str, Tensor]:
    return {name: value[where] for name, value in batch.items()}


ORDERS = {
    "equal shares": ["default", "default", "b", "b", "c", "c"],
    "one row each": ["c", "default", "b"],
    "unequal shares": ["default", "b", "b", "b", "c", "c"],
    "mixed up": ["b", "default", "c", "c", "default", "b"],
}


def value_of(out: Any, batch: dict[str, Tensor]) -> Tensor:
    """Looks at every real token and at all that was read."""
    seen = [out.logits[batch["attention_mask"].bool()].sin().sum()]
    for kind in ("predictions", "collected"):
        for name, value in (out.get(kind) or {}).items():
            where = out.selected[name]
            seen.append(value[where if value.ndim == 3 else where[:, 0]].sin().sum())
    return torch.stack(seen).sum()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("graphs", ["one graph", "several graphs"])
def test_rows_of_several_adapters_give_what_they_give_one_adapter_at_a_time(monkeypatch, graphs, order):
    names = ORDERS[order]
    model = several([PLAIN] * 3 if graphs == "one graph" else [PLAIN, mixed(True), GATED])
    batch = batch_for(names)
    stacked = stacked_nodes(monkeypatch)
    together = model(**batch, adapter_names=names)
    assert bool(stacked) == (graphs == "one graph" and order in ("equal shares", "one row each"))
    stacked.clear()
    value_of(together, batch).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for adapter in dict.fromkeys(names):
        where = [i for i, name in enumerate(names) if name == adapter]
        own = rows_in(batch, where)
        model.set_adapter(adapter)
        trainable(model)
        out = model(**own)
        real = own["attention_mask"].bool()
        close(together.logits[where][real], out.logits[real])
        for kind in ("predictions", "losses", "collected"):
            for node, value in (out.get(kind) or {}).items():
                found = together[kind].get(f"{adapter}/{node}", together[kind].get(node))
                close(found if kind == "losses" else found[where], value)
        value_of(out, own).backward()
    assert not stacked
    for name, p in model.named_parameters():
        if p.grad is not None:
            close(gradients[name], p.grad)
    assert gradients


def test_what_an_adapter_reads_of_the_others_rows_is_zero():
    model, names = several([PLAIN] * 3), ORDERS["equal shares"]
    out = model(**batch_for(names), adapter_names=names)
    for node in ("b/seen", "b/last", "b/below", "b/above"):
        value = (out.predictions | out.collected)[node]
        assert not out.selected[node][[0, 1, 4, 5]].any()
        assert value[[2, 3]].abs().min() > 0
        assert value[[0, 1, 4, 5]].abs().max() == 0, node


def test_rows_of_several_adapters_are_generated_behind_gates_of_their_own():
    graph = rh.InterventionGraph(
        head(0, "gate", outputs=1, target=None),
        rh.Node(rh.Gated(rh.LoReFT(rank=2, dtype="float64")), 1, positions="generated", name="gated", source="gate"),
    )
    model, names = several([graph] * 3).eval(), ORDERS["equal shares"]
    ids = torch.randint(3, 50, (6, 7), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = model.generate(input_ids=ids, adapter_names=names, **options)
    for i, name in enumerate(names):
        model.set_adapter(name)
        assert torch.equal(model.generate(input_ids=ids[i : i + 1], **options)[0], together[i])


@pytest.mark.parametrize("reusing", [False, True])
def test_losses_of_adapters_are_their_own_with_and_without_reuse(reusing):
    model, names = several([PLAIN] * 3), ORDERS["equal shares"]
    batch = batch_for(names)
    with model.reusing(ActivationStore(2**28)) if reusing else nullcontext():
        out = model(**batch, adapter_names=names)
    for adapter in NAMES:
        model.set_adapter(adapter)
        alone = model(**rows_in(batch, [i for i, name in enumerate(names) if name == adapter]))
        for node in ("below", "above"):
            close(out.losses[f"{adapter}/{node}"], alone.losses[node])
        if reusing:
            close(out.adapter_loss[adapter], alone.loss - alone.head_loss)


@pytest.mark.parametrize("pool", ["mean", "attention"])
@pytest.mark.parametrize("reusing", [False, True])
def test_pools_of_adapters_side_by_side_are_their_own(pool, reusing, monkeypatch):
    what = rh.MLPHead(2, target="label", hidden=3, pool=pool, dtype="float64")
    nodes = [rh.Node(what, layer, positions="all", name=name) for layer, name in ((0, "below"), (2, "above"))]
    graph = rh.InterventionGraph(*nodes, rh.Node(rh.LoReFT(rank=2, dtype="float64"), 1, positions="l1"))
    model, names = several([graph] * 3), ORDERS["equal shares"]
    batch = batch_for(names)
    stacked = stacked_nodes(monkeypatch)
    with model.reusing(ActivationStore(2**28)) if reusing else nullcontext():
        out = model(**batch, adapter_names=names)
    assert stacked
    for i, adapter in enumerate(NAMES):
        model.set_adapter(adapter)
        alone = model(**rows_in(batch, [2 * i, 2 * i + 1]))
        for node in ("below", "above"):
            close(out.losses[f"{adapter}/{node}"], alone.losses[node])
            close(out.predictions[f"{adapter}/{node}"][2 * i : 2 * i + 2], alone.predictions[node])


def test_a_node_keeps_its_own_learning_rate_in_every_trial(tokenizer, tmp_path):
    rows = rh.encode_pairs(tokenizer, ["a b c", "d", "e f", "g h"], ["b", "d e", "f", "x"])
    rows = [{**row, "label": i % 2} for i, row in enumerate(rows)]
    still = rh.Node(rh.LinearHead(2, target="label", lr=0.0), 1, positions="l1", name="still")
    graph = rh.InterventionGraph(rh.Node(rh.LoReFT(rank=2), 1, name="edit"), still)
    args = arguments(tmp_path, max_steps=2)
    base = tiny_llama(vocab_size=len(tokenizer))
    model, _ = rh.sweep(base, tokenizer, rows, graph, args, learning_rates=(1e-2, 1e-1))
    base = tiny_llama(vocab_size=len(tokenizer))
    torch.manual_seed(0)
    begun = rh.InterventionModel(base, graph)
    for adapter in ("trial_0", "trial_1"):
        model.set_adapter(adapter)
        assert torch.equal(model.node("still").W, begun.node("still").W)
        assert not torch.equal(model.node("edit").W, begun.node("edit").W)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def stacked_nodes(monkeypatch) -> list[Any]:
    """Grows with every node that acts for several adapters at once."""
    from reftheads.runtime.passes import SideBySide

    made: list[Any] = []
    begin = SideBySide.__init__
    monkeypatch.setattr(SideBySide, "__init__", lambda self, *args: (made.append(args), begin(self, *args))[1])
    return made
