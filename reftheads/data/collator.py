"""From rows to batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from reftheads.data.rows import INPUTS, Row, complete, flat, is_text
from reftheads.graph.intervention import IGNORE

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped


@dataclass
class Collator:
    """Pad rows to a batch, on either side.

    `input_ids` are padded with the tokenizer's pad token, masks with 0, `labels` and other columns that
    run along the tokens with -100 (floats: NaN, which losses take for missing). A column with one number
    per row becomes a vector; one with another number than there are tokens, the same in every row, a matrix.
    Targets that some rows lack are filled by `complete`, which also makes labels of the `completion_mask` and
    `assistant_masks` that TRL and chat templates give. Text beside the tokens is left out. An item that is a list of
    rows, such as a pair of `encode_preferences`, puts all of them into the batch.

    Args:
        tokenizer: for its pad token.
        padding_side: "right" or "left"; positions count real tokens, so that either is the same to them.
        pad_to_multiple_of: rounds the length up.

    Raises:
        ValueError: a tokenizer without pad token, no rows, or what `complete` refuses.

    Example:
        ```python
        >>> import reftheads as rh
        >>> _, tokenizer = rh.load_base("tiny-chat")
        >>> batch = rh.Collator(tokenizer)([{"input_ids": [5, 6, 7], "mood": 1}, {"input_ids": [8], "mood": 0}])
        >>> batch["attention_mask"].tolist(), batch["mood"].tolist()
        ([[1, 1, 1], [1, 0, 0]], [1, 0])
        ```
    """

    tokenizer: PreTrainedTokenizerBase
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                "this tokenizer has no pad token: set tokenizer.pad_token = tokenizer.eos_token "
                "(rows carry their attention_mask, so that this is safe here)"
            )

    def __call__(self, rows: Sequence[Row | Sequence[Row]]) -> dict[str, Shaped[Tensor, "batch ..."]]:
        if not rows:
            raise ValueError("no rows to put into a batch")
        rows = complete([{"attention_mask": [1] * len(row["input_ids"]), **row} for row in flat(rows)])
        length = max(len(row["input_ids"]) for row in rows)
        multiple = self.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        counts = [len(row["input_ids"]) for row in rows]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        text = [name for name, values in columns.items() if any(map(is_text, values))]
        return {name: self._column(name, columns[name], length, counts) for name in columns if name not in text}

    def _column(self, name: str, values: list[Any], length: int, counts: list[int]) -> Shaped[Tensor, "batch ..."]:
        """Return a column as a tensor, padded to `length` if it runs along the tokens, of which rows have `counts`."""
        tensors = [torch.as_tensor(value) for value in values]
        alike = all(tensor.shape == tensors[0].shape for tensor in tensors)
        if tensors[0].ndim == 0 or (alike and any(len(t) != n for t, n in zip(tensors, counts, strict=True))):
            return torch.stack(tensors)
        fill: float = 0 if name in INPUTS else IGNORE
        if name == "input_ids":
            fill = self.tokenizer.pad_token_id  # type: ignore[assignment]
        if tensors[0].is_floating_point():
            fill = float("nan")
        tensors.append(tensors[0].new_full((length, *tensors[0].shape[1:]), fill))  # type: ignore[arg-type]
        return pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=self.padding_side)[:-1]


def prompts_only(
    batch: Mapping[str, Shaped[Tensor, "batch ..."]], pad_token_id: int
) -> dict[str, Int[Tensor, "batch longest"]]:
    """Return the prompts of a batch, left-padded, as `generate` wants them: `input_ids`, `attention_mask`.

    The prompt is what `prompt_mask` marks, else the real tokens before the first label.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.data import prompts_only
        >>> _, tokenizer = rh.load_base("tiny-chat")
        >>> rows = rh.encode_pairs(tokenizer, ["Hi.", "Do you like dogs?"], [" Hello.", " Yes."])
        >>> batch = rh.Collator(tokenizer)(rows)
        >>> tokenizer.batch_decode(prompts_only(batch, tokenizer.pad_token_id)["input_ids"], skip_special_tokens=True)
        ['Hi.', 'Do you like dogs?']
        ```
    """
    real = batch["attention_mask"].bool()
    if "prompt_mask" in batch:
        prompt = real & batch["prompt_mask"].bool()
    else:
        prompt = real & ((batch["labels"] != IGNORE).cumsum(1) == 0)
    prompt, order = torch.sort(prompt.to(torch.uint8), dim=1, stable=True)
    width = int(prompt.sum(1).max())
    mask = prompt[:, prompt.shape[1] - width :].long()
    ids = batch["input_ids"].gather(1, order)[:, order.shape[1] - width :]
    return {"input_ids": torch.where(mask.bool(), ids, pad_token_id), "attention_mask": mask}
