"""Metrics, and the loss and accuracy over targets."""

import pytest
import torch
import torch.nn.functional as F
from support.models import tiny_llama

import reftheads.fewshot as fs


def test_scores():
    assert fs.accuracy(["a", "b"], ["a", "c"]) == fs.accuracy(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5
    # as SQuAD's own script has it: punctuation goes without a trace, then articles do
    assert fs.exact_match(["US", "its", "9 m", "An office!"], ["U.S.", "it's", "9 a.m.", "the office"]) == 0.75
    assert fs.exact_match(["The Hallway.", "an office", "x"], ["hallway", ("room", "Office"), "y"]) == pytest.approx(
        2 / 3
    )
    scores = fs.rouge(["the cats sat"], ["the cat sat down"])
    assert scores["rouge1"] == pytest.approx(2 * 1 * 0.75 / 1.75) and scores["rouge2"] == pytest.approx(2 * 2 / 5)
    assert fs.ngram_overlap(["a b a", ""], ["a b c", "d"]) == pytest.approx((2 / 3 + 0) / 2)
    assert fs.ngram_overlap(["a b c"], ["b c d"], n=2) == 0.5
    for metric in (fs.accuracy, fs.exact_match, fs.rouge, fs.ngram_overlap):
        with pytest.raises(ValueError, match="got 0 predictions"):
            metric([], [])
        with pytest.raises(ValueError, match="1 predictions and 2 targets"):
            metric(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="n must be 1 or more"):
        fs.ngram_overlap(["a"], ["a"], n=0)


def test_the_shifted_loss_is_that_of_the_model_and_of_two_dimensions_the_plain_one():
    base, ids = tiny_llama().double().eval(), torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]])
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 4, -100, -100]])
    out = base(ids, labels=labels)
    torch.testing.assert_close(fs.shifted_cross_entropy(out.logits, labels), out.loss.double(), atol=1e-6, rtol=0)
    right = [bool(out.logits[i, j - 1].argmax() == labels[i, j]) for i, j in ((0, 2), (0, 3), (1, 1))]
    assert fs.masked_accuracy(out.logits, labels) == pytest.approx(sum(right) / 3)
    logits, classes = torch.randn(3, 5), torch.tensor([1, -100, 4])
    torch.testing.assert_close(
        fs.shifted_cross_entropy(logits, classes), F.cross_entropy(logits[[0, 2]], classes[[0, 2]])
    )
    with pytest.raises(ValueError, match=r"got \(3, 5\) and \(2,\)"):
        fs.shifted_cross_entropy(logits, classes[:2])
    with pytest.raises(ValueError, match="all targets are -100"):
        fs.masked_accuracy(logits, torch.full((3,), -100))
