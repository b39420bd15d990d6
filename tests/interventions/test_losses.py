"""Losses against torch's own, over the items that have a target."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from reftheads.graph.intervention import IGNORE
from reftheads.interventions.losses import losses, masked_mean, quantile_loss

NAN = math.nan


def prediction(outputs: int) -> torch.Tensor:
    return torch.randn(2, 3, outputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


VALID = torch.tensor([[True, True, False], [True, True, True]])
CASES = [
    ("cross_entropy", 4, torch.tensor([[1, IGNORE, 3], [0, 2, IGNORE]]), [(0, 0), (1, 0), (1, 1)]),
    ("cross_entropy", 4, torch.tensor([[1, NAN, 3], [0, 2, NAN]]), [(0, 0), (1, 0), (1, 1)]),
    ("mse", 1, torch.tensor([[0.5, NAN, 3], [0, -100.0, NAN]]), [(0, 0), (1, 0), (1, 1)]),
    ("mse", 1, torch.tensor([[7, IGNORE, 3], [0, -1, 2]]), [(0, 0), (1, 0), (1, 1), (1, 2)]),
    ("bce", 1, torch.tensor([[1, IGNORE, 1], [0, 1, IGNORE]]), [(0, 0), (1, 0), (1, 1)]),
    ("bce", 1, torch.tensor([[0.3, NAN, 1], [0, 1, NAN]]), [(0, 0), (1, 0), (1, 1)]),
    ("bce", 1, torch.tensor([[0.3, -100.0, 1], [0, 1, NAN]]), [(0, 0), (1, 0), (1, 1)]),
    ("mae", 1, torch.tensor([[0.5, NAN, 3], [0, -7.0, NAN]]), [(0, 0), (1, 0), (1, 1)]),
    ("huber", 1, torch.tensor([[0.5, NAN, 3], [0, -7.0, NAN]]), [(0, 0), (1, 0), (1, 1)]),
    ("gaussian_nll", 2, torch.tensor([[0.5, NAN, 3], [0, -7.0, NAN]]), [(0, 0), (1, 0), (1, 1)]),
]
REFERENCE = {
    "cross_entropy": lambda p, t: F.cross_entropy(p, t.long()),
    "mse": lambda p, t: F.mse_loss(p[:, 0], t),
    "bce": lambda p, t: F.binary_cross_entropy_with_logits(p[:, 0], t),
    "mae": lambda p, t: F.l1_loss(p[:, 0], t),
    "huber": lambda p, t: F.huber_loss(p[:, 0], t),
    "gaussian_nll": lambda p, t: F.gaussian_nll_loss(p[:, 0], t, p[:, 1].exp()),
}


@pytest.mark.parametrize("name, outputs, target, items", CASES)
def test_the_loss_is_the_mean_over_items_that_are_valid_and_have_a_target(name, outputs, target, items):
    ours, theirs = prediction(outputs).requires_grad_(), prediction(outputs).requires_grad_()
    loss = masked_mean(losses[name], ours, target, VALID)
    picked = torch.stack([theirs[item] for item in items])
    reference = REFERENCE[name](picked, torch.stack([target[item] for item in items]).double())
    torch.testing.assert_close(loss, reference, atol=1e-12, rtol=0)
    loss.backward()
    reference.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name, outputs, target, items", CASES)
def test_a_batch_without_any_target_costs_nothing_and_moves_nothing(name, outputs, target, items):
    p = prediction(outputs).requires_grad_()
    loss = masked_mean(losses[name], p, target, torch.zeros_like(VALID))
    loss.backward()
    assert loss == 0
    assert torch.equal(p.grad, torch.zeros_like(p))


def test_a_user_can_add_a_loss_under_a_name_of_its_own(monkeypatch):
    monkeypatch.setitem(losses, "mae", lambda p, t: (p[..., 0] - t).abs())
    p, target = prediction(1), torch.tensor([[1.0, NAN, 2], [3, 4, 5]])
    expected = (p[..., 0] - target).abs()[VALID & ~target.isnan()].mean()
    torch.testing.assert_close(masked_mean(losses["mae"], p, target, VALID), expected)


def focal(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    log = prediction.log_softmax(-1).gather(-1, target[:, None])[:, 0]
    return -((1 - log.exp()) ** 2) * log


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float16, torch.bool])
def test_a_loss_gets_targets_of_the_dtype_that_was_given(monkeypatch, dtype):
    seen = []
    monkeypatch.setitem(losses, "spy", lambda p, t: seen.append(t.dtype) or p[:, 0])
    masked_mean(losses["spy"], prediction(4), torch.ones(2, 3).to(dtype), VALID)
    assert seen == [dtype]


def test_a_classification_loss_of_ones_own_needs_no_word_on_missing_targets(monkeypatch):
    monkeypatch.setitem(losses, "focal", focal)
    p, target = prediction(4), torch.tensor([[1, IGNORE, 3], [0, 2, IGNORE]])
    items = focal(p[[0, 1, 1], [0, 0, 1]], torch.tensor([1, 0, 2]))
    torch.testing.assert_close(masked_mean(losses["focal"], p, target, VALID), items.mean())


def test_what_is_missing_gives_no_gradient_even_where_the_loss_has_none():
    p = prediction(1)
    p[0, 1] = NAN
    p.requires_grad_()
    target = torch.tensor([[1.0, NAN, 2], [NAN, 4, 5]])
    masked_mean(lambda p, t: (p[:, 0] - t).abs().sqrt(), p, target, VALID).backward()
    assert (p.grad[..., 0] != 0).tolist() == [[True, False, False], [False, True, True]]
    assert p.grad.isfinite().all()


def test_several_labels_are_averaged_over_those_that_are_given():
    p = prediction(4)[:, :2].clone().requires_grad_()
    target = torch.tensor([[[0, 1, NAN, 1], [1, -100.0, 0, 0]], [[NAN] * 4, [1, 1, 1, 0]]])
    given = ~target.isnan() & (target != -100)
    given[1, 1] = False
    loss = masked_mean(losses["multi_label"], p, target, torch.tensor([[True, True], [True, False]]))
    expected = F.binary_cross_entropy_with_logits(p[given], target[given].double())
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    loss.backward()
    assert (p.grad != 0).equal(given)


def test_class_weights_give_the_weighted_mean_of_torch():
    p, target = prediction(4), torch.tensor([[1, IGNORE, 3], [0, 2, IGNORE]])
    weights = (0.1, 0.7, 0.0, 0.2)
    items = p[[0, 1, 1], [0, 0, 1]], torch.tensor([1, 0, 2])
    expected = F.cross_entropy(*items, weight=torch.tensor(weights).double())
    torch.testing.assert_close(
        masked_mean(losses["cross_entropy"], p, target, VALID, class_weights=weights), expected, atol=1e-8, rtol=0
    )
    only_worthless = torch.full_like(target, 2)
    assert masked_mean(losses["cross_entropy"], p, only_worthless, VALID, class_weights=weights) == 0


def test_another_index_may_stand_for_no_target():
    p, target = prediction(4), torch.tensor([[1, 0, 3], [0, 2, 0]])
    expected = F.cross_entropy(p[[0, 1], [0, 1]], torch.tensor([1, 2]))
    torch.testing.assert_close(masked_mean(losses["cross_entropy"], p, target, VALID, ignore=0), expected)


def test_the_quantile_loss_is_least_at_the_quantiles_of_the_targets():
    target = torch.arange(100.0, dtype=torch.float64)
    guesses = torch.arange(0, 100, 0.5, dtype=torch.float64)
    for q in (0.1, 0.5, 0.9):
        loss = partial(quantile_loss, (q,))
        values = torch.stack([loss(guess.expand(100, 1), target).mean() for guess in guesses])
        assert abs(guesses[values.argmin()] - 100 * q) <= 1
    p, y = torch.tensor([[1.0, 5.0]]), torch.tensor([3.0])
    torch.testing.assert_close(quantile_loss((0.1, 0.9), p, y), torch.tensor([(0.1 * 2 + 0.1 * 2) / 2]))


def test_pairs_prefer_what_was_chosen_and_leave_out_what_has_no_partner():
    rewards = torch.randn(8, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    target = torch.tensor([100, -2, 3, -100, 2, 0, -4, 5])
    valid = torch.tensor([True] * 7 + [False])
    loss = masked_mean(losses["bradley_terry"], rewards, target, valid)
    r = rewards[:, 0]
    expected = -(torch.sigmoid(r[0] - r[3]).log() + torch.sigmoid(r[4] - r[1]).log()) / 2
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(loss, rewards)
    assert (gradient[:, 0] != 0).tolist() == [True, True, False, True, True, False, False, False]
    assert masked_mean(losses["bradley_terry"], rewards, torch.arange(1, 9), valid) == 0
