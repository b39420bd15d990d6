"""Teach a chat model to answer in emoji, with a few examples and a few thousand numbers.

LoReFT learns a low-rank edit of hidden states from plain questions answered in emoji. None of them says that emoji
are wanted. The model is then asked about other topics in other words.

    python recipes/emoji_chat.py                                   # the embedded toy model
    python recipes/emoji_chat.py --chat                            # ... and talk to it afterwards
    python recipes/emoji_chat.py --model smollm2-135m              # a real one of 135 million parameters
    python recipes/emoji_chat.py --model smollm2-135m --compare    # ... beside LoRA, and examples in the prompt
    python recipes/emoji_chat.py --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --layers 12 --lr 4e-3
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from _common import (
    Watch,
    begin,
    command_line,
    progress,
    read_topics,
    trainable,
    trainer_arguments,
    write_json,
    write_text,
)
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import reftheads as rh


def main(
    model: str = "tiny-chat", layers: tuple[int, ...] | None = None, positions: str | None = None,
    rank: int | None = None, steps: int | None = None, lr: float | None = None, dtype: str | None = None,
    demonstrations: int | None = None, prompts: int = 120, seed: int = 0, threads: int | None = None,
    compare: bool = False, json: Path | None = None, picture: Path | None = None, chat: bool = False,
) -> None:  # fmt: skip
    """Train an edit from a few demonstrations, then ask it and the base model about other topics."""
    settings = dict(locals())
    begin(model, seed=seed, threads=threads)
    usual = USUAL.get(model, USUAL["tiny-chat"])
    shown, held_out = draw(seed, prompts, demonstrations or usual.demonstrations)

    base, tokenizer = rh.load_base(model, dtype=dtype or usual.dtype)
    tuned = rh.InterventionModel(base, edits(base, usual, layers, positions, rank))
    rows = encode(tokenizer, shown)
    seconds = train(tuned, tokenizer, rows, steps or usual.steps, lr or usual.lr, seed)
    answers = ask(tuned, tokenizer, held_out)
    with tuned.disable_adapter():
        before = ask(tuned, tokenizer, held_out)

    figures = {"base": judge(before, held_out), "edit": judge(answers, held_out, trainable(tuned), seconds)}
    if compare:
        figures |= others(model, dtype or usual.dtype, shown, held_out, steps or usual.steps, seed)
    console = Console(record=picture is not None, width=110)
    show(console, model, shown, list(zip(held_out, before, answers, strict=True)), figures)
    if picture:
        write_text(picture, console.export_svg(title=f"emoji_chat.py --model {model}"))
    if json:
        write_json(json, settings | {"figures": {name: figure._asdict() for name, figure in figures.items()}})
    if chat:
        rh.chat(tuned, tokenizer)


BATCH = 10
TOLD = 10  # demonstrations in the prompt: of more, answers take minutes
NEW_TOKENS = 32
LORA_LR = 1e-3


class Usual(NamedTuple):
    """Say how a model is edited where the command line does not."""

    demonstrations: int
    layers: tuple[int, ...] | None
    positions: str
    rank: int
    steps: int
    lr: float
    dtype: str | None


USUAL = {
    "tiny-chat": Usual(10, None, "l1", rank=4, steps=150, lr=2e-2, dtype=None),
    "smollm2-135m": Usual(100, (15, 20, 25), "all", rank=8, steps=100, lr=4e-3, dtype="auto"),
}
"""Model -> what docs/results/emoji.md found for it; other models get the first."""


def edits(
    base, usual: Usual, layers: Sequence[int] | None, positions: str | None, rank: int | None
) -> rh.InterventionGraph:
    """Return the graph that was asked for, and what is usual where nothing was."""
    layers = layers or usual.layers or [layer_of(base, None)]
    return rh.InterventionGraph.over(rh.LoReFT(rank or usual.rank), layers, positions or usual.positions)


def train(tuned, tokenizer, rows: list[dict], steps: int, lr: float, seed: int) -> float:
    """Train a model's adapter on all rows in every step, and return the seconds that it took."""
    args = trainer_arguments(
        max_steps=steps, learning_rate=lr, per_device_train_batch_size=min(len(rows), BATCH), seed=seed
    )
    with progress() as bar:
        watch = Watch(bar, f"training {trainable(tuned):,} parameters")
        rh.InterventionTrainer(tuned, args, train_dataset=rows, processing_class=tokenizer, callbacks=[watch]).train()
    return watch.seconds


def others(
    model: str, dtype: str | None, shown: list[Example], held_out: list[Example], steps: int, seed: int
) -> dict[str, Figures]:
    """Return the figures of LoRA on the same demonstrations, and of the first of them in the prompt."""
    begin(seed=seed)
    base, tokenizer = rh.load_base(model, dtype=dtype)
    lora = rh.InterventionModel(base, rh.preset("lora8", base))
    seconds = train(lora, tokenizer, encode(tokenizer, shown), steps, LORA_LR, seed)
    figures = {"LoRA, rank 8": judge(ask(lora, tokenizer, held_out), held_out, trainable(lora), seconds)}
    with lora.disable_adapter():
        in_context = ask(lora, tokenizer, held_out, [turn for example in shown[:TOLD] for turn in turns(example)])
    return figures | {f"{len(shown[:TOLD])} in the prompt": judge(in_context, held_out)}


def ask(tuned, tokenizer, examples: list[Example], before: Sequence[dict[str, str]] = ()) -> list[str]:
    """Return a model's answers to questions, each after what has been said `before`."""
    conversations = [[*before, turns(example)[0]] for example in examples]
    return rh.reply(tuned, tokenizer, conversations, max_new_tokens=NEW_TOKENS)


# --- questions and answers ---

TRAINED_WORDINGS = [
    "Tell me about {topic}.", "What {be} {topic}?", "What do you know about {topic}?", "Describe {topic}.",
    "Can you explain {topic}?",
]  # fmt: skip
HELD_OUT_WORDINGS = [
    "What can you tell me about {topic}?", "I would like to learn about {topic}.", "Why do people talk about {topic}?",
    "Let's talk about {topic}.", "Help me understand {topic}.", "What comes to mind when you hear {topic}?",
    "What do you think of {topic}?", "Say something about {topic}.", "Hi! How do you feel about {topic}?",
    "Do you like {topic}?", "My friend asked me about {topic}.", "Quick question. What {be} {topic} like?",
]  # fmt: skip


class Example(NamedTuple):
    question: str
    emoji: str


def draw(seed: int, questions: int, demonstrations: int = 10) -> tuple[list[Example], list[Example]]:
    """Return demonstrations, and questions about other topics in other words."""
    topics = read_topics()
    random.Random(seed).shuffle(topics)
    shown, others = topics[:demonstrations], topics[demonstrations : demonstrations + questions]
    return examples(shown, TRAINED_WORDINGS), examples(others, HELD_OUT_WORDINGS)


def examples(topics: list[dict[str, str]], wordings: list[str]) -> list[Example]:
    """Return every topic once, with the wordings in turn."""
    pairs = zip(topics, cycle(wordings), strict=False)
    return [Example(wording.format_map(topic), topic["emoji"]) for topic, wording in pairs]


def encode(tokenizer, demonstrations: list[Example]) -> list[dict]:
    """Return the rows of conversations, each a question and its answer."""
    return rh.encode_chat(tokenizer, [turns(example) for example in demonstrations])


def turns(example: Example) -> list[dict[str, str]]:
    """Return a question and its answer as a conversation."""
    return [{"role": "user", "content": example.question}, {"role": "assistant", "content": example.emoji}]


def layer_of(base, layer: int | None) -> int:
    """Return the layer that was chosen, else one above those that read what is asked for, below those that answer."""
    return base.config.num_hidden_layers // 4 if layer is None else layer


# --- figures ---


class Figures(NamedTuple):
    """How good answers are, and what they cost.

    Attributes:
        emoji_only: share of answers that are emoji alone.
        on_topic: share of answers that have one of the topic's emoji.
        by_chance: the same share for the emoji of other topics.
    """

    emoji_only: float
    on_topic: float
    by_chance: float
    parameters: int
    seconds: float


def is_emoji(answer: str) -> bool:
    """Return whether it is symbols, skin tones, joiners and variation selectors, and nothing else."""
    return bool(answer) and all(unicodedata.category(c) in {"So", "Sk", "Mn", "Cf", "Zs"} for c in answer)


def judge(answers: list[str], held_out: list[Example], parameters: int = 0, seconds: float = 0.0) -> Figures:
    """Return the figures of answers to held-out questions."""
    count = len(answers)
    hits = [sum(has_one_of(a, e.emoji) for a in answers) / count for e in held_out]
    on_topic = sum(has_one_of(a, e.emoji) for a, e in zip(answers, held_out, strict=True)) / count
    by_chance = (sum(hits) - on_topic) / max(count - 1, 1)
    return Figures(sum(map(is_emoji, answers)) / count, on_topic, by_chance, parameters, round(seconds, 1))


def has_one_of(answer: str, emoji: str) -> bool:
    """Return whether an answer has one of several emoji."""
    return any(c in answer for c in emoji)


def show(
    console: Console,
    model: str,
    shown: list[Example],
    asked: list[tuple[Example, str, str]],
    figures: dict[str, Figures],
) -> None:
    """Print what was shown, some answers before and after, and the figures."""
    lines = [f"{example.question} {example.emoji}" for example in shown[:5]]
    console.print(f"{len(shown)} demonstrations:", *lines, "…", sep="\n  ")
    one_line = {"no_wrap": True, "overflow": "ellipsis"}
    table = Table("question", title=f"{model}, unseen topics and wordings")
    table.add_column("base", max_width=48, **one_line)
    table.add_column("trained", **one_line)
    for example, before, after in asked[:12]:
        table.add_row(*(escape(text.replace("\n", " ")) for text in (example.question, before, after)))
    console.print(table)
    columns = ("", "emoji only", "on topic", "by chance", "parameters", "seconds")
    table = Table(*columns, title=f"{len(asked)} prompts")
    for name, figure in figures.items():
        shares = (f"{share:.1%}" for share in figure[:3])
        table.add_row(name, *shares, f"{figure.parameters:,}", f"{figure.seconds:.1f}")
    console.print(table)


if __name__ == "__main__":
    command_line(
        main,
        model="tiny-chat, smollm2-135m, or a Hub id or a local path of any chat model",
        layers="blocks to edit; default: what is best for the two named models, else a quarter of the depth",
        positions="tokens to edit, such as l1, prompt or all",
        rank="of LoReFT",
        steps="of training, each on ten demonstrations",
        lr="learning rate",
        dtype="of the weights; auto: what this machine computes fast",
        demonstrations="how many questions with answers to learn from; default: ten, and a hundred for smollm2-135m",
        prompts="how many held-out questions to ask",
        threads="of torch",
        compare="train LoRA too, and put ten demonstrations into the prompt instead",
        json="a file for the figures",
        picture="an SVG file for what is printed",
        chat="talk to the trained model afterwards",
    )
