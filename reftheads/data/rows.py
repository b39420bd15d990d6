"""From text to rows, and from rows to padded batches.

A row is a dict of lists: `input_ids`, `attention_mask`, `labels` with -100 wherever nothing is to be
learnt, and `prompt_mask`, which says where the prompt is. Prompt and answer are tokenised apart, so that
the prompt's tokens in training are those of generation, and the answer as what goes on behind a text.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from reftheads.graph.node import IGNORE

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped

_INPUTS = ("input_ids", "attention_mask", "prompt_mask", "token_type_ids", "position_ids")

Row = Mapping[str, Any]
Message = dict[str, str]
"""A turn of a conversation: `{"role": "user", "content": "…"}`."""


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    add_eos: bool = True,
    max_length: int | None = None,
) -> list[dict[str, list[int]]]:
    """One row for every prompt with its answer; the answer is what is learnt.

    Args:
        prompts: tokenised with the tokenizer's special tokens, such as BOS.
        answers: tokenised without them, and just as they go on: most need a space at their beginning.
        add_eos: ends each answer with the tokenizer's EOS token.
        max_length: cuts longer rows at the left of the prompt, never in the answer, and warns how many.

    Raises:
        ValueError: no pairs, or numbers of prompts and answers that differ; an answer without tokens or
            longer than `max_length`.
    """
    if isinstance(prompts, str) or isinstance(answers, str):
        raise ValueError("encode_pairs takes lists of prompts and answers, got a text: put each into a list")
    prompts, answers = list(prompts), list(answers)
    if len(prompts) != len(answers):
        raise ValueError(f"every prompt needs its answer: got {len(prompts)} prompts and {len(answers)} answers")
    if not prompts:
        raise ValueError("no pairs to encode: give at least one prompt and its answer")
    end = [tokenizer.eos_token_id] if add_eos and tokenizer.eos_token_id is not None else []
    prompt_ids = tokenizer(prompts)["input_ids"]
    answer_ids = encode_continuations(tokenizer, answers)
    return _rows(prompt_ids, [[*ids, *end] for ids in answer_ids], max_length)  # type: ignore[arg-type]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    max_length: int | None = None,
) -> list[dict[str, list[int]]]:
    """One row for every conversation, by the tokenizer's chat template; the last answer is what is learnt.

    The prompt is all before it, up to and with the template's start of an assistant's turn, just as
    `apply_chat_template(…, add_generation_prompt=True)` gives it to `generate`.

    Args:
        conversations: each ends with a message of the role "assistant".
        max_length: as in `encode_pairs`.

    Raises:
        ValueError: a tokenizer without chat template, no conversations, or one that does not end with
            an answer.
    """
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: use encode_pairs with prompts of your own form")
    if not conversations:
        raise ValueError("no conversations to encode: give at least one")
    prompts, answers = [], []
    for conversation in conversations:
        messages = list(conversation)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(
                "a conversation must be a question at least and end with an answer of the role 'assistant', "
                f"got {messages!r}"
            )
        *before, last = messages
        prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert isinstance(prompt, str) and isinstance(whole, str)
        # a template that rewrites earlier turns once there is an answer has no common beginning
        answer = whole[len(prompt) :] if whole.startswith(prompt) else f"{last['content']}{tokenizer.eos_token or ''}"
        prompts.append(prompt)
        answers.append(answer.rstrip("\n"))
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return _rows(prompt_ids, encode_continuations(tokenizer, answers), max_length)  # type: ignore[arg-type]


def encode_continuations(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts that go on behind others, without special tokens.

    SentencePiece's tokenizers put a space before every text that they are given; behind a line break they do not.
    """

    def encode(some: Any) -> Any:
        return tokenizer(some, add_special_tokens=False)["input_ids"]

    before = encode("\n")
    behind = encode([f"\n{text}" for text in texts])
    # a tokenizer may make one token of the line break and what follows
    return [
        ids[len(before) :] if ids[: len(before)] == before else encode(text)
        for ids, text in zip(behind, texts, strict=True)
    ]


def _rows(prompts: list[list[int]], answers: list[list[int]], max_length: int | None) -> list[dict[str, list[int]]]:
    rows, cut = [], 0
    for prompt, answer in zip(prompts, answers, strict=True):
        if not answer:
            raise ValueError("an answer has no tokens, so there is nothing to learn from it: leave that pair out")
        if max_length is not None and len(prompt) + len(answer) > max_length:
            if len(answer) >= max_length:
                raise ValueError(
                    f"an answer of {len(answer)} tokens leaves no room for its prompt in max_length={max_length}"
                )
            prompt = prompt[len(prompt) + len(answer) - max_length :]
            cut += 1
        rows.append(
            {
                "input_ids": prompt + answer,
                "attention_mask": [1] * (len(prompt) + len(answer)),
                "labels": [IGNORE] * len(prompt) + answer,
                "prompt_mask": [1] * len(prompt) + [0] * len(answer),
            }
        )
    if cut:
        warnings.warn(
            f"cut the prompts of {cut} of {len(rows)} rows at the left to max_length={max_length}", stacklevel=3
        )
    return rows


def encode_preferences(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[Message]],
    chosen: Sequence[str],
    rejected: Sequence[str],
    *,
    target: str = "preference",
    max_length: int | None = None,
) -> list[list[dict[str, Any]]]:
    """Pairs of rows for the loss `bradley_terry`: each prompt with the answer that was chosen, and with the other one.

    A pair is one item of a dataset, which `Collator` puts into one batch. The target of its rows is k and -k, with k
    counted from 1.0; there are no labels, so that a head at `l1` reads the last token of the answer.

    Args:
        prompts: texts, or conversations for the tokenizer's chat template.
        target: name of the column.
        max_length: as in `encode_pairs`.

    Raises:
        ValueError: as by `encode_pairs` and `encode_chat`; numbers of prompts and answers that differ.
    """
    if not len(prompts) == len(chosen) == len(rejected):
        raise ValueError(
            f"every prompt needs an answer that was chosen and one that was rejected: got {len(prompts)} prompts, "
            f"{len(chosen)} and {len(rejected)} answers"
        )

    def rows(answers: Sequence[str], sign: int) -> list[dict[str, Any]]:
        if all(isinstance(prompt, str) for prompt in prompts):
            encoded = encode_pairs(tokenizer, prompts, answers, max_length=max_length)  # type: ignore[arg-type]
        else:
            turns = [[*p, {"role": "assistant", "content": a}] for p, a in zip(prompts, answers, strict=True)]
            encoded = encode_chat(tokenizer, turns, max_length=max_length)  # type: ignore[arg-type]
        return [
            {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], target: float(sign * k)}
            for k, row in enumerate(encoded, 1)
        ]

    return [list(pair) for pair in zip(rows(chosen, 1), rows(rejected, -1), strict=True)]


def mix(
    tasks: Mapping[str, Sequence[Row]],
    weights: Mapping[str, float] | None = None,
    *,
    temperature: float = 1.0,
    length: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The rows of several tasks as one dataset, each task with its share; targets of other tasks are missing.

    A task that has fewer rows than its share repeats them, all of them equally often but for one; of a task that has
    more, some are left out.

    Args:
        tasks: rows by the name of their task.
        weights: shares of the tasks, in proportion; left out, the numbers of rows to the power of 1/temperature
            (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.5.2).
        temperature: 1 is in proportion to the numbers of rows; the higher, the more equal the shares.
        length: how many rows there are to be; left out, as many as all tasks have.
        seed: of the order, and of the choice of rows.

    Raises:
        ValueError: no tasks, a task without rows, weights that are not positive or not those of the tasks, pairs.
    """
    if any(not isinstance(row, Mapping) for rows in tasks.values() for row in rows):
        raise ValueError("mix takes rows, not pairs of rows: train a task of preferences alone")
    if not tasks or not all(len(rows) for rows in tasks.values()):
        raise ValueError(f"give at least one task, and rows for each: got { ({t: len(r) for t, r in tasks.items()}) }")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    weights = weights or {task: len(rows) ** (1 / temperature) for task, rows in tasks.items()}
    if weights.keys() != tasks.keys() or not all(weight > 0 for weight in weights.values()):
        raise ValueError(f"weights must give a positive number to each of {', '.join(tasks)}, got {dict(weights)}")
    length = sum(map(len, tasks.values())) if length is None else length
    shares = list(accumulate(weights[task] for task in tasks))
    ends = [round(length * share / shares[-1]) for share in shares]
    order = random.Random(seed)
    chosen: list[Row] = []
    for rows, end in zip(tasks.values(), ends, strict=True):
        while len(chosen) < end:
            chosen += order.sample(list(rows), min(len(rows), end - len(chosen)))
    order.shuffle(chosen)
    return complete(chosen)


def complete(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with all columns that any of them has; what a row lacks, or has as `None`, is no target there.

    That is -100, or NaN if any of the column's numbers is a float, in the shape that it has in other rows. Masks that
    are missing say that all tokens are real, and prompt up to the first label.

    Raises:
        ValueError: a column of the input, such as `token_type_ids`, that only some rows have.
    """
    columns: dict[str, list[tuple[Any, int]]] = {}  # every value with its row's number of tokens
    for row in rows:
        for name, value in row.items():
            if value is not None:
                columns.setdefault(name, []).append((value, len(row["input_ids"])))
    absent = {name: _absent(name, given) for name, given in columns.items() if len(given) < len(rows)}
    return [{name: absent[name](row) if row.get(name) is None else row[name] for name in columns} for row in rows]


def _absent(name: str, given: Sequence[tuple[Any, int]]) -> Callable[[Row], Any]:
    """What stands for no target in a row, by the values that other rows have, with their numbers of tokens."""
    if name == "prompt_mask":
        return lambda row: prompt_mask([IGNORE] * len(row["input_ids"]) if row.get("labels") is None else row["labels"])
    if name == "attention_mask":
        return lambda row: [1] * len(row["input_ids"])
    if name in _INPUTS:
        raise ValueError(f"some rows have {name!r} and some do not: give it to all of them, or to none")
    if isinstance(given[0][0], str):
        return lambda row: None
    values = [torch.as_tensor(value) for value, _ in given]
    none: float = float("nan") if any(value.is_floating_point() for value in values) else IGNORE
    if not values[0].ndim:
        return lambda row: none
    by_token = all(len(value) == tokens for value, (_, tokens) in zip(values, given, strict=True))
    count, *width = values[0].shape
    return lambda row: torch.full([len(row["input_ids"]) if by_token else count, *width], none).tolist()


def prompt_mask(labels: Sequence[int]) -> list[int]:
    """1 up to the first label of a row, then 0."""
    answer = next((i for i, label in enumerate(labels) if label != IGNORE), len(labels))
    return [1] * answer + [0] * (len(labels) - answer)


def flat(rows: Iterable[Any]) -> list[Any]:
    """The rows of a dataset, those of pairs one by one."""
    return [one for row in rows for one in (row if isinstance(row, list | tuple) else [row])]


@dataclass
class Collator:
    """Pads rows to a batch, on either side.

    `input_ids` are padded with the tokenizer's pad token, masks with 0, `labels` and other columns that
    run along the tokens with -100 (floats: NaN, which losses take for missing). Columns with one number
    a row become a vector, columns with another number than there are tokens, the same in every row, a matrix.
    Targets that some rows lack are filled by `complete`. An item that is a list of rows, such as a pair of
    `encode_preferences`, puts all of them into the batch.

    Args:
        tokenizer: for its pad token.
        padding_side: "right" or "left"; positions count real tokens, so that either is the same to them.
        pad_to_multiple_of: rounds the length up.

    Raises:
        ValueError: a tokenizer without pad token, or no rows.
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
        return {name: self._column(name, [row[name] for row in rows], length, counts) for name in rows[0]}

    def _column(self, name: str, values: list[Any], length: int, counts: list[int]) -> Shaped[Tensor, "batch ..."]:
        tensors = [torch.as_tensor(value) for value in values]
        alike = all(tensor.shape == tensors[0].shape for tensor in tensors)
        if tensors[0].ndim == 0 or (alike and any(len(t) != n for t, n in zip(tensors, counts, strict=True))):
            return torch.stack(tensors)
        fill: float = 0 if name in _INPUTS else IGNORE
        if name == "input_ids":
            fill = self.tokenizer.pad_token_id  # type: ignore[assignment]
        if tensors[0].is_floating_point():
            fill = float("nan")
        tensors.append(tensors[0].new_full((length, *tensors[0].shape[1:]), fill))  # type: ignore[arg-type]
        return pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=self.padding_side)[:-1]


def prompts_only(
    batch: Mapping[str, Shaped[Tensor, "batch ..."]], pad_token_id: int
) -> dict[str, Int[Tensor, "batch longest"]]:
    """The prompts of a batch, left-padded, as `generate` wants them: `input_ids`, `attention_mask`.

    The prompt is what `prompt_mask` marks, else the real tokens before the first label.
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
