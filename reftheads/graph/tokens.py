"""Which token each column of a forward pass is: what rules of positions look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, Shaped


@dataclass(frozen=True)
class Tokens:
    """Describe the columns of one forward pass, as far as positions are concerned.

    A function that is given for positions gets one of these, and returns which columns it selects.

    Attributes:
        real: whether a column holds a token rather than padding; `None` says that all do.
        in_prompt: whether a column belongs to the prompt.
        rank: of a prompt token, how many prompt tokens of its row stand before it.
        prompt_length: number of prompt tokens of each row, also those outside this chunk.
        input_ids: the tokens themselves, where the model was given any.
        after_prompt: known without looking at tensors: every column of this chunk lies after the prompt.
        inside_prompt: known likewise: no column of this chunk lies after the prompt.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.graph import Tokens
        >>> every_second = rh.Positions.parse(lambda tokens: tokens.rank % 2 == 0)
        >>> every_second.mask(Tokens.of((1, 5))).tolist()
        [[True, False, True, False, True]]
        ```
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
        """Describe columns `past` to `past + chunk` of rows `shape = (batch, chunk)`.

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
            real=None if real is None else _at_columns(real, columns, beyond=True),
            in_prompt=_at_columns(prompt, columns, beyond=False),
            rank=_at_columns(prompt.long().cumsum(1) - 1, columns, beyond=0),
            prompt_length=prompt.sum(1, keepdim=True),
            input_ids=input_ids,
            after_prompt=isinstance(past, int) and prompt_mask is not None and past >= prompt_mask.shape[1],
            inside_prompt=prompt_mask is None,
        )

    @property
    def known_real(self) -> Bool[Tensor, "batch chunk"]:
        """Return `real`, written out where it says by `None` that all columns are."""
        return torch.ones_like(self.in_prompt) if self.real is None else self.real


def _overlap(
    prompt: Bool[Tensor, "batch marked"], real: Bool[Tensor, "batch columns"] | None
) -> Bool[Tensor, "batch marked"]:
    """Return which columns of the prompt hold tokens."""
    if real is None:
        return prompt
    width = min(prompt.shape[1], real.shape[1])
    # columns that the attention mask does not reach yet are columns still to come: real by the caller's word
    return torch.cat([prompt[:, :width] & real[:, :width], prompt[:, width:]], dim=1)


def _at_columns(
    values: Shaped[Tensor, "batch columns"], columns: Int[Tensor, " chunk"], beyond: bool | int
) -> Shaped[Tensor, "batch chunk"]:
    """Return the values at some columns, and `beyond` at columns past the last value."""
    width = values.shape[1]
    return values[:, columns.clamp(max=width - 1)].masked_fill(columns >= width, beyond)
