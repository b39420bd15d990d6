"""Which rank and which learning rate? A grid of adapters, each from several seeds, trained side by side.

Ten demonstrations of answers in emoji, as in emoji_chat.py; one LoReFT node on the last prompt token. All learning
rates and seeds of a rank are one `rh.sweep`: one pass over the base model a step, on stacked weights. The ranks share
one `ActivationStore`, so that what the base model computes of a prompt is computed once for the whole grid.

    python recipes/sweep.py                                        # the embedded toy model, 27 adapters
    python recipes/sweep.py --out FOLDER                           # ... and a plot and all figures as files
    python recipes/sweep.py --ranks 4,16 --rates 1e-3,4e-3 --model TinyLlama/TinyLlama-1.1B-Chat-v1.0
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
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from emoji_chat import HELD_OUT_WORDINGS, TOPICS, TRAINED_WORDINGS, Example, examples, scores
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import TrainerCallback, TrainingArguments

import reftheads as rh
from reftheads._utils.atomic import replacing

QUESTIONS = 40


@dataclass
class Result:
    """One adapter: what it was trained with, and how it does on held-out demonstrations."""

    rank: int
    learning_rate: float
    seed: int
    eval_loss: float
    emoji_only: float
    on_topic: float


@dataclass
class Data:
    demonstrations: list[Example]
    held_out: list[Example]

    @classmethod
    def read(cls, seed: int = 0) -> "Data":
        with TOPICS.open(encoding="utf-8") as file:
            topics = list(csv.DictReader(file, delimiter="\t"))
        random.Random(seed).shuffle(topics)
        return cls(examples(topics[:10], TRAINED_WORDINGS), examples(topics[10 : 10 + QUESTIONS], HELD_OUT_WORDINGS))


class Watch(TrainerCallback):
    """Calls a function after every step, and takes the time of the training alone."""

    def __init__(self, step: Callable[[], object] = bool):
        self.step = step
        self.seconds = 0.0

    def on_train_begin(self, *args, **kwargs) -> None:
        self.seconds -= time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.step()

    def on_train_end(self, *args, **kwargs) -> None:
        self.seconds += time.perf_counter()


def encode(tokenizer, some: Sequence[Example]) -> list[dict]:
    return rh.encode_chat(
        tokenizer,
        [[{"role": "user", "content": e.question}, {"role": "assistant", "content": e.emoji}] for e in some],
    )


def graph_for(args: argparse.Namespace, base, rank: int) -> rh.InterventionGraph:
    # A quarter of the way up: above the layers that read what is asked for, below those that answer.
    layer = base.config.num_hidden_layers // 4 if args.layer is None else args.layer
    return rh.InterventionGraph(rh.Node(rh.LoReFT(rank=rank), layer=layer, positions=args.positions, name="emoji"))


def arguments(args: argparse.Namespace, folder: str, rate: float) -> TrainingArguments:
    return TrainingArguments(
        folder, max_steps=args.steps, learning_rate=rate, per_device_train_batch_size=10, per_device_eval_batch_size=40,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip


def train_rank(
    args: argparse.Namespace, rank: int, data: Data, store: rh.ActivationStore, watch: Watch
) -> list[Result]:
    """All adapters of one rank: trained in one sweep, then each asked the held-out questions."""
    base, tokenizer = rh.load_base(args.model, dropout=False)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):  # a Trainer prints what it logs
        model, trials = rh.sweep(
            base,
            tokenizer,
            encode(tokenizer, data.demonstrations),
            graph_for(args, base, rank),
            arguments(args, folder, args.rates[0]),
            eval_rows=encode(tokenizer, data.held_out),
            learning_rates=args.rates,
            seeds=args.seeds,
            reuse=store,
            callbacks=[watch],
        )
    results = []
    for trial in trials:
        model.set_adapter(trial.adapter_name)
        given = rh.reply(model, tokenizer, [example.question for example in data.held_out])
        assert trial.eval_loss is not None
        results.append(Result(rank, trial.learning_rate, trial.seed, trial.eval_loss, **scores(given, data.held_out)))
        watch.step()
    return results


def train_one(args: argparse.Namespace, data: Data) -> float:
    """The seconds of training a single adapter by itself."""
    base, tokenizer = rh.load_base(args.model, dropout=False)
    model = rh.InterventionModel(base, graph_for(args, base, args.ranks[0]))
    watch, rows = Watch(), encode(tokenizer, data.demonstrations)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
        given = arguments(args, folder, args.rates[0])
        trainer = rh.InterventionTrainer(
            model, given, train_dataset=rows, processing_class=tokenizer, callbacks=[watch], reuse="memory"
        )
        trainer.train()
    return watch.seconds


def over_seeds(results: list[Result], rank: int, rate: float, figure: str) -> tuple[float, float]:
    """Mean and standard deviation."""
    values = [getattr(r, figure) for r in results if (r.rank, r.learning_rate) == (rank, rate)]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table_of(args: argparse.Namespace, results: list[Result], seconds: dict[int, float]) -> Table:
    title = f"{args.model}, {QUESTIONS} held-out questions: mean ± deviation of {len(args.seeds)} seeds"
    table = Table("rank", "learning rate", "eval loss", "emoji only", "training, s", title=title)
    for rank in args.ranks:
        for rate in args.rates:
            loss = "{:.3f} ± {:.3f}".format(*over_seeds(results, rank, rate, "eval_loss"))
            share = "{:.1%} ± {:.1%}".format(*over_seeds(results, rank, rate, "emoji_only"))
            taken = f"{seconds[rank]:.1f}, all rates" if rate == args.rates[0] else ""
            table.add_row(str(rank), f"{rate:g}", loss, share, taken, end_section=rate == args.rates[-1])
    return table


def plot(args: argparse.Namespace, results: list[Result]) -> Figure:
    """The score and the loss against the learning rate, a line a rank."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for at, (axis, name) in enumerate(zip(axes, ("emoji_only", "eval_loss"), strict=True)):
        for i, rank in enumerate(args.ranks):
            means, deviations = zip(*(over_seeds(results, rank, rate, name) for rate in args.rates), strict=True)
            aside = [rate * 1.04 ** (i - (len(args.ranks) - 1) / 2) for rate in args.rates]  # else error bars overlap
            axis.errorbar(aside, means, deviations, marker="o", capsize=3, label=f"rank {rank}")
        axis.set_xscale("log")
        axis.set_xticks(args.rates, [f"{rate:g}" for rate in args.rates])
        axis.minorticks_off()
        axis.set_xlabel("learning rate")
        axis.set_ylabel(("answers of nothing but emoji", "loss on held-out demonstrations")[at])
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1.05)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    axes[0].legend(loc="lower right")
    figure.suptitle(f"{args.model}: mean and standard deviation of {len(args.seeds)} seeds")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny-chat", help="a Hub id or a local path of any chat model")
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--rates", type=lambda text: [float(n) for n in text.split(",")], default=[5e-3, 1e-2, 2e-2])
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--layer", type=int, help="default: a quarter of the model's depth")
    parser.add_argument("--positions", default="l1")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write sweep.png and sweep.json there")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    if args.model == "tiny-chat":  # so small that a second thread mostly waits, for ever on a busy machine
        torch.set_num_threads(1)

    data, store = Data.read(), rh.ActivationStore()
    console = Console(file=sys.stdout)  # this one, also while the trainers' is silent
    adapters = len(args.rates) * len(args.seeds)
    results: list[Result] = []
    seconds: dict[int, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for rank in args.ranks:
            line = progress.add_task(f"rank {rank}, {adapters} adapters side by side", total=args.steps + adapters)
            watch = Watch(lambda line=line: progress.advance(line))
            results += train_rank(args, rank, data, store, watch)
            seconds[rank] = watch.seconds
    one, every = train_one(args, data), adapters * len(args.ranks)

    console.print(table_of(args, results, seconds))
    together = sum(seconds.values())
    console.print(
        f"Training {every} adapters side by side took {together:.1f} s. One adapter alone took {one:.1f} s, so all of "
        f"them one by one would take {one * every:.0f} s, {one * every / together:.1f} times as long: an extrapolation."
    )
    if args.out:
        figures = {"training_seconds": seconds, "one_alone_seconds": one, "results": [asdict(r) for r in results]}
        text = json.dumps(vars(args) | {"out": None} | figures, indent=2) + "\n"
        args.out.mkdir(parents=True, exist_ok=True)
        with replacing(args.out / "sweep.json") as path:
            path.write_text(text)
        with replacing(args.out / "sweep.png") as path:
            plot(args, results).savefig(path, dpi=150)
        console.print(f"written: {args.out / 'sweep.json'}, {args.out / 'sweep.png'}")


if __name__ == "__main__":
    main()
