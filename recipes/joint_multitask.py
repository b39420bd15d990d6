"""One model for three tasks: grading sentences, how related two sentences are, and whether one follows from the other.

The heads share a base model and the LoRA or LoReFT below them, and are trained at once, on a mix of two data sets. Each
row has the targets of its own data set alone; what it lacks is missing, and counts in no loss.

    grade        SST-5, five classes: accuracy
    relatedness  SICK, a number from 1 to 5: Pearson's r
    entailment   SICK, three classes: accuracy

    python recipes/joint_multitask.py --sst5 FOLDER_OR_HUB_ID --sick FOLDER_OR_HUB_ID --model FOLDER_OR_HUB_ID
    python recipes/joint_multitask.py … --separate                  # ... and each task alone, to compare
    python recipes/joint_multitask.py … --balance uncertainty       # weights of the losses that are learnt
    python recipes/joint_multitask.py … --bits 4 --graph lora8:all-linear
    python recipes/joint_multitask.py … --tasks relatedness         # plain regression

A folder of SST-5 has files with "train" and "test" in their names, a label and a sentence a line; one of SICK has such
files of tab-separated columns, as its authors distribute it.
"""

import argparse
import csv
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch
import transformers
from datasets import load_dataset
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback, TrainingArguments

import reftheads as rh
from reftheads._utils.atomic import replacing

TASKS = ("grade", "relatedness", "entailment")
ENTAILMENT = ("ENTAILMENT", "NEUTRAL", "CONTRADICTION")  # in the order of the Hub's numbers


def read_sst5(where: str, split: str) -> list[dict]:
    """Sentences with a grade from 0 to 4."""
    if not Path(where).is_dir():
        return [{"texts": [row["text"]], "grade": row["label"]} for row in load_dataset(where, split=split)]
    lines = next(Path(where).glob(f"*{split}*")).read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" ", 1) for line in lines]
    return [{"texts": [sentence], "grade": int(label)} for label, sentence in pairs]


def read_sick(where: str, split: str) -> list[dict]:
    """Pairs of sentences with both targets; relatedness as a distance from its middle, 3."""
    if Path(where).is_dir():
        with next(Path(where).glob(f"*{split}*")).open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        labels = [ENTAILMENT.index(row["entailment_judgment"]) for row in rows]
    else:
        rows = load_dataset(where, split=split)
        labels = rows["label"]
    return [
        {
            "texts": [row["sentence_A"], row["sentence_B"]],
            "relatedness": float(row["relatedness_score"]) - 3,
            "entailment": label,
        }
        for row, label in zip(rows, labels, strict=True)
    ]


def some(rows: list[dict], limit: int | None) -> list[dict]:
    return rows if limit is None else random.Random(0).sample(rows, min(limit, len(rows)))


def encode(tokenizer, rows: list[dict], tasks: list[str]) -> list[dict]:
    """Rows for the model, with the targets of these tasks."""
    encoded = [tokenizer(*row["texts"], truncation=True, max_length=128) for row in rows]
    return [
        {**ids, **{task: row[task] for task in tasks if task in row}} for ids, row in zip(encoded, rows, strict=True)
    ]


def graph_for(args: argparse.Namespace, base, tasks: list[str]) -> rh.InterventionGraph:
    causal = base.can_generate()
    common = {
        "pool": None if causal else "mean",
        "weight": "uncertainty" if args.balance == "uncertainty" else 1.0,
        "lr": args.head_lr,
        "detach": args.graph == "none",
    }
    heads = {
        "grade": rh.LinearHead(5, target="grade", **common),
        "relatedness": rh.LinearHead(1, target="relatedness", loss="mse", **common),
        "entailment": rh.LinearHead(3, target="entailment", **common),
    }
    where = {"component": "final_norm_output"} if causal else {"layer": -1}
    positions = "l1" if causal else "all"
    graph = rh.InterventionGraph(*(rh.Node(heads[task], positions=positions, name=task, **where) for task in tasks))
    return graph if args.graph == "none" else rh.preset(args.graph, base) + graph


class Step(TrainerCallback):
    """Calls a function after every step."""

    def __init__(self, step: Callable[[], object]):
        self.step = step

    def on_step_end(self, *args, **kwargs) -> None:
        self.step()


def train(args: argparse.Namespace, data: dict, tasks: list[str], seed: int, progress: Progress) -> dict:
    """Trains one model for these tasks; its scores on the test rows, and what it took."""
    transformers.set_seed(seed)
    base, tokenizer = rh.load_base(args.model, bits=args.bits, dropout=False)
    model = rh.InterventionModel(base, graph_for(args, base, tasks))
    sets = {name: rows for name, rows in data["train"].items() if rows[0].keys() & set(tasks)}
    rows = rh.mix(
        {name: encode(tokenizer, rows, tasks) for name, rows in sets.items()},
        args.shares and {name: args.shares[name] for name in sets},
        seed=seed,
    )
    steps = -(-len(rows) // args.batch) * args.epochs
    line = progress.add_task(f"{' + '.join(tasks)}, seed {seed}", total=steps)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):  # a Trainer prints what it logs
        given = TrainingArguments(
            folder, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch, learning_rate=args.lr,
            lr_scheduler_type="linear", warmup_steps=steps // 20, seed=seed, logging_steps=max(steps // 20, 1),
            save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        step = Step(lambda: progress.advance(line))
        trainer = rh.InterventionTrainer(
            model, given, train_dataset=rows, processing_class=tokenizer, reuse=args.reuse, callbacks=[step]
        )
        trainer.train()
    seconds = time.perf_counter() - began
    scores = {}
    for task in tasks:
        own = [row for rows in data["test"].values() for row in rows if task in row]
        predicted = rh.predict(model, tokenizer, encode(tokenizer, own, []))[task]
        target = torch.tensor([row[task] for row in own])
        if task == "relatedness":
            scores[task] = float(torch.corrcoef(torch.stack([predicted[:, 0], target]))[0, 1])
        else:
            scores[task] = float((predicted.argmax(1) == target).float().mean())
    return {
        "tasks": tasks,
        "seed": seed,
        "scores": scores,
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def table_of(args: argparse.Namespace, runs: list[dict], tasks: list[str]) -> Table:
    title = f"{args.model}, {args.graph}: test scores, mean ± deviation of {len(args.seeds)} seeds"
    table = Table("trained together", *tasks, "parameters", "seconds a run", title=title)
    for together in dict.fromkeys(tuple(run["tasks"]) for run in runs):
        own = [run for run in runs if tuple(run["tasks"]) == together]
        cells = []
        for task in tasks:
            found = [run["scores"][task] for run in own if task in run["scores"]]
            deviation = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.3f}{deviation}" if found else "")
        seconds = statistics.mean(run["seconds"] for run in own)
        table.add_row(" + ".join(together), *cells, f"{own[0]['parameters']:,}", f"{seconds:.0f}")
    return table


def plot(args: argparse.Namespace, run: dict) -> Figure:
    """The loss of every head while they are trained together."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for task in run["tasks"]:
        points = [(e["epoch"], e[f"loss_{task}"]) for e in run["losses"] if f"loss_{task}" in e]
        axis.plot(*zip(*points, strict=True), marker=".", label=task)
    axis.set_xlabel("epoch")
    axis.set_ylabel("training loss")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.suptitle(f"{args.model}, {args.graph}")
    return figure


def shares(text: str) -> dict[str, float]:
    return {name: float(share) for name, share in (pair.split("=") for pair in text.split(","))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny-chat", help="a Hub id or a local path, of an encoder or a decoder")
    parser.add_argument("--sst5", default="SetFit/sst5", help="a Hub id or a local folder")
    parser.add_argument("--sick", default="RobZamp/sick", help="a Hub id or a local folder")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS))
    parser.add_argument("--graph", default="lora8:all-linear", help="a preset such as loreft8:all, or none: probes")
    parser.add_argument("--balance", choices=["fixed", "uncertainty"], default="fixed", help="weights of the losses")
    parser.add_argument(
        "--shares", type=shares, help="of the rows, such as sst5=1,sick=2; default: as many as there are"
    )
    parser.add_argument("--separate", action="store_true", help="also train every task alone")
    parser.add_argument("--bits", type=int, choices=[4, 8], help="quantise the base model")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--head-lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0])
    parser.add_argument("--limit", type=int, help="rows of each split of each data set")
    parser.add_argument("--reuse", default="auto", choices=["auto", "memory", "off"])
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write joint_multitask.json and .png there")
    args = parser.parse_args()
    unknown = set(args.tasks) - set(TASKS)
    if unknown:
        parser.error(f"unknown task {unknown.pop()!r}: use {', '.join(TASKS)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)

    readers = {"sst5": (read_sst5, args.sst5, {"grade"}), "sick": (read_sick, args.sick, {"relatedness", "entailment"})}
    data = {
        split: {
            name: some(read(where, split), args.limit)
            for name, (read, where, targets) in readers.items()
            if targets & set(args.tasks)
        }
        for split in ("train", "test")
    }
    together = [args.tasks, *([task] for task in args.tasks if args.separate and len(args.tasks) > 1)]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    console = Console(file=sys.stdout)  # this one, also while the trainers' is silent
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        runs = [train(args, data, tasks, seed, progress) for tasks in together for seed in args.seeds]
    console.print(table_of(args, runs, args.tasks))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(vars(args) | {"out": None, "runs": runs}, indent=2) + "\n"
        with replacing(args.out / "joint_multitask.json") as path:
            path.write_text(text)
        with replacing(args.out / "joint_multitask.png") as path:
            plot(args, runs[0]).savefig(path, dpi=150)
        console.print(f"written: {args.out / 'joint_multitask.json'}, {args.out / 'joint_multitask.png'}")


if __name__ == "__main__":
    main()
