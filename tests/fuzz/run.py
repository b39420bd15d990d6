"""Running cases: what became of each, and what all of them covered."""

import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from unittest import mock

import transformers
from support.oracle import causal_loss, exact_loss

from fuzz.checks import Fault
from fuzz.draw import Case, describe, draw_case, size, smaller
from fuzz.passes import PASSES, Skipped
from fuzz.session import Session
from reftheads.runtime import passes


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        refused: the error with which its graph was refused.
        passes: what was done and was right.
        skipped: by pass, why there was nothing to compare.
        faults: by pass, what was wrong.
    """

    refused: str | None = None
    passes: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


def run_case(case: Case) -> Outcome:
    """Run all passes of a case; edits go by masks as in small batches, or by slots as in large ones."""
    few = mock.patch.object(passes, "FEW", case.number % 2 * passes.FEW)
    with warnings.catch_warnings(), causal_loss(exact_loss), few:
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        return _run(case)


def _run(case: Case) -> Outcome:
    outcome = Outcome()
    try:
        session = Session(case)
    except ValueError as error:
        outcome.refused = str(error)
        if case.wrong is None:
            outcome.faults["build"] = f"refused, though nothing is wrong with it: {error}"
        return outcome
    except Exception:
        outcome.faults["build"] = traceback.format_exc(limit=-3)
        return outcome
    if case.wrong is not None:
        outcome.faults["build"] = f"accepted, though it has {case.wrong}"
        return outcome
    for name in case.passes:
        try:
            PASSES[name](session)
            outcome.passes.append(name)
        except Skipped as reason:
            outcome.skipped[name] = str(reason)
        except Fault as fault:
            outcome.faults[name] = str(fault)
        except Exception:
            outcome.faults[name] = traceback.format_exc(limit=-4)
        session.model.eval()
        session.use([*case.adapters][0])
    return outcome


def shrink(case: Case, name: str) -> Case:
    """The smallest case in which a pass still has a fault."""
    case = replace(case, passes=[] if name == "build" else [name])
    while True:
        tries = (less for less in smaller(case) if size(less) < size(case) and name in run_case(less).faults)
        less = next(tries, None)
        if less is None:
            return case
        case = less


class Covered:
    """Counts of what cases were about."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {
            name: Counter()
            for name in (
                "model",
                "adapters",
                "padding",
                "type",
                "component",
                "positions",
                "mistake",
                "pass",
                "skipped",
            )
        }

    def note(self, case: Case) -> None:
        """Count what a case is about."""
        counts = self.counts
        counts["model"][case.arch] += 1
        if case.wrong is not None:
            counts["mistake"][case.wrong] += 1
            return
        counts["adapters"][str(len(case.adapters))] += 1
        counts["padding"][_padding(case)] += 1
        for specs in case.adapters.values():
            for spec in specs:
                kind, options = spec.what
                counts["type"][kind] += 1
                if "inner" in options:
                    counts["type"][f"{kind}({options['inner'][0]})"] += 1
                component = spec.where["component"]
                head = " of a head" if "head" in spec.where else ""
                counts["component"]["a module path" if "." in component else component + head] += 1
                counts["positions"][str(spec.where["positions"]).partition("s': [")[0].strip("{'")] += 1

    def add(self, case: Case, outcome: Outcome) -> None:
        """Count a case, and what was done with it."""
        self.note(case)
        self.counts["pass"].update(outcome.passes)
        self.counts["skipped"].update(f"{name}: {why}" for name, why in outcome.skipped.items())

    def __str__(self) -> str:
        lines = []
        for name, counter in self.counts.items():
            total = ", ".join(f"{key} {count}" for key, count in counter.most_common())
            lines.append(f"{name:10} {sum(counter.values()):6}  {total}")
        return "\n".join(lines)


def _padding(case: Case) -> str:
    left, right = (any(getattr(row, side) for row in case.rows) for side in ("left", "right"))
    return {(0, 0): "none", (1, 0): "left", (0, 1): "right", (1, 1): "both"}[left, right]


__all__ = ["Covered", "Outcome", "describe", "draw_case", "run_case", "shrink"]
