"""Evaluation by generating: what a model answers to the prompts of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reftheads.data.collator import prompts_only
from reftheads.graph.intervention import IGNORE

if TYPE_CHECKING:
    from jaxtyping import Int


@torch.no_grad()
def generated_answers(
    model: Any, batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> Int[Tensor, "rows new"]:
    """Generate from the prompts of a batch alone; return the new tokens of each row, with -100 after its end.

    Args:
        batch: as `Collator` makes it, with answers; the whole input of an encoder-decoder model is its prompt.
        options: for `model.generate`.
    """
    pad = tokenizer.pad_token_id
    if model.config.is_encoder_decoder:
        prompts = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        new = model.generate(**prompts, pad_token_id=pad, **options)
    else:
        prompts = prompts_only(batch, pad)  # type: ignore[arg-type]
        new = model.generate(**prompts, pad_token_id=pad, **options)[:, prompts["input_ids"].shape[1] :]
    ends = (new == tokenizer.eos_token_id).long()
    after_end = (ends.cumsum(1) - ends > 0) | ((new == pad) & (ends == 0))
    return torch.where(after_end, IGNORE, new)
