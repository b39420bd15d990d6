"""How well does each way of fine-tuning do with k examples? Models × modes × k × seeds.

Encoders get a classifier on the mean of their tokens; language models learn the answer's text. A mode says which
weights are trained: all, whole blocks, biases, LoRA, LoReFT, or the classifier alone; see `reftheads.fewshot`. Names of
LoRA and LoReFT are those of `reftheads.preset`.

    python recipes/few_shot_finetune.py --task rating --data FOLDER_OR_HUB_ID --models ENCODER --modes all,lora4,probe
    python recipes/few_shot_finetune.py --task qa --data FOLDER --models tiny-chat,gpt2-medium --ks 0,1,8 --seeds 0,1,2

Each cell is a file under OUT/ft/TASK. What is there already is not run again, so that a study can be broken off at any
time; a second process with the same command takes other cells.
"""

import math
import random
import re
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from _common import UsageError, begin, command_line, trainable, trainer_arguments
from rich.console import Console
from transformers import Trainer, TrainerCallback, TrainingArguments

import reftheads as rh
import reftheads.fewshot as fs


def main(
    task: Literal["rating", "qa", "summary"] = "rating", data: str | None = None,
    models: tuple[str, ...] = ("tiny-chat",), modes: tuple[str, ...] | None = None, ks: tuple[int, ...] = (1, 8),
    seeds: tuple[int, ...] = (0, 1, 2), tests: int = 100, steps: int = 25, epochs: int = 3, batch: int = 32,
    lr: float | None = None, head_lr: float = 1e-2, stop: float = 0.02, max_length: int = 256,
    threads: int | None = None, out: Path = Path("results"),
) -> None:  # fmt: skip
    """Measure every model with every mode, k and seed, and show means over the seeds."""
    begin(threads=threads)
    data = data or HUB[task]
    examples = load(task, data, max_length)
    tests = min(tests, len(examples.test))
    settings = Settings(task, data, tests, steps, epochs, batch, max_length, head_lr, stop)
    rated = [pair | {"lr": lr or rate_of(pair["mode"])} for pair in pairs_of(examples, settings, models, modes)]
    results = fine_tune(examples, settings, rated, ks, seeds, out)
    title = f"{task}, {tests} tests: mean ± deviation of {len(seeds)} seeds"
    Console().print(fs.table_of(results, ["model", "mode", "trained"], "k", title=title))
    fs.plot(results, out / f"ft_{task}.png", ["model", "mode"], title=title)


def measure(task: fs.Task, settings: "Settings", model: str, mode: str, lr: float, k: int, seed: int) -> dict:
    """Train on the supports of one seed, and answer the test inputs."""
    begin(seed=seed)
    support, tests = support_of(task, k, seed), tests_of(task, settings.tests)
    tuned, tokenizer, classify = build(task, settings, model, mode)
    began = time.perf_counter()
    if support:
        train(tuned, tokenizer, encode(tokenizer, task, support, classify, settings.max_length), settings, lr, seed)
    seconds = time.perf_counter() - began
    if classify:
        predicted = rh.predict(tuned, tokenizer, encode(tokenizer, task, tests, True, settings.max_length))["head"]
        answers = [task.labels[i] for i in predicted.argmax(1).tolist()]
    else:
        prompts = fs.icl_prompts([], [], [example.input for example in tests], task.format)
        answers = answers_of(tuned, tokenizer, task, prompts, settings.batch, settings.max_length)
    score = task.score(answers, [example.answers for example in tests])
    return {"score": score, "trained": trainable(tuned), "seconds": round(seconds, 2)}


# --- the study ---

HUB = {"rating": "SetFit/sst5", "qa": "Muennighoff/babi", "summary": "EdinburghNLP/xsum"}


@dataclass(frozen=True)
class Settings:
    """What all cells have in common; it stands in every file."""

    task: str
    data: str
    tests: int
    steps: int
    epochs: int
    batch: int
    max_length: int
    head_lr: float
    stop: float
    names: str = "rh.preset"  # what modes mean: files from before lora4 and loreft4 meant the presets are refused


def load(task: str, data: str, max_length: int) -> fs.Task:
    """Return a task with its examples.

    Raises:
        UsageError: rows too short for a prompt and its answer.
    """
    examples = fs.load_task(task, data)
    if max_length <= examples.max_tokens:
        raise UsageError(
            f"--max-length {max_length} leaves no room for a prompt before {examples.max_tokens} new tokens"
        )
    return examples


def pairs_of(task: fs.Task, settings: Settings, models: tuple[str, ...], modes: tuple[str, ...] | None) -> list[dict]:
    """Return the models with their modes; each is built once, so that an error comes before all the work."""
    pairs = []
    for model in models:
        usual = MODES if rh.load_base(model)[0].can_generate() else [*MODES, "probe"]
        pairs += [{"model": model, "mode": mode} for mode in modes or usual]
    for pair in pairs:
        build(task, settings, **pair)
    return pairs


def fine_tune(
    task: fs.Task, settings: Settings, rated: list[dict], ks: tuple[int, ...], seeds: tuple[int, ...], out: Path
) -> list[dict]:
    """Return the results of all k and seeds of each model with a mode and its learning rate."""
    cells = [
        {**{name: pair[name] for name in ("model", "mode", "lr")}, "k": k, "seed": seed}
        for seed in seeds for pair in rated for k in ks
    ]  # fmt: skip
    study = fs.Study(out / "ft" / task.name, **asdict(settings))
    return study.run(cells, lambda **cell: measure(task, settings, **cell))


# --- examples ---


def support_of(task: fs.Task, k: int, seed: int) -> list[fs.Example]:
    """Return k examples of each class; k in all where answers are free text."""
    labels = [example.answer if task.labels else "" for example in task.train]
    return [task.train[i] for i in fs.k_shot(labels, k, seed=seed, classes=task.labels)]


def tests_of(task: fs.Task, count: int) -> list[fs.Example]:
    return random.Random(0).sample(task.test, min(count, len(task.test)))


def encode(tokenizer, task: fs.Task, examples: list[fs.Example], classify: bool, max_length: int) -> list[dict]:
    """Return rows with a label for a classifier, else with prompt and answer."""
    if classify:
        encoded = tokenizer([e.input for e in examples], truncation=True, max_length=max_length)["input_ids"]
        labels = [task.labels.index(example.answer) for example in examples]
        return [{"input_ids": ids, "label": label} for ids, label in zip(encoded, labels, strict=True)]
    prompts = fs.icl_prompts([], [], [example.input for example in examples], task.format)
    return rh.encode_pairs(tokenizer, prompts, [f" {e.answer}" for e in examples], max_length=max_length)


def answers_of(model, tokenizer, task: fs.Task, prompts: list, batch: int, max_length: int | None = None) -> list[str]:
    """Return the likeliest label of each prompt; without labels the line after it. Longer prompts lose their left."""
    if task.labels:
        options = {"normalise": True, "batch_size": batch, "max_length": max_length}
        scores = fs.score_labels(model, tokenizer, prompts, task.labels, **options)
        return [task.labels[i] for i in scores.argmax(1).tolist()]
    stop = [tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]]
    room = max_length - task.max_tokens if max_length else 0
    rows = [fs.encode_prompt(tokenizer, prompt)[-room:] for prompt in prompts]
    sampled = fs.greedy_sample(model, rows, stop, task.max_tokens, batch_size=batch)
    # a token may hold the end of a line and more
    lines = [text.strip().split("\n")[0] for text in tokenizer.batch_decode(sampled, skip_special_tokens=True)]
    return [line.split(".")[0] for line in lines] if task.format == "qa" else lines


# --- training ---

MODES = ["all", "last", "lora4:cs330", "loreft4:f1+l1"]
RATES = {
    "all": 5e-5, "first": 1e-4, "middle": 1e-4, "last": 1e-4, "lora": 2e-3, "loreft": 5e-3, "bitfit": 1e-3,
    "head": 1e-3, "probe": 1e-2,
}  # fmt: skip


def rate_of(mode: str) -> float:
    """Return the learning rate of a mode that nobody has said another one for."""
    return RATES.get(re.split("[^a-z]", mode)[0], 1e-3)


def build(task: fs.Task, settings: Settings, model: str, mode: str):
    """Return the model of a mode, its tokenizer, and whether it is a classifier."""
    base, tokenizer = rh.load_base(model, dropout=False)
    classify, heads = not base.can_generate(), []
    if classify:
        if task.labels is None:
            raise ValueError(f"answers of {task.name} are free text, which {model} cannot give: take a language model")
        rate = None if mode == "probe" else settings.head_lr
        heads = [rh.Node(rh.LinearHead(len(task.labels), target="label", pool="mean", lr=rate), layer=-1, name="head")]
    return fs.fine_tuning_model(base, mode, *heads), tokenizer, classify


def arguments(settings: Settings, rows: int, lr: float, seed: int) -> TrainingArguments:
    return trainer_arguments(
        max_steps=max(settings.steps, math.ceil(settings.epochs * rows / settings.batch)), learning_rate=lr,
        warmup_steps=3, per_device_train_batch_size=min(settings.batch, rows),
        per_device_eval_batch_size=settings.batch, seed=seed, logging_strategy="steps", logging_steps=5,
    )  # fmt: skip


def train(model, tokenizer, rows: list[dict], settings: Settings, lr: float, seed: int) -> Trainer:
    """Train until the steps are done or the loss is small."""
    args = arguments(settings, len(rows), lr, seed)
    callbacks: list[TrainerCallback] = [fs.StopWhen("loss", below=settings.stop)]
    if isinstance(model, rh.InterventionModel):
        trainer = rh.InterventionTrainer(
            model, args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
        )
    else:
        trainer = Trainer(model, args, train_dataset=rows, data_collator=rh.Collator(tokenizer), callbacks=callbacks)
    with redirect_stdout(None):  # a Trainer prints what it logs
        trainer.train()
    return trainer


HELP = {
    "data": f"a folder, a file or a Hub id; default: {', '.join(HUB.values())}",
    "models": "Hub ids or local paths",
    "ks": "examples: of each class, if there are classes",
    "tests": "how many test inputs to answer",
    "max_length": "of a row, in tokens",
    "out": "a folder",
    "threads": "of torch",
}
TRAINING_HELP = {
    "modes": f"see reftheads.fewshot; default: {','.join(MODES)}, and probe of encoders",
    "steps": "of training, at least",
    "epochs": "at least",
    "stop": "the training loss below which training stops",
}

if __name__ == "__main__":
    command_line(main, **HELP, **TRAINING_HELP, lr="default: by mode")
