"""Where in a model does it stand what a text is like? A probe at every layer, for a data set of labelled texts.

All probes are trained at once on activations that are recorded once, from several seeds. With --control, each value of
a column gets a random label as well, and selectivity says how much better a probe is at the real labels than at
memorising: for statements about cities, `--control city` shows whether it learnt truth or cities.

    python recipes/text_classification_probe.py --model ENCODER --data SST2_FOLDER --text sentence
    python recipes/text_classification_probe.py --model ENCODER --data SST2_FOLDER --text sentence \\
        --components block_output,attention_output,mlp_output --method closed --out FOLDER
    python recipes/text_classification_probe.py --data cities.csv --text statement --control city --heads
    python recipes/text_classification_probe.py --model gpt2 --data stanfordnlp/sst2 --text sentence --limit 2000

The data are a CSV or TSV file, a folder with train and test files of that kind, or a data set of the Hub.
"""

from pathlib import Path
from typing import Literal

import torch
from _common import begin, command_line, read_splits, read_table
from rich.console import Console
from transformers import AutoModel

import reftheads as rh


def main(
    data: str, model: str = "tiny-chat", text: str = "text", label: str = "label", control: str | None = None,
    components: tuple[str, ...] = ("block_output",), heads: bool = False, positions: str | None = None,
    method: Literal["sgd", "closed"] = "sgd", lr: float = 1e-3, epochs: int = 50, strength: float = 0.1,
    seeds: tuple[int, ...] = (0, 1, 2), limit: int | None = None, max_length: int = 256, threads: int | None = None,
    out: Path | None = None,
) -> None:  # fmt: skip
    """Train a probe at every place from every seed, on activations that are recorded once."""
    begin(model, threads=threads)
    train, test = read(data, label, limit, seeds[0])
    classes = {name: i for i, name in enumerate(sorted({str(e[label]) for e in train + (test or [])}))}
    base, tokenizer = rh.load_base(model, auto_class=AutoModel)
    if positions is None:
        positions = "l1" if "CausalLM" in str(base.config.architectures) else "mean"
    nodes = probes_for(base.config, len(classes), components, heads, positions)
    probed = rh.InterventionModel(base, rh.InterventionGraph(*nodes))
    columns = text, label, control
    rows = encode(tokenizer, train, columns, classes, max_length)
    eval_rows = None if test is None else encode(tokenizer, test, columns, classes, max_length)
    probes = rh.fit_probes(
        probed,
        tokenizer,
        rows,
        eval_rows=eval_rows,
        control=control,
        seeds=seeds,
        method=method,
        lr=lr,
        epochs=epochs,
        strength=strength,
    )

    console = Console()
    console.width = max(console.width, 132)
    console.print(probes.table())
    best = max(probes, key=lambda probe: probe.score.mean)
    judged = "a fifth of them held out" if test is None else f"judged on {len(test)} others"
    console.print(
        f"{len(train)} texts, {judged}, {len(classes)} classes, positions {positions}; 95 % intervals of "
        f"{len(seeds)} seeds. Best: {best.where}, {best.score}. Recording took {probes.recording:.1f} s, training "
        f"{len(probes)} probes {probes.fitting:.1f} s."
    )
    if out:
        out.mkdir(parents=True, exist_ok=True)
        probes.save(out / "probes.json")
        probes.plot(out / "probes.png")
        probed.save_pretrained(out / "adapter")
        console.print(f"written: {out / 'probes.json'}, {out / 'probes.png'}, {out / 'adapter'}")


# --- texts ---

Example = dict[str, str]


def read(data: str, label: str, limit: int | None, seed: int) -> tuple[list[Example], list[Example] | None]:
    """Return examples to train on in random order, and those to judge, if there are such."""
    train, test = examples(data, label)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return [train[i] for i in order[:limit]], None if test is None else test[:limit]


def examples(data: str, label: str) -> tuple[list[Example], list[Example] | None]:
    """Return all examples of a file; or those to train on and those to judge, if there are both."""
    path = Path(data)
    if path.is_file():
        return table(path), None
    if path.is_dir():
        files = {file.stem: file for file in path.iterdir() if file.suffix in (".csv", ".tsv")}
        if not {"train", "test"} <= files.keys():
            raise SystemExit(f"{path} has no train.csv and test.csv, or .tsv: give such a folder, or one file")
        return table(files["train"]), table(files["test"])
    splits = read_splits(data)
    for name in ("test", "validation"):
        if name in splits and splits[name][0][label] != -1:  # -1: the labels are kept back
            return list(splits["train"]), list(splits[name])
    return list(splits["train"]), None


def table(file: Path) -> list[Example]:
    return read_table(file, "\t" if file.suffix == ".tsv" else ",")


def encode(
    tokenizer, examples: list[Example], columns: tuple[str, str, str | None], classes: dict[str, int], max_length: int
) -> list[dict]:
    """Return rows for the model, with their label, and with the column of the control task."""
    text, label, control = columns
    encoded = tokenizer([example[text] for example in examples], truncation=True, max_length=max_length)
    rows = [{name: encoded[name][i] for name in encoded} for i in range(len(examples))]
    for row, example in zip(rows, examples, strict=True):
        row["label"] = classes[str(example[label])]
        if control is not None:
            row[control] = example[control]
    return rows


# --- probes ---


def probes_for(config, classes: int, components: tuple[str, ...], heads: bool, positions: str) -> list[rh.Node]:
    """Return a probe at each component of every layer, and at every attention head if that is wanted."""
    pooled = positions == "mean"
    probe = rh.LinearHead(classes, target="label", pool="mean" if pooled else None)
    where = {"positions": "all" if pooled else positions}
    layers = range(config.num_hidden_layers)
    nodes = [
        rh.Node(probe, layer, component, name=f"{component}_{layer}", **where)
        for component in components
        for layer in layers
    ]
    numbers = range(config.num_attention_heads if heads else 0)
    return nodes + [
        rh.Node(probe, layer, "head_output", head=head, name=f"head_{layer}_{head}", **where)
        for layer in layers
        for head in numbers
    ]


if __name__ == "__main__":
    command_line(
        main,
        model="a Hub id or a local path of an encoder or a language model",
        data="a CSV or TSV file, a folder with train and test, or a Hub id",
        text="the column with texts",
        label="the column with labels, of any kind",
        control="control task: a random label for each value of this column",
        heads="a probe for every attention head as well",
        positions="mean, l1, …; default: mean for an encoder, l1 for a language model",
        strength="of the closed form's penalty",
        limit="texts to train on, and to judge",
        out="a folder for probes.json, probes.png and the adapter",
    )
