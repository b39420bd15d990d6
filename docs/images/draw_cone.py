"""Draw the cone: what a training step computes, and what it finds in the store.

    python docs/images/draw_cone.py [FILE]

The cells are not placed by hand. A Llama of 12 blocks with an edit and a head takes two steps on one row, and hooks see
which block computes which tokens in the first step and in the second.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from transformers import LlamaConfig, LlamaForCausalLM

import reftheads as rh

PROMPT = "What do people in Egypt think of cats ?".split()
ANSWER = "They are very fond of them".split()
END = "(end)"
BLOCKS, EDITED, PROBED = 12, 8, 4

PASSED, KEPT, COMPUTED = "#dfe7f1", "#9fb9da", "#f6b25c"
EDIT, HEAD, LOGITS = "#c62f4f", "#15836f", "#7656a6"
INK, PALE = "#1f2d3a", "#5a6876"

Cell = tuple[int, int]  # token, block


@dataclass(frozen=True)
class Steps:
    """What the hooks have seen.

    Attributes:
        first: the cells that the first step computes.
        later: the cells that every step computes from the second on.
        scored: of how many tokens a later step computes logits.
    """

    first: frozenset[Cell]
    later: frozenset[Cell]
    scored: int

    @property
    def kept(self) -> frozenset[Cell]:
        """Return the cells that later steps start from: keys and values before the cone, hidden states below it."""
        start, bottom = (min(axis) for axis in zip(*self.later, strict=True))
        beside = {(token, block) for token in range(start) for _, block in self.later}
        return frozenset(beside | {(token, bottom - 1) for token, _ in self.later})


def train() -> Steps:
    """Train an edit and a head on one row, and record which cells are computed."""
    words = [*PROMPT, *ANSWER, END]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=BLOCKS, num_attention_heads=2
    )
    base = LlamaForCausalLM(config).eval()
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=2), EDITED, positions="l1", name="edit"),
        rh.Node(rh.LinearHead(2, target="mood"), PROBED, positions="l1", name="head"),
    )
    model = rh.InterventionModel(base, graph)
    ids = torch.arange(len(words))[None]
    prompt = ids < len(PROMPT)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompt_mask": prompt.long()}
    batch |= {"labels": ids.masked_fill(prompt, -100), "mood": torch.tensor([1])}

    computed: set[Cell] = set()
    scored: list[int] = []
    for block, layer in enumerate(base.model.layers):

        def record(module, args, kwargs, block=block):
            computed.update((token, block) for token in kwargs["position_ids"].flatten().tolist())

        layer.self_attn.register_forward_pre_hook(record, with_kwargs=True)
    base.lm_head.register_forward_pre_hook(lambda module, args: scored.append(args[0].shape[:-1].numel()))

    steps = []
    with model.reusing(rh.ActivationStore()):
        for _ in range(2):
            computed.clear()
            model(**batch).loss.backward()
            steps.append(frozenset(computed))
    return Steps(*steps, scored[-1])


def cell(axes: Axes, token: float, block: float, colour: str, **style) -> None:
    """Draw a cell, its middle at these coordinates."""
    style = {"facecolor": colour, "edgecolor": "none", "boxstyle": "round,pad=0,rounding_size=0.13"} | style
    axes.add_patch(FancyBboxPatch((token - 0.43, block - 0.43), 0.86, 0.86, **style))


def draw(steps: Steps, file: Path) -> None:
    """Draw the grid of tokens and blocks, and beside it what the colours mean."""
    figure, axes = plt.subplots(figsize=(11.6, 6.75), dpi=138)
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.005, top=0.995)
    tokens = 1 + max(token for token, _ in steps.first)
    last, top = len(PROMPT) - 1, BLOCKS + 0.4
    for at in sorted(steps.first):
        cell(axes, *at, COMPUTED if at in steps.later else KEPT if at in steps.kept else PASSED)
    cell(axes, last, EDITED, EDIT)
    cell(axes, last, PROBED, HEAD)
    for token in range(tokens):
        if token < tokens - steps.scored:
            cell(axes, token, top, "none", edgecolor=PASSED, linewidth=1.2)
        else:
            cell(axes, token, top, LOGITS)

    style = {"color": PALE, "fontsize": 12}
    for block in range(BLOCKS):
        axes.text(-0.7, block, block, ha="right", va="center", **style)
    axes.text(-1.6, (BLOCKS - 1) / 2, "block", rotation=90, ha="center", va="center", **style)
    axes.text(-0.7, top, "logits", ha="right", va="center", **style)
    for token, word in enumerate([*PROMPT, *ANSWER]):
        axes.text(token + 0.35, -0.7, word, rotation=40, ha="right", va="top", color=INK, fontsize=12.5)
    for token, word in enumerate([*ANSWER, END], last):
        axes.text(token - 0.3, top + 0.65, word, rotation=40, ha="left", va="bottom", color=LOGITS, fontsize=12.5)
    for name, start, end in (("prompt", 0, last), ("answer", last + 1, tokens - 1)):
        axes.plot([start - 0.43, end + 0.43], [-2.8, -2.8], color=PALE, linewidth=1.2)
        axes.text((start + end) / 2, -2.95, name, ha="center", va="top", **style)

    share = f"{len(steps.later)} of {len(steps.first)}"
    for height, colour, title, text in (
        (top, LOGITS, "logits", "where there is a label"),
        (10.2, COMPUTED, "computed in every step", f"what the edit can change:\n{share} cells"),
        (7.4, EDIT, "edit (LoReFT)", f"output of block {EDITED},\nlast token of the prompt"),
        (4.6, KEPT, "computed once, and kept", "keys and values before the edit,\nhidden states below it"),
        (1.8, HEAD, "head", "below the edit it reads what is kept"),
        (-0.4, PASSED, "computed once, never again", "nothing that changes reads it"),
    ):
        left = tokens + 0.7
        cell(axes, left, height, colour)
        axes.text(left + 0.75, height + 0.02, title, ha="left", va="center", color=INK, fontsize=14.5, weight="bold")
        axes.text(left + 0.75, height - 0.55, text, ha="left", va="top", linespacing=1.3, color=PALE, fontsize=13)
    axes.set(xlim=(-1.9, tokens + 9.5), ylim=(-3.7, top + 2.2), aspect=0.86)
    axes.axis("off")
    figure.savefig(file, pil_kwargs={"optimize": True})
    plt.close(figure)


if __name__ == "__main__":
    draw(train(), Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("cone.png"))
