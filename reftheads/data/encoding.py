"""From text to rows.

A row is a dict of lists: `input_ids`, `attention_mask`, `labels` with -100 wherever nothing is to be learnt, and
`prompt_mask`, which says where the prompt is. Prompt and answer are tokenised apart, so that a prompt has the same
tokens in training and in generation, and the answer's are those of a text that goes on after another.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from reftheads.graph.intervention import IGNORE

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
    """Encode every prompt with its answer as one row, of which the answer is learnt.

    Args:
        tokenizer: of the model that is trained.
        prompts: tokenised with the tokenizer's special tokens, such as BOS.
        answers: tokenised without them, exactly as they are: most need a space at their beginning.
        add_eos: ends each answer with the tokenizer's EOS token.
        max_length: cuts longer rows at the left of the prompt, never in the answer, and warns how many. Left out, a row
            that is longer than the tokenizer's `model_max_length` is an error.

    Returns:
        One row per prompt: `input_ids`, `attention_mask`, `labels`, `prompt_mask`.

    Raises:
        ValueError: no pairs, or numbers of prompts and answers that differ; an answer without tokens or
            longer than `max_length`; a row that is longer than the model takes.

    Example:
        ```python
        >>> import reftheads as rh
        >>> _, tokenizer = rh.load_base("tiny-chat")
        >>> (row,) = rh.encode_pairs(tokenizer, ["Do you like dogs?"], [" Yes."])
        >>> tokenizer.decode([label for label in row["labels"] if label != -100])
        ' Yes.<|end|>'
        ```
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
    return _rows(tokenizer, prompt_ids, [[[*ids, *end]] for ids in answer_ids], max_length)  # type: ignore[arg-type]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    turns: Literal["last", "all"] = "last",
    max_length: int | None = None,
) -> list[dict[str, list[int]]]:
    """Encode every conversation as one row by the tokenizer's chat template; learnt is its last answer, or all of them.

    The prompt is all that comes before the first answer that is learnt, up to and with the template's start of an
    assistant's turn, just as `apply_chat_template(…, add_generation_prompt=True)` gives it to `generate`.

    With `turns="all"`, a node at the prompt's end therefore acts before the first answer, where it reaches all of them;
    in a later turn of a conversation, `generate` has a longer prompt, and the node acts at the end of that. To train it
    there, give each conversation once per answer, cut behind it: `[turns[: i + 1] for i in range(1, len(turns), 2)]`.

    Args:
        tokenizer: of the model that is trained.
        conversations: each ends with a message of the role "assistant".
        turns: which answers are learnt: those of all messages of the role "assistant", or the last.
        max_length: as in `encode_pairs`.

    Returns:
        One row per conversation: `input_ids`, `attention_mask`, `labels`, `prompt_mask`.

    Raises:
        ValueError: a tokenizer without chat template, no conversations, one that does not end with an answer, has a
            message that says nothing or is longer than the model takes, or, for all turns, one that the template
            writes otherwise once it goes on.

    Example:
        ```python
        >>> import reftheads as rh
        >>> _, tokenizer = rh.load_base("tiny-chat")
        >>> question, answer = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}
        >>> (row,) = rh.encode_chat(tokenizer, [[question, answer]])
        >>> tokenizer.decode([label for label in row["labels"] if label != -100])
        'Hello!<|end|>'
        >>> (row,) = rh.encode_chat(tokenizer, [[question, answer, question, answer]], turns="all")
        >>> tokenizer.decode([label for label in row["labels"] if label != -100])
        'Hello!<|end|>Hello!<|end|>'
        ```
    """
    if turns not in ("last", "all"):
        raise ValueError(f"turns must be 'last' or 'all', got {turns!r}")
    if not tokenizer.chat_template:
        raise ValueError(
            "this tokenizer has no chat template: load a chat model, give its tokenizer a chat_template, or use "
            "encode_pairs with prompts of your own form"
        )
    if not conversations:
        raise ValueError("no conversations to encode: give at least one")
    prompts, rests = [], []
    for conversation in conversations:
        messages = list(conversation)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(
                "a conversation must be a question at least and end with an answer of the role 'assistant', "
                f"got {messages!r}"
            )
        _check_messages(messages)
        prompt, *rest = _last_turn(tokenizer, messages) if turns == "last" else _all_turns(tokenizer, messages)
        prompts.append(prompt)
        rests.append(rest)
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    rest_ids = iter(encode_continuations(tokenizer, [text for rest in rests for text in rest]))
    return _rows(tokenizer, prompt_ids, [[next(rest_ids) for _ in rest] for rest in rests], max_length)  # type: ignore[arg-type]


def _check_messages(messages: Sequence[Message]) -> None:
    """Raise `ValueError` for a message that says nothing, and calls no tool instead."""
    for i, message in enumerate(messages):
        if not message.get("content") and not message.get("tool_calls"):
            raise ValueError(f"message {i} of a conversation says nothing: {message!r}: leave that conversation out")


def _last_turn(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[str]:
    """Return what comes before the last answer, and the answer."""
    *before, last = messages
    prompt, whole = _rendered(tokenizer, before, True), _rendered(tokenizer, messages, False)
    # a template that rewrites earlier turns once there is an answer has no common beginning
    answer = whole[len(prompt) :] if whole.startswith(prompt) else f"{last['content']}{tokenizer.eos_token or ''}"
    return [prompt, answer.rstrip("\n")]


def _all_turns(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[str]:
    """Return what comes before the first answer, that answer, what comes before the next, and so on."""
    pieces, done = [], ""
    for i in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
        for text in (_rendered(tokenizer, messages[:i], True), _rendered(tokenizer, messages[: i + 1], False)):
            if not text.startswith(done):
                raise ValueError(
                    f"this chat template writes a conversation otherwise once message {i} is there, so that one row "
                    "cannot hold all of its turns as generation has them: give each conversation once per answer, "
                    "cut behind it, with turns='last'"
                )
            pieces.append(text[len(done) :].rstrip("\n") if len(pieces) % 2 else text[len(done) :])
            done += pieces[-1]
    return pieces


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool) -> str:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    assert isinstance(text, str)
    return text


def encode_continuations(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts that go on after others: without special tokens, and without the space that SentencePiece adds.

    SentencePiece's tokenizers put a space before every text that they are given; after a line break they do not.

    Returns:
        The token ids of each text.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.data import encode_continuations
        >>> _, tokenizer = rh.load_base("tiny-chat")
        >>> tokenizer.batch_decode(encode_continuations(tokenizer, [" dogs", "s"]))
        [' dogs', 's']
        ```
    """

    def encode(text: Any) -> Any:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    line_break = encode("\n")
    continuations = []
    for text, ids in zip(texts, encode([f"\n{text}" for text in texts]), strict=True):
        # a tokenizer may make one token of the line break and what follows
        apart = ids[: len(line_break)] == line_break
        continuations.append(ids[len(line_break) :] if apart else encode(text))
    return continuations


def encode_preferences(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[Message]],
    chosen: Sequence[str],
    rejected: Sequence[str],
    *,
    target: str = "preference",
    max_length: int | None = None,
) -> list[list[dict[str, Any]]]:
    """Encode every prompt with the answer that was chosen, and with the one that was not, for the loss `bradley_terry`.

    A pair is one item of a dataset, which `Collator` puts into one batch. The target of its rows is k and -k, with k
    counted from 1.0; there are no labels, so that a head at `l1` reads the last token of the answer.

    Args:
        tokenizer: of the model that is trained.
        prompts: texts, or conversations for the tokenizer's chat template.
        chosen, rejected: one answer of each kind per prompt.
        target: name of the column.
        max_length: as in `encode_pairs`.

    Returns:
        One pair of rows per prompt: `input_ids`, `attention_mask` and the target.

    Raises:
        ValueError: as by `encode_pairs` and `encode_chat`; numbers of prompts and answers that differ.

    Example:
        ```python
        >>> import reftheads as rh
        >>> _, tokenizer = rh.load_base("tiny-chat")
        >>> pairs = rh.encode_preferences(tokenizer, ["2 + 2 =", "1 + 1 ="], [" 4", " 2"], [" 5", " 3"])
        >>> [[row["preference"] for row in pair] for pair in pairs]
        [[1.0, -1.0], [2.0, -2.0]]
        ```
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


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    rests: list[list[list[int]]],
    max_length: int | None,
) -> list[dict[str, list[int]]]:
    """Join prompts with what follows, and cut prompts at the left where a row is too long.

    Args:
        rests: of each row an answer, which is learnt; what comes before the next, which is not; and so on.
    """
    rows, cut = [], 0
    for prompt, rest in zip(prompts, rests, strict=True):
        if not all(rest[::2]):
            raise ValueError("an answer has no tokens, so there is nothing to learn from it: leave that pair out")
        length = sum(map(len, rest))
        if max_length is None and len(prompt) + length > tokenizer.model_max_length:
            raise ValueError(
                f"row {len(rows)} has {len(prompt) + length} tokens, and the model takes {tokenizer.model_max_length}: "
                "give max_length to cut prompts at the left, or leave that row out"
            )
        if max_length is not None and len(prompt) + length > max_length:
            if length >= max_length:
                raise ValueError(
                    f"an answer of {length} tokens leaves no room for its prompt in max_length={max_length}"
                )
            prompt = prompt[len(prompt) + length - max_length :]
            cut += 1
        labels = [ids if i % 2 == 0 else [IGNORE] * len(ids) for i, ids in enumerate(rest)]
        rows.append(
            {
                "input_ids": list(chain(prompt, *rest)),
                "attention_mask": [1] * (len(prompt) + length),
                "labels": [IGNORE] * len(prompt) + list(chain(*labels)),
                "prompt_mask": [1] * len(prompt) + [0] * length,
            }
        )
    if cut:
        warnings.warn(
            f"cut the prompts of {cut} of {len(rows)} rows at the left to max_length={max_length}", stacklevel=3
        )
    return rows
