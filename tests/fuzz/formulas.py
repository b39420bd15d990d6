"""The equations of docs/nodes.md, written out for one token: what an edit makes of it, what a head says and costs."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

P = Mapping[str, Tensor]
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": lambda z: z * (z > 0),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu": lambda z: z / 2 * (1 + torch.erf(z / math.sqrt(2))),
    "softmax": lambda z: torch.softmax(z, -1),
}
ORTHONORMAL = ("LoReFT", "DiReFT", "ConsReFT", "LobiReFT")
CONSTANT = ("ConsReFT", "LobiReFT")
SUBTRACTING = ("LoReFT", "NoReFT", "ConsReFT")
REFT = ("LoReFT", "NoReFT", "DiReFT", "NoDiReFT", "ConsReFT", "LobiReFT")


def rotation(m: Tensor) -> Tensor:
    """The rows of R, orthonormal: the transposed Q of Mᵀ = QU with a positive diagonal of U."""
    q, u = torch.linalg.qr(m.T)
    return (q * u.diagonal().sign()).T


def derived(what: Any, p: P) -> dict[str, Tensor]:
    """The stored parameters, and R of those that are orthonormal."""
    inner = what.inner if type(what).__name__ == "Gated" else what
    return {**p, "R": rotation(p["M"])} if type(inner).__name__ in ORTHONORMAL else dict(p)


def edited(what: Any, p: P, h: Tensor, x: Tensor, gate: Tensor | None) -> Tensor:
    """One token of an edit: h, and the x that entered the module; `gate` is the output of a source."""
    kind = type(what).__name__
    if kind == "Gated":
        assert gate is not None
        return h + ACTIVATIONS["sigmoid"](gate) * (edited(what.inner, p, h, x, gate) - h)
    if kind in REFT:
        basis = p["R"] if kind in ORTHONORMAL else p["P"]
        bias = p["b"] if "b" in p else 0
        source = bias if kind in CONSTANT else ACTIVATIONS[what.act_fn](p["W"] @ h + bias)
        return h + basis.T @ (source - basis @ h if kind in SUBTRACTING else source)
    if kind == "ScaleAndBias":
        return p["s"] * h + p["b"]
    if kind == "Steering":
        return h + what.scale * p["v"]
    if kind == "Shift":
        return h + what.c * (1 if gate is None else gate.sum()) * p["u"]
    if kind in ("Replace", "Ablate"):
        return p["a"] + 0 * h.detach()
    assert kind == "LoRA", kind
    alpha = what.rank if what.alpha is None else what.alpha
    return h + alpha / what.rank * (p["B"] @ (p["A"] @ x))


def mapped(what: Any, p: P, h: Tensor) -> Tensor:
    """What a head makes of one token, before its activation."""
    if type(what).__name__ == "LinearHead":
        return p["W"] @ h + p.get("b", 0)
    for i in range(what.layers):
        h = ACTIVATIONS[what.act_fn](p[f"W{i}"] @ h + p.get(f"b{i}", 0))
    return p[f"W{what.layers}"] @ h + p.get(f"b{what.layers}", 0)


def pooled(what: Any, p: P, tokens: Sequence[Tensor]) -> Tensor:
    """One hidden state of several tokens."""
    if what.pool == "mean":
        return torch.stack(list(tokens)).mean(0)
    scores = torch.stack([p["q"] @ h / math.sqrt(len(h)) for h in tokens])
    weights = ACTIVATIONS["softmax"](scores)
    total = torch.zeros_like(tokens[0])
    for weight, h in zip(weights, tokens, strict=True):
        total = total + weight * h
    return total


def absent(what: Any, target: Tensor) -> bool:
    """Whether a number says that there is no target."""
    number = float(target)
    return math.isnan(number) or number == what.ignore_index or (what.loss == "bradley_terry" and number == 0)


def item_losses(what: Any, items: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, float]]:
    """Loss and weight of each item that counts, of pairs of a prediction and a target."""
    shown = ACTIVATIONS[what.activation]
    out: list[tuple[Tensor, float]] = []
    for z, y in items:
        if what.loss in ("multi_label", "mse_of_each"):
            for score, truth in zip(z if what.loss == "multi_label" else shown(z), y, strict=True):
                if not absent(what, truth):
                    loss = _bce(score, truth) if what.loss == "multi_label" else (score - truth) ** 2
                    out.append((loss, 1.0))
        elif absent(what, y):
            continue
        elif what.loss == "bradley_terry":
            rejected = [other for other, k in items if float(k) == -float(y)]
            if float(y) > 0 and rejected:
                out.append((-F.logsigmoid(z[0] - rejected[0][0]), 1.0))
        else:
            weight = what.class_weights[int(y)] if what.class_weights is not None else 1.0
            out.append((_LOSSES[what.loss](what, z, shown(z), y), weight))
    return out


def given(what: Any, targets: Sequence[Tensor]) -> int:
    """Of how many targets a loss is the mean, as `counts` says it."""
    return sum(not absent(what, number) for target in targets for number in target.reshape(-1))


def weighted(what: Any, loss: Tensor, count: int, p: P) -> Tensor:
    """What a head's mean loss adds to the total."""
    if what.weight != "uncertainty":
        return what.weight * loss
    numbers = what.loss not in ("cross_entropy", "bce", "multi_label", "bradley_terry")
    return (loss / 2 if numbers else loss) * (-p["s"]).exp() + p["s"] / 2 if count else loss * 0


def _bce(z: Tensor, y: Tensor) -> Tensor:
    return -y * F.logsigmoid(z) - (1 - y) * F.logsigmoid(-z)


def _huber(error: Tensor) -> Tensor:
    size = error.abs()
    return error**2 / 2 if float(size) <= 1 else size - 0.5


def _quantiles(what: Any, shown: Tensor, y: Tensor) -> Tensor:
    parts = []
    for q, value in zip(what.quantiles, shown, strict=True):
        error = y - value
        parts.append(q * error if float(error) >= 0 else (q - 1) * error)
    return torch.stack(parts).mean()


_LOSSES: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda what, z, shown, y: torch.logsumexp(z, 0) - z[int(y)],
    "bce": lambda what, z, shown, y: _bce(z[0], y),
    "mse": lambda what, z, shown, y: (shown[0] - y) ** 2,
    "mae": lambda what, z, shown, y: (shown[0] - y).abs(),
    "huber": lambda what, z, shown, y: _huber(y - shown[0]),
    "gaussian_nll": lambda what, z, shown, y: (z[1] + (y - z[0]) ** 2 * (-z[1]).exp()) / 2,
    "quantile": lambda what, z, shown, y: _quantiles(what, shown, y),
}
