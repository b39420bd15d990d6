"""Answers while they are written: several ways of asking one model at the same time, each in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

_HALF = "\N{REPLACEMENT CHARACTER}"  # a letter of which not all tokens are there yet


class Way(NamedTuple):
    """A way of asking.

    Attributes:
        entering: makes the block within which the model is called. It is entered by the thread that calls, since what
            it says holds for that thread alone.
        prompt: what `generate` goes on with: one row.
        max_new_tokens: of the answer.
    """

    entering: Callable[[], AbstractContextManager]
    prompt: BatchEncoding
    max_new_tokens: int


def stream(model: Any, tokenizer: PreTrainedTokenizerBase, ways: Sequence[Way]) -> Iterator[list[str]]:
    """Yield the answers so far, whenever one of them has grown; the last time, all of them are complete.

    Whoever stops iterating stops the model.

    Raises:
        Exception: what generating raised.
    """
    news: queue.Queue[tuple[int, Any]] = queue.Queue()
    stopped = threading.Event()
    threads = [
        threading.Thread(
            target=_generate, args=(model, way, _Writer(tokenizer, i, news), _Stopped(stopped)), daemon=True
        )
        for i, way in enumerate(ways)
    ]
    for thread in threads:
        thread.start()
    answers, running = [""] * len(ways), len(ways)
    try:
        while running:
            number, what = news.get()
            if isinstance(what, Exception):
                raise what
            if what is None:
                running -= 1
            elif what != answers[number]:
                answers[number] = what
                yield list(answers)
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def _generate(model: Any, way: Way, writer: _Writer, stopped: _Stopped) -> None:
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "pad_token_id": writer.tokenizer.pad_token_id}
    options |= {"max_new_tokens": way.max_new_tokens, "streamer": writer, "stopping_criteria": [stopped]}
    try:
        with way.entering(), torch.no_grad():
            model.generate(**way.prompt.to(model.device), **options)
    except Exception as error:
        writer.news.put((writer.number, error))
    writer.news.put((writer.number, None))


class _Writer(BaseStreamer):
    """What tells of the answer at every token; its text is decoded as a whole, so that it ends as `reply` gives it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, number: int, news: queue.Queue[tuple[int, Any]]):
        self.tokenizer, self.number, self.news = tokenizer, number, news
        self.tokens: list[int] | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt at first, and then token after token."""
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += value.flatten().tolist()
        self.news.put((self.number, self._text().rstrip(_HALF)))

    def end(self) -> None:
        """Tell of the whole answer."""
        self.news.put((self.number, self._text()))

    def _text(self) -> str:
        text = self.tokenizer.decode(self.tokens or [], skip_special_tokens=True)
        assert isinstance(text, str)
        return text.strip()


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
