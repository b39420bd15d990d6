"""Training an adapter on a few demonstrations, with news of how far it is."""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments

from reftheads.adapter.model import InterventionModel
from reftheads.data.encoding import encode_chat, encode_pairs
from reftheads.reuse.store import ActivationStore
from reftheads.training.trainer import InterventionTrainer

_BATCH = 16
_ANY = 1 << 30  # tokens: a session says in its own words what is too long


class Demonstration(NamedTuple):
    """A question, and how it is to be answered."""

    question: str
    answer: str


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration]
) -> list[dict[str, Any]]:
    """Return the rows to train on: conversations where the tokenizer has a template for them, else bare texts."""
    if not tokenizer.chat_template:
        return encode_pairs(tokenizer, *map(list, zip(*demonstrations, strict=True)), max_length=_ANY)
    roles = ("user", "assistant")
    turns = [[{"role": r, "content": text} for r, text in zip(roles, pair, strict=True)] for pair in demonstrations]
    return encode_chat(tokenizer, turns, max_length=_ANY)


def train(
    model: InterventionModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    store: ActivationStore,
    *,
    steps: int,
    learning_rate: float,
) -> Iterator[int]:
    """Train the adapters that act, and yield how many steps are done. Whoever stops iterating stops the training.

    Args:
        store: keeps what the frozen model computes, for the next training too.

    Raises:
        Exception: what training raised.
    """
    news: queue.Queue[Any] = queue.Queue()
    watch = _Watch(news)
    with tempfile.TemporaryDirectory() as unused:
        args = TrainingArguments(
            unused,
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=min(len(rows), _BATCH),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=model.device.type == "cpu",
        )
        trainer = InterventionTrainer(
            model, args, train_dataset=rows, processing_class=tokenizer, reuse=store, callbacks=[watch]
        )
        trainer.remove_callback(PrinterCallback)
        thread = threading.Thread(target=_run, args=(trainer, news), daemon=True)
        thread.start()
        try:
            while isinstance(step := news.get(), int):
                yield step
            if step is not None:
                raise step
        finally:
            watch.stopped = True
            thread.join()
            model.eval()


def _run(trainer: InterventionTrainer, news: queue.Queue[Any]) -> None:
    try:
        trainer.train()
        news.put(None)
    except Exception as error:
        news.put(error)


class _Watch(TrainerCallback):
    def __init__(self, news: queue.Queue[Any]):
        self.news, self.stopped = news, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.news.put(state.global_step)
        control.should_training_stop |= self.stopped
