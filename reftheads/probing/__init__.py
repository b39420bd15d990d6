"""Probes: all heads of a graph trained at once, on activations that are recorded once, and judged on rows held out.

1. The rows go through the model once; what every head sees is kept (`recording`, with their `targets`).
2. Heads of one shape are stacked, with their seeds and control tasks (`stacks`), and trained in the same steps or by a
   solver (`solvers`).
3. Each is judged on rows that it has not seen (`judging`), the weights of the first seed go into the model, and the
   figures into a table and a plot (`estimates`, `result`, `drawing`).
"""

from reftheads.probing.estimates import Estimate, Probe
from reftheads.probing.fit import fit_probes
from reftheads.probing.result import Probes

__all__ = ["Estimate", "Probe", "Probes", "fit_probes"]
