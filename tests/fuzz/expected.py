"""What a case must give, put together from its rows alone: logits, what is read, losses, gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuzz import formulas
from fuzz.batches import alone, inputs_alone, targets_of
from fuzz.draw import Case, labels_of
from fuzz.places import ARCHS, Arch
from fuzz.reference import Listed, Row, hooked, tokens_of

Key = tuple[str, str]
Leaves = dict[tuple[str, str], dict[str, Tensor]]
"""By adapter and name of parameters, the parameters: leaves of their own, which get gradients."""


@dataclass
class Reading:
    """What a node reads in all rows.

    Attributes:
        tokens: of every row, by the number of a token, what was read there; of what pools, at token 0.
        length: of every row, how many tokens its stack had.
    """

    listed: Listed
    tokens: list[dict[int, Tensor]]
    length: list[int]


@dataclass
class Expected:
    """What a batch must give.

    Attributes:
        logits: of every row, at its tokens.
        readings: by name, as outputs have it.
        losses: by name, of heads whose target is there.
        counts: likewise, of how many targets they are the mean.
        loss: the whole; `None` where there is none.
    """

    logits: list[Tensor]
    readings: dict[str, Reading] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    loss: Tensor | None = None


class Oracle:
    """The reference for one case.

    Args:
        leaves: the parameters of all nodes.
    """

    def __init__(self, case: Case, graphs: dict[str, Any], leaves: Leaves):
        self.case = case
        self.arch: Arch = ARCHS[case.arch]
        self.leaves = leaves
        self.graphs = graphs

    def listed(self, adapters: Sequence[str]) -> list[Listed]:
        """The nodes of some adapters, in their order."""
        out = []
        for adapter in adapters:
            for spec, node in zip(self.case.adapters[adapter], self.graphs[adapter], strict=True):
                site = node.site
                role = site.stack or spec.role
                if site.is_path:
                    place = self.arch.at_path(site.component, site.side)
                else:
                    place = self.arch.place(role, site.layer, site.component, site.head)
                p = formulas.derived(node.intervention, self.leaves[adapter, node.share or node.name])
                cross = any(site.component.endswith(path) for path in self.arch.cross)
                out.append(Listed((adapter, node.name), node, place, role, p, cross))
        return out

    def run(self, adapters: Sequence[Sequence[str]], labels: bool = False, call: Callable | None = None) -> list[Any]:
        """Every row alone through its adapters: the row and what the model gives.

        Args:
            adapters: of every row, which act.
            call: is given the model and the inputs of a row.
        """
        nodes = {names: self.listed(names) for names in {tuple(names) for names in adapters}}
        out = []
        for number, names in enumerate(adapters):
            row, inputs = alone(self.case, number, labels), inputs_alone(self.case, number)
            with hooked(self.arch, nodes[tuple(names)], [row]) as base:
                out.append((row, nodes[tuple(names)], call(base, inputs) if call else base(**inputs)))
        return out

    def expect(self, adapters: Sequence[Sequence[str]], labels: bool = False, targets: bool = False) -> Expected:
        """What the whole batch must give."""
        rows = self.run(adapters, labels)
        expected = Expected([out.logits[0] for _, _, out in rows])
        expected.readings = self.readings([(row, nodes) for row, nodes, _ in rows])
        terms = [self._own_loss(expected.logits)] if labels else []
        if targets:
            terms += self._head_losses(expected, [row for row, _, _ in rows], adapters)
        terms = [term for term in terms if term is not None]
        expected.loss = sum(terms[1:], terms[0]) if terms else None
        return expected

    def _own_loss(self, logits: list[Tensor]) -> Tensor | None:
        """The model's own loss, a mean over all labels."""
        rows = list(zip(logits, self.case.rows, strict=True))
        if self.arch.name == "bert classifier":
            return torch.stack([F.cross_entropy(z, torch.tensor(row.seed % 2)) for z, row in rows]).mean()
        if not self.arch.causal and not self.arch.seq2seq:
            return None
        terms = []
        for z, row in rows:
            labels = labels_of(self.arch, row)
            seen = z if self.arch.seq2seq else z[:-1]
            for scores, label in zip(seen, labels if self.arch.seq2seq else labels[1:], strict=True):
                if label != -100:
                    terms.append(torch.logsumexp(scores, 0) - scores[label])
        return torch.stack(terms).mean()

    def readings(self, rows: list[tuple[Row, list[Listed]]]) -> dict[str, Reading]:
        """What was read, by the names that outputs use."""
        readers: dict[Key, Listed] = {n.key: n for _, nodes in rows for n in nodes if not n.edits}
        names = [name for _, name in readers]
        out = {}
        for (adapter, name), listed in readers.items():
            tokens, length = [], []
            for number, (row, _) in enumerate(rows):
                one = row.pooled.get(listed.key)
                tokens.append({0: one} if one is not None else row.read.get(listed.key, {}))
                other = listed.other_stack or (self.arch.seq2seq and listed.role == "encoder")
                spec = self.case.rows[number]
                length.append(len(spec.decoder if self.arch.seq2seq and not other else spec.tokens))
            out[name if names.count(name) == 1 else f"{adapter}/{name}"] = Reading(listed, tokens, length)
        return out

    def _head_losses(self, expected: Expected, rows: list[Row], adapters: Sequence[Sequence[str]]) -> list[Tensor]:
        """What every head whose target is there adds to the loss; its mean loss is put down."""
        targets = targets_of(self.case, sorted({name for names in adapters for name in names}))
        total = []
        for name, reading in expected.readings.items():
            what = reading.listed.node.intervention
            target = getattr(what, "target", None)
            if target is None:
                continue
            items = []
            for number, tokens in enumerate(reading.tokens):
                ours = targets[target][number]
                for i, z in tokens.items():
                    if target.startswith("row "):
                        items.append((z, ours))
                    elif not what.shift:
                        items.append((z, ours[i]))
                    elif i + 1 < len(ours):
                        items.append((z, ours[i + 1]))
            losses = formulas.item_losses(what, items)
            weight = sum(w for _, w in losses)
            parts = [w * loss for loss, w in losses]
            loss = torch.stack(parts).sum() / weight if weight else _zero(reading)
            expected.losses[name] = loss
            expected.counts[name] = formulas.given(what, [y for _, y in items])
            total.append(formulas.weighted(what, loss, expected.counts[name], reading.listed.p))
        return total


def _zero(reading: Reading) -> Tensor:
    """0, with a gradient of 0 for the head's parameters."""
    return sum((p.sum() * 0 for p in reading.listed.p.values()), torch.zeros((), dtype=torch.float64))


def projection(logits: Sequence[Tensor]) -> Tensor:
    """A number in which every logit of every row has a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for number, z in enumerate(logits):
        weights = torch.linspace(-1, 1, z.numel(), dtype=z.dtype) * (number + 3)
        total = total + (z * weights.sin().view_as(z)).sum()
    return total


__all__ = ["Expected", "Leaves", "Oracle", "Reading", "projection", "tokens_of"]
