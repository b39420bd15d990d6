"""Scores of predictions, and the loss and accuracy of logits."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from reftheads.graph.intervention import IGNORE

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def shifted_cross_entropy(
    logits: Float[Tensor, "rows *columns classes"], targets: Int[Tensor, " rows *columns"]
) -> Float[Tensor, ""]:
    """Cross-entropy in nats, a mean over targets that are not -100.

    Of logits [rows classes] it is the plain one. Of logits [rows columns classes], those of a token are compared with
    the target of the next column, as a language model's are.

    Raises:
        ValueError: shapes that do not go together.
    """
    return F.cross_entropy(*_aligned(logits, targets), ignore_index=IGNORE)


def masked_accuracy(logits: Float[Tensor, "rows *columns classes"], targets: Int[Tensor, " rows *columns"]) -> float:
    """The share of targets, without those of -100, at which the largest logit is; shifted as `shifted_cross_entropy`.

    Raises:
        ValueError: shapes that do not go together, or no target but -100.
    """
    logits, targets = _aligned(logits, targets)
    counts = targets != IGNORE
    if not counts.any():
        raise ValueError("all targets are -100, so that there is no accuracy: give at least one")
    return float((logits.argmax(-1) == targets)[counts].float().mean())


def _aligned(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if logits.ndim not in (2, 3) or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits must be [rows classes] or [rows columns classes] with targets of the same rows and columns, got "
            f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if logits.ndim == 2:
        return logits, targets
    return logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()


def accuracy(predictions: Sequence[Any], targets: Sequence[Any]) -> float:
    """The share of predictions that are equal to their targets.

    Raises:
        ValueError: no predictions, or another number of targets.
    """
    _check(predictions, targets)
    return sum(bool(p == t) for p, t in zip(predictions, targets, strict=True)) / len(targets)


def exact_match(predictions: Sequence[str], answers: Sequence[str | Sequence[str]]) -> float:
    """The share of predictions that are one of the answers, in whatever case, without punctuation, articles and
    surplus space (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250).

    Raises:
        ValueError: no predictions, or another number of answers.
    """
    _check(predictions, answers)
    aliases = ([some] if isinstance(some, str) else some for some in answers)
    found = [_plain(p) in map(_plain, some) for p, some in zip(predictions, aliases, strict=True)]
    return sum(found) / len(found)


def _plain(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-scores of ROUGE-1, -2 and -L, with stemming, by the library rouge-score (Lin 2004).

    Raises:
        ValueError: no predictions, or another number of references.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check(predictions, references)
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in kinds}


def ngram_overlap(predictions: Sequence[str], references: Sequence[str], n: int = 1) -> float:
    """The mean share of a prediction's n-grams of words that its reference has, each as often at most.

    A prediction without n-grams has 0.

    Raises:
        ValueError: no predictions, another number of references, or n below 1.
    """
    _check(predictions, references)
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    shares = []
    for prediction, reference in zip(predictions, references, strict=True):
        own, given = (
            Counter(zip(*(text.lower().split()[i:] for i in range(n)), strict=False))
            for text in (prediction, reference)
        )
        shares.append((own & given).total() / own.total() if own else 0.0)
    return sum(shares) / len(shares)


def _check(predictions: Sequence[Any], targets: Sequence[Any]) -> None:
    if len(predictions) == 0 or len(predictions) != len(targets):
        raise ValueError(
            f"a metric needs predictions, and a target for each: got {len(predictions)} predictions and "
            f"{len(targets)} targets"
        )
