"""Fine-tuning modes, LoReFT, LoRA, a probe and in-context learning, on the same k examples.

    python recipes/compare_few_shot.py --task rating --data FOLDER_OR_HUB_ID --models ENCODER --ks 1,8,64,128
    python recipes/compare_few_shot.py --task qa --data FOLDER --models tiny-chat --ks 0,1,8

Each mode first gets the learning rate that does best on examples of a seed of its own, trained on one half of them and
evaluated on the other. The rates of a mode that adds nodes to a frozen model are tried side by side, in one pass over
it a step (`rh.sweep`); how much faster that is than one by one is measured. Then the cells are run as by
few_shot_finetune.py and in_context.py, which keep them under OUT/ft and OUT/icl.
"""

import argparse
import json
import math
import tempfile
import time
from contextlib import redirect_stdout

import few_shot_finetune as ft
import in_context as icl
from rich.console import Console
from transformers import TrainerCallback, set_seed

import reftheads as rh
import reftheads.fewshot as fs
from reftheads._utils.atomic import replacing

GRAPHS = ("lora", "loreft", "probe")


class Clock(TrainerCallback):
    """The seconds of training without those before the first step has ended."""

    def on_train_begin(self, *args, **kwargs) -> None:
        self.begun = None

    def on_step_end(self, *args, **kwargs) -> None:
        self.begun, self.ended = self.begun or time.perf_counter(), time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


def side_by_side(args: argparse.Namespace, task: fs.Task, model: str, mode: str, rates: list[float], steps=None):
    """The loss on held-out examples by learning rate, and the seconds of training, all rates at once."""
    graph = ft.build(args, task, model, mode)[0].plan().graph
    base, tokenizer = rh.load_base(model, dropout=False)
    rows, held_out = halves(args, task, base, tokenizer)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
        given = ft.arguments(args, folder, rows, rates[0], seed=0)
        given.max_steps = steps or given.max_steps
        trials = rh.sweep(
            base, tokenizer, rows, graph, given, eval_rows=held_out, learning_rates=rates, callbacks=[clock]
        )[1]  # fmt: skip
    return {trial.learning_rate: trial.eval_loss for trial in trials}, clock.seconds


def in_turn(args: argparse.Namespace, task: fs.Task, model: str, mode: str, rates: list[float]) -> dict[float, float]:
    """The loss on held-out examples by learning rate."""
    losses = {}
    for rate in rates:
        set_seed(0)
        tuned, tokenizer, _ = ft.build(args, task, model, mode)
        rows, held_out = halves(args, task, tuned, tokenizer)
        with redirect_stdout(None):
            losses[rate] = ft.train(args, tuned, tokenizer, rows, rate, seed=0).evaluate(held_out)["eval_loss"]
    return losses


def halves(args: argparse.Namespace, task: fs.Task, model, tokenizer) -> tuple[list[dict], list[dict]]:
    examples = ft.support_of(task, args.choose_k, args.choose_seed)
    rows = ft.encode(tokenizer, task, examples, not model.can_generate(), args.max_length)
    return rows[::2], rows[1::2]


def choose(args: argparse.Namespace, task: fs.Task, model: str, mode: str) -> dict:
    """The learning rate with the least loss, out of the usual one and its neighbours."""
    rates, times = [float(f"{ft.rate_of(mode) * factor:.2g}") for factor in args.factors], {}
    if mode.startswith(GRAPHS):
        losses, _ = side_by_side(args, task, model, mode, rates)
        together = side_by_side(args, task, model, mode, rates, args.timed)[1]
        alone = sum(side_by_side(args, task, model, mode, [rate], args.timed)[1] for rate in rates)
        times = {"seconds_side_by_side": together, "seconds_in_turn": alone, "speed_up": alone / together}
    else:
        losses = in_turn(args, task, model, mode, rates)
    best = min(rates, key=lambda rate: (math.isnan(losses[rate]), losses[rate]))
    return {"lr": best, "losses": list(losses.values()), "rates": rates, **times}


def main() -> None:
    parser = ft.options(str(__doc__).split("\n")[0])
    ft.training_options(parser)
    icl.prompt_options(parser)
    numbers = {"type": lambda text: [float(n) for n in text.split(",")]}
    parser.add_argument("--factors", default=[0.3, 1, 3], help="of a mode's usual learning rate, to try", **numbers)
    parser.add_argument("--choose-k", type=int, default=8, help="examples of each class to choose the rates with")
    parser.add_argument("--choose-seed", type=int, default=1000, help="draws them; none of --seeds")
    parser.add_argument("--timed", type=int, default=3, help="steps by which side by side and in turn are compared")
    args, task = ft.read(parser)
    if args.timed < 2:
        parser.error(f"--timed {args.timed}: the first step does not count, so give 2 or more")
    if args.choose_seed in args.seeds:
        parser.error(f"--choose-seed {args.choose_seed} is one of --seeds: rates would be chosen on what is measured")
    pairs = ft.pairs_of(args, task)
    names = "task", "data", "factors", "choose_k", "choose_seed", "timed", "steps", "epochs", "batch", "max_length"
    study = fs.Study(args.out / "rates" / task.name, **{name: getattr(args, name) for name in (*names, "head_lr")})
    chosen = study.run(pairs, lambda **pair: choose(args, task, **pair))
    results = ft.fine_tune(args, task, chosen)
    args.models = [model for model in args.models if rh.load_base(model)[0].can_generate()]
    if args.models:
        shown = icl.in_context(args, task)
        results += [{**cell, "mode": f"in context, {cell['format']}", "lr": None, "trained": 0} for cell in shown]

    console, title = Console(), f"{task.name}, {args.tests} tests: mean ± deviation of {len(args.seeds)} seeds"
    console.print(fs.table_of(results, ["model", "mode", "trained"], "k", title=title))
    for found in chosen:
        if "speed_up" in found:
            console.print("{model}, {mode}: trials side by side are {speed_up:.1f} times as fast".format(**found))
    fs.plot(results, args.out / f"compare_{task.name}.png", ["model", "mode"], title=title)
    text = json.dumps({"rates": chosen, "results": results}, indent=1)
    with replacing(args.out / f"compare_{task.name}.json") as path:
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
