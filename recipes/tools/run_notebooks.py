"""Run the notebooks from top to bottom, and write into each what its cells print.

    python recipes/tools/run_notebooks.py                          # all of them
    python recipes/tools/run_notebooks.py --files NOTEBOOK,NOTEBOOK

The cells of a notebook run in one namespace, without Jupyter: what they show, they print.
"""

import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where _common.py is

from _common import command_line, write_text

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def main(files: tuple[Path, ...] = ()) -> None:
    """Run each notebook, and write it with what it printed."""
    for file in files or sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = json.loads(file.read_text(encoding="utf-8"))
        for number, (cell, printed) in enumerate(run(notebook), 1):
            lines = printed.splitlines(keepends=True)
            stream = {"name": "stdout", "output_type": "stream", "text": lines}
            cell |= {"execution_count": number, "outputs": [stream] if lines else []}
        write_text(file, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(f"written: {file}")


def run(notebook: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each code cell of a notebook with what it printed."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
            yield cell, printed.getvalue()


if __name__ == "__main__":
    command_line(main, files="notebooks; default: all that there are")
