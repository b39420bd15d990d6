"""Which rank and which learning rate? A grid of adapters, each from several seeds, trained side by side.

Ten demonstrations of answers in emoji, as in emoji_chat.py; one LoReFT node on the last prompt token. All learning
rates and seeds of a rank are one `rh.sweep`: one pass over the base model a step, on stacked weights. The ranks share
one `ActivationStore`, so that what the base model computes of a prompt is computed once for the whole grid.

    python recipes/sweep.py                                        # the embedded toy model, 27 adapters
    python recipes/sweep.py --out FOLDER                           # ... and a plot and all figures as files
    python recipes/sweep.py --ranks 4,16 --rates 1e-3,4e-3 --model TinyLlama/TinyLlama-1.1B-Chat-v1.0
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from _common import Watch, begin, command_line, mean_and_deviation, progress, trainer_arguments, write_results
from emoji_chat import draw, encode, judge, layer_of
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table

import reftheads as rh

QUESTIONS = 40


def main(
    model: str = "tiny-chat", ranks: tuple[int, ...] = (1, 2, 4), rates: tuple[float, ...] = (5e-3, 1e-2, 2e-2),
    seeds: tuple[int, ...] = (0, 1, 2), steps: int = 150, layer: int | None = None, positions: str = "l1",
    out: Path | None = None,
) -> None:  # fmt: skip
    """Train all rates and seeds of a rank side by side, and ask each adapter the held-out questions."""
    settings = dict(locals())
    begin(model)
    demonstrations, held_out = draw(0, QUESTIONS)
    store = rh.ActivationStore()
    results: list[Result] = []
    seconds: dict[int, float] = {}
    with progress() as bar:
        for rank in ranks:
            base, tokenizer = rh.load_base(model, dropout=False)
            node = rh.Node(rh.LoReFT(rank=rank), layer=layer_of(base, layer), positions=positions, name="emoji")
            watch = Watch(bar, f"rank {rank}, {len(rates) * len(seeds)} adapters side by side")
            adapters, trials = rh.sweep(
                base,
                tokenizer,
                encode(tokenizer, demonstrations),
                rh.InterventionGraph(node),
                arguments(steps, rates[0]),
                eval_rows=encode(tokenizer, held_out),
                learning_rates=rates,
                seeds=seeds,
                reuse=store,
                callbacks=[watch],
            )
            seconds[rank] = watch.seconds
            for trial in bar.track(trials, description=f"rank {rank}, {QUESTIONS} questions to each"):
                adapters.set_adapter(trial.adapter_name)
                answers = rh.reply(adapters, tokenizer, [example.question for example in held_out])
                judged = judge(answers, held_out)
                shares = {"emoji_only": judged.emoji_only, "on_topic": judged.on_topic}
                results.append(Result(rank, trial.learning_rate, trial.seed, trial.eval_loss, **shares))
    alone = seconds_alone(model, layer, ranks[0], positions, steps, rates[0], demonstrations)

    show(model, results, seconds, alone)
    if out:
        figures = {"training_seconds": seconds, "one_alone_seconds": alone, "results": [asdict(r) for r in results]}
        write_results(out, "sweep", settings | figures, plot(model, results))


@dataclass
class Result:
    """One adapter: what it was trained with, and how it does on held-out demonstrations."""

    rank: int
    learning_rate: float
    seed: int
    eval_loss: float
    emoji_only: float
    on_topic: float


def arguments(steps: int, rate: float):
    """Return what every training of the grid has in common."""
    return trainer_arguments(
        max_steps=steps, learning_rate=rate, per_device_train_batch_size=10, per_device_eval_batch_size=40
    )


def seconds_alone(model, layer, rank, positions, steps, rate, demonstrations) -> float:
    """Return the seconds of training a single adapter by itself."""
    base, tokenizer = rh.load_base(model, dropout=False)
    node = rh.Node(rh.LoReFT(rank=rank), layer=layer_of(base, layer), positions=positions, name="emoji")
    adapter = rh.InterventionModel(base, rh.InterventionGraph(node))
    rows = encode(tokenizer, demonstrations)
    with progress() as bar:
        watch = Watch(bar, "one adapter alone")
        rh.InterventionTrainer(
            adapter, arguments(steps, rate), train_dataset=rows, processing_class=tokenizer, callbacks=[watch],
            reuse="memory",
        ).train()  # fmt: skip
    return watch.seconds


# --- what comes out ---


def over_seeds(results: list[Result], rank: int, rate: float, figure: str) -> tuple[float, float]:
    """Return mean and standard deviation."""
    return mean_and_deviation([getattr(r, figure) for r in results if (r.rank, r.learning_rate) == (rank, rate)])


def grid_of(results: list[Result]) -> tuple[list[int], list[float], int]:
    """Return ranks, learning rates, and the number of seeds."""
    ranks, rates, seeds = (
        list(dict.fromkeys(getattr(r, name) for r in results)) for name in ("rank", "learning_rate", "seed")
    )
    return ranks, rates, len(seeds)


def show(model: str, results: list[Result], seconds: dict[int, float], alone: float) -> None:
    """Print the grid, and how long it took beside one adapter after the other."""
    ranks, rates, seeds = grid_of(results)
    title = f"{model}, {QUESTIONS} held-out questions: mean ± deviation of {seeds} seeds"
    table = Table("rank", "learning rate", "eval loss", "emoji only", "training, s", title=title)
    for rank in ranks:
        for rate in rates:
            loss = "{:.3f} ± {:.3f}".format(*over_seeds(results, rank, rate, "eval_loss"))
            share = "{:.1%} ± {:.1%}".format(*over_seeds(results, rank, rate, "emoji_only"))
            taken = f"{seconds[rank]:.1f}, all rates" if rate == rates[0] else ""
            table.add_row(str(rank), f"{rate:g}", loss, share, taken, end_section=rate == rates[-1])
    console = Console()
    console.print(table)
    adapters, together = len(results), sum(seconds.values())
    console.print(
        f"Training {adapters} adapters side by side took {together:.1f} s. One adapter alone took {alone:.1f} s, so "
        f"all of them one by one would take {alone * adapters:.0f} s, {alone * adapters / together:.1f} times as long: "
        "an extrapolation."
    )


def plot(model: str, results: list[Result]) -> Figure:
    """Draw the score and the loss against the learning rate, a line a rank."""
    ranks, rates, seeds = grid_of(results)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for at, (axis, name) in enumerate(zip(axes, ("emoji_only", "eval_loss"), strict=True)):
        for i, rank in enumerate(ranks):
            means, deviations = zip(*(over_seeds(results, rank, rate, name) for rate in rates), strict=True)
            aside = [rate * 1.04 ** (i - (len(ranks) - 1) / 2) for rate in rates]  # else error bars overlap
            axis.errorbar(aside, means, deviations, marker="o", capsize=3, label=f"rank {rank}")
        axis.set_xscale("log")
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        axis.set_xlabel("learning rate")
        axis.set_ylabel(("answers of nothing but emoji", "loss on held-out demonstrations")[at])
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1.05)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    axes[0].legend(loc="lower right")
    figure.suptitle(f"{model}: mean and standard deviation of {seeds} seeds")
    return figure


if __name__ == "__main__":
    command_line(
        main,
        model="a Hub id or a local path of any chat model",
        ranks="of LoReFT",
        rates="learning rates",
        layer="default: a quarter of the model's depth",
        positions="tokens to edit",
        out="a folder for sweep.png and sweep.json",
    )
