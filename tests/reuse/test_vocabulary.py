"""The loss of the next tokens, a few at a time."""

import pytest
import torch
import torch.nn.functional as F
from support.architectures import CASES
from support.replay import base_of, check_exact, from_config, intervened, loreft, step, usual_batch
from torch import Tensor, nn

from reftheads.reuse import vocabulary
from reftheads.reuse.vocabulary import token_losses

pytestmark = pytest.mark.usefixtures("loss_in_float64")


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 20])
def test_losses_and_gradients_are_those_of_all_logits_at_once(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", 8)
    torch.manual_seed(0)
    lm_head = nn.Linear(5, 30).double().requires_grad_(False)
    hidden = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(30, (tokens,)), torch.rand(tokens, dtype=torch.float64)
    plain = F.cross_entropy(lm_head(hidden), labels, reduction="none")
    (expected,) = torch.autograd.grad((plain * weights).sum(), hidden)
    got = token_losses(hidden, labels, lm_head)
    (gradient,) = torch.autograd.grad((got * weights).sum(), hidden)
    torch.testing.assert_close(got, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    with torch.no_grad():
        torch.testing.assert_close(token_losses(hidden, labels, lm_head), plain, rtol=1e-12, atol=0)


def test_no_logits_are_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the vocabulary, not of a token, but for those of one chunk."""
    monkeypatch.setattr(vocabulary, "CHUNK", 2)
    model, batch = intervened(base_of("llama"), loreft(1, "f1")), usual_batch()
    words = model.get_base_model().lm_head.out_features
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with model.reusing(None) as used:
        assert used.why_plain() is None  # compared beforehand
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step(model, batch)
    of_words = [shape for shape in kept if shape and shape[-1] == words and len(shape) > 1]
    assert all(shape[-2] <= 2 or shape == model.get_base_model().lm_head.weight.T.shape for shape in of_words)


@pytest.mark.parametrize("name", ["gemma2"])
def test_logits_that_are_capped_or_scaled_are_those_of_the_model(name: str) -> None:
    check_exact(intervened(from_config(CASES[name].config), loreft(1)), usual_batch())
