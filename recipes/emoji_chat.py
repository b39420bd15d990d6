"""Teach a chat model to answer in emoji, with ten examples and one edited token.

LoReFT learns a rank-4 edit of the last prompt token in one layer, from ten plain questions answered in emoji.
None of them says that emoji are wanted. The model is then asked about other topics in other words.

    python recipes/emoji_chat.py                                   # the embedded toy model
    python recipes/emoji_chat.py --chat                            # ... and talk to it afterwards
    python recipes/emoji_chat.py --lr 4e-3 --model TinyLlama/TinyLlama-1.1B-Chat-v1.0    # a real model
"""

import argparse
import csv
import json
import random
import tempfile
import time
import unicodedata
import warnings
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import TrainingArguments, set_seed

import reftheads as rh

TOPICS = Path(__file__).parent / "tools" / "tiny_chat_topics.tsv"
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


def examples(topics: list[dict[str, str]], wordings: list[str]) -> list[Example]:
    """Every topic once, with the wordings in turn."""
    pairs = zip(topics, cycle(wordings), strict=False)
    return [Example(wording.format_map(topic), topic["emoji"]) for topic, wording in pairs]


def is_emoji(answer: str) -> bool:
    """Symbols, skin tones, joiners and variation selectors, and nothing else."""
    return bool(answer) and all(unicodedata.category(c) in {"So", "Sk", "Mn", "Cf", "Zs"} for c in answer)


def scores(given: list[str], held_out: list[Example]) -> dict[str, float]:
    on_topic = [any(c in answer for c in example.emoji) for answer, example in zip(given, held_out, strict=True)]
    return {"emoji_only": sum(map(is_emoji, given)) / len(given), "on_topic": sum(on_topic) / len(given)}


def train(args: argparse.Namespace, positions: str, demonstrations: list[Example]):
    """A fresh base model with one LoReFT node at `positions`, trained; and the seconds that this took."""
    set_seed(args.seed)
    base, tokenizer = rh.load_base(args.model)
    # A quarter of the way up: above the layers that read what is asked for, below those that answer.
    layer = base.config.num_hidden_layers // 4 if args.layer is None else args.layer
    node = rh.Node(rh.LoReFT(rank=args.rank), layer=layer, positions=positions, name="emoji")
    model = rh.InterventionModel(base, rh.InterventionGraph(node))
    rows = rh.encode_chat(
        tokenizer,
        [
            [{"role": "user", "content": example.question}, {"role": "assistant", "content": example.emoji}]
            for example in demonstrations
        ],
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=args.steps, learning_rate=args.lr, per_device_train_batch_size=len(demonstrations),
            seed=args.seed, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        rh.InterventionTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
    return model.eval(), tokenizer, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny-chat", help="a Hub id or a local path of any chat model")
    parser.add_argument("--layer", type=int, help="default: a quarter of the model's depth")
    parser.add_argument("--positions", default="l1")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=120, help="how many held-out questions to ask")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--chat", action="store_true", help="talk to the trained model afterwards")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    if args.model == "tiny-chat":  # so small that a second thread mostly waits, for ever on a busy machine
        torch.set_num_threads(1)

    with TOPICS.open(encoding="utf-8") as file:
        topics = list(csv.DictReader(file, delimiter="\t"))
    random.Random(args.seed).shuffle(topics)
    demonstrations = examples(topics[:10], TRAINED_WORDINGS)
    held_out = examples(topics[10 : 10 + args.prompts], HELD_OUT_WORDINGS)
    questions = [example.question for example in held_out]

    console = Console()
    console.print("Ten demonstrations:", *(f"{e.question} {e.emoji}" for e in demonstrations), sep="\n  ")
    figures: dict[str, dict[str, float]] = {}
    # The chosen positions first; beside them the paper's last token, and every token of the prompt.
    for positions in dict.fromkeys([args.positions, "l1", "prompt"]):
        with console.status(f"training at {positions} ..."):
            model, tokenizer, seconds = train(args, positions, demonstrations)
        given = rh.reply(model, tokenizer, questions)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        figures[positions] = scores(given, held_out) | {"parameters": trainable, "seconds": round(seconds, 1)}
        if positions == args.positions:
            chosen, trained_answers = model, given
    with chosen.disable_adapter():
        base_answers = rh.reply(chosen, tokenizer, questions)
    figures = {"base": scores(base_answers, held_out) | {"parameters": 0, "seconds": 0}} | figures

    table = Table("question", "base", "trained", title=f"{args.model}, unseen topics and wordings")
    for row in list(zip(questions, base_answers, trained_answers, strict=True))[:12]:
        table.add_row(*map(escape, row))
    console.print(table)
    columns = ("edited tokens", "emoji only", "on topic", "parameters", "seconds")
    table = Table(*columns, title=f"{len(questions)} prompts")
    for name, f in figures.items():
        shares = (f"{f['emoji_only']:.1%}", f"{f['on_topic']:.1%}")
        table.add_row(name, *shares, f"{f['parameters']:,}", f"{f['seconds']:.1f}")
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(vars(args) | {"json": None, "figures": figures}, indent=2) + "\n")
    if args.chat:
        rh.chat(chosen, tokenizer)


if __name__ == "__main__":
    main()
