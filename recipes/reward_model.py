"""A reward model: which of two answers is better? Trained on pairs of a chosen and a rejected answer.

A linear head reads the last token of prompt and answer as a reward r; the loss of a pair is −log σ(r of the chosen − r
of the rejected), after Bradley and Terry. LoRA or LoReFT below the head is trained along.

    python recipes/reward_model.py --data FILE_OR_HUB_ID                       # the embedded toy model
    python recipes/reward_model.py --data FILE_OR_HUB_ID --model FOLDER_OR_HUB_ID --bits 4 --out FOLDER
    python recipes/reward_model.py … --graph loreft8:all                       # or none: the head alone

The data are JSON lines, or a data set of the Hub, with "prompt", "chosen" and "rejected": texts, or "chosen" and
"rejected" as conversations that end with the answers. Data with one answer an instruction ("instruction", "output")
have no preferences. Pairs are made of them: chosen is the instruction's own answer, rejected that of another
instruction of the same split. That teaches which answer belongs to an instruction, not which of two people like better.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
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

import reftheads as rh


def main(
    model: str = "tiny-chat", data: str = "trl-lib/ultrafeedback_binarized", split: str = "train",
    held_out: float = 0.2, graph: str = "lora8:all-linear", bits: Literal[4, 8] | None = None,
    optim: str = "adamw_torch", tokens: int = 64, epochs: int = 2, batch: int = 16, lr: float = 2e-3,
    head_lr: float = 2e-3, limit: int | None = None, seed: int = 0, out: Path | None = None,
) -> None:  # fmt: skip
    """Train a reward on pairs of answers, and count on how many held-out pairs it is right."""
    settings = dict(locals())
    begin(model, seed=seed)
    base, tokenizer = rh.load_base(model, bits=bits, dtype="float32", dropout=False)
    head = rh.LinearHead(1, target="preference", loss="bradley_terry", lr=head_lr)
    nodes = rh.InterventionGraph(rh.Node(head, component="final_norm_output", positions="l1", name="reward"))
    if graph != "none":
        nodes = rh.preset(graph, base) + nodes
    tuned = rh.InterventionModel(base, nodes)
    pairs, judged = (encode(tokenizer, part, tokens) for part in read(data, split, limit, held_out))
    tuned.train()  # before its first use: a base of 4 bits that was used for inference would let no gradient through
    before = margins(tuned, tokenizer, judged)
    args = trainer_arguments(
        num_train_epochs=epochs, per_device_train_batch_size=batch, learning_rate=lr, optim=optim, seed=seed,
        warmup_steps=-(-len(pairs) // batch) * epochs // 20,
    )  # fmt: skip
    with progress() as bar:
        watch = Watch(bar)
        rh.InterventionTrainer(tuned, args, train_dataset=pairs, processing_class=tokenizer, callbacks=[watch]).train()
    after = margins(tuned, tokenizer, judged)

    figures = {
        "before": figures_of(before),
        "after": figures_of(after),
        "training pairs": figures_of(margins(tuned, tokenizer, pairs)),
    }
    longer = longer_is_chosen(judged)
    console = Console()
    console.print(table_of(f"{model}, {graph}: {len(judged)} held-out pairs", figures, longer))
    console.print(f"{trainable(tuned):,} parameters, trained in {watch.seconds:.0f} s on {len(pairs):,} pairs")
    if out:
        results = {"parameters": trainable(tuned), "seconds": watch.seconds, "figures": figures}
        results |= {"longer_is_chosen": longer, "margins": after.tolist()}
        write_results(out, "reward_model", settings | results, plot(f"{model}, {graph}", before, after))


# --- pairs of answers ---

Pair = tuple[str | list[dict], str, str]
"""A prompt, the answer that was chosen, and the one that was rejected."""


def read(data: str, split: str, limit: int | None, held_out: float) -> tuple[list[Pair], list[Pair]]:
    """Return pairs to train on, and held-out ones."""
    rows = list(shuffled(read_splits(data)[split], limit))
    count = max(round(held_out * len(rows)), 1)
    return pairs_of(rows[count:]), pairs_of(rows[:count])


def pairs_of(rows: list[dict]) -> list[Pair]:
    """Return pairs as the rows have them, or made of instructions with one answer each."""
    if "chosen" not in rows[0]:  # rows are shuffled: the next one is any other
        others = [*rows[1:], rows[0]]
        asked = [" ".join(filter(None, (row["instruction"], row.get("input")))) for row in rows]
        return [(a, row["output"], other["output"]) for a, row, other in zip(asked, rows, others, strict=True)]
    if isinstance(rows[0]["chosen"], str):
        return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    return [(row["chosen"][:-1], row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in rows]


def encode(tokenizer, pairs: list[Pair], tokens: int) -> list[list[dict]]:
    """Return pairs of rows; texts are cut to their first tokens."""

    def cut(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=tokens)["input_ids"]
        return tokenizer.decode(ids)

    prompts = [
        f"{cut(prompt)}\n" if isinstance(prompt, str) else [turn | {"content": cut(turn["content"])} for turn in prompt]
        for prompt, _, _ in pairs
    ]
    chosen, rejected = ([cut(pair[at]) for pair in pairs] for at in (1, 2))
    return rh.encode_preferences(tokenizer, prompts, chosen, rejected)


# --- what comes out ---


def margins(model: rh.InterventionModel, tokenizer, pairs: list[list[dict]]) -> torch.Tensor:
    """Return the reward of the chosen answer minus that of the rejected one, of every pair."""
    rewards = rh.predict(model, tokenizer, [row for pair in pairs for row in pair])["reward"]
    chosen, rejected = rewards.view(len(pairs), 2).unbind(1)
    return chosen - rejected


def figures_of(margin: torch.Tensor) -> dict[str, float]:
    """Return the share of pairs that are right, the mean loss and the mean margin."""
    return {
        "accuracy": float((margin > 0).float().mean()),
        "loss": float(-F.logsigmoid(margin).mean()),
        "margin": float(margin.mean()),
    }


def longer_is_chosen(pairs: list[list[dict]]) -> float:
    """Return the share of pairs whose longer answer was chosen, a tie counting half."""
    lengths = torch.tensor([[len(row["input_ids"]) for row in pair] for pair in pairs])
    return float((lengths[:, 0] - lengths[:, 1]).sign().double().mean() + 1) / 2


def table_of(title: str, figures: dict[str, dict[str, float]], longer: float) -> Table:
    """Return a table of figures, with what the length of the answers alone would say."""
    table = Table("", "right", "loss", "margin", title=title)
    for name, row in figures.items():
        table.add_row(name, f"{row['accuracy']:.1%}", f"{row['loss']:.3f}", f"{row['margin']:.3f}")
    table.add_row("the longer answer", f"{longer:.1%}", "", "")
    return table


def plot(title: str, before: torch.Tensor, after: torch.Tensor) -> Figure:
    """Draw the margins of the held-out pairs before and after training."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, margin in (("before", before), ("after", after)):
        accuracy = figures_of(margin)["accuracy"]
        axis.hist(margin.tolist(), bins=30, alpha=0.6, label=f"{name} training: {accuracy:.1%} above 0")
    axis.axvline(0, color="black", linewidth=1)
    axis.set_xlabel("reward of the chosen answer − reward of the rejected one")
    axis.set_ylabel("held-out pairs")
    axis.legend()
    figure.suptitle(title)
    return figure


if __name__ == "__main__":
    command_line(
        main,
        model="a Hub id or a local path of a decoder",
        data="JSON lines, or a Hub id",
        split="of the data; a part of it is held out",
        held_out="share of the pairs",
        graph="a preset such as loreft8:all, or none: the head alone",
        bits="quantise the base model",
        optim="such as adamw_bnb_8bit or paged_adamw_8bit",
        tokens="to which prompts and answers are cut",
        batch="pairs",
        limit="pairs",
        out="a folder for reward_model.json and .png",
    )
