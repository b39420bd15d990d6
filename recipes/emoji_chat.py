"""Teach a chat model to answer in emoji, with ten examples and one edited token.

LoReFT learns a rank-4 edit of the last prompt token in one layer, from ten plain questions answered in emoji.
None of them says that emoji are wanted. The model is then asked about other topics in other words.

    python recipes/emoji_chat.py                                   # the embedded toy model
    python recipes/emoji_chat.py --chat                            # ... and talk to it afterwards
    python recipes/emoji_chat.py --lr 4e-3 --model TinyLlama/TinyLlama-1.1B-Chat-v1.0    # a real model
"""

import random
import unicodedata
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from _common import Watch, begin, command_line, progress, read_topics, trainable, trainer_arguments, write_json
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import reftheads as rh


def main(
    model: str = "tiny-chat", layer: int | None = None, positions: str = "l1", rank: int = 4, steps: int = 150,
    lr: float = 2e-2, seed: int = 0, prompts: int = 120, json: Path | None = None, chat: bool = False,
) -> None:  # fmt: skip
    """Train an edit from ten demonstrations, then ask it and the base model about other topics."""
    settings = dict(locals())
    begin(model)
    demonstrations, held_out = draw(seed, prompts)
    questions = [example.question for example in held_out]
    Console().print("Ten demonstrations:", *(f"{e.question} {e.emoji}" for e in demonstrations), sep="\n  ")
    figures: dict[str, dict[str, float]] = {}
    # The chosen positions first; beside them the paper's last token, and every token of the prompt.
    for place in dict.fromkeys([positions, "l1", "prompt"]):
        begin(seed=seed)
        base, tokenizer = rh.load_base(model)
        node = rh.Node(rh.LoReFT(rank=rank), layer=layer_of(base, layer), positions=place, name="emoji")
        tuned = rh.InterventionModel(base, rh.InterventionGraph(node))
        rows = encode(tokenizer, demonstrations)
        args = trainer_arguments(max_steps=steps, learning_rate=lr, per_device_train_batch_size=len(rows), seed=seed)
        with progress() as bar:
            watch = Watch(bar, f"training at {place}")
            rh.InterventionTrainer(
                tuned, args, train_dataset=rows, processing_class=tokenizer, callbacks=[watch]
            ).train()
        answers = rh.reply(tuned, tokenizer, questions)
        costs = {"parameters": trainable(tuned), "seconds": round(watch.seconds, 1)}
        figures[place] = scores(answers, held_out) | costs
        if place == positions:
            chosen, chosen_answers = tuned, answers
    with chosen.disable_adapter():
        base_answers = rh.reply(chosen, tokenizer, questions)
    figures = {"base": scores(base_answers, held_out) | {"parameters": 0, "seconds": 0}} | figures

    show(model, list(zip(questions, base_answers, chosen_answers, strict=True)), figures)
    if json:
        write_json(json, settings | {"figures": figures})
    if chat:
        rh.chat(chosen, tokenizer)


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


def draw(seed: int, questions: int) -> tuple[list[Example], list[Example]]:
    """Return ten demonstrations, and questions about other topics in other words."""
    topics = read_topics()
    random.Random(seed).shuffle(topics)
    return examples(topics[:10], TRAINED_WORDINGS), examples(topics[10 : 10 + questions], HELD_OUT_WORDINGS)


def examples(topics: list[dict[str, str]], wordings: list[str]) -> list[Example]:
    """Return every topic once, with the wordings in turn."""
    pairs = zip(topics, cycle(wordings), strict=False)
    return [Example(wording.format_map(topic), topic["emoji"]) for topic, wording in pairs]


def encode(tokenizer, demonstrations: list[Example]) -> list[dict]:
    """Return the rows of conversations, each a question and its answer."""
    conversations = [
        [{"role": "user", "content": example.question}, {"role": "assistant", "content": example.emoji}]
        for example in demonstrations
    ]
    return rh.encode_chat(tokenizer, conversations)


def layer_of(base, layer: int | None) -> int:
    """Return the layer that was chosen, else one above those that read what is asked for, below those that answer."""
    return base.config.num_hidden_layers // 4 if layer is None else layer


def is_emoji(answer: str) -> bool:
    """Return whether it is symbols, skin tones, joiners and variation selectors, and nothing else."""
    return bool(answer) and all(unicodedata.category(c) in {"So", "Sk", "Mn", "Cf", "Zs"} for c in answer)


def scores(answers: list[str], held_out: list[Example]) -> dict[str, float]:
    """Return the shares of answers that are emoji alone, and that have one of the topic's emoji."""
    on_topic = [any(c in answer for c in example.emoji) for answer, example in zip(answers, held_out, strict=True)]
    return {"emoji_only": sum(map(is_emoji, answers)) / len(answers), "on_topic": sum(on_topic) / len(answers)}


def show(model: str, answers: list[tuple[str, str, str]], figures: dict[str, dict[str, float]]) -> None:
    """Print some answers before and after, and the figures."""
    console = Console()
    table = Table("question", "base", "trained", title=f"{model}, unseen topics and wordings")
    for row in answers[:12]:
        table.add_row(*map(escape, row))
    console.print(table)
    columns = ("edited tokens", "emoji only", "on topic", "parameters", "seconds")
    table = Table(*columns, title=f"{len(answers)} prompts")
    for name, figure in figures.items():
        shares = (f"{figure['emoji_only']:.1%}", f"{figure['on_topic']:.1%}")
        table.add_row(name, *shares, f"{figure['parameters']:,}", f"{figure['seconds']:.1f}")
    console.print(table)


if __name__ == "__main__":
    command_line(
        main,
        model="a Hub id or a local path of any chat model",
        layer="default: a quarter of the model's depth",
        positions="tokens to edit, such as l1 or f1+l1",
        rank="of LoReFT",
        prompts="how many held-out questions to ask",
        json="a file for the figures",
        chat="talk to the trained model afterwards",
    )
