"""A grid of runs, each kept as one file, and what they say together."""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from reftheads._utils.atomic import replacing
from reftheads._utils.deprecation import renamed

Cell = Mapping[str, Any]


class Study:
    """Run a grid cell by cell, and keep every result as a JSON file of its own.

    A file is written when its cell is complete. A study that was broken off goes on where it was: cells that have a
    file are not run again. Processes that run the same study at the same time share its cells.

    Args:
        directory: where the files are, such as "results/ft"; made if there is none.
        settings: what all cells have in common, such as `steps=30`; it stands in every file.

    Example:
        ```python
        >>> import tempfile
        >>> import reftheads.fewshot as fs
        >>> study = fs.Study(tempfile.mkdtemp(), steps=30)
        >>> cells = [{"mode": mode, "k": 8} for mode in ("all", "probe")]
        >>> results = study.run(cells, lambda mode, k: {"score": len(mode) / k})
        probe, 8 ━...━ 2/2 ...
        >>> study.result({"mode": "probe", "k": 8})
        {'mode': 'probe', 'k': 8, 'steps': 30, 'score': 0.625}
        ```
    """

    @renamed(folder="directory")
    def __init__(self, directory: str | os.PathLike, **settings: Any):
        self.directory, self.settings = Path(directory), json.loads(json.dumps(settings))

    def run(self, cells: Iterable[Cell], measure: Callable[..., Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Call `measure(**cell)` for every cell without a result, and return the results of all cells in order.

        Cells that another process is running come last: by then they are mostly there.

        Raises:
            ValueError: a cell whose file is damaged, or holds the result of another cell or of other settings.
        """
        cells = list(cells)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        console = Console(file=sys.stdout)  # also while the output of a cell goes elsewhere
        results: dict[Path, dict[str, Any]] = {}
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            line = progress.add_task("", total=len(cells))
            for wait in (False, True):
                for cell in cells:
                    if self.path(cell) not in results:
                        progress.update(line, description=", ".join(map(str, cell.values())))
                        with self._claimed(cell, wait) as mine:
                            if mine:
                                results[self.path(cell)] = self.result(cell) or self._written(cell, measure(**cell))
                        progress.update(line, completed=len(results))
        return [results[self.path(cell)] for cell in cells]

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Return what is known of a cell: its keys, the settings and what was measured; `None` before it was run.

        Raises:
            ValueError: a file that is damaged, or holds the result of another cell or of other settings.
        """
        path = self.path(cell)
        if not path.exists():
            return None
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            wanted = {**cell, **self.settings}
            other = {name: result.get(name) for name, value in wanted.items() if result.get(name) != value}
        except (ValueError, RecursionError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): delete it, and its cell is run again") from error
        if other:
            raise ValueError(f"{path} is the result of another run, with {other}: take another folder")
        return result

    def path(self, cell: Cell) -> Path:
        """Return the path of a cell's file, which is named by the cell's values."""
        words = [f"{name}{value}" if isinstance(value, int | float) else str(value) for name, value in cell.items()]
        return self.directory / (re.sub(r"[^\w.+,:=-]+", "-", "_".join(words)).strip("-") + ".json")

    @contextmanager
    def _claimed(self, cell: Cell, wait: bool) -> Iterator[bool]:
        """Claim a cell for this process, and say whether it has it; the claim ends with the process at the latest."""
        locks = self.directory / ".running"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{self.path(cell).stem}.lock")
        try:
            lock.acquire(blocking=wait)
        except Timeout:
            yield False
        else:
            try:
                yield True
            finally:
                lock.release()

    def _written(self, cell: Cell, measured: Mapping[str, Any]) -> dict[str, Any]:
        """Write what was measured of a cell, and return it as it will be read."""
        path, result = self.path(cell), {**cell, **self.settings, **measured}
        text = json.dumps(result, indent=1, ensure_ascii=False, default=lambda number: number.item()) + "\n"
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return json.loads(text)


def over_seeds(
    results: Sequence[Mapping[str, Any]], lines: Sequence[str], x: str, metric: str = "score"
) -> dict[tuple[Any, ...], dict[Any, tuple[float, float]]]:
    """Return mean and standard deviation of a metric over all results that agree in `lines` and `x`, such as seeds.

    Returns:
        By the values of `lines`, by that of `x`: the mean, and the deviation, which is 0 of a single result.

    Raises:
        ValueError: no results.

    Example:
        ```python
        >>> import reftheads.fewshot as fs
        >>> results = [{"mode": "all", "k": 8, "seed": seed, "score": score} for seed, score in enumerate((0.5, 0.7))]
        >>> fs.over_seeds(results, lines=["mode"], x="k")
        {('all',): {8: (0.6, 0.141...)}}
        ```
    """
    if not results:
        raise ValueError("no results: run some cells first")
    values: dict[tuple[Any, ...], dict[Any, list[float]]] = {}
    for result in results:
        values.setdefault(tuple(result[name] for name in lines), {}).setdefault(result[x], []).append(result[metric])
    return {
        line: {at: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for at, v in sorted(points.items())}
        for line, points in values.items()
    }


def table_of(
    results: Sequence[Mapping[str, Any]], lines: Sequence[str], x: str, metric: str = "score", title: str | None = None
) -> Table:
    """Make a table of mean ± standard deviation: a row for each value of `lines`, a column for each of `x`.

    Raises:
        ValueError: no results.

    Example:
        ```python
        >>> import rich
        >>> import reftheads.fewshot as fs
        >>> results = [{"mode": "all", "k": k, "score": k / 10} for k in (1, 8)]
        >>> rich.print(fs.table_of(results, lines=["mode"], x="k"))
        ┏━━━━━━┳━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━┓
        ┃ mode ┃ k = 1         ┃ k = 8         ┃
        ┡━━━━━━╇━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━┩
        │ all  │ 0.100 ± 0.000 │ 0.800 ± 0.000 │
        └──────┴───────────────┴───────────────┘
        ```
    """
    by_line = over_seeds(results, lines, x, metric)
    columns = sorted({at for points in by_line.values() for at in points})
    table = Table(*lines, *(f"{x} = {at}" for at in columns), title=title)
    for line, points in by_line.items():
        cells = ("{:.3f} ± {:.3f}".format(*points[at]) if at in points else "" for at in columns)
        table.add_row(*map(_word, line), *cells)
    return table


def plot(
    results: Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
    lines: Sequence[str],
    x: str = "k",
    metric: str = "score",
    title: str = "",
) -> None:
    """Draw the metric against `x` into a PNG file, with bars of one standard deviation.

    The axis of `x` is logarithmic, and has a place for 0. Lines stand a little beside each other, so that their bars
    can be told apart.

    Raises:
        ValueError: no results.

    Example:
        ```python
        >>> import os, tempfile
        >>> import reftheads.fewshot as fs
        >>> path = os.path.join(tempfile.mkdtemp(), "score.png")
        >>> fs.plot([{"mode": "all", "k": k, "score": k / 10} for k in (0, 1, 8)], path, lines=["mode"])
        >>> os.path.exists(path)
        True
        ```
    """
    from matplotlib import color_sequences
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    styles, colours = ("-", "--", ":"), color_sequences["tab10"]
    axis.set_prop_cycle(linestyle=[style for style in styles for _ in colours], color=[*colours] * len(styles))
    by_line = over_seeds(results, lines, x, metric)
    for i, (line, points) in enumerate(by_line.items()):
        means, deviations = zip(*points.values(), strict=True)
        places = [at * 1.03 ** (i - (len(by_line) - 1) / 2) for at in points]
        axis.errorbar(places, means, deviations, marker="o", markersize=4, capsize=2, label=", ".join(map(_word, line)))
    axis.set_xscale("symlog")
    axis.set_xticks(sorted({at for points in by_line.values() for at in points}))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.set_xlabel(x)
    axis.set_ylabel(metric)
    axis.set_title(title)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _word(value: Any) -> str:
    """Write counts with commas, and of paths and Hub ids the last part."""
    return f"{value:,}" if isinstance(value, int) else str(value).rpartition("/")[2]
