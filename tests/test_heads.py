"""Linear heads: predictions, losses and gradients against hooks of the test's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import WIDTH, random_ids, randomise, tiny_gpt2, tiny_llama
from torch import Tensor

import reftheads as rh

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
    torch.testing.assert_close(node(None, h, rh.Context()), h @ node.W.T)


@pytest.mark.parametrize("detach", [False, True])
def test_a_readers_own_read_need_not_know_of_detach(detach):
    node = with_head(rh.LinearHead(3, detach=detach)).node("head")
    h = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    node(None, h, rh.Context()).sum().backward()
    assert (h.grad is None) == detach


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
