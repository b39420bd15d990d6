"""Greedy answers and likelihoods of labels, with what prompts have in common computed once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from reftheads.data import Message
from reftheads.fewshot.prompts import encode_prompt
from reftheads.model import InterventionModel
from reftheads.modes import evaluating

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@torch.no_grad()
def greedy_sample(
    model: Any,
    input_ids: Int[Tensor, "rows columns"] | Sequence[Sequence[int]],
    stop_tokens: Sequence[int],
    max_tokens: int,
) -> list[list[int]]:
    """The most likely next token, again and again, until a stop token or `max_tokens`: the new tokens of each row.

    Neither the input nor the stop token is returned. It is what `model.generate(do_sample=False)` gives with the stop
    tokens as its `eos_token_id`. What all rows begin with is computed once, unless the model has a graph, recurrent
    layers, or windows and rows of several lengths.

    Args:
        input_ids: rows of one length, or of several as lists.

    Raises:
        ValueError: no rows, an empty one, `max_tokens` below 1, more tokens than the model's context has, or a model
            that is no decoder.
    """
    rows = [torch.as_tensor(row, dtype=torch.long) for row in input_ids]
    if not rows or not all(len(row) for row in rows) or max_tokens < 1:
        raise ValueError(
            "give at least one row, each with a token, and max_tokens of 1 or more: got rows of "
            f"{[len(row) for row in rows]} tokens and max_tokens={max_tokens}"
        )
    _check(model, max(map(len, rows)) + max_tokens - 1)
    out: list[list[int]] = [[] for _ in rows]
    with evaluating(model):
        cache, ids, mask = _behind_common(model, rows)
        stop = torch.tensor(list(stop_tokens), dtype=torch.long, device=ids.device)
        alive = torch.ones(len(rows), dtype=torch.bool, device=ids.device)
        with _prompts_end(model, mask):
            for _ in range(max_tokens):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                passed = model(
                    input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                )
                ids = passed.logits[:, -1].argmax(-1, keepdim=True)
                alive = alive & ~torch.isin(ids[:, 0], stop)
                for row, token, going in zip(out, ids[:, 0].tolist(), alive.tolist(), strict=True):
                    row += [token] if going else []
                if not alive.any():
                    break
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
    return out


@torch.no_grad()
def score_labels(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Message]],
    labels: Sequence[str],
    *,
    normalise: bool = False,
    answer: str = " {y}",
    batch_size: int = 32,
) -> Float[Tensor, "prompts labels"]:
    """Log p(label | prompt), in nats; what all prompts begin with, such as examples, is computed once.

    Args:
        labels: such as the names of classes.
        normalise: divides by the number of the label's tokens, so that longer labels are not at a disadvantage.
        answer: how a label stands behind a text; behind a conversation it stands alone.
        batch_size: continuations a pass.

    Raises:
        ValueError: no prompts or labels, a label without tokens, a prompt over the model's context, or a model that
            is no decoder.
    """
    asked = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    forms = [answer if isinstance(prompt, str) else "{y}" for prompt in prompts]
    ends = {
        (form, y): tokenizer(form.format(y=y), add_special_tokens=False)["input_ids"] for form in forms for y in labels
    }
    if not asked or not labels or not all(ends.values()):  # type: ignore[arg-type]
        raise ValueError(
            f"give at least one prompt, and labels with a token each: got {len(asked)} prompts, {labels!r}"
        )
    rows = [torch.tensor([*ids, *ends[form, y]]) for ids, form in zip(asked, forms, strict=True) for y in labels]  # type: ignore[misc]
    _check(model, max(map(len, rows)))
    starts = [len(ids) for ids in asked for _ in labels]
    common = min(_common(rows), min(starts) - 1) if _carries(model) else 0
    scores: list[Tensor] = []
    with evaluating(model):
        cache = _cache_of(model, rows[0][:common])
        for first in range(0, len(rows), batch_size):
            some, prompts_of = rows[first : first + batch_size], starts[first : first + batch_size]
            log_p = _log_probabilities(model, cache, [row[common:] for row in some], [n - common for n in prompts_of])
            scores += [
                own[start - 1 - common : len(row) - 1 - common]
                for own, row, start in zip(log_p, some, prompts_of, strict=True)
            ]
    return torch.stack([own.mean() if normalise else own.sum() for own in scores]).view(len(asked), len(labels))


def _log_probabilities(
    model: Any, cache: DynamicCache, rows: Sequence[Int[Tensor, " tokens"]], prompts: Sequence[int]
) -> Float[Tensor, "rows columns-1"]:
    """Of every token behind the first, given the cache and what comes before it in its row."""
    ids = pad_sequence(list(rows), batch_first=True).to(model.device)
    columns = torch.arange(ids.shape[1], device=ids.device)
    real, prompt = (columns < torch.tensor(n, device=ids.device)[:, None] for n in ([len(r) for r in rows], prompts))
    mask = torch.cat([real.new_ones(len(rows), cache.get_seq_length()), real], 1).long()
    # a graph has to be told where the prompt ends
    given = {"prompt_mask": prompt} if isinstance(model, InterventionModel) else {}
    logits = model(input_ids=ids, attention_mask=mask, past_key_values=_repeated(cache, len(rows)), **given).logits
    return logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].cpu()


def _behind_common(
    model: Any, rows: Sequence[Int[Tensor, " tokens"]]
) -> tuple[DynamicCache, Int[Tensor, "rows rest"], Int[Tensor, "rows columns"]]:
    """A cache of what all rows begin with, the rests, padded at the left, and which of all columns are real."""
    carries = _carries(model, padded=len(set(map(len, rows))) > 1)
    common = min(_common(rows), min(map(len, rows)) - 1) if carries else 0
    rests = [row[common:] for row in rows]
    ids = pad_sequence(rests, batch_first=True, padding_side="left").to(model.device)
    real = pad_sequence([torch.ones_like(row) for row in rests], batch_first=True, padding_side="left").to(model.device)
    cache = _repeated(_cache_of(model, rows[0][:common]), len(rows))
    return cache, ids, torch.cat([real.new_ones(len(rows), common), real], 1)


def _prompts_end(model: Any, real: Int[Tensor, "rows columns"]) -> AbstractContextManager:
    """Within, the nodes of a graph know that what is there now is the prompt."""
    if not isinstance(model, InterventionModel):
        return nullcontext()
    return model.tuner.layer.generating(real.bool(), real.bool())


def _check(model: Any, tokens: int) -> None:
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"answers are read from a decoder with an output layer, such as AutoModelForCausalLM loads, and this "
            f"{model.config.model_type} is none: take another model, or fine-tune this one"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"a prompt and its answer take {tokens} tokens, over the model's context of {limit}: shorten the prompt, "
            "such as by icl_prompts(…, tokenizer=…, budget=…)"
        )


def _carries(model: Any, padded: bool = False) -> bool:
    """Whether the model goes on from a cache as if there were none; with padding behind it, if `padded`."""
    layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
    # a window would count the padding, and states of recurrent layers are for the next token alone
    able = {DynamicLayer} if padded else {DynamicLayer, DynamicSlidingWindowLayer}
    return not isinstance(model, InterventionModel) and layers <= able


def _common(rows: Sequence[Int[Tensor, " tokens"]]) -> int:
    """How many tokens all rows begin with."""
    columns = zip(*(row.tolist() for row in rows), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _cache_of(model: Any, ids: Int[Tensor, " tokens"]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    if len(ids):
        model(input_ids=ids[None].to(model.device), past_key_values=cache, use_cache=True)
    return cache


def _repeated(cache: DynamicCache, rows: int) -> DynamicCache:
    cache = copy.deepcopy(cache)
    if cache.get_seq_length():
        cache.batch_repeat_interleave(rows)
    return cache
