"""All probes of a graph: a table, a plot, a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from rich.table import Table

from reftheads._utils.atomic import replacing
from reftheads.probing.drawing import draw_lines, draw_squares, series
from reftheads.probing.estimates import Probe


@dataclass(frozen=True)
class Probes:
    """Hold all probes of a graph, in its order, as `fit_probes` returns them.

    Attributes:
        probes: one per head; by its node's name, `probes["name"]`.
        recording, fitting: seconds that running the model, and training the probes, took.

    Example:
        ```python
        >>> import os, tempfile
        >>> from reftheads.probing import Estimate, Probe, Probes
        >>> score = Estimate((0.9, 0.8))
        >>> probe = Probe("p", "block_output[2]", "block_output", 2, None, "mood", "accuracy", score, None, {}, score)
        >>> probes = Probes((probe,), recording=0.5, fitting=1.5)
        >>> [(probe.name, probe.score.mean) for probe in probes]
        [('p', 0.85...)]
        >>> probes.save(os.path.join(tempfile.mkdtemp(), "probes.json"))
        ```
    """

    probes: tuple[Probe, ...]
    recording: float
    fitting: float

    def __iter__(self) -> Iterator[Probe]:
        return iter(self.probes)

    def __len__(self) -> int:
        return len(self.probes)

    def __getitem__(self, name: str) -> Probe:
        for probe in self.probes:
            if probe.name == name:
                return probe
        raise KeyError(f"no probe {name!r}: there are {', '.join(probe.name for probe in self.probes)}")

    def table(self) -> Table:
        """Make a table, a row for each probe: means and 95 % confidence intervals over seeds."""
        metrics = list(dict.fromkeys(probe.metric for probe in self))
        seconds = list(dict.fromkeys(name for probe in self for name in probe.second))
        controlled = any(probe.control is not None for probe in self)
        table = Table("probe")
        table.add_column("where", no_wrap=True)
        for name in ("target", *metrics, *seconds):
            table.add_column(name)
        for name in (*(("control", "selectivity") if controlled else ()), "epochs"):
            table.add_column(name)
        for probe in self:
            cells = [str(probe.score) if name == probe.metric else "" for name in metrics]
            cells += [str(probe.second.get(name, "")) for name in seconds]
            cells += [str(probe.control or ""), str(probe.selectivity or "")] if controlled else []
            table.add_row(probe.name, probe.where, probe.target, *cells, f"{probe.epochs.mean:.0f}")
        return table

    def plot(self, path: str | os.PathLike) -> None:
        """Draw score by layer, with intervals and control tasks, into a PNG file.

        There is a line for each component and target. Probes of single attention heads are squares of a picture of
        their own.
        """
        from matplotlib.figure import Figure

        lines, squares = series(p for p in self if p.head is None), series(p for p in self if p.head is not None)
        panels = bool(lines) + len(squares)
        figure = Figure(figsize=(1 + 6 * panels, 4.2), layout="constrained")
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        if lines:
            draw_lines(axes.pop(0), lines)
        for axis, (label, probes) in zip(axes, squares.items(), strict=True):
            figure.colorbar(draw_squares(axis, probes), ax=axis, label=probes[0].metric)
            axis.set_title(label)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: every figure, seed by seed."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "probes": [p.to_dict() for p in self]}

    def save(self, path: str | os.PathLike) -> None:
        """Write `to_dict` as a JSON file."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
