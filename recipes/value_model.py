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

import random
import statistics
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
    trainable,
    trainer_arguments,
    write_results,
)
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

import reftheads as rh


def main(
    model: str = "tiny-chat", data: str = "stanfordnlp/sst2", test: str = "test", text: str = "sentence",
    label: str = "label", graph: str = "lora8:all-linear", hidden: int | None = None, language: bool = False,
    bits: Literal[4, 8, 32] = 4, optim: str = "adamw_torch", epochs: int = 3, batch: int = 32, lr: float = 1e-3,
    head_lr: float = 1e-3, n: int = 8, tries: int = 50, words: int = 4, new_tokens: int = 32, limit: int | None = None,
    seed: int = 0, out: Path | None = None,
) -> None:  # fmt: skip
    """Train a value of every token, judge it on held-out texts, and take the best of n continuations by it."""
    settings = dict(locals())
    begin(model, seed=seed)
    samples, held_out = (read(data, split, text, label, limit) for split in ("train", test))
    quantised = None if bits == 32 else bits
    base, tokenizer = rh.load_base(model, bits=quantised, dtype="float32", dropout=False)
    tuned = rh.InterventionModel(base, graph_for(base, graph, hidden, head_lr))
    rows = encode(tokenizer, samples, ("value", "labels", "prompt_mask") if language else ("value",))
    args = trainer_arguments(
        num_train_epochs=epochs, per_device_train_batch_size=batch, learning_rate=lr, optim=optim, seed=seed,
        warmup_steps=-(-len(rows) // batch) * epochs // 20, train_sampling_strategy="group_by_length",
    )  # fmt: skip
    writes = language or graph == "none"  # else the base model does, which was trained for nothing else
    with progress() as bar:
        watch = Watch(bar)
        rh.InterventionTrainer(tuned, args, train_dataset=rows, processing_class=tokenizer, callbacks=[watch]).train()
        values = judged(tuned, tokenizer, held_out, constant=statistics.mean(outcome for _, outcome in samples))
        tried = [
            continuations(tuned, tokenizer, " ".join(sentence.split()[:words]), n, new_tokens, writes)
            for sentence, _ in bar.track(held_out[:tries], description=f"the best of {n}")
        ]

    judge = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10))
    accuracy = float(judge.fit(*zip(*samples, strict=True)).score(*zip(*held_out, strict=True)))
    picked = [pick(beginning, texts, judge) for beginning, texts in tried]
    console = Console()
    console.print(table_of_values(f"{model}, {graph}: values of held-out sentences", values))
    title = f"the best of {n} and one at random, {len(picked)} beginnings, after {words} words"
    console.print(table_of_texts(title, picked))
    console.print(table_of_means(f"means of {len(picked)}", picked, accuracy))
    console.print(f"{trainable(tuned):,} parameters, trained in {watch.seconds:.0f} s on {len(samples):,} sentences")
    if out:
        results = {"parameters": trainable(tuned), "seconds": watch.seconds, "values": values}
        results |= {"judge": accuracy, "best_of_n": picked}
        write_results(out, "value_model", settings | results, plot(f"{model}, {graph}", values, picked, n))


# --- texts with an outcome ---

Sample = tuple[str, float]
"""A text and its outcome, from 0 to 1."""


def read(data: str, split: str, text: str, label: str, limit: int | None) -> list[Sample]:
    return [(row[text], float(row[label])) for row in shuffled(read_splits(data)[split], limit)]


def encode(tokenizer, samples: list[Sample], targets: tuple[str, ...] = ()) -> list[dict]:
    """Return rows for the model: with the outcome at every token as `value`, with the tokens themselves as `labels`."""
    encoded = tokenizer([text for text, _ in samples], truncation=True, max_length=128)["input_ids"]
    rows = []
    for (_, outcome), ids in zip(samples, encoded, strict=True):
        columns = {"value": [outcome] * len(ids), "labels": ids, "prompt_mask": [1] * len(ids)}
        rows.append({"input_ids": ids, **{name: columns[name] for name in targets}})
    return rows


# --- values ---

SHARES = (0.25, 0.5, 0.75, 1.0)  # of a sentence that has been read


def graph_for(base, below: str, hidden: int | None, head_lr: float) -> rh.InterventionGraph:
    """Return a value head on the final norm, above the nodes of a preset; "none" leaves the base model as it is."""
    options = dict(target="value", loss="mse", activation="sigmoid", lr=head_lr)
    head = rh.MLPHead(1, hidden=hidden, **options) if hidden else rh.LinearHead(1, **options)
    graph = rh.InterventionGraph(rh.Node(head, component="final_norm_output", name="value"))
    return graph if below == "none" else rh.preset(below, base) + graph


def judged(model: rh.InterventionModel, tokenizer, samples: list[Sample], constant: float) -> list[dict]:
    """Return how far the values are from the outcomes, by how much of each text has been read."""
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


# --- the best of n ---


def pieces(tokenizer, ids) -> list[str]:
    """Return what each token adds to the text."""
    texts = [tokenizer.decode(ids[:end], skip_special_tokens=True) for end in range(len(ids) + 1)]
    return [text[len(before) :] for before, text in zip(texts, texts[1:], strict=False)]


def continuations(
    model: rh.InterventionModel, tokenizer, beginning: str, n: int, new_tokens: int, writes: bool
) -> tuple[str, list[dict]]:
    """Sample n continuations of a text, by the model if it `writes`, else by its base model.

    Returns:
        The beginning and the continuations, each with a value at every token, and its mean log-probability.
    """
    model.eval()
    prompt = tokenizer(beginning, return_tensors="pt").to(model.device)
    start = prompt["input_ids"].shape[1]
    sampling = dict(max_new_tokens=new_tokens, do_sample=True, top_k=0, top_p=0.95, num_return_sequences=n)
    options = dict(pad_token_id=tokenizer.pad_token_id, return_dict_in_generate=True, output_logits=True)
    if writes:
        out = valued = model.generate(**prompt, **sampling, **options, return_heads=True)
    else:
        with model.disable_adapter():
            out = model.generate(**prompt, **sampling, **options)
        ends = out.sequences == tokenizer.eos_token_id
        ends[:, :start] = False
        with torch.no_grad():
            valued = model(input_ids=out.sequences, attention_mask=(ends.cumsum(1) <= ends).long())
    logs = model.get_base_model().compute_transition_scores(out.sequences, out.logits, normalize_logits=True)
    values, real = valued.predictions["value"][..., 0], valued.selected["value"]
    return beginning, [
        {
            "text": tokenizer.decode(ids[there], skip_special_tokens=True),
            "tokens": pieces(tokenizer, ids[there]),
            "values": v[there].tolist(),
            "value": float(v[there][-1]),
            "log_probability": float(log[there[start:]].mean()),
        }
        for ids, v, there, log in zip(out.sequences, values, real, logs, strict=True)
    ]


def pick(beginning: str, tried: list[dict], judge) -> dict:
    """Return the continuation of the highest value at its end, and one at random, with what the judge says of them."""
    pair = {"best": max(tried, key=lambda one: one["value"]), "random": random.choice(tried)}
    for continuation in pair.values():
        continuation["judge"] = float(judge.predict_proba([continuation["text"]])[0, 1])
    return {"beginning": beginning, **pair}


# --- what comes out ---


def coloured(continuation: dict) -> Text:
    """Return a text in the colours of its values, from red at 0 to green at 1."""
    shown = Text()
    for word, value in zip(continuation["tokens"], continuation["values"], strict=True):
        shown.append(word, style=f"rgb({int(220 * (1 - value))},{int(180 * value)},60)")
    return shown


def table_of_values(title: str, values: list[dict]) -> Table:
    table = Table("of the sentence read", "MSE", "MSE of the mean outcome", "AUC", title=title)
    for row in values:
        table.add_row(f"{row['read']:.0%}", *(f"{row[name]:.3f}" for name in ("mse", "mse_of_constant", "auc")))
    return table


def table_of_texts(title: str, picked: list[dict]) -> Table:
    table = Table("", "text, in the colours of its values", "value", "log p a token", title=title)
    for row in picked[:3]:
        for name in ("best", "random"):
            one = row[name]
            figures = f"{one['value']:.2f}", f"{one['log_probability']:.2f}"
            table.add_row(name, coloured(one), *figures, end_section=name == "random")
    return table


def table_of_means(title: str, picked: list[dict], accuracy: float) -> Table:
    table = Table("", "value", f"judge (accuracy {accuracy:.1%})", "log p a token", title=title)
    for name in ("best", "random"):
        means = [statistics.mean(row[name][key] for row in picked) for key in ("value", "judge", "log_probability")]
        table.add_row(name, *(f"{mean:.3f}" for mean in means))
    return table


def plot(title: str, values: list[dict], picked: list[dict], n: int) -> Figure:
    """Draw error and AUC by how much was read, and values at the end of the best and of random continuations."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    error, auc, ends = figure.subplots(1, 3)
    shares = [row["read"] for row in values]
    error.plot(shares, [row["mse"] for row in values], marker="o", label="value head")
    error.plot(shares, [row["mse_of_constant"] for row in values], linestyle="--", label="mean outcome")
    error.set_ylabel("mean squared error")
    error.legend()
    auc.plot(shares, [row["auc"] for row in values], marker="o")
    auc.set_ylabel("AUC")
    for axis in (error, auc):
        axis.set_xlabel("of the sentence read")
        axis.grid(alpha=0.3)
    both = [[row[name]["value"] for row in picked] for name in ("best", "random")]
    ends.hist(both, label=[f"best of {n}", "random"])
    ends.set_xlabel("value at the end")
    ends.legend()
    figure.suptitle(title)
    return figure


if __name__ == "__main__":
    command_line(
        main,
        model="a Hub id or a local path of a decoder",
        data="a Hub id, or a folder of train.csv, test.csv …",
        test="the split that is held out",
        text="the column of texts",
        label="the column of outcomes, 0 or 1",
        graph="a preset, or none: a probe",
        hidden="width of a hidden layer of the value head; default: it is linear",
        language="also train by the language model's own loss",
        bits="of the base model; 32: not quantised",
        optim="such as adamw_bnb_8bit or paged_adamw_8bit",
        n="continuations of a beginning",
        tries="beginnings",
        words="of a sentence that make its beginning",
        limit="rows of each split",
        out="a folder for value_model.json and .png",
    )
