"""Examine every model type, or go on where an earlier run was stopped, and write docs/architectures.md."""

import argparse
from collections import Counter
from pathlib import Path

from rich.progress import Progress
from support.paths import ROOT

from census.building import everything
from census.report import write
from census.running import apart, census, prepare, verdict


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "census.jsonl", help="lines of JSON")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "architectures.md")
    parser.add_argument("--group", action="append", help="only this group; may be given several times")
    parser.add_argument("--type", action="append", help="only this model type; may be given several times")
    parser.add_argument("--share", default="0/1", help="i/n: every n-th entry, from the i-th on")
    options = parser.parse_args()
    prepare()
    first, step = map(int, options.share.split("/"))
    entries = [e for e in everything() if not options.group or e.group in options.group]
    entries = [e for e in entries if not options.type or e.model_type in options.type][first::step]
    counts: Counter[str] = Counter()
    with Progress() as progress:
        task = progress.add_task("census", total=len(entries))
        for row in census(entries, options.results, apart):
            counts[verdict(row).word] += 1
            said = ", ".join(f"{count} {word}" for word, count in counts.items())
            progress.update(task, advance=1, description=f"{row['type']} ({said})")
    if not (options.group or options.type or step > 1):
        write(options.results, options.page)


if __name__ == "__main__":
    main()
