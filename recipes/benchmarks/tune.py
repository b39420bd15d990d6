"""How long a search for where to edit takes until its held-out loss is as low as that of random search one by one.

    python recipes/benchmarks/tune.py                                     # emoji answers, the embedded toy model
    python recipes/benchmarks/tune.py --task sst2 --model STORIES260K --sst2 SST2_FOLDER
    python recipes/benchmarks/tune.py --seeds 0,1,2,3,4 --out FOLDER

Random search draws candidates from the same space and trains each alone, for all steps, with the plain trainer; and the
same candidates once more with reuse, from one store that all of them share. Both ways take turns, candidate by
candidate. `rh.tune` then searches with the same steps and rows, in the same process. What counts is when a candidate
that was trained to the end is as good as the best one of the random search.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from rich.console import Console
from rich.table import Table
from transformers.trainer_callback import PrinterCallback

import reftheads as rh
from reftheads.tuning import Candidate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where _common.py is

from _common import begin, command_line, progress, read_table, trainer_arguments, write_json
from emoji_chat import draw, encode


def main(
    task: Literal["emoji", "sst2"] = "emoji", model: str = "tiny-chat", sst2: str | None = None, steps: int = 64,
    candidates: int = 32, trials: int = 64, seeds: tuple[int, ...] = (0, 1, 2), threads: int = 1,
    out: Path | None = None,
) -> None:  # fmt: skip
    """Search by both ways from each seed, and show medians over the seeds."""
    settings = dict(locals())
    begin(threads=threads)
    setup = emoji(model) if task == "emoji" else sentiment(model, sst2)
    found = []
    with progress() as bar:
        for seed in bar.track(seeds, description="seeds"):
            found.append(compared(setup, steps, candidates, trials, seed, bar))
            bar.console.print(found[-1])
    show(found, task, model, candidates, trials)
    if out:
        write_json(out / f"tune_{task}.json", settings | {"found": [asdict(one) for one in found]})


# --- the tasks ---


@dataclass
class Setup:
    """What is learnt, and how it is judged.

    Attributes:
        load: gives a fresh base model and its tokenizer.
        batch: rows of a step.
    """

    load: Callable[[], tuple[Any, Any]]
    rows: list[dict]
    eval_rows: list[dict]
    space: rh.Space
    batch: int

    def arguments(self, steps: int, rate: float = 0.0):
        """Return what every training has in common."""
        return trainer_arguments(
            max_steps=steps, learning_rate=rate, per_device_train_batch_size=self.batch, per_device_eval_batch_size=40
        )


def emoji(model: str) -> Setup:
    """Ten demonstrations of answers in emoji, judged on forty others."""
    tokenizer = rh.load_base(model)[1]
    shown, held_out = draw(0, 40)
    load = lambda: rh.load_base(model, dropout=False)  # noqa: E731
    return Setup(load, encode(tokenizer, shown), encode(tokenizer, held_out), rh.Space(), 10)


def sentiment(model: str, folder: str | None) -> Setup:
    """Sentences of film reviews, good or bad, as a head at the last layer sees them behind an edit."""
    if folder is None:
        raise SystemExit("--task sst2 needs --sst2 FOLDER, with train.csv and dev.csv")
    tokenizer = rh.load_base(model)[1]
    parts = []
    for name, count in (("train", 128), ("dev", 128)):
        table = read_table(Path(folder, f"{name}.csv"), ",")[:count]
        parts.append([{**tokenizer(row["sentence"]), "label": int(row["label"])} for row in table])
    head = rh.Node(rh.LinearHead(2, target="label"), -1, positions="l1", name="sentiment")
    space = rh.Space(positions=["l1", "f1+l1", "l4", "all"], beside=rh.InterventionGraph(head))
    load = lambda: rh.load_base(model, dropout=False)  # noqa: E731
    return Setup(load, *parts, space, 16)


# --- the searches ---


@dataclass
class Compared:
    """What came of both ways from one seed.

    Attributes:
        target: the best held-out loss of the random search.
        plain, reused: seconds until it had that, each candidate trained plainly, or with reuse.
        plain_all, reused_all: seconds of the whole random search.
        tuned: seconds until `rh.tune` had a loss as low, `None` if it never had.
        tuned_all, best: seconds of the whole search, and what it came to.
    """

    seed: int
    target: float
    plain: float
    reused: float
    plain_all: float
    reused_all: float
    tuned: float | None
    tuned_all: float
    best: float


def compared(setup: Setup, steps: int, candidates: int, trials: int, seed: int, bar: Any) -> Compared:
    """Search from one seed, at random and by `rh.tune`."""
    base, tokenizer = setup.load()
    space = setup.space.within(base)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    spent, curve, store = {"off": 0.0, "reused": 0.0}, [], rh.ActivationStore()
    best = float("inf")
    for number in bar.track(range(candidates), description=f"seed {seed}: one by one"):
        candidate = space.draw(number, study.ask())
        for way, reuse in (("off", "off"), ("reused", store)):
            began = time.perf_counter()
            loss = alone(base, tokenizer, setup, candidate, steps, reuse)
            spent[way] += time.perf_counter() - began
            best = min(best, loss)
        curve.append((spent["off"], spent["reused"], best))
    target = best
    plain, reused, _ = next(point for point in curve if point[2] <= target)

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        found = rh.tune(
            base, tokenizer, setup.rows, setup.eval_rows, space=setup.space, trials=trials, args=setup.arguments(steps),
            directory=Path(folder, "search"), seed=seed,
        )  # fmt: skip
        whole = time.perf_counter() - began
        passes = json.loads(Path(folder, "search", "search.json").read_text())["passes"]
    at, tuned = whole - found.seconds, None
    for taken, scores, seconds, _ in passes:
        at += seconds
        if taken == steps:
            reached = [score for _, score in scores if score is not None and score <= target * 1.001]
            tuned = at if reached and tuned is None else tuned
    return Compared(seed, target, plain, reused, spent["off"], spent["reused"], tuned, whole, found.best.score)


def alone(base: Any, tokenizer: Any, setup: Setup, candidate: Candidate, steps: int, reuse: Any) -> float:
    """Train one candidate by itself, and return its held-out loss."""
    torch.manual_seed(0)
    model = rh.InterventionModel(base, candidate.graph)
    trainer = rh.InterventionTrainer(
        model, setup.arguments(steps, candidate.learning_rate), train_dataset=setup.rows, processing_class=tokenizer,
        reuse=reuse,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
        return trainer.evaluate(setup.eval_rows)["eval_loss"]
    except FloatingPointError:
        return float("inf")
    finally:
        model.unload()


def show(found: list[Compared], task: str, model: str, candidates: int, trials: int) -> None:
    """Print each seed, and the medians of the ratios."""
    table = Table(
        "seed", "loss", "plain, s", "reused, s", "tune, s", "against plain", "against reused", "tune's best",
        title=f"{task}, {model}: until as low a held-out loss as the best of {candidates} random candidates",
    )  # fmt: skip
    for one in found:
        there = one.tuned is not None
        table.add_row(
            str(one.seed), f"{one.target:.4f}", f"{one.plain:.1f} of {one.plain_all:.1f}",
            f"{one.reused:.1f} of {one.reused_all:.1f}",
            f"{one.tuned:.1f} of {one.tuned_all:.1f}" if there else f"not in {one.tuned_all:.1f}",
            f"{one.plain / one.tuned:.1f} ×" if there else "", f"{one.reused / one.tuned:.1f} ×" if there else "",
            f"{one.best:.4f}",
        )  # fmt: skip
    console = Console(width=130)
    console.print(table)
    more = trials / candidates
    whole = [(more * one.plain_all / one.tuned_all, more * one.reused_all / one.tuned_all) for one in found]
    plain, reused = (statistics.median(ratio) for ratio in zip(*whole, strict=True))
    console.print(f"candidates a second, medians: {plain:.1f} × plain, {reused:.1f} × with reuse")
    times = [one for one in found if one.tuned is not None]
    if times:
        plain = statistics.median(one.plain / one.tuned for one in times)
        reused = statistics.median(one.reused / one.tuned for one in times)
        text = f"until as low a loss, medians of {len(times)} of {len(found)} seeds: {plain:.1f} ×, {reused:.1f} ×"
        console.print(text)


if __name__ == "__main__":
    command_line(
        main,
        model="a Hub id or a local path; of sst2 any decoder",
        sst2="a folder with train.csv and dev.csv",
        steps="of a whole training",
        candidates="of the random search",
        trials="of rh.tune",
        out="a folder for the figures",
    )
