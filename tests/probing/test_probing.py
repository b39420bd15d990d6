"""Probes: what they see, that each is trained as if alone, and what is said of them."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from support.models import VOCAB, WIDTH, random_ids, randomise, tiny_bart, tiny_gpt2, tiny_llama
from support.paths import RECIPES
from torch import nn
from transformers import PreTrainedTokenizerFast

import reftheads as rh
from reftheads.probing import Estimate, fit, recording, targets
from reftheads.probing.stacks import stacks_of

LENGTHS = [3, 7, 5, 4, 6, 8]


class Padding:
    """All of a tokenizer that a collator looks at."""

    pad_token_id = 0


TOKENIZER: PreTrainedTokenizerFast = Padding()  # type: ignore[assignment]


def rows_of(count: int = 60, seed: int = 0, **columns) -> list[dict]:
    """Rows of random tokens and lengths, with columns made by functions of the row's number and tokens."""
    ids = random_ids(count, max(LENGTHS), seed).tolist()
    cut = [row[: LENGTHS[i % len(LENGTHS)]] for i, row in enumerate(ids)]
    made = [{"input_ids": own} for own in cut]
    return [row | {n: make(i, row["input_ids"]) for n, make in columns.items()} for i, row in enumerate(made)]


def is_last_big(i, ids):
    return int(ids[-1] >= VOCAB // 2)


def nodes(head, layers=range(3), positions="l1", prefix="probe"):
    return [rh.Node(head, layer, positions=positions, name=f"{prefix}_{layer}") for layer in layers]


def model_of(*some, base=tiny_llama) -> rh.InterventionModel:
    return rh.InterventionModel(base(), rh.InterventionGraph(*some))


def weights(model, *names):
    return {name: {k: v.detach().clone() for k, v in model.node(name).stored().items()} for name in names}


HEAD = rh.LinearHead(2, target="label")
QUICK = {"epochs": 4, "seeds": (0, 1), "batch_size": 16, "lr": 1e-2}


def hidden(model, rows, layer):
    """What leaves a block that is not the last, row by row: [tokens width] each."""
    base = model.get_base_model()
    found = []
    with torch.no_grad(), model.disable_adapter():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            found.append(base(ids, output_hidden_states=True).hidden_states[layer + 1][0])
    return found


@pytest.mark.parametrize(
    "head",
    [
        HEAD,
        rh.LinearHead(1, target="label", loss="bce"),
        rh.LinearHead(2, target="label", bias=False, class_weights=(1.0, 3.0)),
        rh.MLPHead(2, target="label", hidden=5),
    ],
    ids=str,
)
def test_each_probe_is_what_it_would_be_alone(head):
    rows = rows_of(label=is_last_big)
    together = model_of(*nodes(head))
    found = rh.fit_probes(together, TOKENIZER, rows, **QUICK)
    for layer in range(3):
        alone = model_of(*nodes(head, [layer]))
        own = rh.fit_probes(alone, TOKENIZER, rows, **QUICK)
        name = f"probe_{layer}"
        for key, value in weights(alone, name)[name].items():
            torch.testing.assert_close(weights(together, name)[name][key], value, atol=1e-5, rtol=1e-4)
        assert own[name].score == found[name].score and own[name].epochs == found[name].epochs


def test_a_lone_probe_is_a_plain_linear_map_trained_by_adamw():
    rows = sorted(rows_of(label=is_last_big), key=lambda row: -len(row["input_ids"]))  # as they are recorded
    model = model_of(*nodes(HEAD, [1]))
    parts = targets.parts_of(model.plan().nodes, {"label": targets.Column.of(HEAD, rows)}, 60, 0, 0.2, 0.1, [3])[0]
    found = rh.fit_probes(model, TOKENIZER, rows, seeds=(3,), epochs=6, patience=6, lr=1e-2, batch_size=16)

    x = torch.stack([h[-1] for h in hidden(model, rows, 1)])
    y = torch.tensor([row["label"] for row in rows])
    mean, scale = x.mean(0), x.std(0, correction=0)
    x = (x - mean) / scale
    train, known, test = ((parts == which).nonzero()[:, 0] for which in range(3))
    assert (len(train), len(known), len(test)) == (43, 5, 12)
    torch.manual_seed(3)
    linear = nn.Linear(WIDTH, 2)
    adam = torch.optim.AdamW(linear.parameters(), lr=1e-2, weight_decay=0.01)
    generator, best, kept = torch.Generator().manual_seed(3), math.inf, (linear.weight, linear.bias)
    for epoch in range(1, 7):
        for items in train[torch.randperm(len(train), generator=generator)].split(16):
            adam.zero_grad()
            F.cross_entropy(linear(x[items]), y[items]).backward()
            adam.step()
        loss = F.cross_entropy(linear(x[known]), y[known]).item()
        if loss < best:
            best, kept, at = loss, (linear.weight.detach().clone(), linear.bias.detach().clone()), epoch
    W, b = kept[0] / scale, kept[1] - kept[0] @ (mean / scale)
    torch.testing.assert_close(model.node("probe_1").W.detach(), W, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model.node("probe_1").b.detach(), b, atol=1e-4, rtol=1e-3)
    right = ((x[test] @ kept[0].T + kept[1]).argmax(1) == y[test]).float().mean().item()
    assert found["probe_1"].score.values == (pytest.approx(right),) and found["probe_1"].epochs.mean == at


def test_the_weights_in_the_model_are_those_that_were_judged():
    rows, held_out = rows_of(label=is_last_big), rows_of(30, seed=5, label=is_last_big)
    model = model_of(*nodes(HEAD), *nodes(rh.MLPHead(2, "label", hidden=4), [1], prefix="mlp"))
    found = rh.fit_probes(model, TOKENIZER, rows, eval_rows=held_out, **QUICK)
    guesses = rh.predict(model, TOKENIZER, held_out)
    truth = torch.tensor([row["label"] for row in held_out])
    for probe in found:
        right = (guesses[probe.name].argmax(1) == truth).float().mean().item()
        assert probe.score.values[0] == pytest.approx(right)


def by_row(h, row, positions, pool):
    h = {"l1": h[-1:], "f2": h[:2], "all": h}[positions]
    return h.mean(0, keepdim=True) if pool else h


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(
    "positions, pool, by_token",
    [("l1", None, False), ("all", "mean", False), ("f2", "mean", False), ("all", None, True)],
)
def test_it_sees_what_the_head_sees_whatever_the_padding(base, positions, pool, by_token):
    def target(i, ids):
        return [float(token % 7) for token in ids] if by_token else float(sum(ids) % 7)

    rows = rows_of(label=target)
    model = model_of(*nodes(rh.LinearHead(1, "label", "mse", pool=pool), [1], positions), base=base)
    rh.fit_probes(model, TOKENIZER, rows, method="closed", seeds=(0,), eval_rows=rows, recording_batch_size=7)
    x = torch.cat([by_row(h, row, positions, pool) for h, row in zip(hidden(model, rows, 1), rows, strict=True)])
    x = x.double().numpy()
    y = np.concatenate([np.atleast_1d(row["label"]) for row in rows])
    scale = x.std(0)
    ridge = Ridge(alpha=len(x) * 0.1 / 2).fit((x - x.mean(0)) / scale, y)
    np.testing.assert_allclose(model.node("probe_1").W.detach().numpy()[0], ridge.coef_ / scale, rtol=1e-3, atol=1e-4)


def test_an_edit_below_a_probe_acts_and_stays_as_it_is():
    rows = rows_of(label=is_last_big)
    model = model_of(rh.Node(rh.LoReFT(2), 0, positions="l1", name="edit"), *nodes(HEAD, [1, 2]))
    randomise(model)
    before = weights(model, "edit")["edit"]
    seen = recording.record(
        model, fit.heads_of(model, "sgd"), rows, {"label": targets.Column.of(HEAD, rows)}, TOKENIZER, 8, None
    )
    for one, name in zip(seen, ("probe_1", "probe_2"), strict=True):
        head = model.node(name)
        for x, item in zip(one.x, one.items.tolist(), strict=True):
            with torch.no_grad():
                shown = model(torch.tensor([rows[item]["input_ids"]])).predictions[name][0]
                torch.testing.assert_close(F.linear(x, head.W, head.b), shown, atol=1e-5, rtol=1e-4)
    rh.fit_probes(model, TOKENIZER, rows, **QUICK)
    assert all(torch.equal(before[key], value) for key, value in weights(model, "edit")["edit"].items())


def test_nothing_above_the_deepest_head_runs_and_the_base_runs_once():
    model = model_of(*nodes(HEAD, [0, 1]))
    calls = {i: 0 for i in range(3)}

    def count(i, args):
        calls[i] += len(args[0]) != 3  # of so many rows are those on which reuse is compared with the plain path

    for i, block in enumerate(model.get_base_model().model.layers):
        block.register_forward_pre_hook(lambda module, args, i=i: count(i, args))
    rh.fit_probes(model, TOKENIZER, rows_of(label=is_last_big), recording_batch_size=20, **QUICK)
    assert calls == {0: 3, 1: 3, 2: 0}


def test_a_store_spares_the_second_call_the_model():
    rows, store, found = rows_of(label=is_last_big), rh.ActivationStore(), []
    for _ in range(2):
        model = model_of(*nodes(HEAD))
        found.append(rh.fit_probes(model, TOKENIZER, rows, store=store, **QUICK)["probe_2"].score)
    assert found[0] == found[1] and store.hits == 3 * len(rows) and store.misses == 3 * len(rows)


def test_seeds_side_by_side_have_their_own_first_weights_and_parts():
    rows = rows_of(label=is_last_big)
    found = [
        rh.fit_probes(model_of(*nodes(HEAD, [2])), TOKENIZER, rows, **QUICK | {"seeds": s}) for s in [(0, 1), (1, 0)]
    ]
    (a, b), (c, d) = (probes["probe_2"].score.values for probes in found)
    parts = targets.parts_of([], {}, 60, 0, 0.2, 0.1, [0, 1])
    assert not torch.equal(parts[0], parts[1]) and (a, b) != (b, a)
    # the order of the batches is the first seed's, so that only closed forms agree to the last digit
    found = [
        rh.fit_probes(model_of(*nodes(HEAD, [2])), TOKENIZER, rows, method="closed", seeds=s) for s in [(0, 1), (1, 0)]
    ]
    assert found[0]["probe_2"].score.values == found[1]["probe_2"].score.values[::-1]


def test_classes_keep_their_shares_in_what_is_held_out():
    rows = rows_of(100, label=lambda i, ids: int(i % 10 == 0))
    column = targets.Column.of(HEAD, rows)
    planned = model_of(*nodes(HEAD, [0])).plan().nodes
    for part in targets.parts_of(planned, {"label": column}, 100, 0, 0.2, 0.25, [0, 1, 2]):
        assert [int(column.values[part == which].sum()) for which in range(3)] == [6, 2, 2]


def test_a_control_task_that_the_type_gives_away_is_memorised_by_all_that_see_the_type():
    rows = rows_of(300, label=lambda i, ids: int(sum(ids) % 2), last=lambda i, ids: f"token {ids[-1]}")
    embedding = rh.Node(HEAD, component="embedding_output", positions="l1", name="sees")
    elsewhere = rh.Node(HEAD, component="embedding_output", positions="f1", name="blind")
    found = rh.fit_probes(
        model_of(embedding, elsewhere),
        TOKENIZER,
        rows,
        control="last",
        seeds=(0, 1, 2),
        lr=3e-2,
        epochs=60,
        patience=20,
    )
    sees, blind = found["sees"], found["blind"]
    assert sees.control.mean > blind.control.mean + 0.1
    assert sees.selectivity.values == tuple(a - b for a, b in zip(sees.score.values, sees.control.values, strict=True))


def test_a_control_task_gives_one_random_target_a_type_drawn_as_often_as_it_occurs():
    rows = rows_of(400, label=lambda i, ids: [int(token % 4 == 0) for token in ids])
    head, model = rh.LinearHead(2, "label"), model_of(*nodes(rh.LinearHead(2, "label"), [0], "all"))
    columns = {"label": targets.Column.of(head, rows)}
    seen = recording.record(model, fit.heads_of(model, "sgd"), rows, columns, TOKENIZER, 64, None)
    [stack] = stacks_of(seen, columns, rows, "input_ids", (0, 1), 64)
    tokens = torch.cat([torch.tensor(row["input_ids"]) for row in rows])[seen[0].items]
    assert stack.y.shape == (1, 4, len(tokens))
    assert torch.equal(stack.y[0, 0], (tokens % 4 == 0).long()) and torch.equal(stack.y[0, 0], stack.y[0, 2])
    for member in (1, 3):
        by_type = [set(stack.y[0, member][tokens == token].tolist()) for token in tokens.unique()]
        assert all(len(targets) == 1 for targets in by_type)
        assert 1 <= sum(targets == {1} for targets in by_type) < len(by_type) / 2
    assert not torch.equal(stack.y[0, 1], stack.y[0, 3])


def test_shift_compares_with_the_next_token_and_its_control_with_the_token_that_is_read():
    rows = rows_of(40, next=lambda i, ids: ids)
    head = rh.LinearHead(VOCAB, "next", shift=True)
    model = model_of(*nodes(head, [0], "all"))
    columns = {"next": targets.Column.of(head, rows)}
    [seen] = recording.record(model, fit.heads_of(model, "sgd"), rows, columns, TOKENIZER, 8, None)
    [stack] = stacks_of([seen], columns, rows, "input_ids", (0,), 8)
    assert len(seen.items) == sum(len(row["input_ids"]) - 1 for row in rows)
    states = hidden(model, rows, 0)
    before = []
    for x, item in zip(seen.x, seen.items.tolist(), strict=True):
        row = int(columns["next"].row[item])
        column = item - int((columns["next"].row < row).sum())
        torch.testing.assert_close(x, states[row][column - 1], atol=1e-5, rtol=1e-4)
        before.append(rows[row]["input_ids"][column - 1])
    for token in set(before):
        assert len(set(stack.y[0, 1][torch.tensor(before) == token].tolist())) == 1


def test_several_targets_at_one_site_are_one_product_and_rows_without_a_target_do_not_count():
    def second(i, ids):
        return None if i % 3 == 0 else int(ids[0] % 3)

    rows = rows_of(90, a=is_last_big, b=lambda i, ids: int(ids[-1] % 2), c=second)
    heads = [rh.LinearHead(2, "a"), rh.LinearHead(2, "b"), rh.LinearHead(3, "c")]
    model = model_of(*[n for h in heads for n in nodes(h, prefix=str(h.target))])
    columns = {str(h.target): targets.Column.of(h, rows) for h in heads}
    seen = recording.record(model, fit.heads_of(model, "sgd"), rows, columns, TOKENIZER, 16, None)
    stacks = list(stacks_of(seen, columns, rows, None, (0,), 16))
    assert [tuple(stack.y.shape) for stack in stacks] == [(3, 2, 90), (3, 1, 60)]
    assert len({one.x.data_ptr() for one in seen[:6]}) == 3
    found = rh.fit_probes(model, TOKENIZER, rows, **QUICK)
    alone = rh.fit_probes(model_of(*nodes(heads[1], [2], prefix="b")), TOKENIZER, rows, eval_rows=rows, **QUICK)
    again = rh.fit_probes(model, TOKENIZER, rows, eval_rows=rows, **QUICK)
    assert len(found) == 9 and again["b_2"].score.values != again["a_2"].score.values
    assert alone["b_2"].target == "b"


@pytest.mark.parametrize("classes, loss", [(2, "cross_entropy"), (3, "cross_entropy"), (1, "bce")])
def test_closed_forms_of_classes_are_where_the_gradient_of_the_penalised_loss_is_zero(classes, loss):
    rows = rows_of(80, label=lambda i, ids: ids[-1] % max(classes, 2))
    head = rh.LinearHead(classes, "label", loss)
    model = model_of(*nodes(head, [1]))
    rh.fit_probes(
        model,
        TOKENIZER,
        rows,
        method="closed",
        strength=0.05,
        seeds=(0,),
        eval_rows=rows_of(9, seed=8, label=lambda i, ids: ids[-1] % 2),
    )
    every = rows + rows_of(9, seed=8, label=lambda i, ids: 0)
    x = torch.stack([h[-1] for h in hidden(model, every, 1)]).double()
    mean, scale = x.mean(0), x.std(0, correction=0)
    x, y = ((x - mean) / scale)[:80], torch.tensor([row["label"] for row in rows])
    W, b = model.node("probe_1").W.detach().double(), model.node("probe_1").b.detach().double()
    W, b = (W * scale).requires_grad_(), (b + W @ mean).requires_grad_()
    z = x @ W.T + b
    value = F.cross_entropy(z, y) if classes > 1 else F.binary_cross_entropy_with_logits(z[:, 0], y.double())
    (value + 0.05 / 2 * W.square().sum()).backward()
    assert W.grad.abs().max() < 2e-4 and b.grad.abs().max() < 2e-4
    assert W.detach().abs().max() > 0.05


def test_gradient_descent_comes_to_where_the_closed_form_is():
    rows = rows_of(100, label=lambda i, ids: float(sum(ids) % 5))
    found = []
    closed, descent = {"method": "closed", "strength": 1e-9}, {"epochs": 400, "lr": 1e-2, "batch_size": 100}
    for options in (closed, descent | {"validation": 0, "weight_decay": 0.0}):
        model = model_of(*nodes(rh.LinearHead(1, "label", "mse", pool="mean"), [0], "all"))
        rh.fit_probes(model, TOKENIZER, rows, seeds=(0,), eval_rows=rows, **options)
        found.append(torch.cat([model.node("probe_0").W.detach()[0], model.node("probe_0").b.detach()]))
    assert found[0].abs().max() > 1
    torch.testing.assert_close(found[1], found[0], atol=0.02, rtol=0.02)


def test_numbers_are_judged_by_their_r2():
    rows = rows_of(80, label=lambda i, ids: float(ids[-1]))
    held_out = rows_of(20, seed=4, label=lambda i, ids: float(ids[-1]))
    model = model_of(*nodes(rh.LinearHead(1, "label", "huber"), [0]))
    probe = rh.fit_probes(model, TOKENIZER, rows, eval_rows=held_out, lr=0.1, seeds=(0,), epochs=80)["probe_0"]
    guess = rh.predict(model, TOKENIZER, held_out)["probe_0"][:, 0]
    truth = [row["label"] for row in held_out]
    assert probe.metric == "r2" and probe.score.mean == pytest.approx(r2_score(truth, guess.numpy()), abs=1e-4)
    assert probe.second["pearson"].mean == pytest.approx(np.corrcoef(truth, guess.numpy())[0, 1], abs=1e-4)


def test_labels_of_which_some_are_missing_count_where_they_are_given():
    def labels(i, ids):
        return [float(ids[-1] >= 25), math.nan if i % 2 else float(ids[-1] % 2)]

    rows = rows_of(80, label=labels)
    head = rh.LinearHead(2, "label", "multi_label")
    model = model_of(*nodes(head, [0]))
    probe = rh.fit_probes(model, TOKENIZER, rows, eval_rows=rows, lr=1e-2, seeds=(0,), epochs=5)["probe_0"]
    guess = rh.predict(model, TOKENIZER, rows)["probe_0"] > 0
    right = [
        [
            bool(own[j]) == (y > 0.5)
            for own, row in zip(guess, rows, strict=True)
            if not math.isnan(y := row["label"][j])
        ]
        for j in range(2)
    ]
    assert [len(of_label) for of_label in right] == [80, 40]
    assert probe.score.mean == pytest.approx(sum(sum(of_label) / len(of_label) for of_label in right) / 2)


def test_the_interval_is_students():
    values = (0.7, 0.8, 0.75)
    low, high = student.interval(0.95, 2, loc=np.mean(values), scale=np.std(values, ddof=1) / math.sqrt(3))
    estimate = Estimate(values)
    assert estimate.interval == pytest.approx((high - low) / 2) and str(estimate) == "0.750 ± 0.124"
    assert Estimate((0.5,)).interval is None


def test_a_probe_that_stops_early_keeps_its_best_weights_while_others_go_on():
    rows = rows_of(200, label=is_last_big)
    hard = rh.Node(HEAD, 2, positions="f1", name="hard")
    easy = rh.Node(HEAD, component="embedding_output", positions="l1", name="easy")
    options = {"lr": 3e-3, "epochs": 40, "patience": 2, "seeds": (0,)}
    together = model_of(hard, easy)
    found = rh.fit_probes(together, TOKENIZER, rows, **options)
    assert found["hard"].epochs.mean + 2 < found["easy"].epochs.mean
    alone = model_of(hard)
    rh.fit_probes(alone, TOKENIZER, rows, **options)
    torch.testing.assert_close(alone.node("hard").W, together.node("hard").W, atol=1e-5, rtol=1e-4)


def test_rows_with_labels_are_probed_where_their_prompts_end():
    rows = rows_of(40, label=is_last_big, labels=lambda i, ids: [-100] * 2 + ids[2:])
    model = model_of(*nodes(HEAD, [1]))
    [seen] = recording.record(
        model, fit.heads_of(model, "sgd"), rows, {"label": targets.Column.of(HEAD, rows)}, TOKENIZER, 8, None
    )
    states = hidden(model, rows, 1)
    for x, item in zip(seen.x, seen.items.tolist(), strict=True):
        torch.testing.assert_close(x, states[item][1], atol=1e-5, rtol=1e-4)


def test_an_encoder_decoder_is_probed_as_a_whole():
    rows = rows_of(40, label=is_last_big, labels=lambda i, ids: ids)
    node = rh.Node(rh.LinearHead(2, "label", pool="mean"), 1, stack="encoder", name="probe")
    model = model_of(node, base=tiny_bart)
    found = rh.fit_probes(model, TOKENIZER, rows, **QUICK)
    assert len(found["probe"].score.values) == 2


def test_the_results_are_written_as_a_table_json_and_a_picture(tmp_path):
    rows = rows_of(label=is_last_big, last=lambda i, ids: ids[-1])
    heads = [
        rh.Node(HEAD, layer, "head_output", "l1", head=head, name=f"head_{layer}_{head}")
        for layer in (0, 1)
        for head in (0, 3)
    ]
    ends = [rh.Node(HEAD, component=c, positions="l1", name=c) for c in ("embedding_output", "final_norm_output")]
    found = rh.fit_probes(model_of(*nodes(HEAD), *heads, *ends), TOKENIZER, rows, control="last", **QUICK)
    assert [column.header for column in found.table().columns][3:] == [
        "accuracy", "macro_f1", "control", "selectivity", "epochs",
    ]  # fmt: skip
    assert found.table().row_count == 9
    found.plot(tmp_path / "new" / "probes.png")
    assert (tmp_path / "new" / "probes.png").read_bytes().startswith(b"\x89PNG")
    found.save(tmp_path / "probes.json")
    read = json.loads((tmp_path / "probes.json").read_text())["probes"]
    assert read[3]["where"] == "head_output[0].head[0]" and read[3]["head"] == 0
    assert read[0]["accuracy" if "accuracy" in read[0] else "score"]["values"] == list(found["probe_0"].score.values)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "probes.json"}


BAD = [
    ("no head to train", [rh.Node(rh.LoReFT(2), 1)], {}, {}),
    ("pool='attention' is learnt", nodes(rh.LinearHead(2, "label", pool="attention"), [1], "all"), {}, {}),
    ("needs pairs in a batch", nodes(rh.LinearHead(1, "label", "bradley_terry"), [1]), {}, {}),
    (
        "node 'gated' reads it",
        [
            *nodes(rh.LinearHead(1, "label", "bce"), [1]),
            rh.Node(rh.Gated(rh.LoReFT(2)), 2, positions="l1", source="probe_1", name="gated"),
        ],
        {},
        {},
    ),
    ("no closed form", nodes(rh.MLPHead(2, "label", hidden=3), [1]), {}, {"method": "closed"}),
    ("no row has a target 'label'", nodes(HEAD, [1]), {"label": lambda i, ids: None}, {}),
    ("all that stands there stands for none", nodes(HEAD, [1]), {"label": lambda i, ids: -100}, {}),
    ("row 7 is 5", nodes(HEAD, [1]), {"label": lambda i, ids: 5 if i == 7 else 1}, {}),
    ("in row 7 is 'x'", nodes(HEAD, [1]), {"label": lambda i, ids: "x" if i == 7 else 1}, {}),
    ("in row 7 has the shape", nodes(HEAD, [1]), {"label": lambda i, ids: [1, 0] if i == 7 else 1}, {}),
    ("class 0 is missing", nodes(HEAD, [1]), {"label": lambda i, ids: 1}, {"method": "closed"}),
    ("control 'city' in row 0 is None", nodes(HEAD, [1]), {}, {"control": "city"}),
    ("needs one a row", nodes(HEAD, [1]), {}, {"control": "input_ids"}),
    ("held_out must be", nodes(HEAD, [1]), {}, {"held_out": 0}),
    ("validation must be", nodes(HEAD, [1]), {}, {"validation": 1}),
    ("seeds must be", nodes(HEAD, [1]), {}, {"seeds": (1, 1)}),
    ("method must be", nodes(HEAD, [1]), {}, {"method": "lbfgs"}),
    ("too few rows", nodes(HEAD, [1]), {}, {"eval_rows": []}),
]


@pytest.mark.parametrize("says, some, columns, options", BAD, ids=[case[0] for case in BAD])
def test_what_cannot_be_is_said(says, some, columns, options):
    rows = rows_of(20, **{"label": is_last_big} | columns)
    with pytest.raises(ValueError, match=says):
        rh.fit_probes(model_of(*some), TOKENIZER, rows, **options)


def test_more_than_half_of_the_free_memory_is_refused_before_the_model_runs(monkeypatch):
    class Free:
        available = 2 * 60 * WIDTH * 4 - 1

    model = model_of(*nodes(HEAD, [1]))
    rh.fit_probes(model, TOKENIZER, rows_of(label=is_last_big), **QUICK)
    monkeypatch.setattr(psutil, "virtual_memory", Free)
    model.get_base_model().model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the model has run"))
    with pytest.raises(ValueError, match="of which half may be used"):
        rh.fit_probes(model, TOKENIZER, rows_of(label=is_last_big), **QUICK)


def test_a_loss_that_is_not_finite_stops_the_training():
    rows = rows_of(label=lambda i, ids: 1e30 if i == 5 else 0.0)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        rh.fit_probes(model_of(*nodes(rh.LinearHead(1, "label", "mse"), [1])), TOKENIZER, rows, eval_rows=rows, **QUICK)


def test_heads_come_back_to_the_model_when_recording_fails():
    model = model_of(*nodes(HEAD, [1]))
    rows = rows_of(label=is_last_big)
    rows[3]["input_ids"] = [VOCAB + 1]
    with pytest.raises(IndexError):
        rh.fit_probes(model, TOKENIZER, rows)
    assert model.node("probe_1").intervention == HEAD


def test_a_logistic_probe_of_raw_numbers_is_scikit_learns():
    rows = rows_of(80, label=is_last_big)
    model = model_of(*nodes(rh.LinearHead(1, "label", "bce"), [1]))
    probe = rh.fit_probes(model, TOKENIZER, rows, method="closed", strength=0.1, seeds=(0,), eval_rows=rows)["probe_1"]
    x = torch.stack([h[-1] for h in hidden(model, rows, 1)]).double().numpy()
    y = [row["label"] for row in rows]
    x = (x - x.mean(0)) / x.std(0)
    assert probe.score.mean == LogisticRegression(C=1 / 8).fit(x, y).score(x, y)


@pytest.mark.slow
def test_the_recipe_prints_its_table_and_writes_figures_a_plot_and_an_adapter(tmp_path):
    words = ["dogs", "cats", "owls", "bread", "soup", "rice"]
    lines = ["text\tlabel\tword", *(f"{s} {w}.\t{'food' if i > 2 else 'animal'}\t{w}"
             for s in ("I like", "We saw", "There are", "No", "Some") for i, w in enumerate(words))]  # fmt: skip
    (tmp_path / "words.tsv").write_text("\n".join(lines))
    recipe = RECIPES / "text_classification_probe.py"
    options = ["--data", tmp_path / "words.tsv", "--control", "word", "--epochs", "2", "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(recipe), *map(str, options)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "block_output[5]" in done.stdout and "selectivity" in done.stdout and "30 texts" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"probes.json", "probes.png", "adapter"}
    base, _ = rh.load_base("tiny-chat")
    rh.InterventionModel.from_pretrained(base.model, tmp_path / "out" / "adapter")


def test_several_numbers_are_judged_one_by_one():
    head = rh.LinearHead(2, target="y", loss="mse_of_each")
    rng = np.random.RandomState(0)
    rows = rows_of(y=lambda i, ids: [float(rng.randn()), 100 + float(rng.randn())])
    found = rh.fit_probes(model_of(*nodes(head, [1])), TOKENIZER, rows, seeds=(0,), epochs=5)["probe_1"]
    assert found.score.mean < 0.5 and abs(found.second["pearson"].mean) < 0.9  # noise around means that differ


def test_a_probe_needs_a_row_to_train_on():
    rows = rows_of(label=lambda i, ids: None)
    with pytest.raises(ValueError, match="no row to train on has a target 'label'"):
        rh.fit_probes(model_of(*nodes(HEAD, [1])), TOKENIZER, rows, eval_rows=rows_of(6, label=is_last_big))


def test_a_frozen_head_of_the_same_target_is_left_alone():
    frozen = rh.Node(rh.LinearHead(2, target="label", trainable=False), 0, positions="l1", name="frozen")
    model = model_of(frozen, *nodes(HEAD, [1]))
    before = weights(model, "frozen")
    rh.fit_probes(model, TOKENIZER, rows_of(label=is_last_big), **QUICK)
    assert all(torch.equal(v, before["frozen"][k]) for k, v in model.node("frozen").stored().items())
    assert model.node("frozen").intervention.target == "label"
