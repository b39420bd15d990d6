"""In-context learning: which examples a prompt shows, in which order and form."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reftheads.data.encoding import Message

if TYPE_CHECKING:
    from jaxtyping import Float


Prompt = str | list[Message]
"""A text, or a conversation for the tokenizer's chat template."""

_ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Format:
    """Say how an example is written in a prompt.

    Args:
        example: with {x} where its input stands, and {y} where its answer does.
        query: what of that stands before the answer.
        between: what stands between two examples.

    Raises:
        ValueError: texts without {x} or {y}, or a query that ends in a space.

    Example:
        ```python
        >>> import reftheads.fewshot as fs
        >>> form = fs.Format("{x} → {y}", "{x} →", between="; ")
        >>> fs.icl_prompts(["one", "two"], ["1", "2"], "three", form, shuffle=False)
        'one → 1; two → 2; three →'
        ```
    """

    example: str
    query: str
    between: str = " "

    def __post_init__(self) -> None:
        if not all("{x}" in text for text in (self.example, self.query)) or "{y}" not in self.example:
            raise ValueError(f"a format needs {{x}} in both texts and {{y}} in the example, got {self}")
        if self.query != self.query.rstrip():
            raise ValueError(f"the query {self.query!r} ends in a space, which most tokenizers put into the answer")


formats: dict[str, Format] = {
    "qa": Format("{x} In the {y}.", "{x} In the"),
    "none": Format("{x} {y}", "{x}"),
    "tldr": Format("{x} TL;DR: {y}", "{x} TL;DR:"),
    "rating": Format("Review: {x} Rating: {y}", "Review: {x} Rating:", between="\n"),
    "custom": Format("Input: {x}\nOutput: {y}", "Input: {x}\nOutput:", between="\n\n"),
}
"""The known formats; add your own under a new name. `qa`, `none` and `tldr` are those of Stanford's CS330."""


def icl_prompts(
    support_inputs: Sequence[str],
    support_labels: Sequence[str],
    test_input: str | Sequence[str],
    format: str | Format = "qa",
    *,
    shuffle: bool = True,
    rng: np.random.RandomState | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    budget: int | None = None,
) -> Prompt | list[Prompt]:
    """Write a prompt that shows the examples and, after them, the test input without its answer.

    A prompt ends in no space. Several test inputs give a list of prompts, all with the same examples in the same
    order: what they begin with can be computed once.

    Args:
        format: a name in `formats`, a `Format`, or "chat": then the examples are earlier turns of a conversation, for
            `tokenizer.apply_chat_template(…, add_generation_prompt=True)`.
        shuffle: by one permutation of the pairs.
        rng: draws it; left out, `np.random`, which `np.random.seed` makes reproducible.
        tokenizer, budget: the first examples are left out until no prompt is longer than `budget` tokens; a warning
            says how many.

    Returns:
        A text or, of the format "chat", a conversation; a list of them where `test_input` is one.

    Raises:
        ValueError: numbers of inputs and labels that differ, no test inputs, a format that is not known; a budget
            without a tokenizer, and one that a test input exceeds without any example.

    Example:
        ```python
        >>> import reftheads.fewshot as fs
        >>> fs.icl_prompts(["Where is Mary?"], ["garden"], "Where is John?", "qa")
        'Where is Mary? In the garden. Where is John? In the'
        ```
    """
    if len(support_inputs) != len(support_labels):
        raise ValueError(f"every input needs its label: got {len(support_inputs)} inputs, {len(support_labels)} labels")
    if isinstance(format, str) and format != "chat" and format not in formats:
        raise ValueError(f"unknown format {format!r}: use {', '.join(formats)}, chat, or a Format of your own")
    tests = [test_input] if isinstance(test_input, str) else list(test_input)
    if not tests or (tokenizer is None) != (budget is None):
        raise ValueError(f"give a test input, and tokenizer and budget together: got {len(tests)}, budget={budget}")
    draw = np.random if rng is None else rng
    order = draw.permutation(len(support_inputs)) if shuffle else range(len(support_inputs))
    pairs = [(support_inputs[i], support_labels[i]) for i in order]
    if tokenizer is not None and budget is not None:

        def longest(dropped: int) -> int:
            return max(len(encode_prompt(tokenizer, _written(pairs[dropped:], test, format))) for test in tests)

        dropped = bisect_left(range(len(pairs) + 1), True, key=lambda count: longest(count) <= budget)
        if dropped > len(pairs):
            raise ValueError(
                f"a test input alone makes a prompt of {longest(len(pairs))} tokens, over the budget of {budget}: "
                "shorten it, or raise the budget"
            )
        if dropped:
            warnings.warn(
                f"left out {dropped} of {len(pairs)} examples, so that prompts fit into {budget} tokens", stacklevel=2
            )
        pairs = pairs[dropped:]
    prompts = [_written(pairs, test, format) for test in tests]
    return prompts[0] if isinstance(test_input, str) else prompts


def _written(pairs: Sequence[tuple[str, str]], test_input: str, format: str | Format) -> Prompt:
    if format == "chat":
        turns = [{"role": role, "content": text} for pair in pairs for role, text in zip(_ROLES, pair, strict=True)]
        return [*turns, {"role": "user", "content": test_input}]
    form = formats[format] if isinstance(format, str) else format
    query = form.query.format(x=test_input).rstrip()
    return form.between.join([*(form.example.format(x=x, y=y) for x, y in pairs), query])


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message]) -> list[int]:
    """Return the tokens of a prompt; those of a conversation end with the start of the answer.

    Example:
        ```python
        >>> import reftheads as rh
        >>> import reftheads.fewshot as fs
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> tokenizer.decode(fs.encode_prompt(tokenizer, [{"role": "user", "content": "Hello."}]))
        '<|user|>Hello.<|end|><|assistant|>'
        ```
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]  # type: ignore[return-value]
    text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[arg-type,return-value]


def k_shot(
    labels: Sequence[Hashable], k: int, *, seed: int = 0, classes: Sequence[Hashable] | None = None
) -> list[int]:
    """Draw k examples of each class without replacement, and return their indices in an order that the seed shuffles.

    Args:
        labels: the class of every example.
        classes: all that there are; left out, those that have examples.

    Raises:
        ValueError: no examples, a label that is none of the classes, k below 0 or over the number of examples of a
            class.

    Example:
        ```python
        >>> import reftheads.fewshot as fs
        >>> labels = ["good", "bad", "good", "bad", "bad"]
        >>> [labels[i] for i in fs.k_shot(labels, 1, seed=1)]
        ['good', 'bad']
        ```
    """
    if k < 0 or not labels:
        raise ValueError(f"k must be 0 or more, and some examples there to draw from: got k={k}, {len(labels)} labels")
    rng = np.random.RandomState(seed)
    by_class: dict[Hashable, list[int]] = {label: [] for label in (labels if classes is None else classes)}
    for i, label in enumerate(labels):
        if label not in by_class:
            raise ValueError(f"the label {label!r} is none of the classes {', '.join(map(repr, by_class))}")
        by_class[label].append(i)
    for label, indices in by_class.items():
        if k > len(indices):
            raise ValueError(
                f"k = {k} examples a class, but class {label!r} has {len(indices)} of them: take a smaller k"
            )
    chosen = [i for indices in by_class.values() for i in rng.choice(indices, k, replace=False).tolist()]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def order_by_entropy(
    count: int,
    predict: Callable[[Sequence[int]], Float[Tensor, "probes labels"]],
    *,
    by: Literal["global", "local"] = "global",
    tried: int = 24,
    rng: np.random.RandomState | None = None,
) -> list[int]:
    """Find the order of the examples under which a model is least inclined to a few labels.

    Of `tried` random orders it is that of the largest entropy, by equations 3 to 6 of Lu et al. 2022
    (https://arxiv.org/abs/2104.08786). Probes are inputs whose labels nobody needs to know.

    Args:
        count: how many examples there are.
        predict: takes the examples' indices in an order, and returns the probabilities of the labels for each probe
            under a prompt that shows the examples in this order.
        by: "global" takes the entropy −Σ pᵥ log pᵥ of the shares of probes for which each label v is the likeliest;
            "local" the mean over probes of the entropy of their probabilities.
        tried: how many orders.
        rng: draws them; left out, `np.random`.

    Raises:
        ValueError: no examples or orders, or another `by`.

    Example:
        ```python
        >>> import torch
        >>> import reftheads.fewshot as fs
        >>> def predict(order):  # such as fs.score_labels(…).softmax(1)
        ...     return torch.tensor([[0.5, 0.5]] if order[0] == 1 else [[0.9, 0.1]])
        >>> fs.order_by_entropy(2, predict, by="local")
        [1, 0]
        ```
    """
    if count < 1 or tried < 1 or by not in ("global", "local"):
        raise ValueError(
            "give at least one example, one order to try and by='global' or 'local', "
            f"got {count}, {tried} and by={by!r}"
        )
    draw = np.random if rng is None else rng
    orders = list(dict.fromkeys(tuple(draw.permutation(count).tolist()) for _ in range(tried)))
    return list(max(orders, key=lambda order: _entropy(predict(order), by)))


def _entropy(probabilities: Float[Tensor, "probes labels"], by: str) -> float:
    if by == "global":
        counts = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])
        probabilities = (counts / counts.sum())[None]
    return float(torch.special.entr(probabilities.double()).sum(1).mean())
