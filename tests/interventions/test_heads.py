"""Heads: predictions, losses and gradients against hooks of the test's own."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from support.models import VOCAB, WIDTH, random_ids, randomise, tiny_gpt2, tiny_llama
from torch import Tensor

import reftheads as rh
from reftheads.graph import Context, Shape

EXACT = {"atol": 1e-10, "rtol": 0}
NAN = math.nan


def graph(head, positions="l1", layer=1, edit=True) -> rh.InterventionGraph:
    nodes = [rh.Node(rh.LoReFT(rank=2), 0, name="edit")] if edit else []
    return rh.InterventionGraph(*nodes, rh.Node(head, layer, positions=positions, name="head"))


def with_head(head, positions="l1", **options) -> rh.InterventionModel:
    model = rh.InterventionModel(tiny_llama(), graph(head, positions, **options)).double().eval()
    randomise(model)
    return model


def oracle(model: rh.InterventionModel, ids: Tensor, detach: bool, **inputs):
    """Prediction at every token, base output, and the leaves of edit and head, from plain hooks."""
    edit = {k: v.detach().clone().requires_grad_() for k, v in model.node("edit").stored().items()}
    head = {k: v.detach().clone().requires_grad_() for k, v in model.node("head").stored().items()}
    base = tiny_llama().double().requires_grad_(False)
    predictions = []

    def write(module, args, h):
        q, r = torch.linalg.qr(edit["M"].T)
        R = (q * torch.sign(torch.diagonal(r))).T
        return h + (h @ edit["W"].T + edit["b"] - h @ R.T) @ R

    def read(module, args, h):
        predictions.append((h.detach() if detach else h) @ head["W"].T + head["b"])

    base.model.layers[0].register_forward_hook(write)
    base.model.layers[1].register_forward_hook(read)
    return base(ids, **inputs), predictions, edit, head


CLASSES = torch.tensor([2, 0])
CASES = [
    ("one token a row, classes", 3, "cross_entropy", "l1", CLASSES, lambda p: F.cross_entropy(p[:, -1], CLASSES)),
    (
        "one token a row, a class is missing", 3, "cross_entropy", "l1", torch.tensor([-100, 1]),
        lambda p: F.cross_entropy(p[1:, -1], torch.tensor([1])),
    ),
    (
        "one token a row, numbers", 1, "mse", "f1", torch.tensor([0.5, -3.0]),
        lambda p: F.mse_loss(p[:, 0, 0], torch.tensor([0.5, -3.0]).double()),
    ),
    (
        "one token a row, a number is missing", 1, "mse", "l1", torch.tensor([NAN, 2.0]),
        lambda p: F.mse_loss(p[1:, -1, 0], torch.tensor([2.0]).double()),
    ),
    (
        "every token, classes", 3, "cross_entropy", "all", torch.tensor([[0, 1, 2, -100, 1, 0, 0], [-100] * 6 + [1]]),
        lambda p: F.cross_entropy(
            torch.cat([p[0, [0, 1, 2, 4, 5, 6]], p[1, 6:]]), torch.tensor([0, 1, 2, 1, 0, 0, 1])
        ),
    ),
    (
        "every token, numbers", 1, "mse", "all", torch.tensor([[NAN] * 5 + [1.0, 2.0], [NAN] * 7]),
        lambda p: F.mse_loss(p[0, 5:, 0], torch.tensor([1.0, 2.0]).double()),
    ),
    (
        "some tokens, yes or no", 1, "bce", "2:4", torch.tensor([[0, 1], [1, -100]]),
        lambda p: F.binary_cross_entropy_with_logits(
            torch.cat([p[0, 2:4, 0], p[1, 2:3, 0]]), torch.tensor([0.0, 1.0, 1.0]).double()
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("name, outputs, loss, positions, target, expected", CASES, ids=[c[0] for c in CASES])
def test_prediction_loss_and_gradients_are_the_written_out_ones(
    name, outputs, loss, positions, target, expected, detach
):
    ids = random_ids()
    model = with_head(rh.LinearHead(outputs, target="label", loss=loss, detach=detach, weight=0.7), positions)
    out = model(ids, label=target)
    base, predictions, edit, head = oracle(model, ids, detach)
    everywhere = predictions[0]
    shown = {"l1": everywhere[:, -1], "f1": everywhere[:, 0], "2:4": everywhere[:, 2:4], "all": everywhere}[positions]
    torch.testing.assert_close(out.predictions["head"], shown, **EXACT)
    torch.testing.assert_close(out.losses["head"], expected(everywhere), **EXACT)
    torch.testing.assert_close(out.loss, 0.7 * expected(everywhere), **EXACT)
    out.loss.backward()
    (0.7 * expected(everywhere)).backward()
    for key, parameter in model.node("head").named_parameters():
        assert head[key].grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, head[key].grad, **EXACT)
    for key, parameter in model.node("edit").named_parameters():
        if detach:
            assert parameter.grad is None
        else:
            assert edit[key].grad.abs().max() > 0
            torch.testing.assert_close(parameter.grad, edit[key].grad, **EXACT)


def test_the_weighted_loss_is_added_to_the_language_models_own():
    ids = random_ids()
    model = with_head(rh.LinearHead(3, target="label", weight=0.3))
    out = model(ids, labels=ids, label=CLASSES, prompt_mask=torch.ones_like(ids))
    base, predictions, edit, _ = oracle(model, ids, False, labels=ids)
    torch.testing.assert_close(out.loss, base.loss + 0.3 * F.cross_entropy(predictions[0][:, -1], CLASSES), **EXACT)
    out.loss.backward()
    (base.loss + 0.3 * F.cross_entropy(predictions[0][:, -1], CLASSES)).backward()
    torch.testing.assert_close(dict(model.node("edit").named_parameters())["M"].grad, edit["M"].grad, **EXACT)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("positions", ["all", "l1", "f2+l2"])
def test_heads_never_change_the_logits(positions, detach):
    ids = random_ids()
    head = rh.LinearHead(3, target="label", detach=detach)
    nodes = [rh.Node(head, layer, positions=positions, name=f"head{layer}") for layer in range(3)]
    for base in (tiny_llama(), tiny_gpt2()):
        expected = base(ids).logits
        model = rh.InterventionModel(base, rh.InterventionGraph(*nodes)).eval()
        randomise(model)
        out = model(ids)
        assert torch.equal(out.logits, expected)
        assert set(out.predictions) == {"head0", "head1", "head2"}
        assert out.losses is None and out.loss is None


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_is_neither_predicted_nor_trained_on(padding_side):
    ids = random_ids()
    model = with_head(rh.LinearHead(3, target="tags"), "all")
    pad = torch.zeros(2, 3, dtype=torch.long)
    target = torch.randint(0, 3, ids.shape, generator=torch.Generator().manual_seed(0))

    def padded(values, fill):
        parts = [torch.full_like(pad, fill), values]
        return torch.cat(parts if padding_side == "left" else parts[::-1], dim=1)

    mask = padded(torch.ones_like(ids), 0)
    plain = model(ids, tags=target)
    out = model(padded(ids, 0), attention_mask=mask, position_ids=mask.cumsum(1) - mask, tags=padded(target, 1))
    torch.testing.assert_close(out.losses["head"], plain.losses["head"], atol=1e-8, rtol=0)
    assert (out.predictions["head"][mask == 0] == 0).all()
    assert torch.equal(out.selected["head"], mask.bool())


def test_a_head_without_a_target_in_the_batch_predicts_and_has_no_loss():
    ids = random_ids()
    model = with_head(rh.LinearHead(3, target="label"))
    out = model(ids)
    assert out.predictions["head"].shape == (2, 3)
    assert out.losses is None and out.loss is None


def test_a_head_without_bias_is_linear():
    node = with_head(rh.LinearHead(3, bias=False)).node("head")
    assert set(node.stored()) == {"W"}
    h = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(node(None, h, Context()), h @ node.W.T)


@pytest.mark.parametrize("detach", [False, True])
def test_a_readers_own_read_need_not_know_of_detach(detach):
    node = with_head(rh.LinearHead(3, detach=detach)).node("head")
    h = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    node(None, h, Context()).sum().backward()
    assert (h.grad is None) == detach


MLP = {"hidden": 5, "layers": 2, "act_fn": "relu"}


def hidden_states(model: rh.InterventionModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """What leaves block 1 of the model, whose graph edits nothing."""
    return tiny_llama().double()(ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]


def test_an_mlp_is_linear_maps_with_an_activation_between_them():
    ids = random_ids()
    model = with_head(rh.MLPHead(3, target="label", **MLP), edit=False)
    p, h = model.node("head").stored(), hidden_states(model, ids)[:, -1]
    for i in range(2):
        h = (h @ p[f"W{i}"].T + p[f"b{i}"]).relu()
    expected = h @ p["W2"].T + p["b2"]
    out = model(ids, label=CLASSES)
    torch.testing.assert_close(out.predictions["head"], expected, **EXACT)
    torch.testing.assert_close(out.loss, F.cross_entropy(expected, CLASSES), **EXACT)
    assert [tuple(p[f"W{i}"].shape) for i in range(3)] == [(5, WIDTH), (5, 5), (3, 5)]


@pytest.mark.parametrize("positions", ["all", "f2+l2", "1:4"])
@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_a_pool_is_over_the_selected_tokens_without_padding(pool, positions):
    ids, mask = random_ids(), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    model = with_head(rh.MLPHead(3, target="label", pool=pool, hidden=4), positions, edit=False)
    p, states = model.node("head").stored(), hidden_states(model, ids, mask)
    pooled = []
    for h, n in zip(states, (7, 5), strict=True):
        chosen = {"all": range(n), "f2+l2": [0, 1, n - 2, n - 1], "1:4": range(1, 4)}[positions]
        h = h[list(chosen)]
        a = torch.softmax(h @ p["q"] / WIDTH**0.5, 0) if pool == "attention" else h.new_full((len(h),), 1 / len(h))
        pooled.append(a @ h)
    expected = F.gelu(torch.stack(pooled) @ p["W0"].T + p["b0"]) @ p["W1"].T + p["b1"]
    out = model(ids, attention_mask=mask, label=CLASSES)
    torch.testing.assert_close(out.predictions["head"], expected, **EXACT)
    torch.testing.assert_close(out.loss, F.cross_entropy(expected, CLASSES), **EXACT)
    assert out.selected["head"].tolist() == [[True], [True]]


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_a_row_without_a_token_has_no_pooled_prediction_and_no_loss(pool):
    ids, mask = random_ids(), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    model = with_head(rh.LinearHead(3, target="label", pool=pool), "4:6")
    out = model(ids, attention_mask=mask, label=CLASSES)
    assert out.selected["head"].tolist() == [[True], [False]]
    assert (out.predictions["head"][1] == 0).all()
    torch.testing.assert_close(out.loss, F.cross_entropy(out.predictions["head"][:1], CLASSES[:1]), **EXACT)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_an_attention_pool_begins_as_the_mean():
    ids = random_ids()
    made = []
    for pool in ("mean", "attention"):
        torch.manual_seed(0)
        made.append(rh.InterventionModel(tiny_llama(), graph(rh.LinearHead(3, pool=pool), "all", edit=False)).eval())
    torch.testing.assert_close(*(model(ids).predictions["head"] for model in made))


def test_users_see_what_the_activation_gives_and_losses_of_logits_do_not():
    ids = random_ids()
    plain = with_head(rh.LinearHead(3, target="label"), "all", edit=False)
    shown = with_head(rh.LinearHead(3, target="label", activation="softmax"), "all", edit=False)
    target, mask = torch.randint(0, 3, ids.shape), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    a, b = (model(ids, attention_mask=mask, label=target) for model in (plain, shown))
    real = mask.bool()
    expected = a.predictions["head"].softmax(-1)
    torch.testing.assert_close(b.predictions["head"][real], expected[real], **EXACT)
    assert (b.predictions["head"][~real] == 0).all()
    assert torch.equal(a.loss, b.loss)


@pytest.mark.parametrize("name", ["mse", "mae", "huber", "own"])
def test_losses_of_numbers_compare_what_users_see(name, monkeypatch):
    monkeypatch.setitem(rh.losses, "own", lambda p, t: (p[:, 0] - t).abs() ** 3)
    ids, y = random_ids(), torch.tensor([0.2, 0.9]).double()
    model = with_head(rh.LinearHead(1, target="y", loss=name, activation="sigmoid"))
    out = model(ids, y=y)
    error = (out.predictions["head"][:, 0] - y).abs()
    value = {"mse": error**2, "mae": error, "huber": error**2 / 2, "own": error**3}[name]
    assert ((out.predictions["head"] > 0) & (out.predictions["head"] < 1)).all()
    torch.testing.assert_close(out.loss, value.mean(), **EXACT)


def test_quantiles_labels_and_pairs_are_trained_by_heads():
    ids = random_ids()
    head = rh.LinearHead(2, target="y", loss="quantile", quantiles=(0.1, 0.9))
    out = (model := with_head(head))(ids, y=torch.tensor([0.5, -2.0]))
    e = torch.tensor([[0.5], [-2.0]]) - out.predictions["head"]
    q = torch.tensor([0.1, 0.9]).double()
    torch.testing.assert_close(out.loss, torch.where(e > 0, q * e, (q - 1) * e).mean(), atol=1e-7, rtol=0)
    model = with_head(rh.LinearHead(3, target="y", loss="multi_label"))
    y = torch.tensor([[1, 0, -100], [1, 1, 0]])
    out = model(ids, y=y)
    p = out.predictions["head"]
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(p[y >= 0], y[y >= 0].double()), **EXACT)
    out = with_head(rh.LinearHead(1, target="pair", loss="bradley_terry"))(ids, pair=torch.tensor([-1, 1]))
    r = out.predictions["head"][:, 0]
    torch.testing.assert_close(out.loss, -torch.sigmoid(r[1] - r[0]).log(), **EXACT)


def test_a_label_an_output_goes_with_every_token():
    ids = random_ids()
    y = torch.randint(0, 2, (*ids.shape, 3), generator=torch.Generator().manual_seed(0))
    for positions, chosen in (("all", slice(None)), ("2:4", slice(2, 4))):
        out = with_head(rh.LinearHead(3, target="y", loss="multi_label"), positions)(ids, y=y)
        expected = F.binary_cross_entropy_with_logits(out.predictions["head"], y[:, chosen].double())
        torch.testing.assert_close(out.loss, expected, **EXACT)


@pytest.mark.parametrize("positions", ["all", "l3"])
def test_a_head_with_the_weights_of_the_old_one_has_the_language_models_own_loss(positions):
    base, ids = tiny_llama(), random_ids()
    head = rh.LinearHead(VOCAB, target="next", bias=False, shift=True)
    node = rh.Node(head, component="final_norm_output", positions=positions, name="lm")
    labels = ids.clone()
    labels[:, : 0 if positions == "all" else 5] = -100
    expected = base(ids, labels=labels).loss
    model = rh.InterventionModel(base, rh.InterventionGraph(node)).eval()
    model.node("lm").assign(W=base.lm_head.weight)
    for reusing in (nullcontext(), model.reusing()):
        with reusing:
            torch.testing.assert_close(model(ids, next=labels).losses["lm"], expected, atol=1e-6, rtol=0)


def test_a_head_may_share_the_weight_of_the_old_one(tmp_path):
    base, ids = tiny_llama(), random_ids()
    node = rh.Node(
        rh.LinearHead(VOCAB, target="next", bias=False, shift=True), component="final_norm_output", name="lm"
    )
    model = rh.InterventionModel(base, rh.InterventionGraph(node)).eval()
    model.node("lm").W = base.lm_head.weight
    assert not any(p.requires_grad for p in model.parameters())
    base.lm_head.weight.requires_grad = True
    model(ids, next=ids).loss.backward()
    tied = base.lm_head.weight.grad
    assert torch.equal(model(ids).predictions["lm"], model(ids).logits) and tied.abs().sum() > 0
    with torch.no_grad():
        base.lm_head.weight -= tied
    assert torch.equal(model(ids).predictions["lm"], model(ids).logits)
    model.save_pretrained(tmp_path)
    loaded = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(ids).predictions["lm"], model(ids).predictions["lm"])


def test_a_head_that_is_not_trained_is_saved(tmp_path):
    model = with_head(rh.LinearHead(3, pool="attention", trainable=False))
    assert not list(model.node("head").parameters())
    model.node("head").assign(q=torch.arange(float(WIDTH)))
    model.save_pretrained(tmp_path)
    loaded = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(loaded.node("head").q.double(), torch.arange(float(WIDTH)).double())


def test_every_option_is_written_to_json_and_read_back():
    head = rh.MLPHead(
        2, "y", "cross_entropy", hidden=4, layers=3, act_fn="relu", activation="softmax", pool="attention",
        ignore_index=-1, class_weights=(0.5, 1.0), trainable=False, lr=1e-3,
    )  # fmt: skip
    made = graph(head, "all")
    assert rh.InterventionGraph.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def bad(outputs: int, loss: str, value: float, **options):
    """A batch of whose second row the target is `value`."""
    target = torch.tensor([0, value])
    return lambda: with_head(rh.LinearHead(outputs, target="y", loss=loss, **options))(random_ids(), y=target)


def two(first, second):
    nodes = [rh.Node(head, 1, positions="l1") for head in (first, second)]
    return lambda: rh.InterventionGraph(*nodes)


@pytest.mark.parametrize(
    "make, message",
    [
        (bad(3, "cross_entropy", 3), "target 'y' in row 1 is 3, .* outputs=3 takes a whole number from 0 to 2"),
        (bad(3, "cross_entropy", -1), "row 1 is -1"),
        (bad(3, "cross_entropy", 0.5), "row 1 is 0.5"),
        (bad(1, "bce", 2), "row 1 is 2, .* takes 0, 1 or a probability"),
        (bad(1, "mse", math.inf), "row 1 is inf, .* takes a finite number"),
        (bad(1, "bradley_terry", 0.5), "row 1 is 0.5, .* chosen in pair k"),
        (bad(3, "cross_entropy", 1, shift=True), "shift=True, so its target 'y' must have the shape"),
        (lambda: with_head(rh.LinearHead(2, target="y"))(random_ids(), y=[0, 1]), "must be a tensor"),
        (lambda: rh.LinearHead(3, loss="gaussian_nll"), "outputs=2, got outputs=3"),
        (lambda: rh.LinearHead(3, activation="nonsense"), "unknown activation 'nonsense'"),
        (lambda: rh.LinearHead(3, pool="max"), "'mean', 'attention' or None, got 'max'"),
        (lambda: rh.LinearHead(3, pool="mean", shift=True), "leave one out"),
        (lambda: rh.LinearHead(3, class_weights=(1.0, 2.0)), "class_weights must be a tuple of outputs=3 numbers"),
        (lambda: rh.LinearHead(1, loss="mse", class_weights=(1.0,)), "belong to loss='cross_entropy'"),
        (lambda: rh.LinearHead(2, loss="quantile"), "needs quantiles"),
        (lambda: rh.LinearHead(2, loss="quantile", quantiles=(0.1, 2.0)), "from 0 to 1"),
        (lambda: rh.LinearHead(2, lr=-1.0), "learning rate of 0 or more"),
        (lambda: rh.MLPHead(2, hidden=0), "hidden of MLPHead must be a positive integer, got 0"),
        (lambda: rh.MLPHead(2, hidden=4, layers=0), "layers of MLPHead"),
        (lambda: rh.MLPHead(2, hidden=4, act_fn="softmax"), "unknown act_fn 'softmax'"),
        (two(rh.LinearHead(3, "y"), rh.LinearHead(1, "y", "mse")), "target 'y' for classes and for numbers"),
        (two(rh.LinearHead(3, "y", "multi_label"), rh.LinearHead(2, "y", "multi_label")), "3 a prediction and 2"),
    ],
)
def test_bad_options_and_targets_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_targets_of_padding_are_not_looked_at():
    ids, mask = random_ids(), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    target = torch.ones_like(ids).masked_fill(mask == 0, 99)
    assert with_head(rh.LinearHead(3, target="y"), "all")(ids, attention_mask=mask, y=target).loss.isfinite()


def test_a_yes_or_no_may_be_a_class_and_a_probability():
    two(rh.LinearHead(2, "y"), rh.LinearHead(1, "y", "bce"))()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: rh.LinearHead(0), "positive integer"),
        (lambda: rh.LinearHead(2, loss="nonsense"), "unknown loss"),
        (lambda: rh.LinearHead(2, dtype="int8"), "float type"),
        (lambda: rh.LinearHead(3, loss="mse"), "outputs=1"),
        (lambda: rh.LinearHead(1, target="label"), "always 0"),
        (lambda: with_head(rh.LinearHead(2, target="y"))(random_ids(), y=torch.zeros(3).long()), "target 'y'"),
        (lambda: with_head(rh.LinearHead(2, target="y"), "all")(random_ids(), y=torch.zeros(2).long()), "target 'y'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_pool_is_no_source_since_it_sees_later_tokens():
    pooled = rh.Node(rh.LinearHead(1, pool="mean"), 0, name="pooled")
    with pytest.raises(ValueError, match="reads 'pooled', which pools all its tokens"):
        rh.InterventionGraph(pooled, rh.Node(rh.Gated(rh.LoReFT(rank=2)), 1, source="pooled"))


def test_the_last_map_of_an_mlp_can_lack_its_bias():
    made = rh.MLPHead(3, hidden=8, layers=2, output_bias=False).parameters(Shape(WIDTH))
    assert list(made) == ["W0", "b0", "W1", "b1", "W2"]


# --- weights that are learnt --------------------------------------------------------------------------------


def test_uncertainty_weighs_losses_by_the_formula_and_is_learnt():
    nodes = [
        rh.Node(rh.LinearHead(2, target="c", weight="uncertainty"), 1, positions="l1", name="class"),
        rh.Node(rh.LinearHead(1, target="y", loss="mse", weight="uncertainty"), 1, positions="l1", name="number"),
        rh.Node(rh.LinearHead(1, target="z", loss="mse", weight=0.3), 1, positions="l1", name="fixed"),
    ]
    model = rh.InterventionModel(tiny_llama(), rh.InterventionGraph(*nodes)).double()
    randomise(model)
    batch = {"input_ids": random_ids(), "c": torch.tensor([1, 0]), "y": torch.tensor([0.5, 2.0]).double()}
    out = model(**batch, z=batch["y"])
    s, t = (model.node(name).s.detach() for name in ("class", "number"))
    loss = {name: value.detach() for name, value in out.losses.items()}
    want = loss["class"] * (-s).exp() + s / 2 + 0.5 * loss["number"] * (-t).exp() + t / 2 + 0.3 * loss["fixed"]
    torch.testing.assert_close(out.head_loss.detach(), want, **EXACT)
    out.loss.backward()
    torch.testing.assert_close(model.node("class").s.grad, 0.5 - loss["class"] * (-s).exp(), **EXACT)
    torch.testing.assert_close(model.node("number").s.grad, 0.5 - 0.5 * loss["number"] * (-t).exp(), **EXACT)


def test_uncertainty_learns_nothing_from_a_batch_without_targets():
    model = with_head(rh.LinearHead(2, target="c", weight="uncertainty"))
    out = model(input_ids=random_ids(), c=torch.tensor([-100, -100]))
    assert out.loss == 0
    out.loss.backward()
    assert model.node("head").s.grad == 0


@pytest.mark.parametrize("weight", [-1, NAN, math.inf, True, "learnt"])
def test_weights_that_cannot_be_are_errors(weight):
    with pytest.raises(ValueError, match="weight must be a number of 0 or more, or 'uncertainty'"):
        rh.LinearHead(2, weight=weight)


def test_a_likelihood_without_a_lower_bound_has_no_weight_that_is_learnt():
    with pytest.raises(ValueError, match="gaussian_nll learns a variance"):
        rh.LinearHead(2, loss="gaussian_nll", weight="uncertainty")


@pytest.mark.parametrize("target", ["input_ids", "attention_mask", "prompt_mask"])
def test_a_target_that_is_an_input_of_the_model_is_refused(target):
    with pytest.raises(ValueError, match=f"the target '{target}' of a head is an input of the model"):
        with_head(rh.LinearHead(2, target=target))


def test_a_head_that_takes_the_labels_has_them_alone_while_activations_are_reused():
    model = with_head(rh.LinearHead(2, target="labels"))
    batch = {"input_ids": random_ids(), "labels": torch.tensor([1, 0])}
    expected = model(**batch).loss
    with model.reusing():
        torch.testing.assert_close(model(**batch).loss, expected)
