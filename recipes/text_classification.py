"""Text classification by full finetuning, LoRA, QLoRA, LoReFT and a probe, all on the same split, in one table.

Every method trains a linear head on top of the model: on the mean of all tokens for an encoder, on the last token for a
decoder. They differ in what is trained below it:

    full     all weights of the base model
    lora     LoRA on every linear module of the blocks
    qlora    the same, on a base model of 4 bits
    loreft   LoReFT at the output of every block
    probe    nothing: the base model stays as it is

The best epoch is chosen on the validation split, and so is the learning rate where several are given for a method, by
the first seed. The test split has no say in either.

    python recipes/text_classification.py                                    # the embedded toy model, SST-2 of the Hub
    python recipes/text_classification.py --model FOLDER_OR_HUB_ID --data FOLDER_OR_CSV --out FOLDER
    python recipes/text_classification.py --methods full,loreft --lr full=2e-5,5e-5,1e-4 --lr loreft=2e-3 --seeds 0,1,2

What has been trained is kept in FOLDER/text_classification.json, so that a command which was broken off, or is given
again with more methods or seeds, trains only what is missing.

A folder has CSV files named by split (train.csv, validation.csv or dev.csv, test.csv). Splits that are missing, or that
have no labels, are cut off from the training split.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from _common import (
    Watch,
    begin,
    command_line,
    mean_and_deviation,
    progress,
    read_splits,
    shuffled,
    trainer_arguments,
    write_json,
    write_results,
)
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, TrainerCallback

import reftheads as rh

RATES = {"full": [1e-4], "lora": [3e-3], "qlora": [3e-3], "loreft": [5e-3], "probe": [1e-2]}


def main(
    methods: tuple[str, ...] = tuple(RATES), model: str = "tiny-chat", data: str = "stanfordnlp/sst2",
    text: str = "sentence", label: str = "label", seeds: tuple[int, ...] = (0, 1, 2), limit: int | None = None,
    epochs: int = 2, batch: int = 32, lr: list[tuple] | None = None, head_lr: float = 5e-3, weight_decay: float = 0.0,
    warmup: float = 0.1, lora: str = "lora4:all-linear", rank: int = 16,
    init: Literal["orthogonal", "identity"] = "identity", positions: str = "all", max_length: int = 256,
    threads: int | None = None, out: Path | None = None,
) -> None:  # fmt: skip
    """Train every method from every seed, with the rate that does best on the validation split."""
    settings = {name: value for name, value in locals().items() if name not in ("methods", "seeds", "lr", "out")}
    begin(model, threads=threads)
    texts = Data.read(data, text, label, limit)
    console = Console()
    console.print(texts.summary())

    def train(method: str, rate: float, seed: int) -> Run:
        begin(seed=seed)
        bits = 4 if method == "qlora" else None
        base, tokenizer = rh.load_base(model, auto_class=AutoModel, dropout=method == "full", bits=bits)
        size = base.num_parameters()
        below = nodes_below(method, base, lora, rh.LoReFT(rank, init=init), positions)
        head = head_of(base, len(texts.labels), detach=method == "probe", lr=None if method == "probe" else head_lr)
        tuned = rh.InterventionModel(base, rh.InterventionGraph(*below, head))
        if method == "full":
            base.requires_grad_(True)
        rows = {split: texts.rows(tokenizer, split, max_length) for split in texts.splits}
        args = trainer_arguments(
            num_train_epochs=epochs, learning_rate=rate, seed=seed, per_device_train_batch_size=batch,
            warmup_steps=warmup, weight_decay=weight_decay, train_sampling_strategy="group_by_length",
        )  # fmt: skip
        best = BestEpoch(tuned, lambda: accuracy(tuned, tokenizer, rows["validation"]))
        watch = [best, Watch(bar, f"{method}, rate {rate:g}, seed {seed}")]
        start = time.perf_counter()
        rh.InterventionTrainer(
            tuned, args, train_dataset=rows["train"], processing_class=tokenizer, callbacks=watch
        ).train()
        seconds = time.perf_counter() - start
        best.restore()
        return Run(
            method, rate, seed, best.counted, best.counted / size, best.accuracies, seconds, statistics.mean(best.ms),
            test=accuracy(tuned, tokenizer, rows["test"]),
        )  # fmt: skip

    book = Book(settings, train, out and out / "text_classification.json")
    rates = RATES | dict(lr or ())
    results: dict[str, list[Run]] = {}
    with progress() as bar:
        for method in methods:
            tried = [book.run(method, rate, seeds[0]) for rate in rates[method]]
            chosen = max(tried, key=lambda run: max(run.validation))
            results[method] = [book.run(method, chosen.learning_rate, seed) for seed in seeds]

    title = f"{model}: accuracy, mean ± deviation of {len(seeds)} seeds"
    console.print(table_of(title, results))
    if out:
        write_results(out, "text_classification", book.contents(), plot(title, results))


# --- data ---


@dataclass
class Data:
    """The three splits as texts with the numbers of their labels."""

    labels: list[str]
    splits: dict[str, tuple[list[str], list[int]]]

    @classmethod
    def read(cls, data: str, text: str, label: str, limit: int | None) -> "Data":
        """Read the splits that have labels, and cut off what is missing from the training split."""
        read = {name: rows for name, rows in read_splits(data).items() if min(rows[label]) != -1}
        for name in ("test", "validation"):
            if name not in read:
                cut = read["train"].train_test_split(test_size=0.1, seed=0)
                read |= {"train": cut["train"], name: cut["test"]}
        labels = sorted(set(read["train"][label]))
        splits = {}
        for name in ("train", "validation", "test"):
            rows = shuffled(read[name], limit) if limit else read[name]
            splits[name] = list(rows[text]), [labels.index(one) for one in rows[label]]
        return cls([str(one) for one in labels], splits)

    def summary(self) -> str:
        sizes = ", ".join(f"{len(labels):,} {split}" for split, (_, labels) in self.splits.items())
        return f"{sizes}; {len(self.labels)} classes"

    def rows(self, tokenizer, split: str, max_length: int) -> list[dict]:
        """Return the rows of a split for the model."""
        texts, labels = self.splits[split]
        encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        return [{"input_ids": ids, "label": label} for ids, label in zip(encoded, labels, strict=True)]


# --- the methods ---


def is_decoder(base) -> bool:
    return any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in base.config.architectures or ())


def head_of(base, classes: int, detach: bool, lr: float | None) -> rh.Node:
    """Return the head that all methods have: on the last token of a decoder, on the mean of an encoder's."""
    decoder = is_decoder(base)
    where = {"component": "final_norm_output", "positions": "l1"} if decoder else {"layer": -1}
    head = rh.LinearHead(classes, "label", pool=None if decoder else "mean", detach=detach, lr=lr)
    return rh.Node(head, name="class", **where)


def nodes_below(method: str, base, lora: str, loreft: rh.LoReFT, positions: str) -> tuple[rh.Node, ...]:
    """Return what a method trains below the head, but for all weights."""
    if method in ("lora", "qlora"):
        return rh.preset(lora, base).nodes
    if method == "loreft":
        layers = range(base.config.num_hidden_layers)
        return rh.InterventionGraph.over(loreft, layers, positions, name="edit").nodes
    return ()


class BestEpoch(TrainerCallback):
    """Judge every epoch, keep the weights of the best; count what is trained, and take the time of each step."""

    def __init__(self, model: torch.nn.Module, validate: Callable[[], float]):
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.validate = validate
        self.accuracies: list[float] = []
        self.best: dict[str, torch.Tensor] = {}
        self.counted = 0
        self.ms: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # a weight that the prediction does not depend on, such as an encoder's pooler, never gets a gradient
        self.counted = self.counted or sum(p.numel() for p in self.trained.values() if p.grad is not None)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ms.append(1e3 * (time.perf_counter() - self.began))

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.accuracies.append(self.validate())
        if self.accuracies[-1] > max(self.accuracies[:-1], default=-1):
            self.best = {name: p.detach().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model the weights of the best epoch."""
        for name, p in self.trained.items():
            p.copy_(self.best[name])


def accuracy(model, tokenizer, rows: list[dict]) -> float:
    predicted = rh.predict(model, tokenizer, rows)["class"].argmax(-1)
    return float((predicted == torch.tensor([row["label"] for row in rows])).float().mean())


# --- runs ---


@dataclass
class Run:
    """One training of one method, judged at its best epoch."""

    method: str
    learning_rate: float
    seed: int
    trained: int
    of_base: float  # `trained` as a share of the base model's parameters
    validation: list[float]  # accuracy after each epoch
    seconds: float
    ms_a_step: float
    test: float


@dataclass
class Book:
    """The runs so far, kept in a file if there is one; a run that it holds is not trained again."""

    settings: dict
    train: Callable[[str, float, int], Run]
    path: Path | None
    runs: dict[tuple[str, float, int], Run] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path and self.path.exists():
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if kept["settings"] != self.settings:
                sys.exit(f"{self.path} was made with other settings: {kept['settings']}. Give another --out.")
            self.runs = {(r["method"], r["learning_rate"], r["seed"]): Run(**r) for r in kept["runs"]}

    def run(self, method: str, rate: float, seed: int) -> Run:
        """Return a run, which is trained and written if it is not there yet."""
        if (method, rate, seed) not in self.runs:
            self.runs[method, rate, seed] = self.train(method, rate, seed)
            if self.path:
                write_json(self.path, self.contents())
        return self.runs[method, rate, seed]

    def contents(self) -> dict:
        return {"settings": self.settings, "runs": [asdict(run) for run in self.runs.values()]}


# --- what comes out ---


def shown(accuracies: list[float]) -> str:
    mean, deviation = mean_and_deviation(accuracies)
    return f"{100 * mean:.2f} ± {100 * deviation:.2f}" if len(accuracies) > 1 else f"{100 * mean:.2f}"


def table_of(title: str, results: dict[str, list[Run]]) -> Table:
    """Return a table with a line a method."""
    table = Table("method", "rate", "trained", "of base", "validation, %", "test, %", "run, s", "step, ms", title=title)
    for method, runs in results.items():
        table.add_row(
            method,
            f"{runs[0].learning_rate:g}",
            f"{runs[0].trained:,}",
            f"{runs[0].of_base:.3%}",
            shown([max(r.validation) for r in runs]),
            shown([r.test for r in runs]),
            f"{statistics.mean(r.seconds for r in runs):.0f}",
            f"{statistics.mean(r.ms_a_step for r in runs):.0f}",
        )
    return table


def plot(title: str, results: dict[str, list[Run]]) -> Figure:
    """Draw test accuracy against the number of trained parameters."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for method, runs in results.items():
        mean, deviation = mean_and_deviation([r.test for r in runs])
        axis.errorbar(runs[0].trained, mean, deviation, marker="o", capsize=4, linestyle="", label=method)
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters")
    axis.set_ylabel("test accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(alpha=0.3)
    axis.legend()
    axis.set_title(title, fontsize="medium")
    return figure


# --- arguments ---


def methods_of(text: str) -> list[str]:
    """Return names of methods that are written with commas."""
    names = text.split(",")
    unknown = [name for name in names if name not in RATES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown method {unknown[0]!r}: use {', '.join(RATES)}")
    return names


def rates_of(text: str) -> tuple[str, list[float]]:
    """Return a method and its learning rates, as in "loreft=1e-3,2e-3"."""
    method, _, values = text.partition("=")
    return methods_of(method)[0], [float(value) for value in values.split(",")]


if __name__ == "__main__":
    command_line(
        main,
        methods={"type": methods_of, "metavar": "METHODS", "help": f"of {','.join(RATES)} (default: all)"},
        model="a Hub id or a local path of an encoder or decoder",
        data="a Hub id, a folder of CSV files or one CSV file",
        text="the column of texts",
        label="the column of labels",
        limit="rows of each split; default: all of them",
        lr={"type": rates_of, "action": "append", "metavar": "METHOD=RATE[,RATE…]", "help": "rates to choose from"},
        head_lr="the head's own, beside every method but probe",
        warmup="a share of all steps; then the rates fall to 0",
        lora="a preset, see reftheads.preset",
        rank="of LoReFT",
        init="of LoReFT",
        positions="of LoReFT",
        threads="of torch; default: as torch has it, one for the embedded model",
        out="a folder for text_classification.json and .png",
    )
