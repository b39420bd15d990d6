"""Rows, graphs and arguments for short trainings of a tiny Llama."""

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers import TrainingArguments

import reftheads as rh
from support import models


def arguments(folder: Path, **options) -> TrainingArguments:
    """Six steps of two rows, each logged, nothing saved."""
    defaults = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(defaults | options))


def weights(model) -> dict[str, torch.Tensor]:
    """Copies of all that is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def llama(vocab: int = 31, **options: Any) -> tf.LlamaForCausalLM:
    """A Llama of width 32 whose weights are large enough for its answers to differ."""
    options = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.3, "eos_token_id": 1} | options
    return models.tiny_llama(vocab_size=vocab, **options)


def rows_of(tokenizer: Any, prompts: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    """Ragged rows, each with a label for heads."""
    generator = torch.Generator().manual_seed(seed)

    def words(least: int, most: int) -> str:
        count = int(torch.randint(least, most + 1, (), generator=generator))
        return " ".join(chr(97 + int(i)) for i in torch.randint(26, (count,), generator=generator))

    pairs = [(words(1, 24), words(1, 5)) for _ in range(prompts)]
    made = rh.encode_pairs(tokenizer, *map(list, zip(*pairs, strict=True)))
    return [{**row, "label": i % 2} for i, row in enumerate(made)]


def edits(positions: Any = "l1", **options: Any) -> rh.InterventionGraph:
    """LoReFT at blocks 1 and 2."""
    return rh.InterventionGraph.over(rh.LoReFT(rank=2, **options), range(1, 3), positions=positions)


def head(layer: int, name: str, target: str | None = "label") -> rh.Node:
    """A classifier of the last token of the prompt."""
    return rh.Node(rh.LinearHead(outputs=2, target=target, weight=0.5), layer=layer, positions="l1", name=name)


def train_two_losses(tokenizer: Any, args: TrainingArguments) -> rh.InterventionTrainer:
    """Train an edit and a head, each by a loss of its own, on rows of one length: every order has the same means."""
    rows = rh.encode_pairs(tokenizer, ["a b c", "d e f"] * 4, ["d e", "x y"] * 4)
    rows = [row | {"sort": i % 3} for i, row in enumerate(rows)]
    torch.manual_seed(0)
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=2), 0, positions="all", name="edit"),
        rh.Node(rh.LinearHead(3, target="sort"), 1, positions="f1", name="sort"),
    )
    model = rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), graph)
    trainer = rh.InterventionTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer
