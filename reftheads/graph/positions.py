"""Which tokens a node acts on: a rule in words, and its resolution into tensors for one forward pass.

A rule counts real tokens only; padding on either side is never counted and never edited. Columns are
absolute: a forward pass that continues a cache starts at the column where the cache ends, so that a
prompt fed whole, in chunks or token by token gives the same selection.

Resolution has two steps. `Tokens` says of every column of the chunk at hand which token it is; a rule's
`select` turns that into a `Selection`. Both are tensor arithmetic on the device: no loop over rows, no
synchronisation with the host.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reftheads._utils.lazy import cached

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped

_TERM = re.compile(r"(?P<first>f\d+)|(?P<last>l\d+)|(?P<word>all|prompt|generated)|(?P<span>-?\d+|(-?\d+)?:(-?\d+)?)")
_SYNTAX = "f3, l1, f7+l7, all, prompt, generated, an index such as 3 or -1, a slice such as 2:5, or a sum such as 0+1"


@dataclass(frozen=True)
class Tokens:
    """The columns of one forward pass, as far as positions are concerned.

    Attributes:
        real: whether a column holds a token rather than padding; `None` says that all do.
        in_prompt: whether a column belongs to the prompt.
        rank: of a prompt token, how many prompt tokens of its row stand before it.
        prompt_length: number of prompt tokens of each row, also those outside this chunk.
        input_ids: the tokens themselves, where the model was given any.
        after_prompt: known without looking at tensors: every column of this chunk lies behind the prompt.
        inside_prompt: known likewise: no column of this chunk lies behind the prompt.
    """

    real: Bool[Tensor, "batch chunk"] | None
    in_prompt: Bool[Tensor, "batch chunk"]
    rank: Int[Tensor, "batch chunk"]
    prompt_length: Int[Tensor, "batch 1"]
    input_ids: Int[Tensor, "batch chunk"] | None = None
    after_prompt: bool = False
    inside_prompt: bool = False

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        past: int | Int[Tensor, ""] = 0,
        attention_mask: Shaped[Tensor, "batch columns"] | None = None,
        prompt_mask: Shaped[Tensor, "batch marked"] | None = None,
        input_ids: Int[Tensor, "batch chunk"] | None = None,
        device: torch.device | None = None,
    ) -> Tokens:
        """Describes columns `past` to `past + chunk` of rows `shape = (batch, chunk)`.

        Args:
            past: number of columns in the cache before this chunk.
            attention_mask: 1 for tokens and 0 for padding; `None` for no padding.
            prompt_mask: over all columns from the first, 1 for tokens of the prompt; columns past its end
                are not in the prompt. `None`: every real token is.
        """
        batch, chunk = shape
        columns = torch.arange(chunk, device=device) + past
        real = None if attention_mask is None else attention_mask.bool()
        if real is None and prompt_mask is None:
            return cls(
                real=None,
                in_prompt=columns.new_ones((batch, chunk), dtype=torch.bool),
                rank=columns.expand(batch, -1),
                prompt_length=(columns[-1:] + 1).expand(batch, 1),
                input_ids=input_ids,
                inside_prompt=True,
            )
        prompt = real if prompt_mask is None else _overlap(prompt_mask.bool(), real)
        assert prompt is not None
        return cls(
            real=None if real is None else _columns(real, columns, beyond=True),
            in_prompt=_columns(prompt, columns, beyond=False),
            rank=_columns(prompt.long().cumsum(1) - 1, columns, beyond=0),
            prompt_length=prompt.sum(1, keepdim=True),
            input_ids=input_ids,
            after_prompt=isinstance(past, int) and prompt_mask is not None and past >= prompt_mask.shape[1],
            inside_prompt=prompt_mask is None,
        )


def _overlap(
    prompt: Bool[Tensor, "batch marked"], real: Bool[Tensor, "batch columns"] | None
) -> Bool[Tensor, "batch marked"]:
    if real is None:
        return prompt
    width = min(prompt.shape[1], real.shape[1])
    # columns that the attention mask does not reach yet are columns still to come: real by the caller's word
    return torch.cat([prompt[:, :width] & real[:, :width], prompt[:, width:]], dim=1)


def _columns(
    values: Shaped[Tensor, "batch columns"], columns: Int[Tensor, " chunk"], beyond: bool | int
) -> Shaped[Tensor, "batch chunk"]:
    width = values.shape[1]
    return values[:, columns.clamp(max=width - 1)].masked_fill(columns >= width, beyond)


@dataclass(frozen=True)
class Selection:
    """The selected tokens of one chunk, in one of three forms.

    * `mask` and `columns` both `None`: every token of the chunk.
    * `mask`: the tokens where it holds.
    * `columns`, `valid`: each row's selected columns in rising order, then slots that are not valid. The
      columns of a row differ from each other, so a scatter is exact.
    """

    mask: Bool[Tensor, "batch chunk"] | None = None
    columns: Int[Tensor, "batch slots"] | None = None
    valid: Bool[Tensor, "batch slots"] | None = None

    @cached
    def _kept(self) -> Bool[Tensor, "batch slots 1"]:
        """Which slots hold a selected token, the same in every use."""
        valid = self.mask if self.columns is None else self.valid
        assert valid is not None
        return valid[..., None]

    def _tokens(self, chunk: int) -> Int[Tensor, " all_slots"]:
        """The slots' tokens among all of a batch, row after row, which is the same in every use."""
        if "flat" not in self.__dict__:
            assert self.columns is not None
            rows = torch.arange(self.columns.shape[0], device=self.columns.device)[:, None]
            self.__dict__["flat"] = (rows * chunk + self.columns).flatten()
        return self.__dict__["flat"]

    def rows(self, keep: Bool[Tensor, " batch"], chunk: int) -> Selection:
        """The same selection in the rows where `keep` holds, nothing in the others."""
        if self.columns is not None:
            assert self.valid is not None
            return Selection(columns=self.columns, valid=self.valid & keep[:, None])
        mask = keep[:, None].expand(-1, chunk)
        return Selection(mask=mask if self.mask is None else self.mask & mask)

    def gather(self, h: Float[Tensor, "batch chunk width"]) -> Float[Tensor, "batch slots width"]:
        """The selected tokens, or `h` where slots are columns."""
        if self.columns is None:
            return h
        return h.flatten(0, 1).index_select(0, self._tokens(h.shape[1])).view(*self.columns.shape, -1)

    def scatter(
        self,
        h: Float[Tensor, "batch chunk width"],
        picked: Float[Tensor, "batch slots width"],
        new: Float[Tensor, "batch slots width"],
    ) -> Float[Tensor, "batch chunk width"]:
        """`h` with `new` in place of `picked = gather(h)` at the selected tokens; all others stay bit for bit."""
        if self.columns is None:
            return new if self.mask is None else torch.where(self._kept, new, h)
        new = torch.where(self._kept, new, picked).flatten(0, 1)
        return h.flatten(0, 1).index_copy(0, self._tokens(h.shape[1]), new).view_as(h)

    def validity(self, h: Float[Tensor, "batch chunk width"]) -> Bool[Tensor, "batch slots"]:
        """Which slots of `gather(h)` hold a selected token."""
        if self.columns is not None:
            assert self.valid is not None
            return self.valid
        return h.new_ones(h.shape[:2], dtype=torch.bool) if self.mask is None else self.mask


@dataclass(frozen=True)
class _Term:
    """A run of prompt tokens, `start` to `stop` as in a Python slice, or one of the words."""

    text: str
    start: int | None = None
    stop: int | None = None
    word: str | None = None

    @classmethod
    def read(cls, text: str) -> _Term:
        match = _TERM.fullmatch(text)
        if match is None:
            raise ValueError(f"cannot read positions {text!r}: use {_SYNTAX}")
        if match["word"]:
            return cls(text, word=match["word"])
        if match["first"]:
            return cls(text, 0, int(text[1:]))
        if match["last"]:
            return cls(text, -int(text[1:]) if int(text[1:]) else 0, None if int(text[1:]) else 0)
        if ":" in text:
            start, stop = (int(part) if part else None for part in text.split(":"))
            return cls(text, start, stop)
        return cls(text, int(text), None if int(text) == -1 else int(text) + 1)

    @property
    def is_first(self) -> bool:
        return self.text.startswith("f")

    @property
    def is_last(self) -> bool:
        return self.text.startswith("l")

    @property
    def bound(self) -> int | None:
        """The most tokens that it can select in a row; `None` if there is no limit."""
        if self.word:
            return None
        start, stop = self.start or 0, self.stop
        if stop is None:
            return -start if start < 0 else None
        return max(stop - start, 0) if (start < 0) == (stop < 0) else (stop if start < 0 else None)

    def mask(self, tokens: Tokens, half: bool) -> Bool[Tensor, "batch chunk"]:
        if self.word == "prompt":
            return tokens.in_prompt
        if self.word:
            real = torch.ones_like(tokens.in_prompt) if tokens.real is None else tokens.real
            return real if self.word == "all" else real & ~tokens.in_prompt
        n = tokens.prompt_length
        if half:
            cap = n // 2
            start, stop = (0, cap.clamp(max=self.stop)) if self.is_first else (n - cap.clamp(max=-(self.start or 0)), n)
        else:
            start, stop = (end if end is None or end >= 0 else n + end for end in (self.start, self.stop))
        inside = tokens.in_prompt
        if start is not None:
            inside = inside & (tokens.rank >= start)
        return inside if stop is None else inside & (tokens.rank < stop)


@dataclass(frozen=True)
class Positions:
    """A rule that says which tokens of a row are meant.

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

    Raises:
        ValueError: a rule that cannot be read.
    """

    text: str = "all"
    token_ids: tuple[int, ...] | None = None
    rule: Callable[[Tokens], Bool[Tensor, "batch chunk"]] | None = None
    _terms: tuple[_Term, ...] = field(init=False, repr=False, compare=False, default=())
    _part: str | None = field(init=False, repr=False, compare=False, default=None)  # the one term that is meant

    def __post_init__(self) -> None:
        if self.token_ids is not None or self.rule is not None:
            return
        if not isinstance(self.text, str):
            raise ValueError(f"cannot read positions {self.text!r}: use {_SYNTAX}")
        part, of, whole = "".join(self.text.split()).partition("of")
        terms = tuple(_Term.read(text) for text in (whole if of else part).split("+"))
        if of and (part not in whole.split("+") or not _capped(terms)):
            raise ValueError(f"cannot read positions {self.text!r}: {part!r} is no part of a sum f… + l…")
        object.__setattr__(self, "text", f"{part} of {whole}" if of else part)
        object.__setattr__(self, "_terms", terms)
        object.__setattr__(self, "_part", part if of else None)

    @classmethod
    def where(cls, token_ids: Sequence[int]) -> Positions:
        """Every real token whose id is one of `token_ids`."""
        ids = tuple(int(i) for i in token_ids)
        if not ids:
            raise ValueError("Positions.where needs at least one token id, got none")
        shown = [*map(str, ids[:4]), *([f"{len(ids) - 4} more"] if len(ids) > 4 else [])]
        return cls(text=f"where token_ids in [{', '.join(shown)}]", token_ids=ids)

    @classmethod
    def parse(cls, spec: str | int | Callable | Positions | dict) -> Positions:
        """Reads what a user or a JSON file may write for positions."""
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
        """A string, or a dict for token ids.

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
        """The rule's terms as rules of their own; a capped sum stays capped."""
        if len(self._terms) < 2 or self._part is not None:
            return (self,)
        of = f" of {self.text}" if _capped(self._terms) else ""
        return tuple(Positions(term.text + of) for term in self._terms)

    @cached
    def in_prompt(self) -> bool:
        """Whether only tokens of the prompt can be selected."""
        return bool(self._terms) and all(term.word in (None, "prompt") for term in self._terms)

    @cached
    def begins_with_first(self) -> bool:
        """Whether the first token of every prompt is selected, for certain."""
        return any(
            term.word in ("all", "prompt") if term.word else not term.start and term.stop != 0 for term in self._active
        )

    @cached
    def needs_prompt(self) -> bool:
        """Whether the rule means nothing until it is known where the prompt ends."""
        return bool(self._terms) and any(term.word != "all" for term in self._terms)

    @cached
    def bound(self) -> int | None:
        """The most tokens that can be selected in a row; `None` if there is no limit."""
        bounds = [term.bound for term in self._active] if self._terms else [None]
        return None if None in bounds else sum(b for b in bounds if b is not None)

    @property
    def _active(self) -> tuple[_Term, ...]:
        return self._terms if self._part is None else tuple(t for t in self._terms if t.text == self._part)

    @property
    def _word(self) -> str | None:
        """The word that is the whole rule, if it is one."""
        return self._terms[0].word if len(self._terms) == 1 else None

    def mask(self, tokens: Tokens) -> Bool[Tensor, "batch chunk"]:
        """The selected columns of this chunk."""
        if self.rule is not None:
            real = torch.ones_like(tokens.in_prompt) if tokens.real is None else tokens.real
            return self.rule(tokens).bool() & real
        if self.token_ids is not None:
            if tokens.input_ids is None:
                raise ValueError(f"positions {self.text!r} look at token ids, but the model was given embeddings only")
            found = torch.isin(tokens.input_ids, _on_device(self.token_ids, tokens.input_ids.device))
            return found if tokens.real is None else found & tokens.real
        half = _capped(self._terms)
        masks = [term.mask(tokens, half and (term.is_first or term.is_last)) for term in self._active]
        return masks[0] if len(masks) == 1 else torch.stack(masks).any(0)

    def select(self, tokens: Tokens, few: int = 0) -> Selection | None:
        """The selection in this chunk; `None` when it is empty for every row without looking.

        Args:
            few: gives a mask instead of slots where the batch has at most so many columns in all.
        """
        if tokens.after_prompt and self.in_prompt or tokens.inside_prompt and self._word == "generated":
            return None
        everything = self._word == "all" or (self._word == "generated" and tokens.after_prompt)
        if everything and tokens.real is None:
            return Selection()
        return self.pick(self.mask(tokens), few)

    def pick(self, mask: Bool[Tensor, "batch chunk"], few: int = 0) -> Selection | None:
        """The selection of what `mask` says, in as many slots as the rule can need; see `select`."""
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


def _capped(terms: Sequence[_Term]) -> bool:
    return any(term.is_first for term in terms) and any(term.is_last for term in terms)


@lru_cache
def _read(text: str) -> Positions:
    """One object for all nodes with the same rule, so that a pass resolves it once."""
    return Positions(text)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # what is kept may be needed for a backward pass
def _on_device(ids: tuple[int, ...], device: torch.device) -> Int[Tensor, " ids"]:
    """Return token ids as a tensor that is sent to its device once, since sending waits for it."""
    return torch.tensor(ids, device=device)
