"""How well probes do on items that they have not seen."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reftheads.heads import MappingHead
from reftheads.nodes import Params
from reftheads.probing.estimates import Estimate, Probe
from reftheads.probing.stacks import Stack
from reftheads.probing.targets import TEST

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


def judge(stack: Stack, part: Int[Tensor, "seeds N"], weights: Params, epochs: Int[Tensor, "P M"]) -> dict[str, Probe]:
    """All probes of a stack, on the items that each seed holds out."""
    items = (part == TEST).any(0).nonzero()[:, 0]
    own = (part == TEST)[:, items].cpu()
    if not bool(own.any(1).all()):
        raise ValueError(f"no row that is held out has a target {stack.head.target!r}: give eval_rows that have one")
    with torch.no_grad():
        z = torch.cat([stack.predict(weights, stack.x[:, some]) for some in items.split(stack.at_once)], 2).cpu()
    y, epochs = stack.y[:, :, items].cpu(), epochs.cpu()
    found = {}
    for i, site in enumerate(stack.planned):
        for task, planned in enumerate(site):
            estimates = []
            for kind in range(stack.kinds):
                members = [stack.member(task, seed, kind) for seed in range(stack.seeds)]
                scores = [_scores(stack.head, z[i, m][of], y[i, m][of]) for m, of in zip(members, own, strict=True)]
                estimates.append({name: Estimate(tuple(score[name] for score in scores)) for name in scores[0]})
            (metric, score), *second = estimates[0].items()
            name, at = str(planned.node.name), planned.address.site
            found[name] = Probe(
                name, str(at), at.component, at.layer, at.head, str(planned.node.intervention.target),  # type: ignore[attr-defined]
                metric, score, estimates[1][metric] if len(estimates) > 1 else None, dict(second),
                Estimate(tuple(float(epochs[i, stack.member(task, seed)]) for seed in range(stack.seeds))),
            )  # fmt: skip
    return found


def _scores(head: MappingHead, z: Float[Tensor, "items outputs"], y: Shaped[Tensor, "items ..."]) -> dict[str, float]:
    """What the predictions z are worth, the most important figure first."""
    from sklearn.metrics import f1_score, r2_score

    given = head.given(y)
    if head.kind == "probabilities":
        truth, guess = y[given] > 0.5, (z.view(y.shape) > 0)[given]
    elif head.kind == "classes" or (head.kind is None and head.outputs > 1 and not y.is_floating_point()):
        truth, guess = y, z.argmax(1)
    else:
        z = head.shown(z)
        z = z if y.ndim > 1 else z[:, head.outputs // 2 if head.loss == "quantile" else 0]  # the median, or the mean
        truth, guess = y[given].double(), z[given].double()
        correlation = float(torch.corrcoef(torch.stack([truth, guess]))[0, 1])
        pearson = correlation if math.isfinite(correlation) else 0.0  # of a constant
        return {"r2": float(r2_score(truth.numpy(), guess.numpy())), "pearson": pearson}
    f1 = f1_score(truth.numpy(), guess.numpy(), average="macro")
    return {"accuracy": float((truth == guess).float().mean()), "macro_f1": float(f1)}
