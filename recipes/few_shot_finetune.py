"""How well does each way of fine-tuning do with k examples? Models × modes × k × seeds.

Encoders get a classifier on the mean of their tokens; language models learn the answer's text. A mode says which
weights are trained: all, whole blocks, biases, LoRA, LoReFT, or the classifier alone; see `reftheads.fewshot`. Names of
LoRA and LoReFT are those of `reftheads.preset`.

    python recipes/few_shot_finetune.py --task rating --data FOLDER_OR_HUB_ID --models ENCODER --modes all,lora4,probe
    python recipes/few_shot_finetune.py --task qa --data FOLDER --models tiny-chat,gpt2-medium --ks 0,1,8 --seeds 0,1,2

Each cell is a file under OUT/ft/TASK. What is there already is not run again, so that a study can be broken off at any
time; a second process with the same command takes other cells.
"""

import argparse
import math
import random
import re
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers import Trainer, TrainingArguments, set_seed

import reftheads as rh
import reftheads.fewshot as fs

HUB = {"rating": "SetFit/sst5", "qa": "Muennighoff/babi", "summary": "EdinburghNLP/xsum"}
RATES = {
    "all": 5e-5, "first": 1e-4, "middle": 1e-4, "last": 1e-4, "lora": 2e-3, "loreft": 5e-3, "bitfit": 1e-3,
    "head": 1e-3, "probe": 1e-2,
}  # fmt: skip
MODES = ["all", "last", "lora4:cs330", "loreft4:f1+l1"]


def rate_of(mode: str) -> float:
    """The learning rate of a mode that nobody has said another one for."""
    return RATES.get(re.split("[^a-z]", mode)[0], 1e-3)


def support_of(task: fs.Task, k: int, seed: int) -> list[fs.Example]:
    """k examples of each class; k in all where answers are free text."""
    labels = [example.answer if task.labels else "" for example in task.train]
    return [task.train[i] for i in fs.k_shot(labels, k, seed=seed, classes=task.labels)]


def tests_of(task: fs.Task, count: int) -> list[fs.Example]:
    return random.Random(0).sample(task.test, min(count, len(task.test)))


def encode(tokenizer, task: fs.Task, examples: list[fs.Example], classify: bool, max_length: int) -> list[dict]:
    if classify:
        ids = tokenizer([e.input for e in examples], truncation=True, max_length=max_length)["input_ids"]
        return [{"input_ids": i, "label": task.labels.index(e.answer)} for i, e in zip(ids, examples, strict=True)]
    prompts = fs.icl_prompts([], [], [example.input for example in examples], task.format)
    return rh.encode_pairs(tokenizer, prompts, [f" {e.answer}" for e in examples], max_length=max_length)


def answers_of(model, tokenizer, task: fs.Task, prompts: list, batch: int, max_length: int | None = None) -> list[str]:
    """The likeliest label of each prompt; without labels the line that follows it. Longer prompts lose their left."""
    if task.labels:
        options = {"normalise": True, "batch_size": batch, "max_length": max_length}
        scores = fs.score_labels(model, tokenizer, prompts, task.labels, **options)
        return [task.labels[i] for i in scores.argmax(1).tolist()]
    stop = [tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]]
    room = max_length - task.max_tokens if max_length else 0
    rows = [fs.encode_prompt(tokenizer, prompt)[-room:] for prompt in prompts]
    found = fs.greedy_sample(model, rows, stop, task.max_tokens, batch_size=batch)
    # a token may hold the end of a line and more
    lines = [text.strip().split("\n")[0] for text in tokenizer.batch_decode(found, skip_special_tokens=True)]
    return [line.split(".")[0] for line in lines] if task.format == "qa" else lines


def build(args: argparse.Namespace, task: fs.Task, model: str, mode: str):
    """The model of a mode, its tokenizer, and whether it is a classifier."""
    base, tokenizer = rh.load_base(model, dropout=False)
    classify, heads = not base.can_generate(), []
    if classify:
        if task.labels is None:
            raise ValueError(f"answers of {task.name} are free text, which {model} cannot give: take a language model")
        rate = None if mode == "probe" else args.head_lr
        heads = [rh.Node(rh.LinearHead(len(task.labels), target="label", pool="mean", lr=rate), layer=-1, name="head")]
    return fs.fine_tuning_model(base, mode, *heads), tokenizer, classify


def arguments(args: argparse.Namespace, folder: str, rows: list[dict], lr: float, seed: int) -> TrainingArguments:
    return TrainingArguments(
        folder, max_steps=max(args.steps, math.ceil(args.epochs * len(rows) / args.batch)), logging_steps=5, seed=seed,
        learning_rate=lr, warmup_steps=3, per_device_train_batch_size=min(args.batch, len(rows)),
        per_device_eval_batch_size=args.batch, save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip


def train(args: argparse.Namespace, model, tokenizer, rows: list[dict], lr: float, seed: int) -> Trainer:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):  # a Trainer prints what it logs
        given = arguments(args, folder, rows, lr, seed)
        options = {"train_dataset": rows, "callbacks": [fs.StopWhen("loss", below=args.stop)]}
        if isinstance(model, rh.InterventionModel):
            trainer = rh.InterventionTrainer(model, given, processing_class=tokenizer, **options)
        else:
            trainer = Trainer(model, given, data_collator=rh.Collator(tokenizer), **options)
        trainer.train()
    return trainer


def measure(args: argparse.Namespace, task: fs.Task, model: str, mode: str, lr: float, k: int, seed: int) -> dict:
    """Trains on the supports of one seed, and answers the test inputs."""
    set_seed(seed)
    support, tests = support_of(task, k, seed), tests_of(task, args.tests)
    tuned, tokenizer, classify = build(args, task, model, mode)
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    began = time.perf_counter()
    if support:
        train(args, tuned, tokenizer, encode(tokenizer, task, support, classify, args.max_length), lr, seed)
    seconds = time.perf_counter() - began
    if classify:
        predicted = rh.predict(tuned, tokenizer, encode(tokenizer, task, tests, True, args.max_length))["head"]
        answers = [task.labels[i] for i in predicted.argmax(1).tolist()]
    else:
        prompts = fs.icl_prompts([], [], [example.input for example in tests], task.format)
        answers = answers_of(tuned, tokenizer, task, prompts, args.batch, args.max_length)
    score = task.score(answers, [example.answers for example in tests])
    return {"score": score, "trained": trained, "seconds": round(seconds, 2)}


def pairs_of(args: argparse.Namespace, task: fs.Task) -> list[dict]:
    """The models with their modes. Each is built once, so that one that cannot be is an error before all the work."""
    pairs = []
    for model in args.models:
        usual = MODES if rh.load_base(model)[0].can_generate() else [*MODES, "probe"]
        pairs += [{"model": model, "mode": mode} for mode in args.modes or usual]
    for pair in pairs:
        build(args, task, **pair)
    return pairs


def fine_tune(args: argparse.Namespace, task: fs.Task, rated: list[dict]) -> list[dict]:
    """Results of all k and seeds of each model with a mode and its learning rate."""
    cells = [
        {**{name: found[name] for name in ("model", "mode", "lr")}, "k": k, "seed": seed}
        for seed in args.seeds for found in rated for k in args.ks
    ]  # fmt: skip
    names = ("task", "data", "tests", "steps", "epochs", "batch", "max_length", "head_lr", "stop")
    study = fs.Study(args.out / "ft" / task.name, **{name: getattr(args, name) for name in names})
    return study.run(cells, lambda **cell: measure(args, task, **cell))


def options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    words = {"type": lambda text: text.split(",")}
    numbers = {"type": lambda text: [int(n) for n in text.split(",")]}
    parser.add_argument("--task", choices=list(HUB), default="rating")
    parser.add_argument("--data", help="a folder, a file or a Hub id (default: " + ", ".join(HUB.values()) + ")")
    parser.add_argument("--models", default=["tiny-chat"], help="Hub ids or local paths", **words)
    parser.add_argument("--ks", default=[1, 8], help="examples: of each class, if there are classes", **numbers)
    parser.add_argument("--seeds", default=[0, 1, 2], **numbers)
    parser.add_argument("--tests", type=int, default=100, help="how many test inputs to answer")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=256, help="of a row, in tokens")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="FOLDER")
    parser.add_argument("--threads", type=int, help="of torch")
    return parser


def read(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, fs.Task]:
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.data = args.data or HUB[args.task]
    task = fs.load_task(args.task, args.data)
    args.tests = min(args.tests, len(task.test))
    if args.max_length <= task.max_tokens:
        parser.error(f"--max-length {args.max_length} leaves no room for a prompt before {task.max_tokens} new tokens")
    return args, task


def training_options(parser: argparse.ArgumentParser) -> None:
    default = f"(default: {','.join(MODES)}, and probe of encoders)"
    parser.add_argument("--modes", type=lambda text: text.split(","), help=f"see reftheads.fewshot {default}")
    parser.add_argument("--steps", type=int, default=25, help="of training, at least")
    parser.add_argument("--epochs", type=int, default=3, help="at least")
    parser.add_argument("--head-lr", type=float, default=1e-2)
    parser.add_argument("--stop", type=float, default=0.02, help="the training loss below which training stops")


def main() -> None:
    parser = options(str(__doc__).split("\n")[0])
    training_options(parser)
    parser.add_argument("--lr", type=float, help="default: by mode")
    args, task = read(parser)
    results = fine_tune(args, task, [pair | {"lr": args.lr or rate_of(pair["mode"])} for pair in pairs_of(args, task)])
    title = f"{task.name}, {args.tests} tests: mean ± deviation of {len(args.seeds)} seeds"
    Console().print(fs.table_of(results, ["model", "mode", "trained"], "k", title=title))
    fs.plot(results, args.out / f"ft_{task.name}.png", ["model", "mode"], title=title)


if __name__ == "__main__":
    main()
