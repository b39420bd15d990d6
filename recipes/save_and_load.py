"""What is saved, where it lies, and who can read it: a classifier is trained, saved, loaded and exported.

A head and LoRA on a language model or an encoder learn the mood of a sentence. Then they are written in every form:

    adapter/     graph and weights, by model.save_pretrained: loads onto the base model, here or through PEFT
    base/        with --full: the base model itself, all of whose weights were trained; the adapter loads onto it
    head/        the head alone, by rh.export_head: a plain torch module, read without this package
    classifier/  the whole as a checkpoint of AutoModelForSequenceClassification, LoRA merged into its weights

Each is read back, and its predictions are compared with those of the model that was trained.

    python recipes/save_and_load.py                                # the embedded toy model, built-in sentences
    python recipes/save_and_load.py --data FOLDER_OR_HUB_ID --limit 2000 --out FOLDER
    python recipes/save_and_load.py --model ENCODER --act-fn tanh  # "relu" for DistilBERT, "gelu" for DeBERTa
"""

import argparse
import json
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments, set_seed

import reftheads as rh
from reftheads._utils.atomic import replacing
from reftheads.interop.sequence_classification import to_sequence_classification

THINGS = "the film", "this book", "our garden", "the soup", "my new coat", "the concert", "that old house", "the lesson"
MOODS = [("dull and much too long", 0), ("a joy from the first moment", 1), ("a sad mess", 0), ("simply lovely", 1)]


def sentences(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Texts with their labels; those of the last two things, or every tenth of a data set, are held out."""
    if args.data is None:
        return [(f"{thing} is {mood}.", label) for thing in THINGS for mood, label in MOODS]
    from datasets import load_dataset

    some = load_dataset(args.data, split="train").shuffle(seed=args.seed)
    some = some.select(range(min(args.limit or len(some), len(some))))
    return list(zip(some[args.text], some[args.label], strict=True))


def graph_for(args: argparse.Namespace, base, labels: int) -> rh.InterventionGraph:
    """LoRA in every block, and a head in the shape that the architecture's own classifier has."""
    if base.can_generate():  # transformers' decoders classify by one map without bias, at the last token
        head = rh.LinearHead(labels, "mood", bias=False)
        node = rh.Node(head, component="final_norm_output", positions="l1", name="mood")
    else:  # and its encoders by two maps, at the first
        head = rh.MLPHead(labels, "mood", hidden=base.config.hidden_size, act_fn=args.act_fn)
        node = rh.Node(head, layer=-1, positions="f1", name="mood")
    return rh.preset("lora8:all-linear", base) + rh.InterventionGraph(node)


class Watch(TrainerCallback):
    def __init__(self, bar: Progress):
        self.bar = bar

    def on_train_begin(self, args, state, *rest, **kwargs) -> None:
        self.line = self.bar.add_task("training", total=state.max_steps)

    def on_step_end(self, *args, **kwargs) -> None:
        self.bar.advance(self.line)


def train(args: argparse.Namespace, model: rh.InterventionModel, tokenizer, examples: list[tuple[str, int]]) -> None:
    rows = [
        {"input_ids": tokenizer(text, truncation=True, max_length=128)["input_ids"], "mood": label}
        for text, label in examples
    ]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # a Trainer prints what it logs
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=Console()) as bar, redirect_stdout(None):
        given = TrainingArguments(
            folder, num_train_epochs=args.epochs, learning_rate=args.lr, per_device_train_batch_size=args.batch_size,
            seed=args.seed, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        rh.InterventionTrainer(
            model, given, train_dataset=rows, processing_class=tokenizer, callbacks=[Watch(bar)]
        ).train()


def read_alone(folder: Path) -> nn.Module:
    """The head from its two files, by torch alone."""
    told, weights = json.loads((folder / "head.json").read_text()), load_file(folder / "head.safetensors")
    widths, biases = told["widths"], told["biases"]
    maps = [nn.Linear(a, b, bias=bias) for a, b, bias in zip(widths, widths[1:], biases, strict=False)]
    between = {None: None, "tanh": nn.Tanh(), "relu": nn.ReLU(), "gelu": nn.GELU()}[told["act_fn"]]
    module = maps[0] if between is None else nn.Sequential(maps[0], between, maps[1])
    module.load_state_dict(weights)
    return module


def sizes(folder: Path) -> Table:
    table = Table("file", "bytes", title="what was written")
    for kind in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(kind.iterdir())
        for file in files:
            table.add_row(str(file.relative_to(folder)), f"{file.stat().st_size:,}", end_section=file == files[-1])
    return table


def save_and_load(args: argparse.Namespace, folder: Path, console: Console) -> dict:
    examples = sentences(args)
    cut = len(examples) * 3 // 4 if args.data is None else len(examples) * 9 // 10
    held_out, answers = [text for text, _ in examples[cut:]], torch.tensor([label for _, label in examples[cut:]])

    base, tokenizer = rh.load_base(args.model, dropout=False)
    base.config.pad_token_id = tokenizer.pad_token_id  # by which transformers' classifiers find the last token
    model = rh.InterventionModel(base, graph_for(args, base, 1 + max(label for _, label in examples)))
    if args.full:
        base.requires_grad_(True)
    train(args, model, tokenizer, examples[:cut])
    trained = rh.predict(model, tokenizer, held_out)["mood"]

    model.save_pretrained(folder / "adapter")
    if args.full:
        base.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
    fresh, _ = rh.load_base(str(folder / "base") if args.full else args.model)
    loaded = rh.InterventionModel.from_pretrained(fresh, folder / "adapter")
    reloaded = rh.predict(loaded, tokenizer, held_out)["mood"]

    to_sequence_classification(model, "mood").save_pretrained(folder / "classifier")
    tokenizer.save_pretrained(folder / "classifier")
    classifier = AutoModelForSequenceClassification.from_pretrained(folder / "classifier").to(base.device).eval()
    rh.export_head(model, "mood", folder / "head")
    alone = read_alone(folder / "head").to(base.device)
    standard, plain = [], []
    for text in held_out:
        ids = tokenizer(text, return_tensors="pt").to(base.device)
        with torch.no_grad():
            out = classifier(**ids, output_hidden_states=True)
            at = -1 if base.can_generate() else 0
            plain.append(alone(out.hidden_states[-1][:, at]).cpu())
            standard.append(out.logits.cpu())

    def figures(logits: torch.Tensor) -> dict:
        return {
            "accuracy": (logits.argmax(-1) == answers).float().mean().item(),
            "largest_difference": (logits - trained).abs().max().item(),
        }

    compared = {
        "the model that was trained": trained,
        "adapter/, loaded onto a fresh base": reloaded,
        "classifier/, by transformers alone": torch.cat(standard),
        "head/, on classifier's hidden states": torch.cat(plain),
    }
    found = {name: figures(logits) for name, logits in compared.items()}
    table = Table(
        "", "accuracy", "largest difference of a logit", title=f"{args.model}, {len(held_out)} held-out texts"
    )
    for name, given in found.items():
        table.add_row(name, f"{given['accuracy']:.1%}", f"{given['largest_difference']:.1e}")
    console.print(table)
    console.print(sizes(folder))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--model", default="tiny-chat", help="a Hub id or a local path of a decoder or an encoder")
    parser.add_argument("--act-fn", choices=["tanh", "relu", "gelu"], default="tanh", help="of an encoder's classifier")
    parser.add_argument("--data", help="a folder with a train.csv, or a data set of the Hub; left out: a few sentences")
    parser.add_argument("--text", default="sentence", help="column of the texts (default: %(default)s)")
    parser.add_argument("--label", default="label", help="column of the labels 0, 1, … (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="how many rows to take")
    parser.add_argument("--full", action="store_true", help="train all weights of the base model as well")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep all that is written there, and the figures")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    if args.model == "tiny-chat":  # so small that a second thread mostly waits, for ever on a busy machine
        torch.set_num_threads(1)

    set_seed(args.seed)
    console = Console()
    if args.out is None:
        with tempfile.TemporaryDirectory() as folder:
            save_and_load(args, Path(folder), console)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    found = save_and_load(args, args.out, console)
    with replacing(args.out / "save_and_load.json") as path:
        path.write_text(json.dumps(vars(args) | {"out": None, "results": found}, indent=2) + "\n")
    console.print(f"written: {args.out / 'save_and_load.json'}")


if __name__ == "__main__":
    main()
