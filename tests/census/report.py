"""The page that shows what came of the census."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from census.building import GROUPS, everything
from census.examining import NOTHING, REFUSED, RIGHT, Verdict
from census.running import known, verdict

_TITLES = {
    "causal": "Causal language models",
    "encoder": "Encoders",
    "classifier": "Encoders with a classifier alone",
    "encoder-decoder": "Encoder-decoders",
    "vision": "Vision",
    "multimodal": "Text with images or sound",
    "speech": "Speech to text",
    "audio": "Audio",
}

_INTRODUCTION = """# Architectures

A census over the model types of transformers {transformers} (torch {torch}): is the library right there, or does it
refuse with a reason? `make census` examines them again and writes this page; it goes on where it was stopped.

{counts}

A model of each type is built tiny, with random weights, in float64 where it computes in it, and examined by checks that
know its modules from one pass with plain hooks rather than from the library:

- an edit at every component of a block equals the same change made by a hook; what enters and leaves blocks, what
  attention and MLP add to the residual stream, what queries, keys and values do to the heads, by their definitions;
- `f1`, `l1`, `f2+l2` and `all` mean the same tokens in a ragged batch, padded left or right, with labels, and alone;
- `generate` with a cache equals generating without, and what the model gives for the whole text when edited by hand;
- losses, gradients and `generate` within `model.reusing(store)` are those of the plain path;
- LoRA equals merged weights; what is saved and loaded gives the same; heads read what a hook sees; a path acts.

*Right* are all of these, where the library does not refuse. *Refused* means that blocks are refused; the dotted path of
a module is what remains. The last column says what a model that is right refuses: a component that it does not have, or
whose place or columns cannot be told.
"""


def write(results: Path, page: Path) -> None:
    """Write the page from the lines of results."""
    rows = known(results)
    entries = [(entry, rows[str(entry)]) for entry in everything() if str(entry) in rows]
    counts = Counter(verdict(row).word for _, row in entries)
    built = sum(counts.values()) - counts[NOTHING]
    words = [f"{count} {word}" for word, count in sorted(counts.items(), key=lambda pair: -pair[1]) if word != NOTHING]
    said = f"**{built} types examined: {', '.join(words)}.** {counts[NOTHING]} others cannot be built here."
    text = _INTRODUCTION.format(
        transformers=transformers.__version__, torch=torch.__version__.split("+")[0], counts=said
    )
    for group in GROUPS:
        text += _section(group, [row for entry, row in entries if entry.group == group])
    page.write_text(text, encoding="utf-8")


def _section(group: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of a group."""
    if not rows:
        return ""
    lines = [f"\n## {_TITLES[group]}\n", "| type | class | | refused, and why |", "|---|---|---|---|"]
    for row in rows:
        whole = verdict(row)
        why = whole.text if whole.word != RIGHT else _refusals(row)
        word = "not built" if whole.word == NOTHING else whole.word
        lines.append(f"| {row['type']} | {row['class'] or ''} | {word} | {_cell(why)} |")
    return "\n".join(lines) + "\n"


def _refusals(row: Mapping[str, Any]) -> str:
    """Return the checks that a model refuses."""
    verdicts = {name: Verdict(*pair) for name, pair in row["checks"].items()}
    return ", ".join(name for name, v in verdicts.items() if v.word == REFUSED)


def _cell(text: str) -> str:
    """Return text for a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")
