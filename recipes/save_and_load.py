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

import json
import tempfile
from pathlib import Path
from typing import Literal

import torch
from _common import (
    Watch,
    begin,
    command_line,
    progress,
    read_splits,
    shuffled,
    trainer_arguments,
    write_results,
)
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

import reftheads as rh
from reftheads.interop.sequence_classification import to_sequence_classification


def main(
    model: str = "tiny-chat", act_fn: Literal["tanh", "relu", "gelu"] = "tanh", data: str | None = None,
    text: str = "sentence", label: str = "label", limit: int | None = None, full: bool = False, epochs: int = 5,
    lr: float = 2e-3, batch_size: int = 8, seed: int = 0, out: Path | None = None,
) -> None:  # fmt: skip
    """Train a classifier, write it in every form, and compare what each form predicts."""
    settings = dict(locals())
    begin(model, seed=seed)
    sentences, held_out = read(data, text, label, limit, seed)
    base, tokenizer = rh.load_base(model, dropout=False)
    base.config.pad_token_id = tokenizer.pad_token_id  # by which transformers' classifiers find the last token
    labels = 1 + max(mood for _, mood in sentences + held_out)
    tuned = rh.InterventionModel(base, graph_for(base, labels, act_fn))
    if full:
        base.requires_grad_(True)
    args = trainer_arguments(
        num_train_epochs=epochs, learning_rate=lr, per_device_train_batch_size=batch_size, seed=seed
    )
    rows = encode(tokenizer, sentences)
    with progress() as bar:
        rh.InterventionTrainer(
            tuned, args, train_dataset=rows, processing_class=tokenizer, callbacks=[Watch(bar)]
        ).train()
    texts = [sentence for sentence, _ in held_out]
    logits = {"the model that was trained": rh.predict(tuned, tokenizer, texts)["mood"]}

    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        tuned.save_pretrained(folder / "adapter")
        if full:
            base.save_pretrained(folder / "base")
            tokenizer.save_pretrained(folder / "base")
        fresh, _ = rh.load_base(str(folder / "base") if full else model)
        loaded = rh.InterventionModel.from_pretrained(fresh, folder / "adapter")
        logits["adapter/, loaded onto a fresh base"] = rh.predict(loaded, tokenizer, texts)["mood"]

        to_sequence_classification(tuned, "mood").save_pretrained(folder / "classifier")
        tokenizer.save_pretrained(folder / "classifier")
        classifier = AutoModelForSequenceClassification.from_pretrained(folder / "classifier").to(base.device).eval()
        by_transformers, hidden_states = classify(classifier, tokenizer, texts, at=-1 if base.can_generate() else 0)
        logits["classifier/, by transformers alone"] = by_transformers

        rh.export_head(tuned, "mood", folder / "head")
        with torch.no_grad():
            logits["head/, on classifier's hidden states"] = read_alone(folder / "head")(hidden_states)

        figures = compared(logits, torch.tensor([mood for _, mood in held_out]))
        console = Console()
        console.print(table_of(f"{model}, {len(held_out)} held-out texts", figures))
        console.print(sizes(folder))
    if out:
        write_results(out, "save_and_load", settings | {"results": figures})


# --- sentences and their mood ---

THINGS = "the film", "this book", "our garden", "the soup", "my new coat", "the concert", "that old house", "the lesson"
MOODS = [("dull and much too long", 0), ("a joy from the first moment", 1), ("a sad mess", 0), ("simply lovely", 1)]

Sentence = tuple[str, int]


def read(
    data: str | None, text: str, label: str, limit: int | None, seed: int
) -> tuple[list[Sentence], list[Sentence]]:
    """Return texts with their labels, and held-out ones: those of the last two things, or a tenth of a data set."""
    if data is None:
        sentences = [(f"{thing} is {mood}.", number) for thing in THINGS for mood, number in MOODS]
        cut = len(sentences) * 3 // 4
    else:
        rows = shuffled(read_splits(data)["train"], limit, seed)
        sentences = list(zip(rows[text], rows[label], strict=True))
        cut = len(sentences) * 9 // 10
    return sentences[:cut], sentences[cut:]


def encode(tokenizer, sentences: list[Sentence]) -> list[dict]:
    """Return rows for the model, with the target of its head."""
    return [
        {"input_ids": tokenizer(text, truncation=True, max_length=128)["input_ids"], "mood": mood}
        for text, mood in sentences
    ]


# --- the classifier ---


def graph_for(base, labels: int, act_fn: str) -> rh.InterventionGraph:
    """Return LoRA in every block, and a head in the shape that the architecture's own classifier has."""
    if base.can_generate():  # transformers' decoders classify by one map without bias, at the last token
        head = rh.LinearHead(labels, "mood", bias=False)
        node = rh.Node(head, component="final_norm_output", positions="l1", name="mood")
    else:  # and its encoders by two maps, at the first
        head = rh.MLPHead(labels, "mood", hidden=base.config.hidden_size, act_fn=act_fn)
        node = rh.Node(head, layer=-1, positions="f1", name="mood")
    return rh.preset("lora8:all-linear", base) + rh.InterventionGraph(node)


# --- without this package ---


@torch.no_grad()
def classify(classifier: nn.Module, tokenizer, texts: list[str], at: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of each text, and the last hidden states of its token `at`."""
    logits, hidden_states = [], []
    for text in texts:
        out = classifier(**tokenizer(text, return_tensors="pt").to(classifier.device), output_hidden_states=True)
        logits.append(out.logits.cpu())
        hidden_states.append(out.hidden_states[-1][:, at].cpu())
    return torch.cat(logits), torch.cat(hidden_states)


def read_alone(folder: Path) -> nn.Module:
    """Return the head from its two files, by torch alone."""
    described, weights = json.loads((folder / "head.json").read_text()), load_file(folder / "head.safetensors")
    widths, biases = described["widths"], described["biases"]
    maps = [nn.Linear(a, b, bias=bias) for a, b, bias in zip(widths, widths[1:], biases, strict=False)]
    between = {None: None, "tanh": nn.Tanh(), "relu": nn.ReLU(), "gelu": nn.GELU()}[described["act_fn"]]
    module = maps[0] if between is None else nn.Sequential(maps[0], between, maps[1])
    module.load_state_dict(weights)
    return module


# --- what comes out ---


def compared(logits: dict[str, torch.Tensor], answers: torch.Tensor) -> dict[str, dict[str, float]]:
    """Return accuracies, and how far the logits of each form are from those of the first, at most."""
    first = next(iter(logits.values()))
    return {
        name: {
            "accuracy": (tensor.argmax(-1) == answers).float().mean().item(),
            "largest_difference": (tensor - first).abs().max().item(),
        }
        for name, tensor in logits.items()
    }


def table_of(title: str, figures: dict[str, dict[str, float]]) -> Table:
    """Return a table with a line a form."""
    table = Table("", "accuracy", "largest difference of a logit", title=title)
    for name, row in figures.items():
        table.add_row(name, f"{row['accuracy']:.1%}", f"{row['largest_difference']:.1e}")
    return table


def sizes(folder: Path) -> Table:
    """Return a table of all files that were written."""
    table = Table("file", "bytes", title="what was written")
    for kind in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(kind.iterdir())
        for file in files:
            table.add_row(str(file.relative_to(folder)), f"{file.stat().st_size:,}", end_section=file == files[-1])
    return table


if __name__ == "__main__":
    command_line(
        main,
        model="a Hub id or a local path of a decoder or an encoder",
        act_fn="of an encoder's classifier",
        data="a folder with a train.csv, or a data set of the Hub; left out: a few sentences",
        text="column of the texts",
        label="column of the labels 0, 1, …",
        limit="how many rows to take",
        full="train all weights of the base model as well",
        out="a folder to keep all that is written, and the figures",
    )
