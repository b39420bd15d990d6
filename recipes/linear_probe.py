"""What does a middle block know of the next token? A linear probe for causal language modelling.

A new output layer on the hidden states of one block of a frozen model learns to predict the next token of a text.
Its perplexity on held-out parts of the text stands beside the model's own, and beside that of the model's output
matrix at the same block, untrained: the logit lens, in its plain form without the final norm. A probe learns from
the text and the model does not, so that on a text that is strange to the model a probe may be the better one.

    python recipes/linear_probe.py                                 # the embedded toy model, on what it talks about
    python recipes/linear_probe.py --text FILE --out FOLDER        # on a text; all figures as a file
    python recipes/linear_probe.py --text FILE --start copy        # ... from the model's output matrix
    python recipes/linear_probe.py --model gpt2 --layer -4 --text Salesforce/wikitext:wikitext-2-raw-v1 --limit 2000
"""

import argparse
import csv
import json
import math
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

import reftheads as rh
from reftheads._utils.atomic import replacing

TOPICS = Path(__file__).parent / "tools" / "tiny_chat_topics.tsv"
TOP = 5

Row = dict[str, list[int]]


def documents(args: argparse.Namespace, tokenizer) -> list[str]:
    """A file is one document; a data set of the Hub has one a row; left out, one a topic of the toy model."""
    if args.text is None:
        with TOPICS.open(encoding="utf-8") as file:
            topics = list(csv.DictReader(file, delimiter="\t"))
        turns = [(f"Tell me about {t['topic']}.", f"{t['fact']} {t['more']}") for t in topics]
        if not tokenizer.chat_template:
            return [" ".join(pair) for pair in turns]
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenize=False
            )
            for question, answer in turns
        ]
    if Path(args.text).is_file():
        return [Path(args.text).read_text(encoding="utf-8")]
    from datasets import load_dataset

    name, _, configuration = args.text.partition(":")
    return load_dataset(name, configuration or None, split="train")[args.column]


def start_of(tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def encode(tokenizer, text: str) -> list[int]:
    return [*start_of(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]


def blocks(tokenizer, texts: Iterable[str], length: int) -> Iterator[Row]:
    """Documents in rows of at most `length` tokens; the targets of a row are its own tokens."""
    start = start_of(tokenizer)
    taken = length - len(start)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for at in range(0, len(ids), taken):
            row = [*start, *ids[at : at + taken]]
            if len(row) > 1:
                yield {"input_ids": row, "next": row}


def split(args: argparse.Namespace, tokenizer) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and a tenth of all that is held out."""
    rows = list(islice(blocks(tokenizer, documents(args, tokenizer), args.length), args.limit))
    random.Random(args.seed).shuffle(rows)
    held_out = max(len(rows) // 10, 1)
    return rows[held_out:], rows[:held_out]


def load(args: argparse.Namespace):
    """The base model, its tokenizer, and the matrix that it predicts the next token with."""
    base, tokenizer = rh.load_base(args.model, dropout=False)
    own = base.get_output_embeddings()
    if own is None:
        raise SystemExit(f"{args.model} is no language model: its {type(base).__name__} has no output layer")
    return base, tokenizer, own.weight


def probe(vocabulary: int) -> rh.LinearHead:
    return rh.LinearHead(vocabulary, target="next", shift=True, detach=True, bias=False)


class Watch(TrainerCallback):
    """Calls a function after every step, and takes the time of every epoch."""

    def __init__(self, step: Callable[[int], object]):
        self.step = step
        self.epochs: list[float] = []

    def on_epoch_begin(self, *args, **kwargs) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args, state, *rest, **kwargs) -> None:
        self.step(state.max_steps)

    def on_epoch_end(self, *args, **kwargs) -> None:
        self.epochs.append(time.perf_counter() - self.start)


def train(args: argparse.Namespace, model: rh.InterventionModel, tokenizer, rows: list[Row], watch: Watch) -> str:
    """Trains the probes; gives what was reused of the base model."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=args.epochs, learning_rate=args.lr, per_device_train_batch_size=args.batch_size,
            max_grad_norm=0,  # one norm of all gradients would couple the probes
            seed=args.seed, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = rh.InterventionTrainer(
            model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[watch]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.reuse_summary


def perplexities(args: argparse.Namespace, model: rh.InterventionModel, tokenizer, rows: list[Row]) -> dict[str, float]:
    """exp of the mean loss of a token: of every probe by its name, and of the model itself."""
    collate, total, count = rh.Collator(tokenizer, padding_side="right"), Counter[str](), 0
    model.eval()
    for at in range(0, len(rows), args.batch_size):
        batch = {k: v.to(model.device) for k, v in collate(rows[at : at + args.batch_size]).items()}
        with torch.no_grad():
            out = model(**batch, labels=batch["next"], prompt_mask=batch["attention_mask"])
        tokens = int((batch["next"][:, 1:] != -100).sum())
        for name, loss in (out.losses | {"model": out.loss - out.head_loss}).items():
            total[name] += tokens * loss.item()
        count += tokens
    return {name: math.exp(min(loss / count, 700)) for name, loss in total.items()}  # no overflow


def next_tokens(model: rh.InterventionModel, tokenizer, prompt: list[int]) -> dict[str, list[str]]:
    """The likeliest next tokens, the first first: of every probe by its name, and of the model itself."""
    with torch.no_grad():
        out = model.eval()(torch.tensor([prompt], device=model.device))
    scores = out.predictions | {"model": out.logits}
    return {name: [tokenizer.decode([i]) for i in z[0, -1].topk(TOP).indices.tolist()] for name, z in scores.items()}


def prompts(args: argparse.Namespace, tokenizer, held_out: list[Row]) -> list[list[int]]:
    """Those that were given, else the first halves of some held-out rows."""
    given = [encode(tokenizer, text) for text in args.prompts or ()]
    return given or [row["input_ids"][: len(row["input_ids"]) // 2] for row in held_out[:4]]


def shown(text: str, length: int = 40) -> str:
    """The end of a text on one line."""
    line = repr(text)[1:-1]
    return escape(line if len(line) <= length else f"…{line[-length:]}")


def figure(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1e5 else f"{perplexity:.1e}"


def options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="tiny-chat", help="a Hub id or a local path of any language model")
    parser.add_argument("--text", help="a file, or a data set of the Hub: NAME or NAME:CONFIGURATION")
    parser.add_argument("--column", default="text", help="of the data set (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="how many rows of text to take")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row, at most (default: %(default)s)")
    parser.add_argument("--start", choices=["random", "copy"], default="random", help="copy: the model's output matrix")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="default: the first halves of held-out rows")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write all figures there")
    return parser


def quiet(args: argparse.Namespace) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    if args.model == "tiny-chat":  # so small that a second thread mostly waits, for ever on a busy machine
        torch.set_num_threads(1)


def progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def main() -> None:
    parser = options(str(__doc__).split("\n")[0])
    parser.add_argument("--layer", type=int, help="default: half the model's depth")
    args = parser.parse_args()
    quiet(args)

    set_seed(args.seed)
    console = Console()
    base, tokenizer, output_matrix = load(args)
    rows, held_out = split(args, tokenizer)
    layer = base.config.num_hidden_layers // 2 if args.layer is None else args.layer
    node = rh.Node(probe(len(output_matrix)), layer=layer, name="probe")
    model = rh.InterventionModel(base, rh.InterventionGraph(node))
    random_start = model.node("probe").W.detach().clone()
    model.node("probe").assign(W=output_matrix)
    before = perplexities(args, model, tokenizer, held_out)
    if args.start == "random":
        model.node("probe").assign(W=random_start)

    with progress(console) as bar:
        line = bar.add_task(f"a probe of {len(rows):,} rows at block {layer}")
        watch = Watch(lambda steps: bar.update(line, total=steps, advance=1))
        reused = train(args, model, tokenizer, rows, watch)
    after = perplexities(args, model, tokenizer, held_out)

    console.print(reused, highlight=False)
    table = Table("prompt", "model", "probe", title=f"{args.model}, block {layer}: the likeliest next tokens")
    for ids in prompts(args, tokenizer, held_out):
        found = next_tokens(model, tokenizer, ids)
        given = (" ".join(shown(token) or "·" for token in found[name]) for name in ("model", "probe"))
        table.add_row(shown(tokenizer.decode(ids)), *given)
    console.print(table)
    figures = {"model": after["model"], "probe": after["probe"], "logit_lens": before["probe"]}
    names = ("the model itself", f"the probe, from a {args.start} start", "the model's output matrix, untrained")
    table = Table("", "perplexity", title=f"{args.model}, block {layer}, {len(held_out)} held-out rows")
    for name, perplexity in zip(names, figures.values(), strict=True):
        table.add_row(name, figure(perplexity))
    console.print(table)
    console.print(f"first epoch {watch.epochs[0]:.1f} s, all {args.epochs} epochs {sum(watch.epochs):.1f} s")
    if args.out:
        told = vars(args) | {"out": None, "layer": layer, "perplexity": figures, "epoch_seconds": watch.epochs}
        with replacing(args.out / "linear_probe.json") as path:
            path.write_text(json.dumps(told, indent=2) + "\n")
        console.print(f"written: {args.out / 'linear_probe.json'}")


if __name__ == "__main__":
    main()
