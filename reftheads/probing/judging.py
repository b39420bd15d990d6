"""How well probes do on items that they have not seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reftheads.graph.intervention import Params
from reftheads.interventions.heads import MappingHead
from reftheads.probing.estimates import Estimate, Probe
from reftheads.probing.stacks import Stack
from reftheads.probing.targets import TEST

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


def judge(stack: Stack, part: Int[Tensor, "seeds N"], weights: Params, epochs: Int[Tensor, "P M"]) -> dict[str, Probe]:
    """Judge all probes of a stack on the items that each seed holds out, and return them by name.

    Args:
        part: what each item is for, by seed.
        epochs: of each member of a site.
    """
    items = (part == TEST).any(0).nonzero()[:, 0]
    judged = (part == TEST)[:, items].cpu()
    if not bool(judged.any(1).all()):
        raise ValueError(f"no row that is held out has a target {stack.head.target!r}: give eval_rows that have one")
    with torch.no_grad():
        z = torch.cat([stack.predict(weights, stack.x[:, batch]) for batch in items.split(stack.at_once)], 2).cpu()
    y, epochs = stack.y[:, :, items].cpu(), epochs.cpu()
    probes = {}
    for i, site in enumerate(stack.planned):
        for task, planned in enumerate(site):
            estimates = []
            for kind in range(stack.kinds):
                members = [stack.member(task, seed, kind) for seed in range(stack.seeds)]
                scores = [_scores(stack.head, z[i, m][of], y[i, m][of]) for m, of in zip(members, judged, strict=True)]
                estimates.append({name: Estimate(tuple(score[name] for score in scores)) for name in scores[0]})
            (metric, score), *second = estimates[0].items()
            name, at = str(planned.node.name), planned.address.site
            probes[name] = Probe(
                name, str(at), at.component, at.layer, at.head, str(planned.node.intervention.target),  # type: ignore[attr-defined]
                metric, score, estimates[1][metric] if len(estimates) > 1 else None, dict(second),
                Estimate(tuple(float(epochs[i, stack.member(task, seed)]) for seed in range(stack.seeds))),
            )  # fmt: skip
    return probes


def _scores(head: MappingHead, z: Float[Tensor, "items outputs"], y: Shaped[Tensor, "items ..."]) -> dict[str, float]:
    """Return what the predictions z are worth, the most important figure first.

    Where a target is several numbers or labels, it is the mean over them.
    """
    from sklearn.metrics import accuracy_score, f1_score, r2_score

    classes = head.kind == "classes" or (head.kind is None and head.outputs > 1 and not y.is_floating_point())
    if classes:
        pairs = [(y, z.argmax(1))]
    elif head.kind == "probabilities":
        pairs = list(zip(y.view(len(y), -1).unbind(1), (z > 0).unbind(1), strict=True))
    elif y.ndim > 1:
        pairs = list(zip(y.unbind(1), head.shown(z).unbind(1), strict=True))
    else:
        pairs = [(y, head.shown(z)[:, head.outputs // 2 if head.loss == "quantile" else 0])]  # the median, or the mean
    known = []
    for truth, guess in pairs:
        present = head.given(truth)
        if present.any():
            known.append((truth[present].double(), guess[present].double()))
    if classes or head.kind == "probabilities":
        known = [(truth.round(), guess) for truth, guess in known]
        metrics = {"accuracy": accuracy_score, "macro_f1": lambda truth, guess: f1_score(truth, guess, average="macro")}
    else:
        metrics = {"r2": r2_score, "pearson": _pearson}
    return {
        name: sum(float(metric(truth.numpy(), guess.numpy())) for truth, guess in known) / len(known)
        for name, metric in metrics.items()
    }


def _pearson(truth: np.ndarray, guess: np.ndarray) -> float:
    constant = np.ptp(truth) == 0 or np.ptp(guess) == 0
    return 0.0 if constant else float(np.corrcoef(truth, guess)[0, 1])
