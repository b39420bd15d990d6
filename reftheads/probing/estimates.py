"""What was measured of one probe: figures over seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """Hold a figure that was measured with several seeds.

    Attributes:
        values: one per seed.

    Example:
        ```python
        >>> from reftheads.probing import Estimate
        >>> accuracy = Estimate((0.8, 0.9, 0.85))
        >>> print(accuracy)
        0.850 ± 0.124
        >>> print(accuracy.minus(Estimate((0.5, 0.6, 0.55))))
        0.300 ± 0.000
        ```
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return the mean over the seeds."""
        return sum(self.values) / len(self.values)

    @property
    def interval(self) -> float | None:
        """Return half the width of the 95 % confidence interval of the mean, by Student's t; `None` for one seed."""
        n = len(self.values)
        if n < 2:
            return None
        from scipy.stats import t

        return float(t.ppf(0.975, n - 1)) * float(np.std(self.values, ddof=1)) / math.sqrt(n)

    def minus(self, other: Estimate) -> Estimate:
        """Return the difference, seed by seed."""
        return Estimate(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"mean": self.mean, "interval": self.interval, "values": list(self.values)}

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.interval is None else f"{self.mean:.3f} ± {self.interval:.3f}"


@dataclass(frozen=True)
class Probe:
    """Hold what was measured of one head.

    Attributes:
        name: of its node.
        where: its address, with layer and head counted from 0, such as "block_output[2]".
        component, layer, head: the parts of the address; `None` where it has none.
        target: the column that it predicts.
        metric: what its scores are: "accuracy" for classes, labels and yes or no, "r2" for numbers.
        score: on rows held out.
        control: the same figure for the control task; `None` without one.
        second: another metric of the same predictions: "macro_f1" (the mean over classes of F1) or "pearson".
        epochs: until the weights that were kept; 0 for a closed form.

    Example:
        ```python
        >>> from reftheads.probing import Estimate, Probe
        >>> site = ("block_output[2]", "block_output", 2, None)
        >>> score, control, epochs = Estimate((0.9, 0.8)), Estimate((0.6, 0.5)), Estimate((7.0, 9.0))
        >>> probe = Probe("p", *site, "mood", "accuracy", score, control, {}, epochs)
        >>> print(probe.selectivity)
        0.300 ± 0.000
        ```
    """

    name: str
    where: str
    component: str
    layer: int | None
    head: int | None
    target: str
    metric: str
    score: Estimate
    control: Estimate | None
    second: dict[str, Estimate]
    epochs: Estimate

    @property
    def selectivity(self) -> Estimate | None:
        """Return the score minus that of the control task (Hewitt and Liang 2019), seed by seed."""
        return None if self.control is None else self.score.minus(self.control)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "second"}
        values |= {"selectivity": self.selectivity, **self.second}
        return {name: v.to_dict() if isinstance(v, Estimate) else v for name, v in values.items()}
