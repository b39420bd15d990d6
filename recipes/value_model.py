"""A value model: how will this text end? Trained on texts with an outcome, it then picks the best of n continuations.

Every token of a training text has the text's outcome as its target, so that the value of a beginning comes to be the
mean outcome of the texts that begin so (Monte-Carlo values): here, the probability that a sentence ends positive. The
base model is frozen, of 4 bits, and goes without its language-model head; LoRA and a value head are trained by mean
squared error. Afterwards n continuations are sampled for the first words of held-out sentences, every token gets its
value, and the one with the highest value at its end is taken. A classifier of words (tf-idf and logistic regression),
which has nothing to do with the model, judges what that is worth.

LoRA that was trained for values alone cannot write any more, so the base model writes what is then valued. With
--language it is trained by the language model's own loss as well: then one model writes such texts and values them.

    python recipes/value_model.py --data FOLDER                             # the embedded toy model; train and test CSV
    python recipes/value_model.py --data FOLDER --model FOLDER_OR_HUB_ID --out FOLDER
    python recipes/value_model.py --data stanfordnlp/sst2 --test validation --model HUB_ID --optim paged_adamw_8bit
    python recipes/value_model.py … --language          # one model that writes and values
    python recipes/value_model.py … --graph none        # a probe: what is written stays as the base writes it
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars, load_dataset
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from transformers import TrainerCallback, TrainingArguments

import reftheads as rh
from reftheads._utils.atomic import replacing

SHARES = (0.25, 0.5, 0.75, 1.0)  # of a sentence that has been read

Sample = tuple[str, float]
"""A text and its outcome, from 0 to 1."""


def read(args: argparse.Namespace) -> tuple[list[Sample], list[Sample]]:
    """Texts to train on, and held-out ones."""
    found = load_dataset(args.data)
    splits = []
    for name in ("train", args.test):
        some = found[name].shuffle(seed=0)
        splits.append([(row[args.text], float(row[args.label])) for row in some][: args.limit])
    return splits[0], splits[1]


def encode(tokenizer, samples: list[Sample], targets: tuple[str, ...] = ()) -> list[dict]:
    """Rows for the model: with the outcome at every token as `value`, with the tokens themselves as `labels`."""
    ids = tokenizer([text for text, _ in samples], truncation=True, max_length=128)["input_ids"]
    rows = []
    for (_, outcome), one in zip(samples, ids, strict=True):
        given = {"value": [outcome] * len(one), "labels": one, "prompt_mask": [1] * len(one)}
        rows.append({"input_ids": one, **{name: given[name] for name in targets}})
    return rows


def graph_for(args: argparse.Namespace, base) -> rh.InterventionGraph:
    options = dict(target="value", loss="mse", activation="sigmoid", lr=args.head_lr)
    head = rh.MLPHead(1, hidden=args.hidden, **options) if args.hidden else rh.LinearHead(1, **options)
    graph = rh.InterventionGraph(rh.Node(head, component="final_norm_output", name="value"))
    return graph if args.graph == "none" else rh.preset(args.graph, base) + graph


class Step(TrainerCallback):
    """Calls a function after every step."""

    def __init__(self, step: Callable[[], object]):
        self.step = step

    def on_step_end(self, *args, **kwargs) -> None:
        self.step()


def train(args: argparse.Namespace, model: rh.InterventionModel, tokenizer, samples: list[Sample], progress: Progress):
    targets = ("value", "labels", "prompt_mask") if args.language else ("value",)
    rows = encode(tokenizer, samples, targets)
    steps = -(-len(rows) // args.batch) * args.epochs
    line = progress.add_task("training", total=steps)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):  # a Trainer prints what it logs
        given = TrainingArguments(
            folder, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch, learning_rate=args.lr,
            optim=args.optim, warmup_steps=steps // 20, seed=args.seed, train_sampling_strategy="group_by_length",
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        step = Step(lambda: progress.advance(line))
        rh.InterventionTrainer(model, given, train_dataset=rows, processing_class=tokenizer, callbacks=[step]).train()


def judged(model: rh.InterventionModel, tokenizer, samples: list[Sample], constant: float) -> list[dict]:
    """How far the values are from the outcomes, by how much of each text has been read."""
    values = rh.predict(model, tokenizer, encode(tokenizer, samples))["value"]
    outcomes = [outcome for _, outcome in samples]
    figures = []
    for share in SHARES:
        at = [float(of_text[max(round(share * len(of_text)), 1) - 1, 0]) for of_text in values]
        figures.append(
            {
                "read": share,
                "mse": statistics.mean((v - y) ** 2 for v, y in zip(at, outcomes, strict=True)),
                "mse_of_constant": statistics.mean((constant - y) ** 2 for y in outcomes),
                "auc": float(roc_auc_score(outcomes, at)),
            }
        )
    return figures


# --- the best of n ----------------------------------------------------------------------------------------


def pieces(tokenizer, ids) -> list[str]:
    """What each token adds to the text."""
    texts = [tokenizer.decode(ids[:end], skip_special_tokens=True) for end in range(len(ids) + 1)]
    return [text[len(before) :] for before, text in zip(texts, texts[1:], strict=False)]


def continuations(args: argparse.Namespace, model: rh.InterventionModel, tokenizer, beginning: str) -> list[dict]:
    """n sampled continuations of a text, each with a value at every token, and its mean log-probability."""
    prompt = tokenizer(beginning, return_tensors="pt").to(model.device)
    start = prompt["input_ids"].shape[1]
    sampling = dict(max_new_tokens=args.new_tokens, do_sample=True, top_k=0, top_p=0.95, num_return_sequences=args.n)
    options = dict(pad_token_id=tokenizer.pad_token_id, return_dict_in_generate=True, output_logits=True)
    if args.language or args.graph == "none":
        out = seen = model.generate(**prompt, **sampling, **options, return_heads=True)
    else:
        with model.disable_adapter():
            out = model.generate(**prompt, **sampling, **options)
        ends = out.sequences == tokenizer.eos_token_id
        ends[:, :start] = False
        with torch.no_grad():
            seen = model(input_ids=out.sequences, attention_mask=(ends.cumsum(1) <= ends).long())
    logs = model.get_base_model().compute_transition_scores(out.sequences, out.logits, normalize_logits=True)
    values, real = seen.predictions["value"][..., 0], seen.selected["value"]
    return [
        {
            "text": tokenizer.decode(ids[there], skip_special_tokens=True),
            "tokens": pieces(tokenizer, ids[there]),
            "values": v[there].tolist(),
            "value": float(v[there][-1]),
            "log_probability": float(log[there[start:]].mean()),
        }
        for ids, v, there, log in zip(out.sequences, values, real, logs, strict=True)
    ]


def best_of_n(
    args: argparse.Namespace, model: rh.InterventionModel, tokenizer, held_out: list[Sample], judge: Pipeline,
    progress: Progress,
) -> list[dict]:  # fmt: skip
    """For each of some beginnings: the continuation of the highest value at its end, and one at random."""
    model.eval()
    found = []
    for text, _ in progress.track(held_out[: args.tries], description=f"the best of {args.n}"):
        beginning = " ".join(text.split()[: args.words])
        some = continuations(args, model, tokenizer, beginning)
        pair = {"best": max(some, key=lambda one: one["value"]), "random": random.choice(some)}
        for one in pair.values():
            one["judge"] = float(judge.predict_proba([one["text"]])[0, 1])
        found.append({"beginning": beginning, **pair})
    return found


def beside(one: dict) -> Text:
    """A text in the colours of its values, from red at 0 to green at 1."""
    shown = Text()
    for word, value in zip(one["tokens"], one["values"], strict=True):
        shown.append(word, style=f"rgb({int(220 * (1 - value))},{int(180 * value)},60)")
    return shown


def tables(args: argparse.Namespace, figures: list[dict], found: list[dict], judge: float) -> list[Table]:
    title = f"{args.model}, {args.graph}: values of held-out sentences"
    values = Table("of the sentence read", "MSE", "MSE of the mean outcome", "AUC", title=title)
    for row in figures:
        values.add_row(f"{row['read']:.0%}", *(f"{row[name]:.3f}" for name in ("mse", "mse_of_constant", "auc")))
    title = f"the best of {args.n} and one at random, {len(found)} beginnings, after {args.words} words"
    texts = Table("", "text, in the colours of its values", "value", "log p a token", title=title)
    for row in found[:3]:
        for name in ("best", "random"):
            one = row[name]
            last = name == "random"
            texts.add_row(name, beside(one), f"{one['value']:.2f}", f"{one['log_probability']:.2f}", end_section=last)
    means = Table("", "value", f"judge (accuracy {judge:.1%})", "log p a token", title=f"means of {len(found)}")
    for name in ("best", "random"):
        means.add_row(name, *(f"{mean(found, name, key):.3f}" for key in ("value", "judge", "log_probability")))
    return [values, texts, means]


def mean(found: list[dict], name: str, key: str) -> float:
    return statistics.mean(row[name][key] for row in found)


def plot(args: argparse.Namespace, figures: list[dict], found: list[dict]) -> Figure:
    """Error and AUC by how much was read; values at the end of the best and of random continuations."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    error, auc, ends = figure.subplots(1, 3)
    shares = [row["read"] for row in figures]
    error.plot(shares, [row["mse"] for row in figures], marker="o", label="value head")
    error.plot(shares, [row["mse_of_constant"] for row in figures], linestyle="--", label="mean outcome")
    error.set_ylabel("mean squared error")
    error.legend()
    auc.plot(shares, [row["auc"] for row in figures], marker="o")
    auc.set_ylabel("AUC")
    for axis in (error, auc):
        axis.set_xlabel("of the sentence read")
        axis.grid(alpha=0.3)
    ends.hist(
        [[row[name]["value"] for row in found] for name in ("best", "random")], label=[f"best of {args.n}", "random"]
    )
    ends.set_xlabel("value at the end")
    ends.legend()
    figure.suptitle(f"{args.model}, {args.graph}")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny-chat", help="a Hub id or a local path of a decoder")
    parser.add_argument("--data", default="stanfordnlp/sst2", help="a Hub id, or a folder of train.csv, test.csv …")
    parser.add_argument("--test", default="test", help="the split that is held out")
    parser.add_argument("--text", default="sentence", help="the column of texts")
    parser.add_argument("--label", default="label", help="the column of outcomes, 0 or 1")
    parser.add_argument("--graph", default="lora8:all-linear", help="a preset, or none: a probe")
    parser.add_argument("--hidden", type=int, help="width of a hidden layer of the value head; default: it is linear")
    parser.add_argument("--language", action="store_true", help="also train by the language model's own loss")
    parser.add_argument("--bits", type=int, choices=[4, 8, 32], default=4, help="of the base model; 32: not quantised")
    parser.add_argument("--optim", default="adamw_torch", help="such as adamw_bnb_8bit or paged_adamw_8bit")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--head-lr", type=float, default=1e-3)
    parser.add_argument("--n", type=int, default=8, help="continuations of a beginning")
    parser.add_argument("--tries", type=int, default=50, help="beginnings")
    parser.add_argument("--words", type=int, default=4, help="of a sentence that make its beginning")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--limit", type=int, help="rows of each split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write value_model.json and .png there")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)

    transformers.set_seed(args.seed)
    samples, held_out = read(args)
    bits = None if args.bits == 32 else args.bits
    base, tokenizer = rh.load_base(args.model, bits=bits, dtype="float32", dropout=False)
    model = rh.InterventionModel(base, graph_for(args, base))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    texts, outcomes = zip(*samples, strict=True)
    judge = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10)).fit(texts, outcomes)
    accuracy = float(judge.score(*zip(*held_out, strict=True)))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    console = Console(file=sys.stdout)  # this one, also while the trainer's is silent
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        began = time.perf_counter()
        train(args, model, tokenizer, samples, progress)
        seconds = time.perf_counter() - began
        figures = judged(model, tokenizer, held_out, statistics.mean(outcomes))
        found = best_of_n(args, model, tokenizer, held_out, judge, progress)
    for table in tables(args, figures, found, accuracy):
        console.print(table)
    console.print(f"{trained:,} parameters, trained in {seconds:.0f} s on {len(samples):,} sentences")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        told = {"parameters": trained, "seconds": seconds, "values": figures, "judge": accuracy, "best_of_n": found}
        text = json.dumps(vars(args) | {"out": None} | told, indent=2) + "\n"
        with replacing(args.out / "value_model.json") as path:
            path.write_text(text)
        with replacing(args.out / "value_model.png") as path:
            plot(args, figures, found).savefig(path, dpi=150)
        console.print(f"written: {args.out / 'value_model.json'}, {args.out / 'value_model.png'}")


if __name__ == "__main__":
    main()
