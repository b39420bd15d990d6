"""Successive halving: how many candidates are trained for how many steps, and what of that a budget of time allows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

REDUCTION = 4  # of each rung the best quarter goes on, for four times as many steps
WIDTH = 2 * REDUCTION**2  # candidates that begin a round: 32, of which 8, then 2 go on

Rung = tuple[int, int]  # candidates, steps


def rungs(candidates: int, steps: int) -> list[Rung]:
    """Return the rungs of a round that ends with trainings of `steps`; one that would leave out nobody is none."""
    lengths = sorted({max(steps // REDUCTION**2, 1), max(steps // REDUCTION, 1), steps})
    sizes = [math.ceil(candidates / REDUCTION**i) for i in range(len(lengths))]
    every = list(zip(sizes, lengths, strict=True))
    return [rung for rung, following in zip(every, [*sizes[1:], 0], strict=True) if rung[0] > following]


@dataclass(frozen=True)
class Pace:
    """Say how long a pass takes, in which some candidates are trained side by side.

    Attributes:
        setup: seconds of a pass, but for its steps.
        step: seconds of a step.
    """

    setup: float
    step: float

    @classmethod
    def of(cls, passes: Sequence[tuple[float, int, float]]) -> Pace:
        """Return the mean pace of passes: of each the seconds, the steps, and the seconds of a step."""
        setups = [max(seconds - steps * step, 0.0) for seconds, steps, step in passes]
        return cls(sum(setups) / len(passes), sum(step for _, _, step in passes) / len(passes))

    def seconds(self, of: Sequence[Rung], together: int) -> float:
        """Return how long some rungs take, with at most `together` candidates in a pass."""
        # candidates that look at the first token, and those that do not, have passes of their own
        passes = [min(math.ceil(size / together) + 1, size) for size, _ in of]
        return sum(n * (self.setup + steps * self.step) for n, (_, steps) in zip(passes, of, strict=True))


def affordable(seconds: float, steps: int, together: int, pace: Pace) -> int:
    """Return with how many candidates a round of these steps takes no more than `seconds`; 0 if with none."""
    sizes = range(WIDTH, 0, -1)
    return next((n for n in sizes if pace.seconds(rungs(n, steps), together) <= seconds), 0)


_UNITS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}


def seconds_of(budget: str | float) -> float:
    """Return the seconds of a budget such as "10min", "90s", "1.5h", or a number of seconds.

    Raises:
        ValueError: a budget that cannot be read, or is not above 0.
    """
    text = budget if isinstance(budget, str) else f"{budget}s"
    parts = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*(s|sec|min|m|h)\s*", text)
    seconds = float(parts[1]) * _UNITS[parts[2]] if parts and not isinstance(budget, bool) else 0.0
    if not 0 < seconds < math.inf:
        raise ValueError(f"a budget is a time above 0 such as '10min', '90s', '1.5h', or seconds, got {budget!r}")
    return seconds
