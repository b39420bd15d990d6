"""What a replayed pass computes: no block, token or logit that nobody looks at; and the dropout of nodes."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from support.architectures import CASES
from support.models import randomise
from support.replay import (
    base_of,
    batch_of,
    blocks_of,
    check,
    check_exact,
    counted,
    from_config,
    head,
    inside,
    intervened,
    loreft,
    replayed,
    step,
    token_rows,
    usual_batch,
)
from torch import Tensor, nn

import reftheads as rh
from reftheads.reuse import prefixes
from reftheads.reuse.store import ActivationStore
from reftheads.runtime import passes

pytestmark = pytest.mark.usefixtures("loss_in_float64")


def test_heads_alone_run_no_block_after_the_first_epoch() -> None:
    model = intervened(base_of("llama"), head(0, name="low"), head(2, "all", name="high", target="t"))
    batch = usual_batch(targets=True, labels=False)
    batch["t"] = batch["input_ids"] % 3
    check_exact(model, batch)
    assert replayed(model, batch, *inside(model), model.get_base_model().model.embed_tokens) == []


def test_heads_with_labels_run_no_block_after_the_first_epoch() -> None:
    model, batch = intervened(base_of("llama"), head(0), head(2, name="high")), usual_batch(targets=True)
    plain = check_exact(model, batch)
    assert float(plain.output.head_loss) < float(plain.loss)
    lm_head = model.get_base_model().lm_head
    assert replayed(model, batch, *inside(model)) == []
    assert sum(replayed(model, batch, lm_head)) == int((batch["labels"] != -100).sum())


def test_no_block_runs_above_the_last_head_if_there_are_no_labels() -> None:
    model = intervened(base_of("llama"), loreft(0), head(1), loreft(2))
    tokens = token_rows()
    batch = batch_of(tokens, list(map(len, tokens)), labels=False) | {"y": torch.tensor([0, 2, 1, 2])}
    plain = check_exact(model, batch)
    assert not any("loreft_2" in name for name in plain.gradients if float(plain.gradients[name].norm()) > 0)
    low, middle, high = inside(model)
    assert replayed(model, batch, low, high) == []
    assert replayed(model, batch, middle) == [4]


def test_the_first_pass_runs_no_further_than_somebody_looks() -> None:
    model, batch = intervened(base_of("llama"), head(1)), usual_batch(targets=True, labels=False)
    low, middle, high = inside(model)
    with model.reusing(ActivationStore(2**30)) as used:
        assert used.why_plain() is None  # compared beforehand
        with counted(high) as above, counted(low, middle) as below:
            step(model, batch)
    assert not above and len(below) == 1 + (1 if below[1:] else 0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom"])
def test_the_vocabulary_is_seen_by_tokens_with_a_label_alone(name: str) -> None:
    model, batch = intervened(base_of(name), loreft(1, "f1")), usual_batch()
    lm_head = model.get_base_model().get_output_embeddings()
    assert sum(replayed(model, batch, lm_head)) == int((batch["labels"] != -100).sum())
    with model.reusing(None):
        assert model(**batch).logits is None


def test_nothing_of_a_prefix_is_kept_for_the_backward_pass() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    def tokens(shapes: list[torch.Size]) -> int:
        """The most tokens of hidden states, of any kind, in one kept tensor."""
        return max(shape[:-1].numel() for shape in shapes if len(shape) == 3)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(model, batch)
        plain, kept[:] = list(kept), []
        with model.reusing(None) as used:
            assert used.why_plain() is None  # compared beforehand
            kept.clear()
            step(model, batch)
    assert tokens(plain) == 4 * 12 and tokens(kept) == 4 * 4


def test_what_is_kept_needs_no_gradient_and_no_more_than_its_own_memory() -> None:
    model, batch = intervened(base_of("llama"), loreft(1), head(0)), usual_batch(targets=True)
    store = ActivationStore(2**30)
    with model.reusing(store):
        step(model, batch)
    tensors = [tensor for entry in store._memory.values() for tensor in entry.values()]
    assert tensors and not any(t.requires_grad for t in tensors)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bloom"])
def test_a_template_that_all_rows_begin_with_is_run_once(name: str) -> None:
    common = token_rows([(prefixes.SHARED + 3, 0)], seed=7)[0]
    config = copy.deepcopy(CASES[name].config)
    model = intervened(from_config(config), loreft(1))
    tokens = [common + row[:6] for row in token_rows()]
    batch = batch_of(tokens, [len(row) - 2 for row in tokens])
    check_exact(model, batch)
    store = ActivationStore(2**30)
    with model.reusing(store), counted(blocks_of(model)[0]) as seen:
        step(model, batch)
    # the template; the rest of each prefix but its last token; what is computed
    assert seen[:3] == [prefixes.SHARED, 4 * (3 + 6 - 2 - 1), 4 * 2]
    other = batch_of([common + row[:6] for row in token_rows(seed=3)], [len(row) - 2 for row in tokens])
    plain = step(model, other)
    with model.reusing(store), counted(blocks_of(model)[0]) as seen:
        check(step(model, other), plain)
    assert seen[:2] == [4 * (3 + 6 - 2 - 1), 4 * 2]


def test_two_answers_to_one_prompt_share_its_keys_and_values() -> None:
    (prompt,) = token_rows([(9, 9)])
    model = intervened(base_of("llama"), loreft(1))
    first, second = (batch_of([[*prompt, *answer]], [9]) for answer in ([5, 6], [7, 8, 9]))
    plain = step(model, second)
    store = ActivationStore(2**30)
    with model.reusing(store):
        step(model, first)
        step(model, first)
        store.hits = 0
        with counted(blocks_of(model)[0]) as seen:
            check(step(model, second), plain)
    check_exact(model, batch_of([[*prompt, 5, 6], [*prompt, 7, 8, 9]], [9, 9]))
    assert store.hits > 0 and seen[0] == 8  # its prefix in all blocks, since they lie below what is kept of it
    with model.reusing(store) as used:
        step(model, second)
        with counted(blocks_of(model)[2]) as seen:
            step(model, second)
    assert seen == [3] and used.store is store


def test_two_graphs_share_a_store() -> None:
    batch, store = usual_batch(targets=True), ActivationStore(2**30)
    for nodes in ([loreft(1), head(0)], [loreft(2), head(0)], [loreft(0)], [loreft(2), head(1, "2")], [head(2, -1)]):
        model = intervened(base_of("llama"), *nodes)
        given = batch if model.plan().targets else usual_batch()
        plain, store.hits = step(model, given), 0
        for _ in range(2):
            with model.reusing(store) as used:
                assert used(given) is not None
                check(step(model, given), plain)
        assert store.hits > 0 or used.cone.cut == 0


def test_two_adapters_that_act_together_have_the_plain_gradients() -> None:
    model, batch = intervened(base_of("llama"), loreft(1), head(1, name="probe")), usual_batch(targets=True)
    model.add_adapter("other", rh.InterventionGraph(loreft(0), loreft(2), head(0, name="probe")))
    model.double().train()
    for names in (["default", "other"], ["other"], ["default"], ["other", "default"]):
        model.set_adapter(names)
        randomise(model)
        plain = check_exact(model, batch)
        assert len(plain.gradients) == sum({"default": 5, "other": 8}[name] for name in names)


SITES = {
    "the embeddings": {"component": "embedding_output"},
    "the final norm": {"component": "final_norm_output"},
    "a norm within a block": {"component": "model.layers.1.input_layernorm"},
    "what enters an attention": {"component": "model.layers.1.self_attn", "side": "input"},
    "a projection": {"component": "model.layers.2.mlp.gate_proj"},
    "the table of embeddings": {"component": "model.embed_tokens"},
    "one head": {"layer": 1, "component": "query_output", "head": 2},
}


@pytest.mark.parametrize("rule", ["l1", "generated", "all"])
@pytest.mark.parametrize("where", SITES.values(), ids=list(SITES))
def test_an_edit_at_any_site_has_the_plain_gradients(where: dict[str, Any], rule: str) -> None:
    reader = head(1, name="probe") if where["component"] != "final_norm_output" else head(2, name="probe")
    model = intervened(base_of("llama"), rh.Node(rh.LoReFT(rank=2), positions=rule, **where), reader)
    check_exact(model, usual_batch(targets=True))
    model = intervened(base_of("llama"), loreft(1, rule), rh.Node(rh.LinearHead(3, target="t"), **where))
    batch = usual_batch()
    check_exact(model, batch | {"t": batch["input_ids"] % 3})


@pytest.mark.parametrize("rule", ["l1", "l2", "generated"])
def test_a_gate_sees_the_probe_below_the_edits_at_its_own_tokens(rule: str) -> None:
    probe = rh.Node(rh.LinearHead(1), 0, positions=rule, name="probe")
    gated = rh.Node(rh.Gated(rh.LoReFT(rank=2)), 1, positions=rule, source="probe")
    check_exact(intervened(base_of("llama"), probe, gated), usual_batch())


def test_a_target_for_each_token_goes_with_its_token_below_and_above_the_edit() -> None:
    nodes = [head(layer, "generated", name=f"at{layer}", target="t") for layer in (0, 2)]
    model, batch = intervened(base_of("llama"), *nodes, loreft(1)), usual_batch()
    check_exact(model, batch | {"t": batch["input_ids"] % 3})


def test_a_target_for_each_slot_goes_with_its_slot_though_few_tokens_are_computed() -> None:
    model = intervened(base_of("llama"), loreft(0, "3:5"), head(1, "3:5", target="s"))
    batch = batch_of(token_rows([(5, 0), (4, 0)]), [5, 4])
    batch["labels"][1, 3] = 8  # the second row is computed from its third token on, and its head reads the fourth
    check_exact(model, batch | {"s": torch.tensor([[0, 1], [2, 0]])})


@pytest.mark.parametrize("pool", ["mean", "attention"])
@pytest.mark.parametrize("rule", ["all", "generated", "f2+l2"])
def test_a_pool_below_and_above_the_edit_has_the_plain_gradients(rule: str, pool: Any) -> None:
    pooled = rh.MLPHead(3, target="y", hidden=4, pool=pool)
    nodes = [rh.Node(pooled, layer, positions=rule, name=f"at{layer}") for layer in (0, 2)]
    check_exact(intervened(base_of("llama"), *nodes, loreft(1)), usual_batch(targets=True))


@pytest.mark.parametrize("rule", ["all", "generated"])
def test_the_next_tokens_target_is_that_of_the_next_column_below_and_above_the_edit(rule: str) -> None:
    nodes = [
        rh.Node(rh.LinearHead(3, target="t", shift=True), layer, positions=rule, name=f"at{layer}") for layer in (0, 2)
    ]
    model, batch = intervened(base_of("llama"), *nodes, loreft(1)), usual_batch()
    check_exact(model, batch | {"t": batch["input_ids"] % 3})


@pytest.mark.parametrize("columns", [3, 12])
def test_a_target_for_each_output_is_not_taken_for_one_of_each_token(columns: int) -> None:
    what = rh.LinearHead(columns, target="y", loss="multi_label")
    nodes = [rh.Node(what, layer, positions="l1", name=f"at{layer}") for layer in (0, 2)]
    model, batch = intervened(base_of("llama"), *nodes, loreft(1)), usual_batch()
    assert batch["input_ids"].shape[1] == 12
    check_exact(model, batch | {"y": torch.randint(0, 2, (4, columns), generator=torch.Generator().manual_seed(0))})


# --- dropout of nodes -----------------------------------------------------------------------------------------


def test_dropout_of_a_node_draws_as_in_the_plain_path_where_as_many_tokens_are_edited() -> None:
    with mock.patch.object(passes, "FEW", 0):  # else all tokens are edited, and chosen by a mask
        check_exact(intervened(base_of("llama"), loreft(1, "l1", dropout=0.5)), usual_batch())


def test_dropout_of_a_node_keeps_as_many_numbers_as_it_should() -> None:
    model, batch = intervened(base_of("llama"), loreft(1, "generated", dropout=0.25)), usual_batch()
    kept = []

    def see(module: nn.Module, args: tuple, output: Tensor) -> None:
        kept.append(float((output != 0).double().mean()))

    with model.reusing(ActivationStore(2**30)) as used:
        assert used.why_plain() is None  # compared beforehand
        handle = model.node("loreft_1").register_forward_hook(see)
        losses = {float(model(**batch).loss) for _ in range(40)}
    handle.remove()
    assert len(losses) == 40  # drawn anew each time, although all else is replayed
    assert len(kept) == 40 and abs(sum(kept) / 40 - 0.75) < 0.02
