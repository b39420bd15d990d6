"""Greedy answers and likelihoods of labels, with what prompts have in common computed once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from reftheads._utils.eval_mode import evaluating
from reftheads.architectures.structure import arguments
from reftheads.data.encoding import encode_continuations
from reftheads.fewshot.prompts import Prompt, encode_prompt
from reftheads.runtime.interventions import Interventions
from reftheads.runtime.lineage import PREPARED

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@torch.no_grad()
def greedy_sample(
    model: Any,
    input_ids: Int[Tensor, "rows columns"] | Sequence[Sequence[int]],
    stop_tokens: Sequence[int],
    max_tokens: int,
    *,
    batch_size: int = 32,
) -> list[list[int]]:
    """Take the most likely next token, again and again, and return the new tokens of each row.

    A row ends at a stop token, which is not returned, or after `max_tokens`. It is what
    `model.generate(do_sample=False)` gives with the stop tokens as its `eos_token_id`, and without penalties. What all
    rows begin with is computed once, unless the model has a graph, recurrent layers, or windows and rows of several
    lengths.

    Args:
        input_ids: rows of one length, or of several as lists.
        stop_tokens: ids of tokens that end a row.
        max_tokens: new tokens a row, at most.
        batch_size: rows that are answered at the same time.

    Raises:
        ValueError: no rows, an empty one, `max_tokens` below 1, more tokens than the model's context has, or a model
            that is no decoder.

    Example:
        ```python
        >>> import reftheads as rh
        >>> import reftheads.fewshot as fs
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> prompt = fs.encode_prompt(tokenizer, [{"role": "user", "content": "Tell me about owls."}])
        >>> answers = fs.greedy_sample(base, [prompt], [tokenizer.eos_token_id], max_tokens=6)
        >>> tokenizer.batch_decode(answers)
        ['Owls are birds that']
        ```
    """
    rows = [torch.as_tensor(row, dtype=torch.long) for row in input_ids]
    if not rows or not all(len(row) for row in rows) or min(max_tokens, batch_size) < 1:
        raise ValueError(
            "give at least one row, each with a token, and max_tokens and batch_size of 1 or more: got rows of "
            f"{[len(row) for row in rows]} tokens, max_tokens={max_tokens} and batch_size={batch_size}"
        )
    _check(model, max(map(len, rows)) + max_tokens - 1)
    carries = _carries(model, padded=len(set(map(len, rows))) > 1)
    common = min(_common(rows), min(map(len, rows)) - 1) if carries else 0
    stop = torch.tensor(list(stop_tokens), dtype=torch.long, device=model.device)
    out: list[list[int]] = []
    with evaluating(model):
        cache = _cache_of(model, rows[0][:common])
        for first in range(0, len(rows), batch_size):
            out += _greedy(model, cache, [row[common:] for row in rows[first : first + batch_size]], stop, max_tokens)
    return out


def _greedy(
    model: Any, begun: DynamicCache, rows: Sequence[Int[Tensor, " tokens"]], stop: Int[Tensor, " ids"], max_tokens: int
) -> list[list[int]]:
    """Return the new tokens of a batch of rows, given the cache of what comes before them."""
    ids = pad_sequence(list(rows), batch_first=True, padding_side="left").to(model.device)
    real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left").to(model.device)
    mask = torch.cat([real.new_ones(len(rows), begun.get_seq_length()), real], 1)
    alive, cache = torch.ones(len(rows), dtype=torch.bool, device=model.device), _repeated(begun, len(rows))
    out: list[list[int]] = [[] for _ in rows]
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True, **_last(model, 1)}
    if _interventions(model) is not None:
        options[PREPARED] = True
    # as generate does: a call of the PeftModel would be one of its own, no pass that goes on
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with _prompts_end(model, mask):
        for _ in range(max_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            passed = base(input_ids=ids, attention_mask=mask, position_ids=positions, **options)
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
    prompts: Sequence[Prompt],
    labels: Sequence[str],
    *,
    normalise: bool = False,
    answer: str = " {y}",
    batch_size: int = 32,
    max_length: int | None = None,
) -> Float[Tensor, "prompts labels"]:
    """Return log p(label | prompt) in nats.

    What all prompts begin with, such as examples, is computed once.

    Args:
        labels: such as the names of classes.
        normalise: divides by the number of the label's tokens, so that longer labels are not at a disadvantage.
        answer: how a label stands after a text; after a conversation it stands alone.
        batch_size: continuations a pass.
        max_length: cuts longer prompts at their left, so that they have so many tokens with the longest label.

    Raises:
        ValueError: no prompts or labels, one without tokens, a prompt over the model's context, or a model that is no
            decoder.

    Example:
        ```python
        >>> import reftheads as rh
        >>> import reftheads.fewshot as fs
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> prompts = [[{"role": "user", "content": f"Tell me about {word}."}] for word in ("bread", "owls")]
        >>> fs.score_labels(base, tokenizer, prompts, ["Owls are", "Bread is"]).argmax(1)
        tensor([1, 0])
        ```
    """
    if isinstance(prompts, str) or isinstance(labels, str):
        raise ValueError("score_labels takes lists of prompts and labels, got a text: put it into a list")
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    forms = [answer if isinstance(prompt, str) else "{y}" for prompt in prompts]
    ends = {form: encode_continuations(tokenizer, [form.format(y=y) for y in labels]) for form in set(forms)}
    if not encoded or not labels or not all(encoded) or not all(map(all, ends.values())):
        raise ValueError(
            "give at least one prompt and one label, each with a token: got prompts of "
            f"{[len(ids) for ids in encoded]} tokens and the labels {list(labels)!r}"
        )
    if max_length is not None:
        room = max_length - max(len(end) for of_form in ends.values() for end in of_form)
        if room < 1:
            raise ValueError(f"max_length={max_length} leaves no room for a prompt before the longest label")
        encoded = [ids[-room:] for ids in encoded]
    rows = [torch.tensor([*ids, *end]) for ids, form in zip(encoded, forms, strict=True) for end in ends[form]]
    _check(model, max(map(len, rows)))
    starts = [len(ids) for ids in encoded for _ in labels]
    common = min(_common(rows), min(starts) - 1) if _carries(model) else 0
    scores: list[Tensor] = []
    with evaluating(model):
        cache = _cache_of(model, rows[0][:common])
        for first in range(0, len(rows), batch_size):
            part = slice(first, first + batch_size)
            rests = [row[common:] for row in rows[part]]
            scores += _log_p_of_ends(model, cache, rests, [start - common for start in starts[part]])
    return torch.stack([score.mean() if normalise else score.sum() for score in scores]).view(len(encoded), len(labels))


def _log_p_of_ends(
    model: Any, cache: DynamicCache, rows: Sequence[Int[Tensor, " tokens"]], prompts: Sequence[int]
) -> list[Float[Tensor, " tokens"]]:
    """Return log p of every token after the prompts, given the cache and what comes before it in its row."""
    ids = pad_sequence(list(rows), batch_first=True).to(model.device)
    columns = torch.arange(ids.shape[1], device=ids.device)
    real, prompt = (columns < torch.tensor(n, device=ids.device)[:, None] for n in ([len(r) for r in rows], prompts))
    mask = torch.cat([real.new_ones(len(rows), cache.get_seq_length()), real], 1).long()
    count = ids.shape[1] - min(prompts) + 1
    options: dict[str, Any] = _last(model, count)
    if _interventions(model):  # a graph has to be told where the prompt ends
        options["prompt_mask"] = prompt
    passed = model(input_ids=ids, attention_mask=mask, past_key_values=_repeated(cache, len(rows)), **options)
    logits = passed.logits[:, -count:-1]  # of the first answer to begin, and on
    log_p = -F.cross_entropy(logits.float().mT, ids[:, min(prompts) :], reduction="none").cpu()
    ends = ((start - min(prompts), len(row) - min(prompts)) for row, start in zip(rows, prompts, strict=True))
    return [of_row[start:end] for of_row, (start, end) in zip(log_p, ends, strict=True)]


def _prompts_end(model: Any, real: Int[Tensor, "rows columns"]) -> AbstractContextManager:
    """Tell the nodes of a graph, for as long as it lasts, that what is there now is the prompt."""
    nodes = _interventions(model)
    return nodes.generating(real.bool(), real.bool()) if nodes else nullcontext()


def _interventions(model: Any) -> Interventions | None:
    return next((module for module in model.modules() if isinstance(module, Interventions)), None)


def _takes(model: Any, name: str) -> bool:
    return name in arguments(model.get_base_model() if isinstance(model, PeftModel) else model)


def _last(model: Any, count: int) -> dict[str, int]:
    """Return the argument that asks for the logits of the last columns alone, of models that take one."""
    return {"logits_to_keep": count} if _takes(model, "logits_to_keep") else {}


def _check(model: Any, tokens: int) -> None:
    if model.config.is_encoder_decoder or not model.can_generate() or not _takes(model, "past_key_values"):
        raise ValueError(
            "answers are read from a decoder with an output layer and a cache, such as AutoModelForCausalLM loads, and "
            f"this {model.config.model_type} is none: take another model, or fine-tune this one"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"a prompt and its answer take {tokens} tokens, over the model's context of {limit}: shorten the prompt, "
            "such as by icl_prompts(…, tokenizer=…, budget=…)"
        )


def _carries(model: Any, padded: bool = False) -> bool:
    """Say whether the model goes on from a cache as if there were none; with padding after it, if `padded`."""
    layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
    # a window would count the padding, and states of recurrent layers are for the next token alone
    able = {DynamicLayer} if padded else {DynamicLayer, DynamicSlidingWindowLayer}
    return _interventions(model) is None and layers <= able


def _common(rows: Sequence[Int[Tensor, " tokens"]]) -> int:
    """Count the tokens that all rows begin with."""
    columns = zip(*(row.tolist() for row in rows), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _cache_of(model: Any, ids: Int[Tensor, " tokens"]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    if len(ids):
        model(input_ids=ids[None].to(model.device), past_key_values=cache, use_cache=True, **_last(model, 1))
    return cache


def _repeated(cache: DynamicCache, rows: int) -> DynamicCache:
    cache = copy.deepcopy(cache)
    if cache.get_seq_length():
        cache.batch_repeat_interleave(rows)
    return cache
