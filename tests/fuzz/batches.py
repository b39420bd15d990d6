"""The batch that a case is about, padded as it says; and each of its rows alone."""

import math
from random import Random
from typing import Any

import torch
from torch import Tensor

from fuzz.draw import Case, RowSpec, Spec, labels_of
from fuzz.places import ARCHS
from fuzz.reference import Row

NONE = {"classes": -100, "chances": math.nan, "each chance": math.nan, "numbers": math.nan, "each number": math.nan}


def padded(
    case: Case, values: list[list[Any]], filler: Any, role: str | None = None, dtype: torch.dtype = torch.long
) -> Tensor:
    """One value a token, with padding: [rows columns …]."""
    out = []
    for row, ours in zip(case.rows, values, strict=True):
        left, right = (
            (0, row.decoder_right) if role == "decoder" and ARCHS[case.arch].seq2seq else (row.left, row.right)
        )
        out.append([filler] * left + list(ours) + [filler] * right)
    return torch.tensor(out, dtype=dtype)


def batch_of(case: Case, labels: bool = False) -> dict[str, Tensor]:
    """What the model is given; with the labels of a language model, where they are asked for."""
    arch, rows = ARCHS[case.arch], case.rows
    ids = padded(case, [row.tokens for row in rows], 0)
    mask = padded(case, [[1] * len(row.tokens) for row in rows], 0)
    batch = {"input_ids": ids}
    if not bool(mask.all()) or case.number % 2:
        batch["attention_mask"] = mask
    if arch.takes_positions and (not bool(mask.all()) or case.number % 3 == 0):
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if marks_by_mask(case, labels):
        batch["prompt_mask"] = padded(case, [[int(i in row.prompt) for i in range(len(row.tokens))] for row in rows], 0)
    if arch.seq2seq:
        batch["decoder_input_ids"] = padded(case, [row.decoder for row in rows], 0, "decoder")
        batch["decoder_attention_mask"] = padded(case, [[1] * len(row.decoder) for row in rows], 0, "decoder")
        if labels:
            batch["labels"] = padded(case, [labels_of(arch, row) for row in rows], -100, "decoder")
            if case.shifted:
                del batch["decoder_input_ids"]
    elif labels and arch.causal:
        batch["labels"] = padded(case, [labels_of(arch, row) for row in rows], -100)
    elif labels and arch.name == "bert classifier":
        batch["labels"] = torch.tensor([row.seed % 2 for row in rows])
    return batch


def marks_by_mask(case: Case, labels: bool) -> bool:
    """Whether a prompt mask is given: training a language model without labels needs one."""
    return case.marked in ("mask", "both")


def alone(case: Case, number: int, labels: bool = False) -> Row:
    """A row without the others: what its prompt is follows from what the batch is given."""
    arch, row = ARCHS[case.arch], case.rows[number]
    marked = row.prompt if marks_by_mask(case, labels) else None
    if arch.seq2seq:
        return Row({"encoder": marked, "decoder": list(range(row.decoder_answer + 1)) if labels else None})
    if marked is None and labels and arch.causal:
        marked = list(range(row.answer))
    return Row({arch.role: marked})


def inputs_alone(case: Case, number: int) -> dict[str, Tensor]:
    """What the base model is given of one row."""
    row = case.rows[number]
    inputs = {"input_ids": torch.tensor([row.tokens])}
    return inputs | ({"decoder_input_ids": torch.tensor([row.decoder])} if ARCHS[case.arch].seq2seq else {})


# --- targets ------------------------------------------------------------------------------------------------


def targets_of(case: Case, adapters: list[str]) -> dict[str, list[Tensor]]:
    """By column, of every row its target or its targets, of the heads of some adapters."""
    names = sorted({name for adapter in adapters for spec in case.adapters[adapter] if (name := target_of(spec))})
    return {name: [_targets(name, case, row) for row in case.rows] for name in names}


def target_of(spec: Spec) -> str | None:
    """The column that a head learns."""
    return spec.what[1].get("target")


def _targets(name: str, case: Case, row: RowSpec) -> Tensor:
    """The targets of a row: one, or one a token."""
    level, _, what = name.partition(" ")
    random = Random(f"{row.seed}:{name}")
    if level == "row":
        return torch.tensor(_target(random, what), dtype=_dtype(what))
    count = len(row.decoder) if level == "decoder" and ARCHS[case.arch].seq2seq else len(row.tokens)
    return torch.tensor([_target(random, what) for _ in range(count)], dtype=_dtype(what))


def _dtype(what: str) -> torch.dtype:
    return torch.long if what in ("classes", "pairs") else torch.float64


def _target(random: Random, what: str) -> Any:
    if what.startswith("each "):
        return [_target(random, what.removeprefix("each ") + "s") for _ in range(2)]
    if what == "pairs":
        return random.choice([1, -1, 2, -2, 0])
    if random.random() < 0.25:
        return NONE[what]
    return {"classes": random.randrange(3), "chances": random.choice([0.0, 1.0, 0.3]), "numbers": random.gauss(0, 2)}[
        what
    ]


def target_batch(case: Case, targets: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """The columns of targets, with none on padding."""
    columns = {}
    for name, rows in targets.items():
        level, _, what = name.partition(" ")
        if level == "row":
            columns[name] = torch.stack(rows)
            continue
        filler: Any = 0 if what == "pairs" else NONE[what]
        filler = [filler, filler] if what.startswith("each") else filler
        columns[name] = padded(case, [row.tolist() for row in rows], filler, level, _dtype(what))
    return columns
