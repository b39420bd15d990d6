"""How well does a model learn from k examples in its prompt? Models × formats × k × seeds.

    python recipes/in_context.py --task qa --data FOLDER_OR_HUB_ID --models tiny-chat,gpt2-medium --formats qa,none
    python recipes/in_context.py --task rating --data FOLDER --formats rating,chat --order global

All tests of a seed see the same examples in the same order, as many as fit into the context before the longest of them,
so that what they have in common is computed once. Each cell is a file under OUT/icl/TASK, as in few_shot_finetune.py.
"""

import argparse
import time

import numpy as np
import torch
from few_shot_finetune import answers_of, options, read, support_of, tests_of
from rich.console import Console

import reftheads as rh
import reftheads.fewshot as fs


def in_order(args: argparse.Namespace, model, tokenizer, task: fs.Task, support: list, form: str, seed: int) -> list:
    """The examples as they are drawn, or in the order of most entropy over a few other inputs."""
    if args.order == "random" or len(support) < 2:
        return support
    probes = [example.input for example in task.train[: args.probes]]

    def predict(order) -> torch.Tensor:
        prompts = prompts_of(args, model, tokenizer, task, [support[i] for i in order], probes, form)
        return fs.score_labels(model, tokenizer, prompts, task.labels, batch_size=args.batch).softmax(1)

    rng = np.random.RandomState(seed)
    return [support[i] for i in fs.order_by_entropy(len(support), predict, by=args.order, tried=8, rng=rng)]


def prompts_of(args, model, tokenizer, task: fs.Task, support: list, tests: list[str], form: str) -> list:
    limits = (args.context, getattr(model.config.get_text_config(), "max_position_embeddings", None))
    context = min((limit for limit in limits if limit), default=2048)
    inputs, answers = [example.input for example in support], [example.answer for example in support]
    options = {"tokenizer": tokenizer, "budget": context - task.max_tokens}
    return fs.icl_prompts(inputs, answers, tests, form, shuffle=False, **options)


def measure(args: argparse.Namespace, task: fs.Task, model: str, format: str, k: int, seed: int) -> dict:
    """Shows the supports of one seed, and answers the test inputs."""
    base, tokenizer = rh.load_base(model)
    tests = tests_of(task, args.tests)
    support = in_order(args, base, tokenizer, task, support_of(task, k, seed), format, seed)
    began = time.perf_counter()
    prompts = prompts_of(args, base, tokenizer, task, support, [example.input for example in tests], format)
    answers = answers_of(base, tokenizer, task, prompts, args.batch)
    score = task.score(answers, [example.answers for example in tests])
    seconds = round(time.perf_counter() - began, 2)
    return {"score": score, "seconds": seconds}


def in_context(args: argparse.Namespace, task: fs.Task) -> list[dict]:
    """Results of all formats."""
    if args.order != "random" and not task.labels:
        raise ValueError(f"--order {args.order} goes by the probabilities of labels, and {task.name} has none")
    cells = [
        {"model": model, "format": form, "k": k, "seed": seed}
        for seed in args.seeds for model in args.models for form in args.formats or [task.format, "custom"]
        for k in args.ks
    ]  # fmt: skip
    names = ("task", "data", "tests", "order", "probes", "context")
    study = fs.Study(args.out / "icl" / task.name, **{name: getattr(args, name) for name in names})
    return study.run(cells, lambda **cell: measure(args, task, **cell))


def prompt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--formats", type=lambda text: text.split(","), help="default: that of the task, and custom")
    parser.add_argument("--order", choices=["random", "global", "local"], default="random", help="by which entropy")
    parser.add_argument("--probes", type=int, default=16, help="inputs to measure the entropy with")
    parser.add_argument("--context", type=int, help="tokens of a prompt with its answer (default: all that there are)")


def main() -> None:
    parser = options(str(__doc__).split("\n")[0])
    prompt_options(parser)
    args, task = read(parser)
    results = in_context(args, task)
    title = f"{task.name} in context, {args.tests} tests: mean ± deviation of {len(args.seeds)} seeds"
    Console().print(fs.table_of(results, ["model", "format"], "k", title=title))
    fs.plot(results, args.out / f"icl_{task.name}.png", ["model", "format"], title=title)


if __name__ == "__main__":
    main()
