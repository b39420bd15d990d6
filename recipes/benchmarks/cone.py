"""What a training step costs when only the cone of influence is computed, against pyreft, PEFT and full finetuning.

    python recipes/benchmarks/cone.py --out FOLDER        # the whole table, also as JSON and markdown
    python recipes/benchmarks/cone.py --only commonsense --repeats 3
    python recipes/benchmarks/cone.py --only SST-2 --encoder MINILM_FOLDER --sst2 SST2_FOLDER
    python recipes/benchmarks/cone.py --device cuda --dtype bfloat16
    python recipes/benchmarks/cone.py --model smollm2-135m --data FOLDER --batch 4 --repeats 3    # real rows

A step is forward, backward and AdamW on what is trained. All steps of a shape use one base model's weights and the same
rows, and take turns in one process; medians are printed, and ratios are medians of the ratio within each turn. A CPU's
times are what the process computed, not what it waited. The base model is a Llama with random weights, since what a
step costs does not depend on what the model knows; `--model` takes a real one, and real rows.
"""

import copy
import gc
import json
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import reftheads as rh
from reftheads.reuse.store import ActivationStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where _common.py is

from _common import UsageError, begin, command_line, write_json, write_text
from emoji_chat import draw, encode


def main(
    layers: int = 12, width: int = 512, vocab: int = 4096, batch: int = 8, dtype: str = "float32",
    device: str = "cpu", threads: int = 1, only: str = "", repeats: int = 9, encoder: str | None = None,
    sst2: str | None = None, model: str | None = None, data: str | None = None, out: Path | None = None,
) -> None:  # fmt: skip
    """Measure the steps of each shape in turns, and show medians beside what is wanted."""
    if (model is None) != (data is None):
        raise UsageError("--model and --data go together: real rows are tokenised for a real model")
    setup = Setup(layers, width, vocab, batch, dtype, device, threads, only, repeats, encoder, sst2, model, data)
    console = Console()
    console.width = max(console.width, 124)
    begin(threads=threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    differences: dict[str, float] = {}
    with Progress(console=console, transient=True) as progress:
        for case in cases(setup, console):
            low, high = min(case.losses.values()), max(case.losses.values())
            differences[case.name] = (high - low) / abs(low)
            rows += measure(case, setup, progress)
            if out:
                write(out, rows, setup, differences)
    if rows:
        console.print(table_of(rows, caption(setup, differences)))


@dataclass(frozen=True)
class Setup:
    """The base model, and how it is measured: what the command line says."""

    layers: int
    width: int
    vocab: int
    batch: int
    dtype: str
    device: str
    threads: int
    only: str
    repeats: int
    encoder: str | None
    sst2: str | None
    model: str | None
    data: str | None


# --- what is measured ---

RANK, LORA_RANK, LR = 4, 8, 1e-5
SLOW = 500  # ms; shorter steps are called several times a turn, so that caches are those of a loop

PLAIN, FIRST, LATER = "reftheads, plain path", "reftheads, first epoch", "reftheads, later epochs"
PYREFT, LORA, TOP_LORA, FULL = "pyreft", "LoRA r=8", "LoRA r=8, top layers", "full finetuning"
FORWARD, PRODUCTS = "base model, forward alone", "products of the cone alone"

Batch = dict[str, Tensor]
Run = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """Rows of a kind, what is edited in them, and the least that is wanted: by row of the table, then by column."""

    name: str
    prompt: int
    answer: int
    positions: str = "l1"
    all_layers: bool = False
    targets: dict[str, dict[str, float]] = field(default_factory=dict)

    def edited(self, layers: int) -> list[int]:
        return list(range(layers)) if self.all_layers else [layers * 3 // 4]


def columns_of(positions: str, prompt: int) -> list[int]:
    """Return what the positions of a shape select in a prompt."""
    last = 1 if positions == "l1" else 7
    return [*range(7 if positions.startswith("f7") else 0), *range(prompt - last, prompt)]


IDEAL = {"share": 0.7}
NEVER_SLOWER = {"plain": 0.97}
SHAPES = [
    Shape("emoji 40+10", 40, 10, targets={LATER: IDEAL}),
    Shape("GSM8K-like 96+96", 96, 96, targets={LATER: {"pyreft": 6, "lora": 8} | IDEAL}),
    Shape("commonsense-like 180+4", 180, 4, targets={LATER: {"pyreft": 30, "lora": 50} | IDEAL}),
    Shape("memorisation 1+256", 1, 256, targets={LATER: IDEAL}),
    Shape(
        "f7+l7, all layers 96+16", 96, 16, "f7+l7", all_layers=True,
        targets={FIRST: NEVER_SLOWER, LATER: NEVER_SLOWER | IDEAL},
    ),
]  # fmt: skip
SST2 = "SST-2, a head on MiniLM"


@dataclass
class Case:
    """The steps of one shape.

    Attributes:
        runs: by row of the table, a step.
        losses: those that must agree, by row.
        needed: floating-point operations of the cone; 0: not worth a comparison.
        forward, plain: those of the base model's forward pass, and of a step by the plain path.
    """

    name: str
    runs: dict[str, Run]
    losses: dict[str, float]
    needed: float = 0
    forward: float = 0
    plain: float = 0
    targets: dict[str, dict[str, float]] = field(default_factory=dict)


# --- what is trained ---


def step_of(loss_of: Callable[[], Tensor], parameters: list[nn.Parameter]) -> Run:
    """Return a training step. AdamW updates only what is trained."""
    optimiser = torch.optim.AdamW(parameters, lr=LR)

    def step() -> None:
        loss_of().backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sharing(base: nn.Module) -> Any:
    """Return a copy with modules of its own, since hooks are put on them, and the same weights."""
    return copy.deepcopy(base, {id(weight): weight for weight in (*base.parameters(), *base.buffers())})


def with_reftheads(model: rh.InterventionModel, batch: Batch) -> dict[str, Callable[[], Tensor]]:
    """Return the loss by the plain path, with an empty store, and with one that knows the batch.

    Each store has one `Replay` for all steps, as in a training run, which hashes the base model's weights once.
    """
    with model.reusing(ActivationStore()) as recording, model.reusing(ActivationStore()) as replaying:
        model(**batch)

    def plain() -> Tensor:
        return model(**batch).loss

    def first() -> Tensor:
        recording.store.clear()  # type: ignore[union-attr]
        with model.reusing(recording):
            return model(**batch).loss

    def later() -> Tensor:
        with model.reusing(replaying):
            return model(**batch).loss

    return {PLAIN: plain, FIRST: first, LATER: later}


def with_pyreft(
    base: LlamaForCausalLM, ours: rh.InterventionModel, layers: list[int], columns: list[list[int]], batch: Batch
) -> tuple[Callable[[], Tensor], list[nn.Parameter]]:
    """Return the loss of the same edits, with the same weights, by pyreft, as in `ReftTrainer.compute_loss`."""
    import pyreft

    width, weight = base.config.hidden_size, next(base.parameters())
    twins, representations = [], []
    for layer in layers:
        node = ours.node(f"n_{layer}")
        twin = pyreft.LoreftIntervention(embed_dim=width, low_rank_dimension=RANK, dtype=weight.dtype).to(weight.device)
        with torch.no_grad():
            twin.rotate_layer.weight = node.R.T
            twin.learned_source.weight.copy_(node.W)
            twin.learned_source.bias.copy_(node.b)
        twins.append(twin)
        place = {"layer": layer, "component": "block_output", "low_rank_dimension": RANK, "intervention": twin}
        representations.append(place)
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations), set_device=False)
    model.model.train()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    where = {"sources->base": (None, [columns] * len(layers))}

    def loss() -> Tensor:
        return model(inputs, unit_locations=where, labels=batch["labels"])[1].loss

    return loss, [parameter for twin in twins for parameter in twin.parameters()]


def with_lora(base: Any, layers: list[int] | None = None) -> peft.PeftModel:
    projections = ["query", "value"] if hasattr(base, "encoder") else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=LORA_RANK, target_modules=projections, layers_to_transform=layers)
    return peft.get_peft_model(base, config).train()


def unfrozen(base: Any) -> Any:
    """Return a copy all of whose weights are its own, and trained."""
    return copy.deepcopy(base).train().requires_grad_(True)


# --- language models ---


def rows_of(shape: Shape, setup: Setup) -> Batch:
    """Return random tokens, padded at the right; the length of the prompt varies by ±10 %."""
    spread = shape.prompt // 10
    prompts = [shape.prompt + round(spread * (2 * i / max(setup.batch - 1, 1) - 1)) for i in range(setup.batch)]
    ids = torch.zeros(setup.batch, max(prompts) + shape.answer, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, prompt in enumerate(prompts):
        end = prompt + shape.answer
        ids[i, :end] = torch.randint(3, setup.vocab, (end,))
        mask[i, :end] = 1
        labels[i, prompt:end] = ids[i, prompt:end]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: value.to(setup.device) for name, value in batch.items()}


def llama(setup: Setup) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=setup.width, intermediate_size=-(-setup.width * 8 // 3 // 64) * 64, num_hidden_layers=setup.layers,
        num_attention_heads=max(setup.width // 64, 1), vocab_size=setup.vocab, use_cache=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(setup.device, getattr(torch, setup.dtype))
    return base.train().requires_grad_(False)


def language_model(name: str, base: LlamaForCausalLM, batch: Batch, layers: list[int], positions: str) -> Case:
    """Return the steps of one graph of LoReFT, and the others.

    Args:
        batch: rows that are padded at the right, whose labels are their ends.
    """
    lengths, answers = batch["attention_mask"].sum(1).tolist(), (batch["labels"] != -100).sum(1).tolist()
    columns = [columns_of(positions, length - answer) for length, answer in zip(lengths, answers, strict=True)]
    graph = rh.InterventionGraph.over(rh.LoReFT(rank=RANK), layers, positions, name="n")
    ours = rh.InterventionModel(sharing(base), graph)
    losses = with_reftheads(ours, batch)
    losses[PYREFT], theirs = with_pyreft(sharing(base), ours, layers, columns, batch)
    known = {row: loss().item() for row, loss in losses.items()}
    runs = {row: step_of(loss, theirs if row == PYREFT else trained(ours)) for row, loss in losses.items()}
    others = {LORA: with_lora(sharing(base))}
    if layers[0]:
        others[TOP_LORA] = with_lora(sharing(base), list(range(layers[0], base.config.num_hidden_layers)))
    others[FULL] = unfrozen(base)
    for row, model in others.items():
        runs[row] = step_of(lambda model=model: model(**batch).loss, trained(model))
    inputs = {column: batch[column] for column in ("input_ids", "attention_mask")}
    runs[FORWARD] = torch.no_grad()(lambda: base(**inputs))
    cut = layers[0] + 1
    spans = [cone_tokens(*row) for row in zip(columns, lengths, answers, strict=True)]
    runs[PRODUCTS] = products(base, cut, sum(map(len, spans)), sum(answers))
    needed = cone_operations(base, cut, spans, sum(answers))
    forward, backward = plain_operations(base, cut, batch["input_ids"])
    return Case(name, runs, known, needed, forward, forward + backward)


# --- real language models, real rows ---


@dataclass(frozen=True)
class RealShape:
    """What is edited in real rows.

    Attributes:
        rows: of a tokenizer, the folder of the data, and how many.
        dtype: of the base model; empty: what the command line says.
    """

    name: str
    rows: Callable[[Any, Path, int], list[dict]]
    layers: list[int]
    positions: str = "l1"
    dtype: str = ""


def real_shapes(depth: int) -> list[RealShape]:
    """Return those for a model of so many blocks."""
    middle, late = depth // 3, depth * 2 // 3
    return [
        RealShape(f"ARC-Easy, l1 at block {late}", arc_easy, [late]),
        RealShape(f"ARC-Easy, l1 at block {middle}", arc_easy, [middle]),
        RealShape(f"ARC-Easy, l7 at blocks {middle}–{depth - 1}", arc_easy, list(range(middle, depth)), "l7"),
        RealShape("ARC-Easy, f7+l7 at all blocks", arc_easy, list(range(depth)), "f7+l7"),
        RealShape(f"GSM8K, l1 at block {late}", gsm8k, [late]),
        RealShape(f"emoji, l1 at block {depth * 8 // 15}", emoji, [depth * 8 // 15], dtype="bfloat16"),
        RealShape(f"emoji, l1 at block {depth * 4 // 5}", emoji, [depth * 4 // 5], dtype="bfloat16"),
    ]


def arc_easy(tokenizer: Any, data: Path, count: int) -> list[dict]:
    rows = json.loads((data / "commonsense/ARC-Easy/train.json").read_text(encoding="utf-8"))[:count]
    return rh.encode_pairs(tokenizer, [f"{row['instruction']}\n" for row in rows], [row["output"] for row in rows])


def gsm8k(tokenizer: Any, data: Path, count: int) -> list[dict]:
    lines = (data / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    return rh.encode_pairs(tokenizer, [f"{row['question']}\n" for row in rows], [row["answer"] for row in rows])


def emoji(tokenizer: Any, data: Path, count: int) -> list[dict]:
    """Return the ten conversations of `recipes/emoji_chat.py`, however many are asked for."""
    return encode(tokenizer, draw(seed=0, questions=0)[0])


def real_cases(setup: Setup) -> Iterator[Case]:
    """Yield the shapes of a real model; its weights are loaded once for each type of numbers."""
    dtype, (base, tokenizer) = setup.dtype, rh.load_base(setup.model, dtype=setup.dtype)
    for shape in real_shapes(base.config.num_hidden_layers):
        if setup.only not in shape.name:
            continue
        if dtype != (shape.dtype or setup.dtype):
            dtype = shape.dtype or setup.dtype
            base, tokenizer = rh.load_base(setup.model, dtype=dtype)
        base = base.to(setup.device).train().requires_grad_(False)
        rows = rh.Collator(tokenizer)(shape.rows(tokenizer, Path(setup.data), setup.batch))
        batch = {name: rows[name].to(setup.device) for name in ("input_ids", "attention_mask", "labels")}
        yield language_model(shape.name, base, batch, shape.layers, shape.positions)


# --- a head on a real encoder ---


class Classifier(nn.Module):
    """What is written without reftheads: an encoder and a linear map of its first token."""

    def __init__(self, encoder: nn.Module, width: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 2)

    def forward(self, label: Tensor, **inputs: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.encoder(**inputs).last_hidden_state[:, 0]), label)


def sentiment(setup: Setup) -> Case:
    """Return a head on the last block's first token of all-MiniLM-L6-v2, sentences of SST-2."""
    base = AutoModel.from_pretrained(setup.encoder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    base = base.to(setup.device, getattr(torch, setup.dtype)).train().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(setup.encoder)
    lines = (Path(setup.sst2) / "train.csv").read_text(encoding="utf-8").splitlines()[1 : setup.batch + 1]
    labels, sentences = zip(*(line.split(",", 1) for line in lines), strict=True)
    batch = dict(tokenizer(list(sentences), padding=True, return_tensors="pt"))
    batch = {name: value.to(setup.device) for name, value in batch.items()}
    batch["label"] = torch.tensor([int(label) for label in labels], device=setup.device)
    head = rh.Node(rh.LinearHead(outputs=2, target="label"), -1, positions="0", name="mood")
    ours = rh.InterventionModel(sharing(base), rh.InterventionGraph(head))
    losses = with_reftheads(ours, batch)
    known = {name: loss().item() for name, loss in losses.items()}
    runs = {name: step_of(loss, trained(ours)) for name, loss in losses.items()}
    for name, encoder in {LORA: with_lora(sharing(base)), FULL: unfrozen(base)}.items():
        model = Classifier(encoder, base.config.hidden_size).to(setup.device, base.dtype)
        runs[name] = step_of(lambda model=model: model(**batch), trained(model))
    inputs = {name: value for name, value in batch.items() if name != "label"}
    runs[FORWARD] = torch.no_grad()(lambda: base(**inputs))
    return Case(SST2, runs, known)


def cases(setup: Setup, console: Console) -> Iterator[Case]:
    """Yield those wanted, made one after the other, since each has a model to finetune in full."""
    if setup.model:
        yield from real_cases(setup)
        return
    shapes = [shape for shape in SHAPES if setup.only in shape.name]
    base = llama(setup) if shapes else None
    for shape in shapes:
        batch, layers = rows_of(shape, setup), shape.edited(setup.layers)
        case = language_model(shape.name, base, batch, layers, shape.positions)  # type: ignore[arg-type]
        yield replace(case, targets=shape.targets)
    if setup.only not in SST2:
        return
    if setup.encoder and setup.sst2 and Path(setup.encoder).is_dir() and (Path(setup.sst2) / "train.csv").is_file():
        yield sentiment(setup)
    else:
        console.print(f"{SST2}: left out, since it needs --encoder (a folder) and --sst2 (a folder with train.csv)")


# --- what the cone needs ---


def operations(base: LlamaForCausalLM) -> tuple[float, float, float]:
    """Return those of a token in a block but for attention, for every token it attends to there, and of its logits."""
    block = 2 * sum(weight.numel() for weight in base.model.layers[0].parameters() if weight.ndim == 2)
    return block, 4 * base.config.hidden_size, 2 * base.lm_head.weight.numel()


def plain_operations(base: LlamaForCausalLM, cut: int, ids: Tensor) -> tuple[float, float]:
    """Return those of forward, and of backward down to block `cut`.

    Padding and masked attention count, since they are computed as well.
    """
    block, attended, logits = operations(base)
    rows, columns = ids.shape
    layers = base.config.num_hidden_layers
    forward = layers * (block + columns * attended) + logits
    backward = (layers - cut) * (block + 2 * columns * attended) + logits
    return rows * columns * forward, rows * columns * backward


def cone_tokens(edited: list[int], length: int, answer: int) -> range:
    """Return the tokens of a row from the first that is edited to the last but one, which predicts the last label."""
    return range(min(edited[0], length - answer - 1), length - 1)


def cone_operations(base: LlamaForCausalLM, cut: int, spans: list[range], labels: int) -> float:
    """Return the least that a step needs, matrix products alone.

    Computed are the blocks from `cut` on for the tokens of each row's span, which attend to all before them. The
    gradient with respect to activations costs as much again, and in attention also that of the span's keys and values.
    Logits and their gradient are computed where there is a label.
    """
    block, attended, logits = operations(base)
    total = 0.0
    for span in spans:
        pairs, within = sum(token + 1 for token in span), len(span) * (len(span) + 1) / 2
        forward = len(span) * block + pairs * attended
        total += (base.config.num_hidden_layers - cut) * (2 * forward + within * attended)
    return total + 2 * labels * logits


def products(base: LlamaForCausalLM, cut: int, tokens: int, labels: int) -> Run:
    """Return the products with weights that a step needs, alone: thin ones are slower than the ideal says."""
    weights = [weight for block in base.model.layers[cut:] for weight in block.parameters() if weight.ndim == 2]
    head = base.lm_head.weight
    inputs = {size: head.new_ones(tokens, size) for weight in weights for size in weight.shape}
    labelled = head.new_ones(labels, head.shape[1])

    @torch.no_grad()
    def run() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)
        gradient = F.linear(labelled, head)
        gradient @ head
        for weight in weights:
            inputs[weight.shape[0]] @ weight

    return run


# --- measuring ---


class Peak(TorchDispatchMode):
    """Watch the greatest sum of bytes that tensors made within took at a time.

    What existed before (weights, the optimiser's state, a warm store) does not count, nor does what a kernel takes for
    itself while it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._see(storage, 0)
        result = func(*args, **kwargs or {})
        for storage in _storages(result):
            self._see(storage, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _see(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += size
            weakref.finalize(storage, self._gone, storage._cdata, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def peak_memory(run: Run, device: str) -> float:
    """Return the megabytes that a step takes beyond what is there before it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with Peak() as measured:
        run()
    return measured.peak / 1e6


def milliseconds(run: Run, device: str) -> float:
    """Return how long a step takes; on a CPU, what this process computes, whatever else the machine does meanwhile."""
    if not device.startswith("cuda"):
        start = time.process_time()
        run()
        return 1e3 * (time.process_time() - start)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(case: Case, setup: Setup, progress: Progress) -> list[dict[str, Any]]:
    """Return one row of the table for each step of a case."""
    task = progress.add_task(case.name, total=len(case.runs) * (setup.repeats + 2))

    def each(do: Callable[[str, Run], float]) -> dict[str, float]:
        values = {}
        for name, run in case.runs.items():
            progress.update(task, description=f"{case.name}: {name}")
            values[name] = do(name, run)
            progress.advance(task)
        return values

    def timed(name: str, run: Run) -> float:
        calls = 1 if first[name] > SLOW else 4
        return statistics.median([milliseconds(run, setup.device) for _ in range(calls)][calls > 1 :])

    first = each(lambda name, run: milliseconds(run, setup.device))  # warms up, too
    memory = each(lambda name, run: peak_memory(run, setup.device))
    turns = [each(timed) for _ in range(setup.repeats)]
    return [row_of(case, name, turns, memory[name]) for name in case.runs]


def row_of(case: Case, name: str, turns: list[dict[str, float]], memory: float) -> dict[str, Any]:
    def ratio(other: str) -> float | None:
        if other not in case.runs or name in (FORWARD, PRODUCTS):
            return None
        return statistics.median(turn[other] / turn[name] for turn in turns)

    share = None
    if case.needed and name in (PLAIN, FIRST, LATER, PRODUCTS):
        share = statistics.median(case.needed / case.forward * turn[FORWARD] / turn[name] for turn in turns)
    row = {
        "shape": case.name, "row": name, "ms": statistics.median(turn[name] for turn in turns),
        "operations": case.plain / case.needed if case.needed else None,
        "all_ms": [turn[name] for turn in turns], "memory": memory,
        "plain": ratio(PLAIN), "pyreft": ratio(PYREFT), "lora": ratio(LORA), "share": share,
    }  # fmt: skip
    wanted = case.targets.get(name, {})
    return row | {"targets": wanted, "met": {column: row[column] >= least for column, least in wanted.items()}}


# --- showing ---

COLUMNS = ["", "step, ms", "peak, MB", "× plain", "× pyreft", "× LoRA", "of ideal", "wanted"]


def cells(row: dict[str, Any]) -> list[str]:
    def shown(value: float | None, digits: int = 2) -> str:
        return "—" if value is None else f"{value:.{digits if value < 10 else 1}f}"

    names = {"plain": "× plain", "pyreft": "× pyreft", "lora": "× LoRA", "share": "of ideal"}
    wanted = [
        f"≥ {least:g} {names[column]}{'' if row['met'][column] else ' MISSED'}"
        for column, least in row["targets"].items()
    ]
    ratios = [shown(row[column]) for column in ("plain", "pyreft", "lora", "share")]
    return [row["row"], f"{row['ms']:.2f}", f"{row['memory']:.2f}", *ratios, "\n".join(wanted)]


def operations_of(row: dict[str, Any]) -> str:
    """Say how much faster than the plain path a step could be at most, if it took nothing but matrix products."""
    return "" if row["operations"] is None else f"operations: {row['operations']:.1f} × fewer"


def caption(setup: Setup, differences: dict[str, float]) -> str:
    where = torch.cuda.get_device_name() if setup.device.startswith("cuda") else f"CPU, {setup.threads} thread(s)"
    greatest = max(differences, key=differences.__getitem__)
    base = f"{setup.layers} layers, width {setup.width}, vocabulary {setup.vocab}, batch {setup.batch}, {setup.dtype}"
    if setup.model:
        base = f"{setup.model}, batch {setup.batch}, {setup.dtype} (emoji: batch 10, bfloat16)"
    return (
        f"{where}; {base}; median of {setup.repeats}. × pyreft: its time by this one's. Of ideal: the time that the "
        "matrix products of the cone would take at the speed of the base model's forward pass, by the step's. "
        f"Losses of reftheads and pyreft differ by {differences[greatest]:.1e} at most ({greatest})."
    )


def table_of(rows: list[dict[str, Any]], text: str) -> Table:
    table = Table(title="A training step", caption=text)
    for column in COLUMNS:
        table.add_column(column, no_wrap=True, justify="left" if column in ("", "wanted") else "right")
    shape = None
    for row in rows:
        if row["shape"] != shape:
            shape = row["shape"]
            table.add_section()
            table.add_row(f"[bold]{shape}[/bold]", *[""] * (len(COLUMNS) - 2), operations_of(row))
        table.add_row(*cells(row))
    return table


def markdown_of(rows: list[dict[str, Any]], text: str) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|---{'|---:' * (len(COLUMNS) - 2)}|---|"]
    shape = None
    for row in rows:
        if row["shape"] != shape:
            shape = row["shape"]
            lines.append(f"| **{shape}** |{' |' * (len(COLUMNS) - 2)} {operations_of(row)} |")
        lines.append(f"| {' | '.join(cells(row))} |".replace("\n", "; "))
    return "\n".join([*lines, "", text, ""])


def write(folder: Path, rows: list[dict[str, Any]], setup: Setup, differences: dict[str, float]) -> None:
    """Write what has been measured so far, as JSON and as markdown."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, rh)}
    figures = {
        "arguments": asdict(setup), "machine": platform.platform(), "versions": versions,
        "greatest_difference": differences, "rows": rows,
    }  # fmt: skip
    write_json(folder / "cone.json", figures)
    write_text(folder / "cone.md", markdown_of(rows, caption(setup, differences)))


if __name__ == "__main__":
    command_line(
        main,
        vocab="4096: logits take as small a share of the work as in a model of 7B",
        dtype="of the base model; what reftheads trains is float32",
        threads="of torch",
        only="shapes whose name contains this word",
        encoder="a folder with all-MiniLM-L6-v2",
        sst2="a folder with train.csv of SST-2",
        model="a real one in place of the random one, built like a Llama: what rh.load_base takes",
        data="a folder with commonsense/ARC-Easy/train.json and gsm8k/train.jsonl, for --model",
        out="a folder for cone.json and cone.md",
    )
