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

import argparse
import csv
import warnings
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers import AutoModel

import reftheads as rh

Example = dict[str, str]


def read(file: Path) -> list[Example]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ","))


def examples(name: str) -> tuple[list[Example], list[Example] | None]:
    """All examples of a file; or those to train on and those to judge, if there are both."""
    path = Path(name)
    if path.is_file():
        return read(path), None
    if path.is_dir():
        files = {file.stem: file for file in path.iterdir() if file.suffix in (".csv", ".tsv")}
        if not {"train", "test"} <= files.keys():
            raise SystemExit(f"{path} has no train.csv and test.csv, or .tsv: give such a folder, or one file")
        return read(files["train"]), read(files["test"])
    from datasets import load_dataset

    splits = load_dataset(name)
    judged = next((split for split in ("test", "validation") if split in splits and -1 not in splits[split][:1]), None)
    return list(splits["train"]), None if judged is None else list(splits[judged])


def encode(some: list[Example], tokenizer, classes: dict[str, int], args: argparse.Namespace) -> list[dict]:
    texts = [example[args.text] for example in some]
    ids = tokenizer(texts, truncation=True, max_length=args.max_length)
    rows = [{name: ids[name][i] for name in ids} for i in range(len(texts))]
    for row, example in zip(rows, some, strict=True):
        row["label"] = classes[str(example[args.label])]
        row |= {} if args.control is None else {args.control: example[args.control]}
    return rows


def nodes(args: argparse.Namespace, base, classes: int) -> list[rh.Node]:
    config = base.config
    pooled = args.positions == "mean"
    probe = rh.LinearHead(classes, target="label", pool="mean" if pooled else None)
    where = {"positions": "all" if pooled else args.positions}
    layers = range(config.num_hidden_layers)
    found = [
        rh.Node(probe, layer, component, name=f"{component}_{layer}", **where)
        for component in args.components
        for layer in layers
    ]
    heads = range(config.num_attention_heads if args.heads else 0)
    return found + [
        rh.Node(probe, layer, "head_output", head=head, name=f"head_{layer}_{head}", **where)
        for layer in layers
        for head in heads
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default="tiny-chat", help="a Hub id or a local path of an encoder or a language model"
    )
    parser.add_argument("--data", required=True, help="a CSV or TSV file, a folder with train and test, or a Hub id")
    parser.add_argument("--text", default="text", help="the column with texts")
    parser.add_argument("--label", default="label", help="the column with labels, of any kind")
    parser.add_argument("--control", metavar="COLUMN", help="control task: a random label for each value of a column")
    parser.add_argument("--components", type=lambda text: text.split(","), default=["block_output"])
    parser.add_argument("--heads", action="store_true", help="a probe for every attention head as well")
    parser.add_argument("--positions", help="mean, l1, …; default: mean for an encoder, l1 for a language model")
    parser.add_argument("--method", choices=["sgd", "closed"], default="sgd")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--strength", type=float, default=0.1, help="of the closed form's penalty")
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--limit", type=int, help="texts to train on, and to judge")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for probes.json, probes.png and the adapter")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    if args.threads:
        torch.set_num_threads(args.threads)

    train, test = examples(args.data)
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seeds[0])).tolist()
    train, test = [train[i] for i in shuffled[: args.limit]], None if test is None else test[: args.limit]
    classes = {label: i for i, label in enumerate(sorted({str(e[args.label]) for e in train + (test or [])}))}
    base, tokenizer = rh.load_base(args.model, auto_class=AutoModel)
    if args.positions is None:
        args.positions = "l1" if "CausalLM" in str(base.config.architectures) else "mean"
    model = rh.InterventionModel(base, rh.InterventionGraph(*nodes(args, base, len(classes))))
    found = rh.fit_probes(
        model,
        tokenizer,
        encode(train, tokenizer, classes, args),
        eval_rows=None if test is None else encode(test, tokenizer, classes, args),
        control=args.control,
        seeds=args.seeds,
        method=args.method,
        lr=args.lr,
        epochs=args.epochs,
        strength=args.strength,
    )

    console = Console()
    console.width = max(console.width, 132)
    console.print(found.table())
    best = max(found, key=lambda probe: probe.score.mean)
    judged = "a fifth of them held out" if test is None else f"judged on {len(test)} others"
    console.print(
        f"{len(train)} texts, {judged}, {len(classes)} classes, positions {args.positions}; 95 % intervals of "
        f"{len(args.seeds)} seeds. Best: {best.where}, {best.score}. Recording took {found.recording:.1f} s, training "
        f"{len(found)} probes {found.fitting:.1f} s."
    )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        found.save(args.out / "probes.json")
        found.plot(args.out / "probes.png")
        model.save_pretrained(args.out / "adapter")
        console.print(f"written: {args.out / 'probes.json'}, {args.out / 'probes.png'}, {args.out / 'adapter'}")


if __name__ == "__main__":
    main()
