"""What does every block know of the next token? Linear probes for causal language modelling at all layers at once.

The probes of linear_probe.py, one on the embeddings and one on the output of every block, trained together: the
frozen model runs over the text once, and all epochs after the first take its hidden states from a store. Held-out
perplexity by layer shows where the next token takes shape; the likeliest next tokens by layer, what the model
"thinks" behind each block.

    python recipes/multi_probe.py                                 # the embedded toy model, on what it talks about
    python recipes/multi_probe.py --text FILE --out FOLDER        # on a text; a plot and all figures as files
    python recipes/multi_probe.py --model gpt2 --text Salesforce/wikitext:wikitext-2-raw-v1 --limit 1000
"""

from pathlib import Path
from typing import Literal

from _common import Watch, begin, command_line, progress, write_results
from linear_probe import (
    HELP,
    arguments,
    documents,
    figure,
    line_of,
    load,
    logit_lens,
    next_tokens,
    perplexities,
    probe,
    prompts_of,
    shown,
    split,
)
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import reftheads as rh


def main(
    model: str = "tiny-chat", text: str | None = None, column: str = "text", limit: int | None = None,
    length: int = 128, start: Literal["random", "copy"] = "random", epochs: int = 10, lr: float = 3e-3,
    batch_size: int = 16, seed: int = 0, prompts: list[str] | None = None, out: Path | None = None,
) -> None:  # fmt: skip
    """Train a probe at every layer, side by side, and judge them beside the model and the logit lens."""
    settings = dict(locals())
    begin(model, seed=seed)
    base, tokenizer, output_matrix = load(model)
    rows, held_out = split(tokenizer, documents(tokenizer, text, column), length, limit, seed)
    probed = rh.InterventionModel(base, graph_for(base.config.num_hidden_layers, len(output_matrix)))
    names = list(probed.plan().graph.names)
    lens = logit_lens(probed, tokenizer, output_matrix, held_out, batch_size, keep=start == "copy")

    args = arguments(epochs, lr, batch_size, seed)
    with progress() as bar:
        watch = Watch(bar, f"{len(names)} probes of {len(rows):,} rows, side by side")
        trainer = rh.InterventionTrainer(
            probed, args, train_dataset=rows, processing_class=tokenizer, callbacks=[watch]
        )
        trainer.train()
    probes = perplexities(probed, tokenizer, held_out, batch_size)

    console = Console()
    console.print(trainer.reuse_summary, highlight=False)
    tokens = []
    for ids in prompts_of(tokenizer, prompts, held_out):
        likeliest = next_tokens(probed, tokenizer, ids)
        tokens.append({"prompt": tokenizer.decode(ids), **likeliest})
        console.print(table_of_tokens(tokens[-1], [*names, "model"]))
    title = f"{model}: perplexity on {len(held_out)} held-out rows"
    console.print(table_of_layers(f"probe, {start} start", title, names, probes, lens))
    first, *later = watch.epochs
    mean = sum(later) / max(len(later), 1)
    console.print(f"the first epoch took {first:.1f} s, each of the {len(later)} later ones {mean:.1f} s")
    if out:
        figures = {"probes": probes, "logit_lens": {name: lens[name] for name in names}}
        figures |= {"epoch_seconds": watch.epochs, "next_tokens": tokens}
        write_results(out, "multi_probe", settings | figures, plot(title, names, probes, lens))


def graph_for(layers: int, vocabulary: int) -> rh.InterventionGraph:
    """Return a probe on the embeddings, and one on the output of every block."""
    nodes = [rh.Node(probe(vocabulary), layer=layer, name=f"block_{layer}") for layer in range(layers)]
    return rh.InterventionGraph(rh.Node(probe(vocabulary), component="embedding_output", name="embedding"), *nodes)


def table_of_tokens(likeliest: dict, names: list[str]) -> Table:
    """Return a table of what comes next after a prompt, by layer."""
    table = Table("", "the likeliest next tokens", title=shown(likeliest["prompt"], 60), min_width=66)
    for name in names:
        table.add_row(name.replace("_", " "), line_of(likeliest[name]))
    return table


def table_of_layers(
    column: str, title: str, names: list[str], probes: dict[str, float], lens: dict[str, float]
) -> Table:
    """Return a table of perplexities by layer."""
    table = Table("", column, "the model's output matrix, untrained", title=title)
    for name in names:
        table.add_row(name.replace("_", " "), figure(probes[name]), figure(lens[name]))
    table.add_row("model", figure(probes["model"]), "")
    return table


def plot(title: str, names: list[str], probes: dict[str, float], lens: dict[str, float]) -> Figure:
    """Draw perplexity by layer: of the probes, of the model's output matrix there, and of the model itself."""
    drawn = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn.subplots()
    axes.plot(names, [lens[name] for name in names], "o--", color="0.6", label="the model's output matrix, untrained")
    axes.plot(names, [probes[name] for name in names], "o-", label="probe")
    axes.axhline(probes["model"], color="black", linewidth=1, label="the model itself")
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], rotation=45, ha="right")
    axes.set_yscale("log")
    axes.set_ylabel("perplexity on held-out text")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn.suptitle(title)
    return drawn


if __name__ == "__main__":
    command_line(main, **HELP)
