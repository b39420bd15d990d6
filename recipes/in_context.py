"""How well does a model learn from k examples in its prompt? Models × formats × k × seeds.

    python recipes/in_context.py --task qa --data FOLDER_OR_HUB_ID --models tiny-chat,gpt2-medium --formats qa,none
    python recipes/in_context.py --task rating --data FOLDER --formats rating,chat --order global

All tests of a seed see the same examples in the same order, as many as fit into the context before the longest of them,
so that what they have in common is computed once. Each cell is a file under OUT/icl/TASK, as in few_shot_finetune.py.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from _common import begin, command_line
from few_shot_finetune import HELP, HUB, answers_of, load, support_of, tests_of
from rich.console import Console

import reftheads as rh
import reftheads.fewshot as fs


def main(
    task: Literal["rating", "qa", "summary"] = "rating", data: str | None = None,
    models: tuple[str, ...] = ("tiny-chat",), formats: tuple[str, ...] | None = None, ks: tuple[int, ...] = (1, 8),
    seeds: tuple[int, ...] = (0, 1, 2), tests: int = 100, batch: int = 32,
    order: Literal["random", "global", "local"] = "random", probes: int = 16, context: int | None = None,
    max_length: int = 256, threads: int | None = None, out: Path = Path("results"),
) -> None:  # fmt: skip
    """Measure every model with every format, k and seed, and show means over the seeds."""
    begin(threads=threads)
    data = data or HUB[task]
    examples = load(task, data, max_length)
    tests = min(tests, len(examples.test))
    settings = Settings(task, data, tests, order, probes, context)
    results = in_context(examples, settings, models, formats, ks, seeds, batch, out)
    title = f"{task} in context, {tests} tests: mean ± deviation of {len(seeds)} seeds"
    Console().print(fs.table_of(results, ["model", "format"], "k", title=title))
    fs.plot(results, out / f"icl_{task}.png", ["model", "format"], title=title)


def measure(task: fs.Task, settings: "Settings", batch: int, model: str, format: str, k: int, seed: int) -> dict:
    """Show the supports of one seed, and answer the test inputs."""
    base, tokenizer = rh.load_base(model)
    tests = tests_of(task, settings.tests)
    support = in_order(base, tokenizer, task, settings, batch, support_of(task, k, seed), format, seed)
    began = time.perf_counter()
    inputs = [example.input for example in tests]
    prompts = prompts_of(base, tokenizer, task, settings, support, inputs, format)
    answers = answers_of(base, tokenizer, task, prompts, batch)
    score = task.score(answers, [example.answers for example in tests])
    seconds = round(time.perf_counter() - began, 2)
    return {"score": score, "seconds": seconds}


# --- the study ---


@dataclass(frozen=True)
class Settings:
    """What all cells have in common; it stands in every file."""

    task: str
    data: str
    tests: int
    order: str
    probes: int
    context: int | None


def in_context(
    task: fs.Task, settings: Settings, models: tuple[str, ...], formats: tuple[str, ...] | None, ks: tuple[int, ...],
    seeds: tuple[int, ...], batch: int, out: Path,
) -> list[dict]:  # fmt: skip
    """Return the results of all models, formats, k and seeds."""
    if settings.order != "random" and not task.labels:
        raise ValueError(f"--order {settings.order} goes by the probabilities of labels, and {task.name} has none")
    cells = [
        {"model": model, "format": form, "k": k, "seed": seed}
        for seed in seeds for model in models for form in formats or [task.format, "custom"] for k in ks
    ]  # fmt: skip
    study = fs.Study(out / "icl" / task.name, **asdict(settings))
    return study.run(cells, lambda **cell: measure(task, settings, batch, **cell))


# --- prompts ---


def in_order(
    model, tokenizer, task: fs.Task, settings: Settings, batch: int, support: list, form: str, seed: int
) -> list:
    """Return the examples as they are drawn, or in the order of most entropy over a few other inputs."""
    if settings.order == "random" or len(support) < 2:
        return support
    probes = [example.input for example in task.train[: settings.probes]]

    def predict(order) -> torch.Tensor:
        prompts = prompts_of(model, tokenizer, task, settings, [support[i] for i in order], probes, form)
        return fs.score_labels(model, tokenizer, prompts, task.labels, batch_size=batch).softmax(1)

    rng = np.random.RandomState(seed)
    return [support[i] for i in fs.order_by_entropy(len(support), predict, by=settings.order, tried=8, rng=rng)]


def prompts_of(model, tokenizer, task: fs.Task, settings: Settings, support: list, tests: list[str], form: str) -> list:
    """Return a prompt for each test input, with as many examples as the context has room for."""
    limits = (settings.context, getattr(model.config.get_text_config(), "max_position_embeddings", None))
    context = min((limit for limit in limits if limit), default=2048)
    inputs, answers = [example.input for example in support], [example.answer for example in support]
    options = {"tokenizer": tokenizer, "budget": context - task.max_tokens}
    return fs.icl_prompts(inputs, answers, tests, form, shuffle=False, **options)


PROMPT_HELP = {
    "formats": "default: that of the task, and custom",
    "order": "by which entropy",
    "probes": "inputs to measure the entropy with",
    "context": "tokens of a prompt with its answer (default: all that there are)",
}

if __name__ == "__main__":
    command_line(main, **HELP, **PROMPT_HELP)
