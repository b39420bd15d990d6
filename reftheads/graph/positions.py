"""Which tokens a node acts on: a rule in words, and its resolution into tensors for one forward pass.

A rule counts real tokens only; padding on either side is never counted and never edited. Columns are
absolute: a forward pass that continues a cache starts at the column where the cache ends, so that a
prompt fed whole, in chunks or token by token gives the same selection.

Resolution has two steps. `Tokens` says of every column of the chunk at hand which token it is; a rule's
`select` turns that into a `Selection`. Both are tensor arithmetic on the device: no loop over rows, no
synchronisation with the host.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reftheads._utils.lazy import cached
from reftheads._utils.showing import shown
from reftheads.graph.selection import Selection
from reftheads.graph.terms import SYNTAX, Term, capped
from reftheads.graph.tokens import Tokens

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

_MOST_TERMS = 1000


@dataclass(frozen=True)
class Positions:
    """Say which tokens of a row are meant.

    | rule | tokens |
    |---|---|
    | `f3`, `l1` | the first 3, the last 1 of the prompt |
    | `f7+l7` | both, each capped at half the prompt, as pyreft does, so that they never overlap |
    | `all`, `prompt`, `generated` | every real token; those of the prompt; those after it |
    | `3`, `-1`, `2:5`, `-4:` | an index or slice of the prompt, read as Python reads it |
    | `f7 of f7+l7` | one part of a capped sum |
    | `Positions.where(token_ids=[7, 9])` | tokens with one of these ids |
    | a callable | those where its `rule(tokens: Tokens)` is true |

    What a prompt does not have is not selected: `f7` takes the two tokens of a two-token prompt, and an
    index beyond the prompt selects nothing.

    Rules are equal if they have the same words, or the same token ids; two callables only if they are one object.
    Rules can be keys of a dictionary.

    Raises:
        ValueError: a rule that cannot be read.

    Example:
        ```python
        >>> import reftheads as rh
        >>> rh.Positions("f7+l7").bound
        14
        >>> rh.Positions("f7 + l7") == rh.Positions("f7+l7")
        True
        ```
    """

    text: str = "all"
    token_ids: tuple[int, ...] | None = None
    rule: Callable[[Tokens], Bool[Tensor, "batch chunk"]] | None = field(default=None, compare=False)
    _rule_id: int | None = field(init=False, repr=False, default=None)  # callables are told apart by identity
    _terms: tuple[Term, ...] = field(init=False, repr=False, compare=False, default=())
    _part: str | None = field(init=False, repr=False, compare=False, default=None)  # the one term that is meant

    def __post_init__(self) -> None:
        if self.rule is not None:
            object.__setattr__(self, "_rule_id", id(self.rule))
        if self.token_ids is not None or self.rule is not None:
            return
        if not isinstance(self.text, str):
            raise ValueError(f"cannot read positions {shown(self.text)}: use {SYNTAX}")
        first, of, rest = f" {self.text} ".partition(" of ")
        part, whole = (first.strip(), rest) if of else (None, first)
        if whole.count("+") >= _MOST_TERMS:
            raise ValueError(
                f"positions are a sum of at most {_MOST_TERMS} terms, got {whole.count('+') + 1:,}: use slices, "
                "Positions.where(token_ids=…) or a function"
            )
        terms = tuple(Term.read(text.strip()) for text in whole.split("+"))
        if part is not None and (part not in [term.text for term in terms] or not capped(terms)):
            raise ValueError(f"cannot read positions {shown(self.text)}: {shown(part)} is no part of a sum f… + l…")
        text = "+".join(term.text for term in terms)
        object.__setattr__(self, "text", text if part is None else f"{part} of {text}")
        object.__setattr__(self, "_terms", terms)
        object.__setattr__(self, "_part", part)

    def __reduce__(self) -> tuple[Any, ...]:
        # made anew, since a copied callable is another rule
        return type(self), (self.text, self.token_ids, self.rule)

    @classmethod
    def where(cls, token_ids: Sequence[int]) -> Positions:
        """Select every real token whose id is one of `token_ids`.

        Raises:
            ValueError: no ids, or what is no whole number of 0 or more.
        """
        if isinstance(token_ids, str | bytes | Mapping) or not isinstance(token_ids, Iterable):
            raise ValueError(f"token_ids must be a list of whole numbers, got {shown(token_ids)}")
        ids = tuple(_token_id(i) for i in token_ids)
        if not ids:
            raise ValueError("Positions.where needs at least one token id, got none")
        listed = [str(i) for i in ids[:4]]
        if len(ids) > 4:
            listed.append(f"{len(ids) - 4} more")
        return cls(text=f"where token_ids in [{', '.join(listed)}]", token_ids=ids)

    @classmethod
    def parse(cls, spec: str | int | Callable | Positions | dict) -> Positions:
        """Read what a user or a JSON file may write for positions."""
        if isinstance(spec, Positions):
            return spec
        if isinstance(spec, dict) and set(spec) == {"token_ids"}:
            return cls.where(spec["token_ids"])
        if isinstance(spec, int) and not isinstance(spec, bool):
            return cls(str(spec))
        if callable(spec):
            return cls(text=getattr(spec, "__name__", "callable"), rule=spec)
        return _read(spec) if isinstance(spec, str) else cls(spec)  # type: ignore[arg-type]

    def to_json(self) -> Any:
        """Return a string, or a dict for token ids.

        Raises:
            ValueError: a callable, which no file can hold.
        """
        if self.rule is not None:
            raise ValueError(
                f"positions given by the function {self.text!r} cannot be saved: use a rule in words "
                "or Positions.where(token_ids=…)"
            )
        return self.text if self.token_ids is None else {"token_ids": list(self.token_ids)}

    @property
    def parts(self) -> tuple[Positions, ...]:
        """Return the rule's terms as rules of their own; the parts of a capped sum stay capped."""
        if len(self._terms) < 2 or self._part is not None:
            return (self,)
        of = f" of {self.text}" if capped(self._terms) else ""
        return tuple(Positions(term.text + of) for term in self._terms)

    @cached
    def in_prompt(self) -> bool:
        """Return whether only tokens of the prompt can be selected."""
        return bool(self._terms) and all(term.word in (None, "prompt") for term in self._terms)

    @cached
    def begins_with_first(self) -> bool:
        """Return whether what is selected of a prompt begins with its first token; of two tokens or more, if capped."""
        return any(term.has_first_token for term in self._active)

    @cached
    def needs_prompt(self) -> bool:
        """Return whether the rule means nothing until it is known where the prompt ends."""
        return any(term.word != "all" for term in self._terms)

    @cached
    def bound(self) -> int | None:
        """Return the most tokens that can be selected in a row; `None` if there is no limit."""
        if not self._terms:
            return None
        total = 0
        for term in self._active:
            if term.bound is None:
                return None
            total += term.bound
        return total

    @property
    def _active(self) -> tuple[Term, ...]:
        """Return the terms that select: all of them, or the one part."""
        return self._terms if self._part is None else tuple(t for t in self._terms if t.text == self._part)

    @property
    def _word(self) -> str | None:
        """Return the word that is the whole rule, if it is one."""
        return self._terms[0].word if len(self._terms) == 1 else None

    def mask(self, tokens: Tokens) -> Bool[Tensor, "batch chunk"]:
        """Return which columns of this chunk are selected.

        Raises:
            ValueError: token ids are asked for, and the model was given embeddings only.
        """
        if self.rule is not None:
            return self.rule(tokens).bool() & tokens.known_real
        if self.token_ids is not None:
            if tokens.input_ids is None:
                raise ValueError(f"positions {self.text!r} look at token ids, but the model was given embeddings only")
            wanted = torch.isin(tokens.input_ids, _on_device(self.token_ids, tokens.input_ids.device))
            return wanted if tokens.real is None else wanted & tokens.real
        half = capped(self._terms)
        masks = [term.mask(tokens, half) for term in self._active]
        return masks[0] if len(masks) == 1 else torch.stack(masks).any(0)

    def nothing_in(self, tokens: Tokens) -> bool:
        """Return whether nothing of this chunk is selected in any row, as is known without looking."""
        return tokens.after_prompt and self.in_prompt or tokens.inside_prompt and self._word == "generated"

    def select(self, tokens: Tokens, few: int = 0) -> Selection | None:
        """Return the selection in this chunk; `None` when it is empty for every row without looking.

        Args:
            few: gives a mask instead of slots where the batch has at most so many columns in all.
        """
        if self.nothing_in(tokens):
            return None
        everything = self._word == "all" or (self._word == "generated" and tokens.after_prompt)
        if everything and tokens.real is None:
            return Selection()
        return self.pick(self.mask(tokens), few)

    def pick(self, mask: Bool[Tensor, "batch chunk"], few: int = 0) -> Selection | None:
        """Return the selection of what `mask` says, in as many slots as the rule can need; see `select`."""
        slots = self.bound
        if slots is None or slots >= mask.shape[1] or mask.numel() <= few:
            return Selection(mask=mask)
        if slots == 0:
            return None
        # a stable sort puts the selected columns first, in order, and every column once
        order = torch.sort(mask.to(torch.uint8), dim=1, descending=True, stable=True)
        return Selection(columns=order.indices[:, :slots], valid=order.values[:, :slots].bool())

    def __str__(self) -> str:
        return self.text


def _token_id(value: Any) -> int:
    """Return an id as Python's integer. Raise `ValueError` for what is none."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**63:
        raise ValueError(f"token_ids must be whole numbers of 0 or more, got {shown(value)}")
    return number


@lru_cache
def _read(text: str) -> Positions:
    """Return one object for all nodes with the same rule, so that it is read once."""
    return Positions(text)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # what is kept may be needed for a backward pass
def _on_device(ids: tuple[int, ...], device: torch.device) -> Int[Tensor, " ids"]:
    """Return token ids as a tensor that is sent to its device once, since sending waits for it."""
    return torch.tensor(ids, device=device)
