"""What a rule of positions means, in lists of Python: the columns of one row, no tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from reftheads.graph.tokens import Tokens


def selected(rule: str, real: Sequence[int], prompt: Sequence[int]) -> list[int]:
    """The columns that a rule in words means, of a row whose tokens and whose prompt lie at these columns."""
    part, _, whole = rule.replace(" ", "").partition("of")
    terms = (whole or part).split("+")
    capped = {"f", "l"} <= {term[0] for term in terms}
    chosen: set[int] = set()
    for term in [part] if whole else terms:
        chosen.update(_term(term, list(real), list(prompt), capped))
    return sorted(chosen)


def _term(term: str, real: list[int], prompt: list[int], capped: bool) -> list[int]:
    """The columns of one term; f… and l… take half the prompt at most if `capped`."""
    n = len(prompt)
    if term == "all":
        return real
    if term == "prompt":
        return prompt
    if term == "generated":
        return [column for column in real if column not in prompt]
    if term[0] in "fl":
        count = min(int(term[1:]), n // 2 if capped else n)
        return prompt[:count] if term[0] == "f" else prompt[n - count :]
    if ":" in term:
        start, stop = (int(end) if end else None for end in term.split(":"))
        return prompt[start:stop]
    return [prompt[int(term)]] if -n <= int(term) < n else []


def with_ids(ids: Iterable[int], real: Sequence[int], row: Sequence[int]) -> list[int]:
    """The columns of a row's tokens that have one of these ids."""
    return [column for column in real if row[column] in ids]


def every(step: int, real: Sequence[int], prompt: Sequence[int]) -> list[int]:
    """The columns of every so manyth token of the prompt, from its first on."""
    return list(prompt)[::step]


def every_second(tokens: Tokens) -> Tensor:
    """The rule that `every(2, …)` is about, as a function of `Tokens`."""
    return tokens.in_prompt & (tokens.rank % 2 == 0)


def every_third(tokens: Tokens) -> Tensor:
    """The rule that `every(3, …)` is about, as a function of `Tokens`."""
    return tokens.in_prompt & (tokens.rank % 3 == 0)
