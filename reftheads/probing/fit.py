"""From rows to figures: what heads see is recorded, stacks of them are trained, and each is judged."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from reftheads._utils.deprecation import reordered
from reftheads.adapter.model import InterventionModel
from reftheads.inference.prediction import tracked
from reftheads.interventions.heads import LinearHead, MappingHead
from reftheads.probing.estimates import Probe
from reftheads.probing.judging import judge
from reftheads.probing.recording import record
from reftheads.probing.result import Probes
from reftheads.probing.solvers import CLOSED, descend, solve
from reftheads.probing.stacks import Weights, stacks_of
from reftheads.probing.targets import TRAIN, Column, parts_of
from reftheads.reuse.store import ActivationStore
from reftheads.runtime.plan import PlannedNode


@reordered("model", "rows", "tokenizer", tokenizer=PreTrainedTokenizerBase)
@torch.inference_mode(False)
@torch.enable_grad()
def fit_probes(
    model: InterventionModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    eval_rows: Sequence[Mapping[str, Any]] | None = None,
    held_out: float = 0.2,
    validation: float = 0.1,
    control: str | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    method: Literal["sgd", "closed"] = "sgd",
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    epochs: int = 50,
    patience: int = 5,
    batch_size: int = 64,
    strength: float = 0.1,
    recording_batch_size: int = 64,
    store: ActivationStore | None = None,
) -> Probes:
    """Train the heads of a graph as probes, all in one pass, and judge them on rows held out.

    The model runs once over all rows, no further than to the deepest head. Edits of the graph act as they are; they and
    the base model are not trained. Inputs are scaled to mean 0 and deviation 1, feature by feature over all rows; the
    final weights include that scaling. Without a bias they are only scaled. Heads with the same options on inputs of
    one width are trained in the same steps: each comes out as if it had been trained alone.

    A seed draws which rows are held out, the first weights and the control task. The weights of the first seed, from
    the epoch in which they did best in validation, end up in the model.

    Args:
        model: its graph has a `LinearHead` or `MLPHead` at each site to be probed.
        rows: `input_ids` and the heads' targets; what the model does not take is left alone.
        eval_rows: rows to judge by, instead of a part of `rows`.
        held_out: the part of the rows to judge by; classes have their shares in it.
        validation: the part of the other rows that decides how many epochs are best.
        control: a column; every *type*, a value in it, gets a random target, each target as often as it occurs. How
            well these are predicted says what a probe can memorise (Hewitt and Liang 2019,
            https://arxiv.org/abs/1909.03368). "input_ids" is for targets of tokens: the type is the token.
        seeds: several give confidence intervals. A closed form with `eval_rows` leaves them the control task alone to
            draw: its scores have an interval of 0.
        method: "sgd" is AdamW; "closed" is ridge regression (`mse`, `mse_of_each`) or logistic
            regression (`cross_entropy`, `bce`), by scikit-learn, for a `LinearHead`.
        lr: learning rate; a head's own `lr` replaces it.
        weight_decay: as AdamW has it, of all weights.
        epochs: at most.
        patience: after how many epochs without a lower loss in validation a probe stops.
        batch_size: items per step, of which each seed takes its own; an item is a row, or a token.
        strength: λ of the closed forms, which minimise the mean loss + λ/2 |W|²; the mean loss of `mse` is that of
            (z − y)².
        recording_batch_size: rows per pass through the model.
        store: keeps the base model's activations for further calls, in which other heads read the same sites.

    Raises:
        ValueError: a graph without heads to train, heads that need more than fixed inputs, missing or impossible
            targets, options that do not go together, or activations that would take more than half of the free
            memory.
        FloatingPointError: a loss that is not finite.

    Example:
        ```python
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> words = {"dogs": 1, "cats": 1, "owls": 1, "bears": 1, "bread": 0, "soup": 0, "pizza": 0, "rice": 0}
        >>> rows = [{**tokenizer(f"Tell me about {word}."), "animal": animal} for word, animal in words.items()]
        >>> node = rh.Node(rh.LinearHead(2, target="animal"), layer=2, positions="l1", name="animal")
        >>> model = rh.InterventionModel(base, rh.InterventionGraph(node))
        >>> probes = rh.fit_probes(model, tokenizer, rows, eval_rows=rows, method="closed", seeds=(0,))
        >>> probes["animal"].metric, probes["animal"].score.mean
        ('accuracy', 1.0)
        ```
    """
    planned = heads_of(model, method)
    _check(rows, eval_rows, held_out, validation, seeds, method, epochs)
    every = [*rows, *(eval_rows or ())]
    columns = {str(p.node.intervention.target): Column.of(p.node.intervention, every) for p in planned}  # type: ignore[attr-defined]
    for head in dict.fromkeys(p.node.intervention for p in planned):
        columns[str(head.target)].check(head)  # type: ignore[attr-defined,arg-type]
    validation = 0.0 if method == "closed" else validation
    parts = parts_of(planned, columns, len(rows), len(eval_rows or ()), held_out, validation, seeds)
    began = time.perf_counter()
    recorded = record(model, planned, every, columns, tokenizer, recording_batch_size, store)
    recording = time.perf_counter() - began
    stacks = list(stacks_of(recorded, columns, every, control, seeds, batch_size))
    probes: dict[str, Probe] = {}
    trained: dict[str, Weights] = {}
    for stack in tracked(stacks, "training probes"):
        part = parts[:, stack.rows.cpu()].to(stack.x.device)
        if not bool((part == TRAIN).any(1).all()):
            raise ValueError(
                f"no row to train on has a target {stack.head.target!r}: fill the column, or give more rows"
            )
        if method == "closed":
            weights, kept = solve(stack, part, strength)
        else:
            weights, kept = descend(stack, part, seeds, lr, weight_decay, epochs, patience, batch_size)
        probes |= judge(stack, part, weights, kept)
        trained |= stack.first(weights)
    for name, weights in trained.items():
        model.node(name).assign(**weights)
    order = [probes[str(p.node.name)] for p in planned]
    return Probes(tuple(order), recording, time.perf_counter() - began - recording)


def heads_of(model: InterventionModel, method: str) -> list[PlannedNode]:
    """Return the nodes to train.

    Raises:
        ValueError: none, or one that cannot be trained on recorded activations, or not by this method.
    """
    heads = []
    for planned in model.plan().nodes:
        head, name = planned.node.intervention, planned.node.name
        if not isinstance(head, MappingHead) or head.target is None or not head.trainable:
            continue
        where = f"head {name!r} cannot be trained on recorded activations"
        if head.pool == "attention":
            raise ValueError(f"{where}: pool='attention' is learnt. Use pool='mean', or InterventionTrainer")
        if head.kind == "pairs":
            raise ValueError(f"{where}: its loss {head.loss!r} needs pairs in a batch. Use InterventionTrainer")
        reader = next((n.name for n in model.plan().graph if n.source == name), None)
        if reader is not None:
            raise ValueError(f"{where}: node {reader!r} reads it, and would change with it. Use InterventionTrainer")
        if planned.node.share is not None:
            raise ValueError(f"{where}: it shares its weights as {planned.node.share!r}. Leave share out")
        closed = isinstance(head, LinearHead) and head.activation is None and head.loss in CLOSED
        if method == "closed" and not closed:
            raise ValueError(
                f"there is no closed form of head {name!r}, {head}: it takes a LinearHead without activation and a "
                f"loss of {', '.join(CLOSED)}. Use method='sgd'"
            )
        heads.append(planned)
    if not heads:
        raise ValueError(
            "the graph has no head to train: give it a LinearHead or MLPHead with a target at each site to be probed"
        )
    return heads


def _check(rows: Any, eval_rows: Any, held_out: float, validation: float, seeds: Any, method: str, epochs: int) -> None:
    if method not in ("sgd", "closed"):
        raise ValueError(f"method must be 'sgd' or 'closed', got {method!r}")
    if len(rows) < 2 or (eval_rows is not None and not len(eval_rows)):
        raise ValueError(f"too few rows: got {len(rows)} to train on, and {'' if eval_rows is None else '0 '}to judge")
    if eval_rows is None and not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, so that there are rows to judge, got {held_out!r}")
    if not 0 <= validation < 1:
        raise ValueError(f"validation must be 0 or between 0 and 1, got {validation!r}")
    if not len(seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different integers, at least one, got {seeds!r}")
    if epochs < 1:
        raise ValueError(f"epochs must be 1 or more, got {epochs!r}")
