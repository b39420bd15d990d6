"""What training probes costs, against running the whole model in every step, as transformer-heads does.

    python recipes/benchmarks/probes.py                  # row and token probes, one thread
    python recipes/benchmarks/probes.py --threads 2 --repeats 9 --out FOLDER

The model is a random GPT-2 (width 256, 8 layers), a batch is 16 rows of 64 tokens. A step of the other way is a forward
pass of the frozen model without its output matrix, with all hidden states out, plain linear maps on them, their
backward pass and AdamW. Everything takes turns in one process; medians are printed, and ratios are medians of the ratio
within a turn. Times of `rh.fit_probes` are all of its time, judging included, divided by the steps.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

import reftheads as rh
from reftheads.probing import Probes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where _common.py is

from _common import begin, command_line, write_json


def main(
    threads: int = 1, repeats: int = 5, kinds: tuple[str, ...] = ("rows", "tokens"), out: Path | None = None
) -> None:
    """Measure probes of each kind in turns with the other ways, and show medians."""
    begin(threads=threads)
    console = Console()
    console.width = max(console.width, 110)
    with Progress(console=console, transient=True) as progress:
        rows = [row for kind in kinds for row in measured(kind, repeats, progress)]
    console.print(table_of(rows, threads))
    if out:
        write_json(out / "probes.json", {"threads": threads, "rows": rows})


# --- what is measured ---

LAYERS, WIDTH, ROWS, TOKENS, CLASSES, BATCHES, PROBED = 8, 256, 16, 64, 2, 20, 1
EPOCHS = 20  # of what is measured on cached activations
TARGETS = {
    "early stop, a probe behind two of eight blocks": 4.2,
    "cached, one probe": 483,
    "cached, eight probes, fused": 385,
    "cached, eight probes one by one": 155,
    "64 probes fused, against a loop": 7.5,
    "ten epochs of eight, recording included": 10.5,
    "one probe, against plain PyTorch": 0.8,
    "eight probes, against plain PyTorch": 0.8,
}


class Padding:
    """All of a tokenizer that rows of one length need."""

    pad_token_id = 0


def new_model() -> GPT2Model:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=WIDTH, n_layer=LAYERS, n_head=8, n_positions=TOKENS, vocab_size=8192, bos_token_id=1, eos_token_id=2
    )
    return GPT2Model(config).eval().requires_grad_(False)


def rows_of(kind: str) -> list[dict]:
    """Return random rows with a target for each of eight tasks: one a row, or one a token."""
    shape = (8,) if kind == "rows" else (8, TOKENS)
    ids = torch.randint(3, 8192, (BATCHES * ROWS, TOKENS))
    targets = torch.randint(CLASSES, (BATCHES * ROWS, *shape))
    return [
        {"input_ids": tokens} | {f"task_{i}": target for i, target in enumerate(of_row)}
        for tokens, of_row in zip(ids.tolist(), targets.tolist(), strict=True)
    ]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# --- the other ways ---


def whole_model(rows: list[dict], kind: str, layers: list[int]) -> Callable[[], None]:
    """Return a step of transformer-heads' way, with a probe at each of some layers."""
    base = new_model()
    heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in layers)
    adam = torch.optim.AdamW(heads.parameters(), lr=1e-3)
    ids = torch.tensor([row["input_ids"] for row in rows[:ROWS]])
    target = torch.tensor([row["task_0"] for row in rows[:ROWS]]).flatten()

    def step() -> None:
        states = base(ids, output_hidden_states=True).hidden_states
        inputs = [states[layer + 1] if kind == "tokens" else states[layer + 1][:, -1] for layer in layers]
        losses = [F.cross_entropy(h(x).flatten(0, -2), target) for h, x in zip(heads, inputs, strict=True)]
        adam.zero_grad()
        torch.stack(losses).sum().backward()
        adam.step()

    return step


def plain_probes(x: list[Tensor], y: list[Tensor], epochs: int, batch: int) -> None:
    """Train each probe by a loop of its own on cached features."""
    for features, target in zip(x, y, strict=True):
        linear = nn.Linear(WIDTH, CLASSES)
        adam = torch.optim.AdamW(linear.parameters(), lr=1e-3)
        for _ in range(epochs):
            for items in torch.randperm(len(features)).split(batch):
                loss = F.cross_entropy(linear(features[items]), target[items])
                adam.zero_grad()
                loss.backward()
                adam.step()


# --- ours ---


def with_probes(layers: list[int], kind: str, tasks: int = 1) -> rh.InterventionModel:
    """Return a frozen model with a probe at each of some layers for each task."""
    positions = "l1" if kind == "rows" else "all"
    nodes = [
        rh.Node(rh.LinearHead(CLASSES, f"task_{i}"), layer, positions=positions, name=f"probe_{layer}_{i}")
        for layer in layers
        for i in range(tasks)
    ]
    return rh.InterventionModel(new_model(), rh.InterventionGraph(*nodes))


def early_stop(rows: list[dict], kind: str) -> Callable[[], None]:
    """Return a step of the usual loop that computes nothing above its probe."""
    model = with_probes([PROBED], kind)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = rh.Collator(Padding())([{n: row[n] for n in ("input_ids", "task_0")} for row in rows[:ROWS]])  # type: ignore[arg-type]
    with model.reusing() as replay:
        model(**batch)

    def step() -> None:
        with model.reusing(replay):
            loss = model(**batch).loss
        adam.zero_grad()
        loss.backward()
        adam.step()

    return step


def fit(model: rh.InterventionModel, rows: list[dict], epochs: int, batch: int) -> Probes:
    return rh.fit_probes(
        model, Padding(), rows, eval_rows=rows[:ROWS], validation=0, seeds=(0,), epochs=epochs, batch_size=batch,  # type: ignore[arg-type]
        recording_batch_size=ROWS,
    )  # fmt: skip


# --- measuring ---


def turn(kind: str, rows: list[dict]) -> dict[str, tuple[float, float]]:
    """Return milliseconds of the other way and of ours, everything once."""
    batch = ROWS if kind == "rows" else ROWS * TOKENS
    every = list(range(LAYERS))
    steps = BATCHES * EPOCHS
    one_step, eight_step, early = (
        whole_model(rows, kind, [PROBED]),
        whole_model(rows, kind, every),
        early_stop(rows, kind),
    )
    for run in (one_step, eight_step, early, lambda: fit(with_probes([PROBED], kind), rows[: 2 * ROWS], 1, batch)):
        run()
    whole = 1e3 * statistics.median(seconds(one_step) for _ in range(5))
    whole8 = 1e3 * statistics.median(seconds(eight_step) for _ in range(5))
    early_ms = 1e3 * statistics.median(seconds(early) for _ in range(5))
    one = 1e3 * fit(with_probes([PROBED], kind), rows, EPOCHS, batch).fitting / steps
    eight = 1e3 * fit(with_probes(every, kind), rows, EPOCHS, batch).fitting / steps
    many = 1e3 * fit(with_probes(every, kind, 8), rows, EPOCHS // 4, batch).fitting / (steps // 4)
    ten = fit(with_probes(every, kind), rows, 10, batch)

    count = len(rows) * (1 if kind == "rows" else TOKENS)
    x = [torch.randn(count, WIDTH) for _ in every]
    y = [torch.tensor([row[f"task_{i}"] for row in rows]).flatten() for i in every]
    plain = 1e3 * seconds(lambda: plain_probes(x[:1], y[:1], EPOCHS, batch)) / steps
    plain8 = 1e3 * seconds(lambda: plain_probes(x, y, EPOCHS // 4, batch)) / (steps // 4)
    loop64 = 1e3 * seconds(lambda: plain_probes(x * 8, y * 8, 1, batch)) / BATCHES
    figures = [
        (whole, early_ms), (whole, one), (whole8, eight), (whole8, 8 * one), (loop64, many),
        (10 * BATCHES * whole8, 1e3 * (ten.recording + ten.fitting)), (plain, one), (plain8, eight),
    ]  # fmt: skip
    return dict(zip(TARGETS, figures, strict=True))


def measured(kind: str, repeats: int, progress: Progress) -> Iterator[dict]:
    """Yield a row of the table for each target: medians of all turns."""
    rows = rows_of(kind)
    turns = [turn(kind, rows) for _ in progress.track(range(repeats), description=f"probes of {kind}")]
    for name, wanted in TARGETS.items():
        theirs, ours = (statistics.median(t[name][i] for t in turns) for i in (0, 1))
        ratio = statistics.median(t[name][0] / t[name][1] for t in turns)
        yield {"kind": kind, "what": name, "other_ms": theirs, "ours_ms": ours, "ratio": ratio, "wanted": wanted}


def table_of(rows: list[dict], threads: int) -> Table:
    table = Table(
        title=f"Probes on a GPT-2 of width {WIDTH}, {LAYERS} layers, {ROWS} × {TOKENS} tokens, {threads} threads"
    )
    for name in ("probes of", "what", "the other way, ms", "ours, ms", "ratio", "wanted"):
        table.add_column(name, justify="left" if name in ("probes of", "what") else "right")
    for row in rows:
        missed = "" if row["ratio"] >= row["wanted"] else " MISSED"
        table.add_row(
            row["kind"], row["what"], f"{row['other_ms']:.4g}", f"{row['ours_ms']:.4g}", f"{row['ratio']:.3g} ×",
            f"{row['wanted']:g} ×{missed}", end_section=row["what"] == list(TARGETS)[-1],
        )  # fmt: skip
    return table


if __name__ == "__main__":
    command_line(main, threads="of torch", kinds="rows or tokens, that have a target", out="a folder for probes.json")
