"""The notebooks are promises: their cells run in order, and print what is stored in them."""

import importlib.util
import io
import json
import re
import sys
from contextlib import redirect_stdout
from unittest.mock import patch

import pytest
from support.paths import RECIPES

NOTEBOOKS = sorted((RECIPES / "notebooks").glob("*.ipynb"))


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def run_notebooks():
    """The module that wrote the outputs."""
    spec = importlib.util.spec_from_file_location("run_notebooks", RECIPES / "tools" / "run_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    with patch.object(sys, "path", list(sys.path)):
        spec.loader.exec_module(module)
    return module


def without_figures(text: str) -> str:
    """Measured figures and bars may differ from machine to machine, in a cell that is tagged "varies"."""
    return re.sub(r"[-+\d.%█ ]+", "#", text)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_is_stored_in_it(path):
    for cell, printed in run_notebooks().run(read(path)):
        stored = "".join(line for output in cell["outputs"] for line in output["text"])
        shown = without_figures if "varies" in cell["metadata"].get("tags", []) else str
        assert shown(printed) == shown(stored), cell["id"]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"quick_tour", "probing_by_layer", "few_shot_modes"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_form_of_nbformat_4_5(path):
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5) and "kernelspec" in notebook["metadata"]
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", one) for one in ids)
    for cell in notebook["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell["cell_type"] in ("code", "markdown")
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | code
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not any("/home/" in line or "/tmp/" in line for cell in notebook["cells"] for line in cell["source"])


def test_running_notebooks_writes_what_their_cells_print(tmp_path):
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# Two cells"]},
        *(
            {"cell_type": "code", "id": name, "metadata": {}, "source": [line], "execution_count": None, "outputs": []}
            for name, line in (("b", "number = 20"), ("c", "print(number + 1)\n"))
        ),
    ]
    file = tmp_path / "small.ipynb"
    file.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    with redirect_stdout(io.StringIO()) as shown:
        run_notebooks().main((file,))
    _, first, second = read(file)["cells"]
    assert (first["execution_count"], first["outputs"]) == (1, [])
    assert second["execution_count"] == 2 and second["outputs"][0]["text"] == ["21\n"]
    assert str(file) in shown.getvalue()
