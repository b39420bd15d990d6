"""Losses against torch's own, over the items that have a target."""

import math

import pytest
import torch
import torch.nn.functional as F

from reftheads.losses import IGNORE, losses, masked_mean

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
]
REFERENCE = {
    "cross_entropy": lambda p, t: F.cross_entropy(p, t.long()),
    "mse": lambda p, t: F.mse_loss(p[:, 0], t),
    "bce": lambda p, t: F.binary_cross_entropy_with_logits(p[:, 0], t),
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
