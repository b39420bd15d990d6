"""What a search has found: the best graph, trained; a table, a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from reftheads._utils.atomic import replacing
from reftheads.adapter.model import InterventionModel
from reftheads.tuning.space import Candidate


@dataclass(frozen=True, eq=False)
class Tuning:
    """Hold what `tune` has found.

    Attributes:
        model: the base model with the best candidate's graph, as it was trained to the end.
        best: that candidate, with its graph, learning rate and score.
        candidates: all of them, in the order of the search, each as it was trained the last time.
        judged_by: "held-out loss", or the metric's name.
        maximize: whether more is better.
        seconds: that the search took, with those before it was resumed.

    Example:
        ```python
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat", dropout=False)
        >>> rows = rh.encode_pairs(tokenizer, ["Tell me about owls.", "Hi!"], ["Owls hoot.", "Hello!"])
        >>> space = rh.Space(layers=[1, 3], positions=["l1", "f1+l1"], rank=2)
        >>> found = rh.tune(base, tokenizer, rows, rows, space=space, trials=4, steps=3)
        >>> found.best in list(found), len(found)
        (True, 4)
        >>> found.table().row_count
        4
        ```
    """

    model: InterventionModel
    best: Candidate
    candidates: tuple[Candidate, ...]
    judged_by: str
    maximize: bool
    seconds: float

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.candidates)

    def __len__(self) -> int:
        return len(self.candidates)

    def table(self) -> Table:
        """Make a table, the best candidate first; those that were trained for more steps come before the others."""
        table = Table("candidate", "layers", "positions", "component", "kind", "rank", "learning rate", "steps")
        table.add_column(self.judged_by)
        for c in ranked(self.candidates, self.maximize):
            table.add_row(
                str(c.number), ", ".join(map(str, c.layers)), c.positions, c.component, c.kind, str(c.rank),
                f"{c.learning_rate:.2g}", str(c.steps), "no number" if c.score is None else f"{c.score:.4g}",
            )  # fmt: skip
        return table

    def plot(self, path: str | os.PathLike) -> None:
        """Draw layer × positions as a PNG file: in each cell the best score that a candidate there came to.

        Scores of candidates that were left out early are those of fewer steps. A star marks the best candidate.
        """
        from matplotlib.figure import Figure

        rules = list(dict.fromkeys(c.positions for c in sorted(self.candidates, key=lambda c: c.positions)))
        layers = range(max(max(c.layers) for c in self.candidates) + 1)
        figure = Figure(figsize=(2 + 0.5 * len(layers), 1.6 + 0.5 * len(rules)), layout="constrained")
        axis: Any = figure.subplots()
        image = axis.imshow(
            [[self._best_at(layer, rule) for layer in layers] for rule in rules],
            aspect="auto", cmap="viridis" if self.maximize else "viridis_r",
        )  # fmt: skip
        axis.scatter(self.best.layers, [rules.index(self.best.positions)] * len(self.best.layers), marker="*", c="red")
        axis.set_xlabel("layer")
        axis.set_ylabel("positions")
        axis.set_xticks(layers[:: max(len(layers) // 16, 1)])
        axis.set_yticks(range(len(rules)), rules)
        axis.set_facecolor("0.9")
        figure.colorbar(image, ax=axis, label=self.judged_by)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")

    def _best_at(self, layer: int, rule: str) -> float:
        there = [c.score for c in self.candidates if layer in c.layers and c.positions == rule and c.score is not None]
        if not there:
            return float("nan")
        return max(there) if self.maximize else min(there)


def ranked(candidates: Sequence[Candidate], maximize: bool) -> list[Candidate]:
    """Return candidates, the best first: by steps, then by score, in the end those without one."""
    sign = -1 if maximize else 1
    return sorted(candidates, key=lambda c: (c.score is None, -c.steps, sign * (c.score or 0.0), c.number))
