"""The page that shows what came of the census."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from census.building import GROUPS, everything
from census.examining import CRASH, NOTHING, REFUSED, RIGHT, WRONG, Verdict
from census.running import known, verdict

LONGEST = 160
"""Characters of a cell."""
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

{missing}A model of each type is built tiny, with random weights, in float64 where it computes in it, and examined by
checks that know its modules from one pass with plain hooks rather than from the library:

- an edit at every component of a block equals the same change made by a hook; what enters and leaves blocks, what
  attention and MLP add to the residual stream, what queries, keys and values do to the heads, by their definitions;
- `f1`, `l1`, `f2+l2` and `all` mean the same tokens in a ragged batch, padded left or right, with labels, and alone;
- `generate` with a cache equals generating without, and what the model gives for the whole text when edited by hand;
- losses, gradients and `generate` within `model.reusing(store)` are those of the plain path;
- LoRA equals merged weights; what is saved and loaded gives the same; heads read what a hook sees; a path acts.

*Right* are all of these, where the library does not refuse. *Wrong* and *crash* are faults that are known, with what
the first check says. *Not built* are types that need a package that is not installed, or inputs that the census does
not make. *Refused* means that blocks are refused; the dotted path of a module is what remains. The last column says
what a model that is right refuses: a component that it does not have, or whose place or columns cannot be told.
"""


def write(results: Path, page: Path) -> None:
    """Write the page from the lines of results."""
    rows = known(results)
    entries = [(entry, rows[str(entry)]) for entry in everything() if str(entry) in rows]
    text = _INTRODUCTION.format(
        transformers=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        counts=_counts({group: [row for entry, row in entries if entry.group == group] for group in GROUPS}),
        missing=_missing(len(everything()) - len(entries)),
    )
    for group in GROUPS:
        text += _section(group, [row for entry, row in entries if entry.group == group])
    page.write_text(text, encoding="utf-8")


def _missing(count: int) -> str:
    """Return what to say of entries that have no result yet."""
    return f"{count} further types have not been examined in this run.\n\n" if count else ""


def _counts(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the table of how many types of each group came out how."""
    words = (RIGHT, REFUSED, WRONG, CRASH, NOTHING)
    lines = ["| | right | refused | wrong | crash | not built |", "|---|--:|--:|--:|--:|--:|"]
    total: Counter[str] = Counter()
    for group, of_group in rows.items():
        counts = Counter(verdict(row).word for row in of_group)
        total += counts
        lines.append(f"| {_TITLES[group]} | {' | '.join(str(counts[word]) for word in words)} |")
    lines.append(f"| **all** | {' | '.join(f'**{total[word]}**' for word in words)} |")
    return "\n".join(lines)


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
    """Return text for a cell of a table, its end left out if it is long."""
    short = text if len(text) <= LONGEST else f"{text[:LONGEST].rpartition(' ')[0]} …"
    return short.replace("|", "\\|").replace("<", "&lt;")
