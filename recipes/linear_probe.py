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

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from _common import Watch, begin, command_line, progress, read_splits, read_topics, trainer_arguments, write_results
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import reftheads as rh


def main(
    model: str = "tiny-chat", layer: int | None = None, text: str | None = None, column: str = "text",
    limit: int | None = None, length: int = 128, start: Literal["random", "copy"] = "random", epochs: int = 10,
    lr: float = 3e-3, batch_size: int = 16, seed: int = 0, prompts: list[str] | None = None, out: Path | None = None,
) -> None:  # fmt: skip
    """Train a probe at one block, and judge it beside the model and the logit lens."""
    settings = dict(locals())
    begin(model, seed=seed)
    base, tokenizer, output_matrix = load(model)
    rows, held_out = split(tokenizer, documents(tokenizer, text, column), length, limit, seed)
    layer = base.config.num_hidden_layers // 2 if layer is None else layer
    node = rh.Node(probe(len(output_matrix)), layer=layer, name="probe")
    probed = rh.InterventionModel(base, rh.InterventionGraph(node))
    lens = logit_lens(probed, tokenizer, output_matrix, held_out, batch_size, keep=start == "copy")

    args = arguments(epochs, lr, batch_size, seed)
    with progress() as bar:
        watch = Watch(bar, f"a probe of {len(rows):,} rows at block {layer}")
        trainer = rh.InterventionTrainer(
            probed, args, train_dataset=rows, processing_class=tokenizer, callbacks=[watch]
        )
        trainer.train()
    after = perplexities(probed, tokenizer, held_out, batch_size)

    console = Console()
    console.print(trainer.reuse_summary, highlight=False)
    table = Table("prompt", "model", "probe", title=f"{model}, block {layer}: the likeliest next tokens")
    for ids in prompts_of(tokenizer, prompts, held_out):
        likeliest = next_tokens(probed, tokenizer, ids)
        table.add_row(shown(tokenizer.decode(ids)), line_of(likeliest["model"]), line_of(likeliest["probe"]))
    console.print(table)
    figures = {"model": after["model"], "probe": after["probe"], "logit_lens": lens["probe"]}
    names = ("the model itself", f"the probe, from a {start} start", "the model's output matrix, untrained")
    table = Table("", "perplexity", title=f"{model}, block {layer}, {len(held_out)} held-out rows")
    for name, perplexity in zip(names, figures.values(), strict=True):
        table.add_row(name, figure(perplexity))
    console.print(table)
    console.print(f"first epoch {watch.epochs[0]:.1f} s, all {epochs} epochs {sum(watch.epochs):.1f} s")
    if out:
        results = {"layer": layer, "perplexity": figures, "epoch_seconds": watch.epochs}
        write_results(out, "linear_probe", settings | results)


# --- the model and its probes ---


def load(model: str):
    """Return the base model, its tokenizer, and the matrix that it predicts the next token with."""
    base, tokenizer = rh.load_base(model, dropout=False)
    output_layer = base.get_output_embeddings()
    if output_layer is None:
        raise SystemExit(f"{model} is no language model: its {type(base).__name__} has no output layer")
    return base, tokenizer, output_layer.weight


def probe(vocabulary: int) -> rh.LinearHead:
    """Return a head that predicts the next token, without any effect on the model."""
    return rh.LinearHead(vocabulary, target="next", shift=True, detach=True, bias=False)


def arguments(epochs: int, lr: float, batch_size: int, seed: int):
    """Return how probes are trained: one norm of all gradients would couple them, so there is no clipping."""
    return trainer_arguments(
        num_train_epochs=epochs, learning_rate=lr, per_device_train_batch_size=batch_size, max_grad_norm=0, seed=seed
    )


def logit_lens(
    model: rh.InterventionModel, tokenizer, output_matrix: torch.Tensor, rows: list[dict], batch_size: int, keep: bool
) -> dict[str, float]:
    """Return the perplexities of the model's output matrix in every probe; with `keep` the probes start from it."""
    names = model.plan().graph.names
    random_start = {name: model.node(name).W.detach().clone() for name in names}
    for name in names:
        model.node(name).assign(W=output_matrix)
    lens = perplexities(model, tokenizer, rows, batch_size)
    for name in () if keep else names:
        model.node(name).assign(W=random_start[name])
    return lens


# --- text ---

Row = dict[str, list[int]]


def documents(tokenizer, text: str | None, column: str) -> list[str]:
    """Return a file as one document, a data set of the Hub with one a row; left out, one a topic of the toy model."""
    if text is None:
        turns = [(f"Tell me about {t['topic']}.", f"{t['fact']} {t['more']}") for t in read_topics()]
        if not tokenizer.chat_template:
            return [" ".join(pair) for pair in turns]
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenize=False
            )
            for question, answer in turns
        ]
    if Path(text).is_file():
        return [Path(text).read_text(encoding="utf-8")]
    return read_splits(text)["train"][column]


def start_of(tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def encode(tokenizer, text: str) -> list[int]:
    """Return a text as ids behind the tokenizer's first token, if it has one."""
    return [*start_of(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]


def blocks(tokenizer, texts: Iterable[str], length: int) -> Iterator[Row]:
    """Yield documents in rows of at most `length` tokens; the targets of a row are its own tokens."""
    start = start_of(tokenizer)
    taken = length - len(start)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for at in range(0, len(ids), taken):
            row = [*start, *ids[at : at + taken]]
            if len(row) > 1:
                yield {"input_ids": row, "next": row}


def split(tokenizer, texts: list[str], length: int, limit: int | None, seed: int) -> tuple[list[Row], list[Row]]:
    """Return rows to train on, and a tenth of all that is held out."""
    rows = list(islice(blocks(tokenizer, texts, length), limit))
    random.Random(seed).shuffle(rows)
    held_out = max(len(rows) // 10, 1)
    return rows[held_out:], rows[:held_out]


def prompts_of(tokenizer, prompts: list[str] | None, held_out: list[Row]) -> list[list[int]]:
    """Return the prompts as ids; left out, the first halves of some held-out rows."""
    if prompts:
        return [encode(tokenizer, text) for text in prompts]
    return [row["input_ids"][: len(row["input_ids"]) // 2] for row in held_out[:4]]


# --- figures ---


def perplexities(model: rh.InterventionModel, tokenizer, rows: list[Row], batch_size: int) -> dict[str, float]:
    """Return exp of the mean loss of a token: of every probe by its name, and of the model itself."""
    collate, total, count = rh.Collator(tokenizer, padding_side="right"), Counter[str](), 0
    model.eval()
    for at in range(0, len(rows), batch_size):
        batch = {k: v.to(model.device) for k, v in collate(rows[at : at + batch_size]).items()}
        with torch.no_grad():
            out = model(**batch, labels=batch["next"], prompt_mask=batch["attention_mask"])
        tokens = int((batch["next"][:, 1:] != -100).sum())
        for name, loss in (out.losses | {"model": out.loss - out.head_loss}).items():
            total[name] += tokens * loss.item()
        count += tokens
    return {name: math.exp(min(loss / count, 700)) for name, loss in total.items()}  # no overflow


def next_tokens(model: rh.InterventionModel, tokenizer, prompt: list[int], top: int = 5) -> dict[str, list[str]]:
    """Return the likeliest next tokens, the first first: of every probe by its name, and of the model itself."""
    with torch.no_grad():
        out = model.eval()(torch.tensor([prompt], device=model.device))
    scores = out.predictions | {"model": out.logits}
    return {name: [tokenizer.decode([i]) for i in z[0, -1].topk(top).indices.tolist()] for name, z in scores.items()}


def line_of(tokens: list[str]) -> str:
    return " ".join(shown(token) or "·" for token in tokens)


def shown(text: str, length: int = 40) -> str:
    """Return the end of a text on one line."""
    line = repr(text)[1:-1]
    return escape(line if len(line) <= length else f"…{line[-length:]}")


def figure(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1e5 else f"{perplexity:.1e}"


HELP = {
    "model": "a Hub id or a local path of any language model",
    "text": "a file, or a data set of the Hub: NAME or NAME:CONFIGURATION",
    "column": "of the data set",
    "limit": "how many rows of text to take",
    "length": "tokens of a row, at most",
    "start": "copy: the model's output matrix",
    "prompts": {"nargs": "+", "type": str, "help": "default: the first halves of held-out rows"},
    "out": "a folder for all figures",
}

if __name__ == "__main__":
    command_line(main, **HELP, layer="default: half the model's depth")
