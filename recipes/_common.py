"""What the recipes share: the command line, arguments for a Trainer, progress, reading data and writing results.

A recipe that is copied elsewhere needs this file beside it, and one about the embedded model's topics `data/` as well.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from reftheads._utils.atomic import replacing

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from matplotlib.figure import Figure


# --- the command line ---


class UsageError(Exception):
    """Options that do not go together; `command_line` says so as it does of a wrong flag."""


def command_line(main: Callable[..., None], **texts: str | dict[str, Any]) -> None:
    """Call `main` with what the command line says: its signature is the command line.

    The parameter `new_tokens: int = 32` is the flag `--new-tokens`. One without a default is required, a bool is a
    switch, a tuple is written with commas (`--seeds 0,1,2`), and a `Literal` lists the choices.

    Args:
        main: the program; the first line of its module's docstring describes it.
        texts: the help for a parameter, or all that `add_argument` is to take instead of what the signature says.
    """
    parser = argparse.ArgumentParser(description=main.__globals__["__doc__"].split("\n")[0])
    parameters = inspect.signature(main, eval_str=True).parameters
    for name, parameter in parameters.items():
        text = texts.get(name, "")
        options = _options_of(parameter) | (text if isinstance(text, dict) else {"help": text})
        if options.get("default") not in (None, False) and "default" not in options["help"]:
            options["help"] += f" (default: {_written(options['default'])})"
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    quiet()
    try:
        main(**vars(parser.parse_args()))
    except UsageError as error:
        parser.error(str(error))


def _options_of(parameter: inspect.Parameter) -> dict[str, Any]:
    """Return what `add_argument` takes for a parameter."""
    required = parameter.default is parameter.empty
    options: dict[str, Any] = {"required": True} if required else {"default": parameter.default}
    kind = parameter.annotation
    if isinstance(kind, types.UnionType):  # int | None
        kind = get_args(kind)[0]
    if kind is bool:
        return options | {"action": "store_true"}
    if get_origin(kind) is Literal:
        return options | {"choices": get_args(kind), "type": type(get_args(kind)[0])}
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]

        def comma_separated(text: str) -> tuple:
            return tuple(item(word) for word in text.split(","))

        return options | {"type": comma_separated, "metavar": f"{parameter.name.upper()},…"}
    return options | {"type": kind}


def _written(default: object) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def quiet() -> None:
    """Silence progress bars and warnings that say nothing to whoever runs a recipe."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


def begin(model: str = "", *, seed: int | None = None, threads: int | None = None) -> None:
    """Seed all random numbers, and let torch use so many threads.

    The embedded model gets one thread if nothing is said: it is so small that a second one mostly waits, for ever on a
    busy machine.
    """
    if seed is not None:
        transformers.set_seed(seed)
    if threads or model == "tiny-chat":
        torch.set_num_threads(threads or 1)


# --- training ---


def trainer_arguments(**options: Any) -> TrainingArguments:
    """Return arguments by which a Trainer saves and logs nothing, where `options` do not say otherwise."""
    silent = {
        "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(tempfile.gettempdir(), **(silent | options))  # a folder must be named; it stays as it is


@contextmanager
def progress() -> Iterator[Progress]:
    """Show a progress bar on the standard output, and nothing that a Trainer prints there meanwhile."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stdout)) as bar, redirect_stdout(None):
        yield bar


class Watch(TrainerCallback):
    """Move a line of a progress bar with the steps of a training, and take its times.

    Attributes:
        seconds: those of the whole training.
        epochs: the seconds of each epoch.
    """

    def __init__(self, bar: Progress | None = None, description: str = "training"):
        self.bar, self.description = bar, description
        self.seconds = 0.0
        self.epochs: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.line = self.bar.add_task(self.description, total=state.max_steps)
        self.training_began = time.perf_counter()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.epoch_began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.advance(self.line)

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.epochs.append(time.perf_counter() - self.epoch_began)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.training_began


def trainable(model: nn.Module) -> int:
    """Return how many parameters are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# --- reading ---


def read_table(file: Path, delimiter: str = "\t") -> list[dict[str, str]]:
    """Return the rows of a table with a header line."""
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter=delimiter))


def read_topics() -> list[dict[str, str]]:
    """Return what the embedded model talks about: topics, each with a word, emoji and two sentences."""
    return read_table(Path(__file__).resolve().parent / "data" / "tiny_chat_topics.tsv")


def read_splits(source: str) -> DatasetDict:
    """Return a data set by split.

    Args:
        source: a CSV or JSON file, a folder of such files with the splits' names, or a Hub id, also with a
            configuration: "Salesforce/wikitext:wikitext-2-raw-v1".
    """
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    path = Path(source)
    if path.is_file():
        return load_dataset("json" if "json" in path.suffix else "csv", data_files=source)
    if path.is_dir():
        return load_dataset(source)
    name, _, configuration = source.partition(":")
    return load_dataset(name, configuration or None)


def shuffled(rows: Dataset, limit: int | None, seed: int = 0) -> Dataset:
    """Return the rows in random order, `limit` of them at most."""
    return rows.shuffle(seed=seed).select(range(min(limit or len(rows), len(rows))))


# --- results ---


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation, which is 0 for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def write_text(file: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all; its folder is made if need be."""
    with replacing(file) as path:
        path.write_text(text, encoding="utf-8")


def write_json(file: Path, results: Mapping[str, Any]) -> None:
    """Write results, without the paths among them, which tell of this machine alone."""
    kept = {name: value for name, value in results.items() if not isinstance(value, Path)}
    write_text(file, json.dumps(kept, indent=2) + "\n")


def write_results(out: Path, name: str, results: Mapping[str, Any], plot: Figure | None = None) -> None:
    """Write OUT/NAME.json, with a plot OUT/NAME.png too, and print where they are."""
    write_json(out / f"{name}.json", results)
    if plot is None:
        print(f"written: {out / name}.json")
        return
    with replacing(out / f"{name}.png") as path:
        plot.savefig(path, dpi=150)
    print(f"written: {out / name}.json, {out / name}.png")
