"""Running the census: each model in a process of its own, results as lines of JSON that a later run goes on from."""

import faulthandler
import json
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import reftheads as rh
from census.building import Species, subject
from census.components import COMPONENT_CHECKS, Components
from census.examining import CRASH, NOTHING, REFUSED, RIGHT, WRONG, Exam, Verdict, Wrong, judge
from census.tracing import trace
from census.uses import USE_CHECKS, Uses

SECONDS = 240
"""How long a model may take before it counts as hanging."""
MEMORY = 12 << 30


def examine(species: Species) -> dict[str, Any]:
    """Return what came of all checks of a model: verdicts by check, or why it cannot be built."""
    start = time.perf_counter()
    try:
        made = subject(species)
    except Exception as error:
        return _row(species, start, unbuilt=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    exam = Exam(made)
    verdicts: dict[str, Verdict] = {}
    for stack in exam.stacks:
        components, uses = Components(exam, stack), Uses(exam, stack)
        prefix = f"{stack.role}: " if stack.role else ""
        for name, component in COMPONENT_CHECKS.items():
            verdicts[prefix + name] = judge(partial(component, components))
        for name, use in USE_CHECKS.items():
            verdicts[prefix + name] = judge(partial(use, uses))
    if not exam.stacks:
        verdicts["blocks"] = judge(partial(_no_blocks, exam))
    return _row(species, start, verdicts, type(made.model).__name__)


def _no_blocks(exam: Exam) -> None:
    """Raise what the library says of a layer of a model in which no blocks are seen."""
    exam.output(exam.model(rh.Node(rh.Collect(), 0, "block_output")))
    raise Wrong("blocks are addressed where none hands on to the next")


def _row(
    species: Species,
    start: float,
    verdicts: Mapping[str, Verdict] | None = None,
    model: str | None = None,
    unbuilt: str | None = None,
) -> dict[str, Any]:
    """Return one line of the results."""
    checks = {name: [verdict.word, verdict.text] for name, verdict in (verdicts or {}).items()}
    return {
        "group": species.group,
        "type": species.model_type,
        "class": model,
        "unbuilt": unbuilt,
        "seconds": round(time.perf_counter() - start, 1),
        "checks": checks,
    }


def _child(species: Species, pipe: Any) -> None:
    """Examine a model and send what came of it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe.send(examine(species))


def apart(species: Species, seconds: float = SECONDS) -> dict[str, Any]:
    """Return what came of a model that is examined in a process of its own, also if that dies or hangs."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    start = time.perf_counter()
    process = context.Process(target=_child, args=(species, there))
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            return _row(species, start, {"the process": Verdict(CRASH, f"it takes more than {seconds} s")})
        return here.recv()
    except EOFError:
        process.join()
        return _row(species, start, {"the process": Verdict(CRASH, f"it ended with exit code {process.exitcode}")})
    finally:
        process.kill()
        process.join()


def prepare() -> None:
    """Load what all models need, once for all processes."""
    warnings.filterwarnings("ignore")
    tf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    faulthandler.enable()
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**_SMALL))
    tf.BertForMaskedLM(tf.BertConfig(**_SMALL))
    trace(model, {"input_ids": torch.ones(1, 2, dtype=torch.long)})


_SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 8}


def known(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results that a file holds, by entry; a line that was cut off is left out."""
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[f"{row['group']}/{row['type']}"] = row
    return rows


def census(
    entries: Iterable[Species], path: Path, examined: Callable[[Species], dict[str, Any]] = apart
) -> Iterator[dict[str, Any]]:
    """Yield the result of each entry, and keep it in a file; what the file holds already is not run again."""
    done = known(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for species in entries:
        row = done.get(str(species))
        if row is None:
            row = examined(species)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        yield row


CORE = ("blocks", "rules in a ragged batch")


def verdict(row: Mapping[str, Any]) -> Verdict:
    """Return one word on a whole model: the worst of its checks, or refused where its blocks are."""
    if row["unbuilt"]:
        return Verdict(NOTHING, row["unbuilt"])
    checks = {name: Verdict(*pair) for name, pair in row["checks"].items()}
    for word in (CRASH, WRONG):
        bad = [f"{name}: {v.text}" for name, v in checks.items() if v.word == word]
        if bad:
            return Verdict(word, "; ".join(bad))
    for name, v in checks.items():
        if name.split(": ")[-1] in CORE and v.word == REFUSED:
            return Verdict(REFUSED, v.text)
    return Verdict(RIGHT)
