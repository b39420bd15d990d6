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
    """Return the cross-entropy in nats, a mean over the targets that are not -100.

    Logits [rows classes] are compared with the targets of their rows. Logits [rows columns classes] are compared, as a
    language model's are, with the target of the next column.

    Raises:
        ValueError: shapes that do not go together.

    Example:
        ```python
        >>> import torch
        >>> import reftheads.fewshot as fs
        >>> logits = torch.zeros(1, 4, 10)  # a token as likely as any other: ln 10
        >>> round(fs.shifted_cross_entropy(logits, torch.tensor([[-100, -100, 7, 3]])).item(), 3)
        2.303
        ```
    """
    return F.cross_entropy(*_aligned(logits, targets), ignore_index=IGNORE)


def masked_accuracy(logits: Float[Tensor, "rows *columns classes"], targets: Int[Tensor, " rows *columns"]) -> float:
    """Return the share of the targets that are not -100 which have the largest logit.

    Logits and targets are compared as by `shifted_cross_entropy`.

    Raises:
        ValueError: shapes that do not go together, or no target but -100.

    Example:
        ```python
        >>> import torch
        >>> import reftheads.fewshot as fs
        >>> fs.masked_accuracy(torch.eye(3), torch.tensor([0, 2, -100]))
        0.5
        ```
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
    """Return the share of predictions that equal their targets.

    Raises:
        ValueError: no predictions, or another number of targets.

    Example:
        ```python
        >>> import reftheads.fewshot as fs
        >>> fs.accuracy(["good", "bad"], ["good", "good"])
        0.5
        ```
    """
    _check(predictions, targets)
    return sum(bool(p == t) for p, t in zip(predictions, targets, strict=True)) / len(targets)


def exact_match(predictions: Sequence[str], answers: Sequence[str | Sequence[str]]) -> float:
    """Return the share of predictions that are one of their answers.

    Case, punctuation, articles and surplus space do not count (Rajpurkar et al. 2016,
    https://arxiv.org/abs/1606.05250).

    Args:
        answers: of each prediction its right answer, or several.

    Raises:
        ValueError: no predictions, or another number of answers.

    Example:
        ```python
        >>> import reftheads.fewshot as fs
        >>> fs.exact_match(["The garden.", "hall"], ["garden", ("kitchen", "office")])
        0.5
        ```
    """
    _check(predictions, answers)
    right = 0
    for prediction, of_prediction in zip(predictions, answers, strict=True):
        of_prediction = [of_prediction] if isinstance(of_prediction, str) else of_prediction
        right += _plain(prediction) in map(_plain, of_prediction)
    return right / len(predictions)


def _plain(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the mean F-scores of ROUGE-1, -2 and -L, with stemming, by the library rouge-score (Lin 2004).

    Raises:
        ValueError: no predictions, or another number of references.

    Example:
        ```python
        >>> import reftheads.fewshot as fs
        >>> fs.rouge(["cats sleep"], ["the cat sleeps"])
        {'rouge1': 0.8, 'rouge2': 0.666..., 'rougeL': 0.8}
        ```
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check(predictions, references)
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in kinds}


def ngram_overlap(predictions: Sequence[str], references: Sequence[str], n: int = 1) -> float:
    """Return the mean share of a prediction's n-grams of words that its reference has too.

    An n-gram counts as often as it occurs in the reference at most. A prediction without n-grams has a share of 0.

    Raises:
        ValueError: no predictions, another number of references, or n below 1.

    Example:
        ```python
        >>> import reftheads.fewshot as fs
        >>> fs.ngram_overlap(["the cat the"], ["the cat sleeps"])
        0.666...
        ```
    """
    _check(predictions, references)
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    shares = []
    for prediction, reference in zip(predictions, references, strict=True):
        said, wanted = _ngrams(prediction, n), _ngrams(reference, n)
        shares.append((said & wanted).total() / said.total() if said else 0.0)
    return sum(shares) / len(shares)


def _ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.lower().split()
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _check(predictions: Sequence[Any], targets: Sequence[Any]) -> None:
    if len(predictions) == 0 or len(predictions) != len(targets):
        raise ValueError(
            f"a metric needs predictions, and a target for each: got {len(predictions)} predictions and "
            f"{len(targets)} targets"
        )
