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
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoModel, TrainerCallback, TrainingArguments

import reftheads as rh
from reftheads._utils.atomic import replacing

RATES = {"full": [1e-4], "lora": [3e-3], "qlora": [3e-3], "loreft": [5e-3], "probe": [1e-2]}


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
class Data:
    """The three splits as texts with the numbers of their labels."""

    labels: list[str]
    splits: dict[str, tuple[list[str], list[int]]]

    @classmethod
    def read(cls, args: argparse.Namespace) -> "Data":
        one_file = args.data.endswith(".csv")
        found = load_dataset("csv", data_files=args.data) if one_file else load_dataset(args.data)
        found = DatasetDict({name: some for name, some in found.items() if min(some[args.label]) != -1})
        for name in ("test", "validation"):
            if name not in found:
                cut = found["train"].train_test_split(test_size=0.1, seed=0)
                found |= {"train": cut["train"], name: cut["test"]}
        labels = sorted(set(found["train"][args.label]))
        return cls(
            [str(label) for label in labels],
            {name: cls._limited(found[name], labels, args) for name in ("train", "validation", "test")},
        )

    @staticmethod
    def _limited(some: Dataset, labels: list, args: argparse.Namespace) -> tuple[list[str], list[int]]:
        if args.limit:
            some = some.shuffle(seed=0).select(range(min(args.limit, len(some))))
        return list(some[args.text]), [labels.index(label) for label in some[args.label]]

    def rows(self, tokenizer, split: str, max_length: int) -> list[dict]:
        texts, labels = self.splits[split]
        ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        return [{"input_ids": one, "label": label} for one, label in zip(ids, labels, strict=True)]


class Watch(TrainerCallback):
    """Counts what is trained, takes the time of each step, and keeps the weights of the best epoch."""

    def __init__(self, model: torch.nn.Module, validate: Callable[[], float], step: Callable[[], object]):
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.validate, self.step = validate, step
        self.accuracies: list[float] = []
        self.best: dict[str, torch.Tensor] = {}
        self.counted = 0
        self.ms: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, *args, **kwargs) -> None:
        # a weight that the prediction does not depend on, such as an encoder's pooler, never gets a gradient
        self.counted = self.counted or sum(p.numel() for p in self.trained.values() if p.grad is not None)

    def on_step_end(self, *args, **kwargs) -> None:
        self.ms.append(1e3 * (time.perf_counter() - self.began))
        self.step()

    def on_epoch_end(self, *args, **kwargs) -> None:
        self.accuracies.append(self.validate())
        if self.accuracies[-1] > max(self.accuracies[:-1], default=-1):
            self.best = {name: p.detach().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def restore(self) -> None:
        for name, p in self.trained.items():
            p.copy_(self.best[name])


def graph_for(args: argparse.Namespace, method: str, base, classes: int) -> rh.InterventionGraph:
    """The nodes of a method below the head that all methods have."""
    causal = any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in base.config.architectures or ())
    head = rh.LinearHead(
        classes,
        "label",
        pool=None if causal else "mean",
        detach=method == "probe",
        lr=None if method == "probe" else args.head_lr,
    )
    where = {"component": "final_norm_output", "positions": "l1"} if causal else {"layer": -1}
    if method in ("lora", "qlora"):
        below = rh.preset(args.lora, base).nodes
    elif method == "loreft":
        layers = range(base.config.num_hidden_layers)
        loreft = rh.LoReFT(args.rank, init=args.init)
        below = rh.InterventionGraph.over(loreft, layers, args.positions, name="edit").nodes
    else:
        below = ()
    return rh.InterventionGraph(*below, rh.Node(head, name="class", **where))


def accuracy(model, tokenizer, rows: list[dict]) -> float:
    given = rh.predict(model, tokenizer, rows)["class"].argmax(-1)
    return float((given == torch.tensor([row["label"] for row in rows])).float().mean())


def train(args: argparse.Namespace, data: Data, method: str, rate: float, seed: int, step: Callable[[], object]) -> Run:
    transformers.set_seed(seed)
    base, tokenizer = rh.load_base(
        args.model, auto_class=AutoModel, dropout=method == "full", bits=4 if method == "qlora" else None
    )
    size = base.num_parameters()
    model = rh.InterventionModel(base, graph_for(args, method, base, len(data.labels)))
    if method == "full":
        base.requires_grad_(True)
    rows = {split: data.rows(tokenizer, split, args.max_length) for split in data.splits}
    watch = Watch(model, lambda: accuracy(model, tokenizer, rows["validation"]), step)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):  # a Trainer prints what it logs
        given = TrainingArguments(
            folder, num_train_epochs=args.epochs, learning_rate=rate, seed=seed,
            per_device_train_batch_size=args.batch, warmup_steps=args.warmup, weight_decay=args.weight_decay,
            train_sampling_strategy="group_by_length", save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        rh.InterventionTrainer(
            model, given, train_dataset=rows["train"], processing_class=tokenizer, callbacks=[watch]
        ).train()
    seconds = time.perf_counter() - start
    watch.restore()
    return Run(
        method, rate, seed, watch.counted, watch.counted / size, watch.accuracies, seconds, statistics.mean(watch.ms),
        test=accuracy(model, tokenizer, rows["test"]),
    )  # fmt: skip


@dataclass
class Book:
    """The runs so far, kept in a file if there is one."""

    settings: dict
    path: Path | None
    runs: dict[tuple[str, float, int], Run] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path and self.path.exists():
            kept = json.loads(self.path.read_text())
            if kept["settings"] != self.settings:
                sys.exit(f"{self.path} was made with other settings: {kept['settings']}. Give another --out.")
            self.runs = {(r["method"], r["learning_rate"], r["seed"]): Run(**r) for r in kept["runs"]}

    def get(self, method: str, rate: float, seed: int, train: Callable[[str, float, int], Run]) -> Run:
        if (method, rate, seed) not in self.runs:
            self.runs[method, rate, seed] = train(method, rate, seed)
            self.write()
        return self.runs[method, rate, seed]

    def write(self) -> None:
        if self.path:
            text = json.dumps({"settings": self.settings, "runs": [asdict(r) for r in self.runs.values()]}, indent=1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as path:
                path.write_text(text + "\n")


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def shown(accuracies: list[float]) -> str:
    mean, deviation = mean_and_deviation(accuracies)
    return f"{100 * mean:.2f} ± {100 * deviation:.2f}" if len(accuracies) > 1 else f"{100 * mean:.2f}"


def table_of(title: str, results: dict[str, list[Run]]) -> Table:
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
    """Test accuracy against the number of trained parameters."""
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


def methods(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in RATES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown method {unknown[0]!r}: use {', '.join(RATES)}")
    return names


def rates(text: str) -> tuple[str, list[float]]:
    method, _, values = text.partition("=")
    return methods(method)[0], [float(value) for value in values.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", type=methods, default=list(RATES), metavar="full,lora,…")
    parser.add_argument("--model", default="tiny-chat", help="a Hub id or a local path of an encoder or decoder")
    parser.add_argument("--data", default="stanfordnlp/sst2", help="a Hub id, a folder of CSV files or one CSV file")
    parser.add_argument("--text", default="sentence", help="the column of texts")
    parser.add_argument("--label", default="label", help="the column of labels")
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--limit", type=int, help="rows of each split; default: all of them")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=rates, action="append", default=[], metavar="METHOD=RATE[,RATE…]")
    parser.add_argument("--head-lr", type=float, default=5e-3, help="the head's own, beside every method but probe")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--warmup", type=float, default=0.1, help="a share of all steps; then the rates fall to 0")
    parser.add_argument("--lora", default="lora4:all-linear", help="a preset, see reftheads.preset")
    parser.add_argument("--rank", type=int, default=16, help="of LoReFT")
    parser.add_argument("--init", choices=("orthogonal", "identity"), default="identity", help="of LoReFT")
    parser.add_argument("--positions", default="all", help="of LoReFT")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--threads", type=int, help="default: as torch has it")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write text_classification.json and .png there")
    args = parser.parse_args()
    args.lr = RATES | dict(args.lr)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)
    if args.threads:
        torch.set_num_threads(args.threads)

    data = Data.read(args)
    sizes = ", ".join(f"{len(labels):,} {split}" for split, (_, labels) in data.splits.items())
    console = Console(file=sys.stdout)  # this one, also while the trainers' is silent
    console.print(f"{sizes}; {len(data.labels)} classes")
    settings = {name: value for name, value in vars(args).items() if name not in ("methods", "seeds", "lr", "out")}
    book = Book(settings, args.out and args.out / "text_classification.json")
    steps = args.epochs * math.ceil(len(data.splits["train"][0]) / args.batch)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    results: dict[str, list[Run]] = {}
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:

        def run(method: str, rate: float, seed: int) -> Run:
            line = progress.add_task(f"{method}, rate {rate:g}, seed {seed}", total=steps)
            return train(args, data, method, rate, seed, lambda: progress.advance(line))

        for method in args.methods:
            found = [book.get(method, rate, args.seeds[0], run) for rate in args.lr[method]]
            best = max(found, key=lambda one: max(one.validation))
            results[method] = [book.get(method, best.learning_rate, seed, run) for seed in args.seeds]

    title = f"{args.model}: accuracy, mean ± deviation of {len(args.seeds)} seeds"
    console.print(table_of(title, results))
    if args.out:
        with replacing(args.out / "text_classification.png") as path:
            plot(title, results).savefig(path, dpi=100)
        console.print(f"written: {args.out / 'text_classification.json'}, {args.out / 'text_classification.png'}")


if __name__ == "__main__":
    main()
