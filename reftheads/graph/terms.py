"""The terms of a rule of positions: `f7`, `-4:` or `prompt`, each read from words and resolved into a mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from reftheads._utils.showing import shown
from reftheads.graph.tokens import Tokens

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

_NUMBER = r"-?[0-9]{1,9}"  # which every tensor of positions can hold
_TERM = re.compile(
    r"(?P<first>f[0-9]{1,9})|(?P<last>l[0-9]{1,9})|(?P<word>all|prompt|generated)"
    rf"|(?P<span>{_NUMBER}|({_NUMBER})?:({_NUMBER})?)"
)
SYNTAX = "f3, l1, f7+l7, all, prompt, generated, an index such as 3 or -1, a slice such as 2:5, or a sum such as 0+1"


@dataclass(frozen=True)
class Term:
    """Select a run of prompt tokens, `start` to `stop` as in a Python slice, or one of the words."""

    text: str
    start: int | None = None
    stop: int | None = None
    word: str | None = None

    @classmethod
    def read(cls, text: str) -> Term:
        """Read one term in words. Raise `ValueError` if it cannot be read."""
        match = _TERM.fullmatch(text)
        if match is None:
            raise ValueError(f"cannot read positions {shown(text)}: use {SYNTAX}")
        if match["word"]:
            return cls(text, word=match["word"])
        if match["first"]:
            return cls(text, 0, int(text[1:]))
        if match["last"]:
            count = int(text[1:])
            return cls(text, -count, None) if count else cls(text, 0, 0)
        if ":" in text:
            start, stop = (int(part) if part else None for part in text.split(":"))
            return cls(text, start, stop)
        return cls(text, int(text), None if int(text) == -1 else int(text) + 1)

    @property
    def is_first(self) -> bool:
        """Return whether it is f…, the first tokens."""
        return self.text.startswith("f")

    @property
    def is_last(self) -> bool:
        """Return whether it is l…, the last tokens."""
        return self.text.startswith("l")

    @property
    def has_first_token(self) -> bool:
        """Return whether the first token of every prompt is meant, for certain."""
        if self.word:
            return self.word in ("all", "prompt")
        return not self.start and self.stop != 0

    @property
    def bound(self) -> int | None:
        """Return the most tokens that it can select in a row; `None` if there is no limit."""
        if self.word:
            return None
        start, stop = self.start or 0, self.stop
        if stop is None:
            return -start if start < 0 else None
        if (start < 0) == (stop < 0):
            return max(stop - start, 0)
        return stop if start < 0 else None

    def mask(self, tokens: Tokens, half: bool) -> Bool[Tensor, "batch chunk"]:
        """Return the columns that it selects, of `fN` and `lN` no more than half the prompt if `half`."""
        if self.word == "prompt":
            return tokens.in_prompt
        if self.word:
            return tokens.known_real if self.word == "all" else tokens.known_real & ~tokens.in_prompt
        start, stop = self._ends(tokens.prompt_length, half)
        inside = tokens.in_prompt
        if start is not None:
            inside = inside & (tokens.rank >= start)
        return inside if stop is None else inside & (tokens.rank < stop)

    def _ends(self, length: Int[Tensor, "batch 1"], half: bool) -> list[int | Tensor | None]:
        """Return start and stop counted from the first token of prompts of this length."""
        if half and self.is_first:
            return [0, (length // 2).clamp(max=self.stop)]
        if half and self.is_last:
            return [length - (length // 2).clamp(max=-(self.start or 0)), length]
        return [length + end if end is not None and end < 0 else end for end in (self.start, self.stop)]


def capped(terms: Sequence[Term]) -> bool:
    """Return whether a sum has both f… and l…, so that each of them takes at most half the prompt."""
    return any(term.is_first for term in terms) and any(term.is_last for term in terms)
