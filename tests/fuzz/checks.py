"""Comparing what the library gives with what is expected: outputs to 1e-10, gradients to 1e-8."""

from typing import Any

import torch
from torch import Tensor

from fuzz import formulas
from fuzz.draw import Case
from fuzz.expected import Expected, Reading
from fuzz.places import ARCHS
from fuzz.session import Session

TOLERANCE, OF_GRADIENTS, IN_FLOAT32 = 1e-10, 1e-8, 1e-6  # `generate` keeps logits in float32


class Fault(AssertionError):
    """A difference between the library and the reference."""


def same(what: str, got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise `Fault` where two tensors differ by more than rounding."""
    if got.shape != expected.shape:
        raise Fault(f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if not got.numel():
        return
    scale = max(1.0, float(expected.detach().abs().max()))
    worst = float((got.detach().double() - expected.detach()).abs().max())
    if not worst <= tolerance * scale:
        raise Fault(f"{what}: {worst:.2e} away, of {scale:.1e}")


def real(case: Case, values: Tensor, role: str | None = None) -> list[Tensor]:
    """Of every row of [rows columns …], what lies at its tokens."""
    decoder = ARCHS[case.arch].seq2seq and role != "encoder"
    if decoder:
        return [one[: len(row.decoder)] for row, one in zip(case.rows, values, strict=True)]
    return [one[row.left : row.left + len(row.tokens)] for row, one in zip(case.rows, values, strict=True)]


def logits_of(case: Case, output: Any) -> list[Tensor]:
    """Of every row, the logits at its tokens; one for all of them, if the model gives one."""
    return list(output.logits) if output.logits.ndim == 2 else real(case, output.logits)


def check_logits(case: Case, output: Any, expected: Expected) -> None:
    """Raise `Fault` where logits at real tokens differ."""
    for number, (got, wanted) in enumerate(zip(logits_of(case, output), expected.logits, strict=True)):
        same(f"logits of row {number}", got, wanted)


def check_readings(case: Case, output: Any, readings: dict[str, Reading]) -> None:
    """Raise `Fault` where predictions, activations or the tokens that they belong to differ."""
    predictions, collected = (getattr(output, name, None) or {} for name in ("predictions", "collected"))
    got = predictions | collected
    needed = {name for name, reading in readings.items() if any(reading.tokens)}
    if not needed <= got.keys() <= readings.keys():
        raise Fault(f"readings of {sorted(got)}, expected {sorted(needed)} of {sorted(readings)}")
    for name in got:
        check_reading(name, got[name], output.selected[name], readings[name])


def check_reading(name: str, got: Tensor, valid: Tensor, reading: Reading) -> None:
    """Raise `Fault` where what a node read differs from the reading, row by row."""
    what = reading.listed.node.intervention
    shown = formulas.ACTIVATIONS[getattr(what, "activation", None)]
    for number, tokens in enumerate(reading.tokens):
        if int(valid[number].sum()) != len(tokens):
            raise Fault(f"{name} selects {int(valid[number].sum())} tokens of row {number}, expected {len(tokens)}")
        values = got[number][None] if got.ndim == 2 else got[number]
        if values.shape[0] != valid.shape[1]:
            raise Fault(f"{name}: {values.shape[0]} values for {valid.shape[1]} slots")
        if tokens:
            wanted = torch.stack([shown(tokens[i]) for i in sorted(tokens)])
            same(f"{name} in row {number}", values[valid[number]], wanted)
        if bool(values[~valid[number]].any()):
            raise Fault(f"{name} is not zero where row {number} has no token")


def check_losses(output: Any, expected: Expected) -> None:
    """Raise `Fault` where the losses of heads, or what they are means of, differ."""
    got, counts = (getattr(output, name, None) or {} for name in ("losses", "counts"))
    needed = {name for name in expected.losses if any(expected.readings[name].tokens)}
    if not needed <= got.keys() <= expected.losses.keys():
        raise Fault(f"losses of {sorted(got)}, expected {sorted(needed)} of {sorted(expected.losses)}")
    for name in got:
        same(f"loss of {name}", got[name], expected.losses[name])
        if int(counts[name]) != expected.counts[name]:
            raise Fault(f"{name} counts {int(counts[name])} targets, expected {expected.counts[name]}")


def check_gradients(session: Session, objective: Tensor | None, expected: Tensor | None, what: str = "") -> None:
    """Raise `Fault` where the gradients of two objectives differ."""
    model, leaves = session.model, session.leaves
    model.zero_grad()
    if objective is not None and objective.requires_grad:
        objective.backward()
    wanted = [(key, name, leaf) for key, p in leaves.items() for name, leaf in p.items() if leaf.requires_grad]
    if expected is None or not expected.requires_grad:
        slopes = [None] * len(wanted)
    else:
        slopes = torch.autograd.grad(expected, [leaf for *_, leaf in wanted], allow_unused=True, retain_graph=True)
    norms = [float(s.norm()) for s in slopes if s is not None]
    scale = max([1.0, *norms])
    for ((adapter, key), name, leaf), slope in zip(wanted, slopes, strict=True):
        parameter = model.base_model.layer.rh_nodes[adapter][key].stored()[name]
        got = torch.zeros_like(leaf) if parameter.grad is None else parameter.grad
        slope = torch.zeros_like(leaf) if slope is None else slope
        worst = float((got - slope).abs().max())
        if not worst <= OF_GRADIENTS * scale:
            raise Fault(f"{what}gradient of {adapter}.{key}.{name}: {worst:.2e} away, of {scale:.1e}")
