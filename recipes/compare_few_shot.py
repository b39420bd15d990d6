"""Fine-tuning modes, LoReFT, LoRA, a probe and in-context learning, on the same k examples.

    python recipes/compare_few_shot.py --task rating --data FOLDER_OR_HUB_ID --models ENCODER --ks 1,8,64,128
    python recipes/compare_few_shot.py --task qa --data FOLDER --models tiny-chat --ks 0,1,8

Each mode first gets the learning rate that does best on examples of a seed of its own, trained on one half of them and
evaluated on the other. The rates of a mode that adds nodes to a frozen model are tried side by side, in one pass over
it a step (`rh.sweep`); how much faster that is than one by one is measured. Then the cells are run as by
few_shot_finetune.py and in_context.py, which keep them under OUT/ft and OUT/icl.
"""

import math
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import few_shot_finetune as ft
import in_context as icl
from _common import UsageError, begin, command_line, write_json
from rich.console import Console
from transformers import TrainerCallback

import reftheads as rh
import reftheads.fewshot as fs


def main(
    task: Literal["rating", "qa", "summary"] = "rating", data: str | None = None,
    models: tuple[str, ...] = ("tiny-chat",), modes: tuple[str, ...] | None = None,
    formats: tuple[str, ...] | None = None, ks: tuple[int, ...] = (1, 8), seeds: tuple[int, ...] = (0, 1, 2),
    tests: int = 100, steps: int = 25, epochs: int = 3, batch: int = 32, head_lr: float = 1e-2, stop: float = 0.02,
    max_length: int = 256, order: Literal["random", "global", "local"] = "random", probes: int = 16,
    context: int | None = None, factors: tuple[float, ...] = (0.3, 1.0, 3.0), choose_k: int = 8,
    choose_seed: int = 1000, timed: int = 3, threads: int | None = None, out: Path = Path("results"),
) -> None:  # fmt: skip
    """Choose each mode a learning rate, fine-tune by it, answer in context, and show all in one table."""
    begin(threads=threads)
    check(timed, choose_seed, seeds)
    data = data or ft.HUB[task]
    examples = ft.load(task, data, max_length)
    tests = min(tests, len(examples.test))
    settings = ft.Settings(task, data, tests, steps, epochs, batch, max_length, head_lr, stop)
    choice = Choice(factors, choose_k, choose_seed, timed)
    pairs = ft.pairs_of(examples, settings, models, modes)
    shared = {name: value for name, value in asdict(settings).items() if name not in ("tests", "stop")}
    study = fs.Study(out / "rates" / task, **shared, **asdict(choice))
    rated = study.run(pairs, lambda **pair: choose(examples, settings, choice, **pair))
    results = ft.fine_tune(examples, settings, rated, ks, seeds, out)
    writers = tuple(model for model in models if rh.load_base(model)[0].can_generate())
    if writers:
        asked = icl.Settings(task, data, tests, order, probes, context)
        answered = icl.in_context(examples, asked, writers, formats, ks, seeds, batch, out)
        results += [{**cell, "mode": f"in context, {cell['format']}", "lr": None, "trained": 0} for cell in answered]

    console, title = Console(), f"{task}, {tests} tests: mean ± deviation of {len(seeds)} seeds"
    console.print(fs.table_of(results, ["model", "mode", "trained"], "k", title=title))
    for pair in rated:
        if "speed_up" in pair:
            console.print("{model}, {mode}: trials side by side are {speed_up:.1f} times as fast".format(**pair))
    fs.plot(results, out / f"compare_{task}.png", ["model", "mode"], title=title)
    write_json(out / f"compare_{task}.json", {"rates": rated, "results": results})


# --- learning rates ---

GRAPHS = ("lora", "loreft", "probe")


@dataclass(frozen=True)
class Choice:
    """How learning rates are chosen.

    Attributes:
        factors: of a mode's usual learning rate, to try.
        choose_k, choose_seed: the examples that they are tried on.
        timed: steps by which trials side by side and in turn are compared.
    """

    factors: tuple[float, ...]
    choose_k: int
    choose_seed: int
    timed: int


def check(timed: int, choose_seed: int, seeds: tuple[int, ...]) -> None:
    """Raise `UsageError` for options that would measure the wrong thing."""
    if timed < 2:
        raise UsageError(f"--timed {timed}: the first step does not count, so give 2 or more")
    if choose_seed in seeds:
        raise UsageError(f"--choose-seed {choose_seed} is one of --seeds: rates would be chosen on what is measured")


def choose(task: fs.Task, settings: ft.Settings, choice: Choice, model: str, mode: str) -> dict:
    """Return the learning rate with the least loss, out of the usual one and its neighbours."""
    rates, times = [float(f"{ft.rate_of(mode) * factor:.2g}") for factor in choice.factors], {}
    if mode.startswith(GRAPHS):
        losses, _ = side_by_side(task, settings, choice, model, mode, rates)
        _, together = side_by_side(task, settings, choice, model, mode, rates, choice.timed)
        alone = sum(side_by_side(task, settings, choice, model, mode, [rate], choice.timed)[1] for rate in rates)
        times = {"seconds_side_by_side": together, "seconds_in_turn": alone, "speed_up": alone / together}
    else:
        losses = in_turn(task, settings, choice, model, mode, rates)
    best = min(rates, key=lambda rate: (math.isnan(losses[rate]), losses[rate]))
    return {"lr": best, "losses": list(losses.values()), "rates": rates, **times}


def side_by_side(
    task: fs.Task, settings: ft.Settings, choice: Choice, model: str, mode: str, rates: list[float],
    steps: int | None = None,
) -> tuple[dict[float, float], float]:  # fmt: skip
    """Return the loss on held-out examples by learning rate, and the seconds of training, all rates at once."""
    graph = ft.build(task, settings, model, mode)[0].plan().graph
    base, tokenizer = rh.load_base(model, dropout=False)
    rows, held_out = halves(task, settings, choice, base, tokenizer)
    args = ft.arguments(settings, len(rows), rates[0], seed=0)
    args.max_steps = steps or args.max_steps
    clock = Clock()
    with redirect_stdout(None):  # a Trainer prints what it logs
        _, trials = rh.sweep(
            base, tokenizer, rows, graph, args, eval_rows=held_out, learning_rates=rates, callbacks=[clock]
        )
    return {trial.learning_rate: trial.eval_loss for trial in trials}, clock.seconds


def in_turn(
    task: fs.Task, settings: ft.Settings, choice: Choice, model: str, mode: str, rates: list[float]
) -> dict[float, float]:
    """Return the loss on held-out examples by learning rate."""
    losses = {}
    for rate in rates:
        begin(seed=0)
        tuned, tokenizer, _ = ft.build(task, settings, model, mode)
        rows, held_out = halves(task, settings, choice, tuned, tokenizer)
        trainer = ft.train(tuned, tokenizer, rows, settings, rate, seed=0)
        with redirect_stdout(None):
            losses[rate] = trainer.evaluate(held_out)["eval_loss"]
    return losses


def halves(task: fs.Task, settings: ft.Settings, choice: Choice, model, tokenizer) -> tuple[list[dict], list[dict]]:
    """Return rows to train on and rows to evaluate by."""
    examples = ft.support_of(task, choice.choose_k, choice.choose_seed)
    rows = ft.encode(tokenizer, task, examples, not model.can_generate(), settings.max_length)
    return rows[::2], rows[1::2]


class Clock(TrainerCallback):
    """Take the seconds of training without those before the first step has ended."""

    def on_train_begin(self, *args, **kwargs) -> None:
        self.begun = None

    def on_step_end(self, *args, **kwargs) -> None:
        self.begun, self.ended = self.begun or time.perf_counter(), time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


if __name__ == "__main__":
    command_line(
        main,
        **ft.HELP,
        **ft.TRAINING_HELP,
        **icl.PROMPT_HELP,
        factors="of a mode's usual learning rate, to try",
        choose_k="examples of each class to choose the rates with",
        choose_seed="draws them; none of --seeds",
        timed="steps by which side by side and in turn are compared",
    )
