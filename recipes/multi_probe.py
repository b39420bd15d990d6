"""What does every block know of the next token? Linear probes for causal language modelling at all layers at once.

The probes of linear_probe.py, one on the embeddings and one on the output of every block, trained together: the
frozen model runs over the text once, and all epochs after the first take its hidden states from a store. Held-out
perplexity by layer shows where the next token takes shape; the likeliest next tokens by layer, what the model
"thinks" behind each block.

    python recipes/multi_probe.py                                 # the embedded toy model, on what it talks about
    python recipes/multi_probe.py --text FILE --out FOLDER        # on a text; a plot and all figures as files
    python recipes/multi_probe.py --model gpt2 --text Salesforce/wikitext:wikitext-2-raw-v1 --limit 1000
"""

import json

from linear_probe import (
    Watch,
    figure,
    load,
    next_tokens,
    options,
    perplexities,
    probe,
    progress,
    prompts,
    quiet,
    shown,
    split,
    train,
)
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import set_seed

import reftheads as rh
from reftheads._utils.atomic import replacing


def graph_for(layers: int, vocabulary: int) -> rh.InterventionGraph:
    nodes = [rh.Node(probe(vocabulary), layer=layer, name=f"block_{layer}") for layer in range(layers)]
    return rh.InterventionGraph(rh.Node(probe(vocabulary), component="embedding_output", name="embedding"), *nodes)


def plot(title: str, names: list[str], probes: dict[str, float], lens: dict[str, float]) -> Figure:
    """Perplexity by layer: of the probes, of the model's output matrix there, and of the model itself."""
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


def main() -> None:
    args = options(str(__doc__).split("\n")[0]).parse_args()
    quiet(args)

    set_seed(args.seed)
    console = Console()
    base, tokenizer, output_matrix = load(args)
    rows, held_out = split(args, tokenizer)
    model = rh.InterventionModel(base, graph_for(base.config.num_hidden_layers, len(output_matrix)))
    names = list(model.plan().graph.names)
    random_start = {name: model.node(name).W.detach().clone() for name in names}
    for name in names:
        model.node(name).assign(W=output_matrix)
    lens = perplexities(args, model, tokenizer, held_out)
    if args.start == "random":
        for name in names:
            model.node(name).assign(W=random_start[name])

    with progress(console) as bar:
        line = bar.add_task(f"{len(names)} probes of {len(rows):,} rows, side by side")
        watch = Watch(lambda steps: bar.update(line, total=steps, advance=1))
        reused = train(args, model, tokenizer, rows, watch)
    probes = perplexities(args, model, tokenizer, held_out)
    console.print(reused, highlight=False)

    tokens = []
    for ids in prompts(args, tokenizer, held_out):
        found = next_tokens(model, tokenizer, ids)
        tokens.append({"prompt": tokenizer.decode(ids), **found})
        table = Table("", "the likeliest next tokens", title=shown(tokenizer.decode(ids), 60), min_width=66)
        for name in [*names, "model"]:
            table.add_row(name.replace("_", " "), " ".join(shown(token) or "·" for token in found[name]))
        console.print(table)
    title = f"{args.model}: perplexity on {len(held_out)} held-out rows"
    table = Table("", f"probe, {args.start} start", "the model's output matrix, untrained", title=title)
    for name in names:
        table.add_row(name.replace("_", " "), figure(probes[name]), figure(lens[name]))
    table.add_row("model", figure(probes["model"]), "")
    console.print(table)
    first, *later = watch.epochs
    mean = sum(later) / max(len(later), 1)
    console.print(f"the first epoch took {first:.1f} s, each of the {len(later)} later ones {mean:.1f} s")
    if args.out:
        told = vars(args) | {"out": None, "probes": probes, "logit_lens": {name: lens[name] for name in names}}
        told |= {"epoch_seconds": watch.epochs, "next_tokens": tokens}
        with replacing(args.out / "multi_probe.json") as path:
            path.write_text(json.dumps(told, indent=2) + "\n")
        with replacing(args.out / "multi_probe.png") as path:
            plot(title, names, probes, lens).savefig(path, dpi=150)
        console.print(f"written: {args.out / 'multi_probe.json'}, {args.out / 'multi_probe.png'}")


if __name__ == "__main__":
    main()
