"""Talking to a model: one answer to each of many conversations, or a conversation in the terminal."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from transformers import BatchEncoding, PreTrainedTokenizerBase

from reftheads._utils.eval_mode import evaluating
from reftheads.data.encoding import Message


def reply(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[str | Sequence[Message]],
    *,
    batch_size: int = 32,
    **generate: Any,
) -> list[str]:
    """Return the model's answers, in order.

    Args:
        conversations: each a list of messages that ends with the user's, or just what the user says.
            A tokenizer without chat template gets the text of the only message as it is.
        batch_size: conversations that are answered at the same time.
        generate: goes to `model.generate`; left out, greedy and at most 64 new tokens.

    Raises:
        ValueError: a text instead of a list; several messages for a tokenizer without chat template.

    Example:
        ```python
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> rh.reply(base, tokenizer, ["Tell me about owls.", "Tell me about bread."], max_new_tokens=6)
        ['Owls are birds that', 'Bread is baked from']
        ```
    """
    generate = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": tokenizer.pad_token_id, **generate}
    if isinstance(conversations, str):
        raise ValueError(f"reply takes a list of conversations, got the text {conversations!r}: put it into a list")
    starts = range(0, len(conversations), batch_size)
    # what cannot be asked is an error before anything is answered
    batches = [encode_questions(tokenizer, conversations[start : start + batch_size]) for start in starts]
    answers: list[str] = []
    for batch in batches:
        batch = batch.to(model.device)
        with torch.no_grad(), evaluating(model):
            ids = model.generate(**batch, **generate)
        if not model.config.is_encoder_decoder:
            ids = ids[:, batch["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def encode_questions(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[str | Sequence[Message]]
) -> BatchEncoding:
    """Return what `generate` takes, so that each conversation goes on with the model's answer: padded at the left."""
    return tokenizer(
        [_prompt(tokenizer, conversation) for conversation in conversations],
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=not tokenizer.chat_template,
        return_token_type_ids=False,
    )


def _prompt(tokenizer: PreTrainedTokenizerBase, conversation: str | Sequence[Message]) -> str:
    messages = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else list(conversation)
    if not tokenizer.chat_template:
        if len(messages) > 1:
            raise ValueError(
                f"this tokenizer has no chat template, which would make one text of {len(messages)} messages: load a "
                "chat model, give its tokenizer a chat_template, or write the text yourself and give that alone"
            )
        return messages[0]["content"]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)  # type: ignore[arg-type]
    assert isinstance(text, str)
    return text


def chat(model: Any, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, **generate: Any) -> None:
    """Talk to a model in the terminal; an empty line ends the conversation.

    `/base` switches the intervention off and on again, `/new` forgets what was said.

    Args:
        system: a system message to begin with.
        generate: goes to `model.generate`, as in `reply`.

    Raises:
        ValueError: a tokenizer without chat template.

    Example:
        ```python
        >>> from unittest.mock import patch
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> with patch("builtins.input", side_effect=["Tell me about owls.", ""]):  # what somebody types
        ...     rh.chat(base, tokenizer, max_new_tokens=6)
        An empty line ends the chat; ...
        you model Owls are birds that
        you
        ```
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "this tokenizer has no chat template, so that nothing would tell turns apart: load a chat model, such as "
            '"smollm2-135m", give its tokenizer a chat_template, or use reply, which takes texts as they are'
        )
    console = Console()
    console.print(
        "[dim]An empty line ends the chat; /base switches the intervention off and on, /new starts afresh.[/]"
    )
    opening = [{"role": "system", "content": system}] if system else []
    messages, with_base = list(opening), False
    while True:
        try:
            said = console.input("[bold cyan]you[/]   ").strip()
        except (EOFError, KeyboardInterrupt):
            said = ""
        if not said:
            return
        if said == "/new":
            messages = list(opening)
        elif said == "/base":
            with_base = not with_base
            console.print(f"[dim]the {'base model' if with_base else 'intervention'} answers now[/]")
        else:
            messages.append({"role": "user", "content": said})
            if with_base:
                with model.disable_adapter():
                    answer = reply(model, tokenizer, [messages], **generate)[0]
            else:
                answer = reply(model, tokenizer, [messages], **generate)[0]
            messages.append({"role": "assistant", "content": answer})
            console.print(f"[bold magenta]{'base ' if with_base else 'model'}[/]", end=" ")
            console.print(answer, highlight=False, markup=False, emoji=False)
