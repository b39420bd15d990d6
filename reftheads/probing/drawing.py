"""Pictures of probes: scores by layer, and by layer and attention head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from reftheads.probing.estimates import Probe


def series(probes: Iterator[Probe]) -> dict[str, list[Probe]]:
    """Group probes into the lines of a plot, by component and, if there are several, by target."""
    every = list(probes)
    targets = {probe.target for probe in every}
    lines: dict[str, list[Probe]] = {}
    for probe in every:
        label = probe.component if len(targets) == 1 else f"{probe.component}, {probe.target}"
        lines.setdefault(label, []).append(probe)
    return lines


def draw_lines(axis: Any, lines: Mapping[str, list[Probe]]) -> None:
    """Draw score by layer; embeddings stand before the first block, the final norm after the last."""
    deepest = max((p.layer for probes in lines.values() for p in probes if p.layer is not None), default=0)
    ends = {"embedding_output": -1, "final_norm_output": deepest + 1}
    for label, probes in lines.items():
        probes = sorted(probes, key=lambda p: _depth(p, ends))
        at = [_depth(probe, ends) for probe in probes]
        score = [probe.score for probe in probes]
        drawn = axis.errorbar(
            at, [s.mean for s in score], [s.interval or 0 for s in score], marker="o", capsize=3, label=label
        )
        controls = [probe.control for probe in probes if probe.control is not None]
        if len(controls) == len(probes):
            means, spans = [c.mean for c in controls], [c.interval or 0 for c in controls]
            axis.errorbar(
                at, means, spans, marker="x", capsize=3, linestyle=":", color=drawn[0].get_color(),
                label=f"{label}, control",
            )  # fmt: skip
    axis.set_xlabel("layer")
    axis.set_ylabel(" or ".join(dict.fromkeys(p.metric for probes in lines.values() for p in probes)))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend()


def _depth(probe: Probe, ends: Mapping[str, int]) -> int:
    return ends.get(probe.component, 0) if probe.layer is None else probe.layer


def draw_squares(axis: Any, probes: Sequence[Probe]) -> Any:
    """Draw the scores of attention heads, layers upwards and heads to the right."""
    layers = sorted({probe.layer or 0 for probe in probes})
    heads = sorted({probe.head or 0 for probe in probes})
    picture = np.full((len(layers), len(heads)), np.nan)
    for probe in probes:
        picture[layers.index(probe.layer or 0), heads.index(probe.head or 0)] = probe.score.mean
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_xticks(range(len(heads)), heads)
    axis.set_yticks(range(len(layers)), layers)
    return axis.imshow(picture, origin="lower", aspect="auto")
