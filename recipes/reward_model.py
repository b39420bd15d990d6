"""A reward model: which of two answers is better? Trained on pairs of a chosen and a rejected answer.

A linear head reads the last token of prompt and answer as a reward r; the loss of a pair is −log σ(r of the chosen − r
of the rejected), after Bradley and Terry. LoRA or LoReFT below the head is trained along.

    python recipes/reward_model.py --data FILE_OR_HUB_ID                       # the embedded toy model
    python recipes/reward_model.py --data FILE_OR_HUB_ID --model FOLDER_OR_HUB_ID --bits 4 --out FOLDER
    python recipes/reward_model.py … --graph loreft8:all                       # or none: the head alone

The data are JSON lines, or a data set of the Hub, with "prompt", "chosen" and "rejected": texts, or "chosen" and
"rejected" as conversations that end with the answers. Data with one answer an instruction ("instruction", "output")
have no preferences. Pairs are made of them: chosen is the instruction's own answer, rejected that of another
instruction of the same split. That teaches which answer belongs to an instruction, not which of two people like better.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from datasets import disable_progress_bars, load_dataset
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback, TrainingArguments

import reftheads as rh
from reftheads._utils.atomic import replacing

Pair = tuple[str | list[dict], str, str]
"""A prompt, the answer that was chosen, and the one that was rejected."""


def read(args: argparse.Namespace) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and held-out ones."""
    kind = ("json", {"data_files": args.data}) if Path(args.data).is_file() else (args.data, {})
    rows = load_dataset(kind[0], split=args.split, **kind[1]).shuffle(seed=0)
    rows = list(rows.select(range(min(args.limit or len(rows), len(rows)))))
    held_out = max(round(args.held_out * len(rows)), 1)
    return pairs_of(rows[held_out:]), pairs_of(rows[:held_out])


def pairs_of(rows: list[dict]) -> list[Pair]:
    if "chosen" not in rows[0]:  # rows are shuffled: the next one is any other
        others = [*rows[1:], rows[0]]
        asked = [" ".join(filter(None, (row["instruction"], row.get("input")))) for row in rows]
        return [(a, row["output"], other["output"]) for a, row, other in zip(asked, rows, others, strict=True)]
    if isinstance(rows[0]["chosen"], str):
        return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    return [(row["chosen"][:-1], row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in rows]


def encode(args: argparse.Namespace, tokenizer, pairs: list[Pair]) -> list[list[dict]]:
    """Pairs of rows; texts are cut to their first tokens."""

    def cut(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=args.tokens)["input_ids"]
        return tokenizer.decode(ids)

    prompts = [
        f"{cut(prompt)}\n" if isinstance(prompt, str) else [turn | {"content": cut(turn["content"])} for turn in prompt]
        for prompt, _, _ in pairs
    ]
    chosen, rejected = ([cut(pair[at]) for pair in pairs] for at in (1, 2))
    return rh.encode_preferences(tokenizer, prompts, chosen, rejected)


def graph_for(args: argparse.Namespace, base) -> rh.InterventionGraph:
    head = rh.LinearHead(1, target="preference", loss="bradley_terry", lr=args.head_lr)
    node = rh.Node(head, component="final_norm_output", positions="l1", name="reward")
    graph = rh.InterventionGraph(node)
    return graph if args.graph == "none" else rh.preset(args.graph, base) + graph


class Step(TrainerCallback):
    """Calls a function after every step."""

    def __init__(self, step: Callable[[], object]):
        self.step = step

    def on_step_end(self, *args, **kwargs) -> None:
        self.step()


def train(args: argparse.Namespace, model: rh.InterventionModel, tokenizer, pairs: list, progress: Progress) -> None:
    steps = -(-len(pairs) // args.batch) * args.epochs
    line = progress.add_task("training", total=steps)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):  # a Trainer prints what it logs
        given = TrainingArguments(
            folder, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch, learning_rate=args.lr,
            optim=args.optim, warmup_steps=steps // 20, seed=args.seed, logging_strategy="no", save_strategy="no",
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        step = Step(lambda: progress.advance(line))
        rh.InterventionTrainer(model, given, train_dataset=pairs, processing_class=tokenizer, callbacks=[step]).train()


def margins(model: rh.InterventionModel, tokenizer, pairs: list[list[dict]]) -> torch.Tensor:
    """The reward of the chosen answer minus that of the rejected one, of every pair."""
    rewards = rh.predict(model, tokenizer, [row for pair in pairs for row in pair])["reward"]
    chosen, rejected = rewards.view(len(pairs), 2).unbind(1)
    return chosen - rejected


def figures_of(found: torch.Tensor) -> dict[str, float]:
    return {
        "accuracy": float((found > 0).float().mean()),
        "loss": float(-F.logsigmoid(found).mean()),
        "margin": float(found.mean()),
    }


def plot(args: argparse.Namespace, before: torch.Tensor, after: torch.Tensor) -> Figure:
    """The margins of the held-out pairs before and after training."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, found in (("before", before), ("after", after)):
        accuracy = figures_of(found)["accuracy"]
        axis.hist(found.tolist(), bins=30, alpha=0.6, label=f"{name} training: {accuracy:.1%} above 0")
    axis.axvline(0, color="black", linewidth=1)
    axis.set_xlabel("reward of the chosen answer − reward of the rejected one")
    axis.set_ylabel("held-out pairs")
    axis.legend()
    figure.suptitle(f"{args.model}, {args.graph}")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny-chat", help="a Hub id or a local path of a decoder")
    parser.add_argument("--data", default="trl-lib/ultrafeedback_binarized", help="JSON lines, or a Hub id")
    parser.add_argument("--split", default="train", help="of the data; a part of it is held out")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the pairs")
    parser.add_argument("--graph", default="lora8:all-linear", help="a preset such as loreft8:all, or none")
    parser.add_argument("--bits", type=int, choices=[4, 8], help="quantise the base model")
    parser.add_argument("--optim", default="adamw_torch", help="such as adamw_bnb_8bit or paged_adamw_8bit")
    parser.add_argument("--tokens", type=int, default=64, help="to which prompts and answers are cut")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="pairs")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--head-lr", type=float, default=2e-3)
    parser.add_argument("--limit", type=int, help="pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write reward_model.json and .png there")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)

    transformers.set_seed(args.seed)
    base, tokenizer = rh.load_base(args.model, bits=args.bits, dtype="float32", dropout=False)
    model = rh.InterventionModel(base, graph_for(args, base))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pairs, held_out = (encode(args, tokenizer, some) for some in read(args))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    console = Console(file=sys.stdout)  # this one, also while the trainer's is silent
    model.train()  # before its first use: a base of 4 bits that was used for inference would let no gradient through
    before = margins(model, tokenizer, held_out)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        began = time.perf_counter()
        train(args, model, tokenizer, pairs, progress)
        seconds = time.perf_counter() - began
    after = margins(model, tokenizer, held_out)

    lengths = torch.tensor([[len(row["input_ids"]) for row in pair] for pair in held_out])
    longer = float((lengths[:, 0] - lengths[:, 1]).sign().double().mean() + 1) / 2  # half of a tie
    found = {
        "before": figures_of(before),
        "after": figures_of(after),
        "training pairs": figures_of(margins(model, tokenizer, pairs)),
    }
    table = Table("", "right", "loss", "margin", title=f"{args.model}, {args.graph}: {len(held_out)} held-out pairs")
    for name, figures in found.items():
        table.add_row(name, f"{figures['accuracy']:.1%}", f"{figures['loss']:.3f}", f"{figures['margin']:.3f}")
    table.add_row("the longer answer", f"{longer:.1%}", "", "")
    console.print(table)
    console.print(f"{trained:,} parameters, trained in {seconds:.0f} s on {len(pairs):,} pairs")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        told = {"parameters": trained, "seconds": seconds, "figures": found, "longer_is_chosen": longer}
        text = json.dumps(vars(args) | {"out": None} | told | {"margins": after.tolist()}, indent=2) + "\n"
        with replacing(args.out / "reward_model.json") as path:
            path.write_text(text)
        with replacing(args.out / "reward_model.png") as path:
            plot(args, before, after).savefig(path, dpi=150)
        console.print(f"written: {args.out / 'reward_model.json'}, {args.out / 'reward_model.png'}")


if __name__ == "__main__":
    main()
