"""One model for three tasks: grading sentences, how related two sentences are, and whether one follows from the other.

The heads share a base model and the LoRA or LoReFT below them, and are trained at once, on a mix of two data sets. Each
row has the targets of its own data set alone; what it lacks is missing, and counts in no loss.

    grade        SST-5, five classes: accuracy
    relatedness  SICK, a number from 1 to 5: Pearson's r
    entailment   SICK, three classes: accuracy

    python recipes/joint_multitask.py --sst5 FOLDER_OR_HUB_ID --sick FOLDER_OR_HUB_ID --model FOLDER_OR_HUB_ID
    python recipes/joint_multitask.py … --separate                  # ... and each task alone, to compare
    python recipes/joint_multitask.py … --balance uncertainty       # weights of the losses that are learnt
    python recipes/joint_multitask.py … --bits 4 --graph lora8:all-linear
    python recipes/joint_multitask.py … --tasks relatedness         # plain regression

A folder of SST-5 has files with "train" and "test" in their names, a label and a sentence a line; one of SICK has such
files of tab-separated columns, as its authors distribute it.
"""

import random
from pathlib import Path
from typing import Literal

import torch
from _common import (
    UsageError,
    Watch,
    begin,
    command_line,
    mean_and_deviation,
    progress,
    read_splits,
    read_table,
    trainable,
    trainer_arguments,
    write_results,
)
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import reftheads as rh

TASKS = ("grade", "relatedness", "entailment")


def main(
    model: str = "tiny-chat", sst5: str = "SetFit/sst5", sick: str = "RobZamp/sick", tasks: tuple[str, ...] = TASKS,
    graph: str = "lora8:all-linear", balance: Literal["fixed", "uncertainty"] = "fixed",
    shares: dict[str, float] | None = None, separate: bool = False, bits: Literal[4, 8] | None = None, epochs: int = 3,
    batch: int = 32, lr: float = 1e-3, head_lr: float = 1e-3, seeds: tuple[int, ...] = (0,), limit: int | None = None,
    reuse: Literal["auto", "memory", "off"] = "auto", out: Path | None = None,
) -> None:  # fmt: skip
    """Train one model for all tasks, if wanted each task alone as well, and judge them on the test rows."""
    settings = dict(locals())
    begin(model)
    data = read(sst5, sick, tasks, limit)
    runs = []
    with progress() as bar:
        for together in groups_of(tasks, separate):
            for seed in seeds:
                begin(seed=seed)
                base, tokenizer = rh.load_base(model, bits=bits, dropout=False)
                nodes = graph_for(base, together, graph, balance, head_lr)
                tuned = rh.InterventionModel(base, nodes)
                rows = mixed(tokenizer, data["train"], together, shares, seed)
                steps = -(-len(rows) // batch) * epochs
                args = trainer_arguments(
                    num_train_epochs=epochs, per_device_train_batch_size=batch, learning_rate=lr, seed=seed,
                    lr_scheduler_type="linear", warmup_steps=steps // 20, logging_strategy="steps",
                    logging_steps=max(steps // 20, 1),
                )  # fmt: skip
                watch = Watch(bar, f"{' + '.join(together)}, seed {seed}")
                trainer = rh.InterventionTrainer(
                    tuned, args, train_dataset=rows, processing_class=tokenizer, reuse=reuse, callbacks=[watch]
                )
                trainer.train()
                run = {"tasks": together, "seed": seed, "scores": judge(tuned, tokenizer, data["test"], together)}
                run |= {"seconds": round(watch.seconds, 1), "parameters": trainable(tuned)}
                runs.append(run | {"losses": [entry for entry in trainer.state.log_history if "loss" in entry]})

    title = f"{model}, {graph}: test scores, mean ± deviation of {len(seeds)} seeds"
    Console().print(table_of(title, runs, tasks))
    if out:
        write_results(out, "joint_multitask", settings | {"runs": runs}, plot(f"{model}, {graph}", runs[0]))


# --- data ---

ENTAILMENT = ("ENTAILMENT", "NEUTRAL", "CONTRADICTION")  # in the order of the Hub's numbers


def read(sst5: str, sick: str, tasks: tuple[str, ...], limit: int | None) -> dict[str, dict[str, list[dict]]]:
    """Return the rows of each data set that has one of the tasks, by split and name.

    Raises:
        UsageError: a task that there is not.
    """
    unknown = set(tasks) - set(TASKS)
    if unknown:
        raise UsageError(f"unknown task {unknown.pop()!r}: use {', '.join(TASKS)}")
    readers = {"sst5": (read_sst5, sst5, {"grade"}), "sick": (read_sick, sick, {"relatedness", "entailment"})}
    return {
        split: {
            name: sampled(reader(where, split), limit)
            for name, (reader, where, targets) in readers.items()
            if targets & set(tasks)
        }
        for split in ("train", "test")
    }


def read_sst5(where: str, split: str) -> list[dict]:
    """Return sentences with a grade from 0 to 4."""
    if not Path(where).is_dir():
        return [{"texts": [row["text"]], "grade": row["label"]} for row in read_splits(where)[split]]
    lines = next(Path(where).glob(f"*{split}*")).read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" ", 1) for line in lines]
    return [{"texts": [sentence], "grade": int(label)} for label, sentence in pairs]


def read_sick(where: str, split: str) -> list[dict]:
    """Return pairs of sentences with both targets; relatedness as a distance from its middle, 3."""
    if Path(where).is_dir():
        rows = read_table(next(Path(where).glob(f"*{split}*")))
        labels = [ENTAILMENT.index(row["entailment_judgment"]) for row in rows]
    else:
        rows = read_splits(where)[split]
        labels = rows["label"]
    return [
        {
            "texts": [row["sentence_A"], row["sentence_B"]],
            "relatedness": float(row["relatedness_score"]) - 3,
            "entailment": label,
        }
        for row, label in zip(rows, labels, strict=True)
    ]


def sampled(rows: list[dict], limit: int | None) -> list[dict]:
    return rows if limit is None else random.Random(0).sample(rows, min(limit, len(rows)))


def encode(tokenizer, rows: list[dict], tasks: tuple[str, ...] = ()) -> list[dict]:
    """Return rows for the model, with the targets of these tasks."""
    encoded = [tokenizer(*row["texts"], truncation=True, max_length=128) for row in rows]
    return [
        {**ids, **{task: row[task] for task in tasks if task in row}} for ids, row in zip(encoded, rows, strict=True)
    ]


def mixed(
    tokenizer, data: dict[str, list[dict]], tasks: tuple[str, ...], shares: dict[str, float] | None, seed: int
) -> list[dict]:
    """Return the rows of all data sets that have a target of these tasks, in random order."""
    sets = {name: encode(tokenizer, rows, tasks) for name, rows in data.items() if rows[0].keys() & set(tasks)}
    return rh.mix(sets, shares and {name: shares[name] for name in sets}, seed=seed)


# --- the model ---


def groups_of(tasks: tuple[str, ...], separate: bool) -> list[tuple[str, ...]]:
    """Return the tasks that are trained together, and each alone if that is wanted."""
    alone = [(task,) for task in tasks] if separate and len(tasks) > 1 else []
    return [tasks, *alone]


def graph_for(base, tasks: tuple[str, ...], below: str, balance: str, head_lr: float) -> rh.InterventionGraph:
    """Return a head for each task, above the nodes of a preset; "none" leaves the base model as it is."""
    causal = base.can_generate()
    common = {
        "pool": None if causal else "mean",
        "weight": "uncertainty" if balance == "uncertainty" else 1.0,
        "lr": head_lr,
        "detach": below == "none",
    }
    heads = {
        "grade": rh.LinearHead(5, target="grade", **common),
        "relatedness": rh.LinearHead(1, target="relatedness", loss="mse", **common),
        "entailment": rh.LinearHead(3, target="entailment", **common),
    }
    where = {"component": "final_norm_output"} if causal else {"layer": -1}
    positions = "l1" if causal else "all"
    graph = rh.InterventionGraph(*(rh.Node(heads[task], positions=positions, name=task, **where) for task in tasks))
    return graph if below == "none" else rh.preset(below, base) + graph


# --- what comes out ---


def judge(model, tokenizer, data: dict[str, list[dict]], tasks: tuple[str, ...]) -> dict[str, float]:
    """Return Pearson's r for relatedness, the accuracy for other tasks."""
    scores = {}
    for task in tasks:
        rows = [row for rows in data.values() for row in rows if task in row]
        predicted = rh.predict(model, tokenizer, encode(tokenizer, rows))[task]
        target = torch.tensor([row[task] for row in rows])
        if task == "relatedness":
            scores[task] = float(torch.corrcoef(torch.stack([predicted[:, 0], target]))[0, 1])
        else:
            scores[task] = float((predicted.argmax(1) == target).float().mean())
    return scores


def table_of(title: str, runs: list[dict], tasks: tuple[str, ...]) -> Table:
    """Return a table with a line for what was trained together."""
    table = Table("trained together", *tasks, "parameters", "seconds a run", title=title)
    for together in dict.fromkeys(run["tasks"] for run in runs):
        alike = [run for run in runs if run["tasks"] == together]
        cells = []
        for task in tasks:
            scores = [run["scores"][task] for run in alike if task in run["scores"]]
            mean, deviation = mean_and_deviation(scores) if scores else (None, 0)
            spread = f" ± {deviation:.3f}" if len(scores) > 1 else ""
            cells.append("" if mean is None else f"{mean:.3f}{spread}")
        seconds, _ = mean_and_deviation([run["seconds"] for run in alike])
        table.add_row(" + ".join(together), *cells, f"{alike[0]['parameters']:,}", f"{seconds:.0f}")
    return table


def plot(title: str, run: dict) -> Figure:
    """Draw the loss of every head while they are trained together."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for task in run["tasks"]:
        points = [(e["epoch"], e[f"loss_{task}"]) for e in run["losses"] if f"loss_{task}" in e]
        axis.plot(*zip(*points, strict=True), marker=".", label=task)
    axis.set_xlabel("epoch")
    axis.set_ylabel("training loss")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.suptitle(title)
    return figure


def shares_of(text: str) -> dict[str, float]:
    return {name: float(share) for name, share in (pair.split("=") for pair in text.split(","))}


if __name__ == "__main__":
    command_line(
        main,
        model="a Hub id or a local path, of an encoder or a decoder",
        sst5="a Hub id or a local folder",
        sick="a Hub id or a local folder",
        graph="a preset such as loreft8:all, or none: probes",
        balance="weights of the losses",
        shares={"type": shares_of, "help": "of the rows, such as sst5=1,sick=2; default: as many as there are"},
        separate="also train every task alone",
        bits="quantise the base model",
        limit="rows of each split of each data set",
        out="a folder for joint_multitask.json and .png",
    )
