"""What the recipes share, and the form that all of them have."""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import pytest
from support.paths import RECIPES

PROGRAMS = sorted({*RECIPES.rglob("*.py")} - {RECIPES / "_common.py"})


@pytest.fixture(scope="module")
def common():
    spec = importlib.util.spec_from_file_location("_common", RECIPES / "_common.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_recipe_opens_with_the_program_and_ends_with_its_arguments(path):
    tree = tree_of(path)
    assert ast.get_docstring(tree), "says what it shows"
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert functions[0].name == "main" and ast.get_docstring(functions[0])
    assert ast.unparse(tree.body[-1]).startswith("if __name__ == '__main__':")
    for node in functions:
        nested = ast.walk(node)
        assert not any(isinstance(n, ast.Attribute) and ast.unparse(n) == "argparse.ArgumentParser" for n in nested)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_recipe_names_only_parameters_that_there_are(path):
    """A help text of a parameter that has gone would be lost without a word."""
    tree = tree_of(path)
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    parameters = {argument.arg for argument in main.args.args}
    calls = [node for node in ast.walk(tree.body[-1]) if isinstance(node, ast.Call)]
    names = {k.arg for call in calls if ast.unparse(call.func) == "command_line" for k in call.keywords if k.arg}
    assert names <= parameters


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_only_what_recipes_share_reaches_into_private_modules(path):
    for node in ast.walk(tree_of(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.startswith("reftheads._") for name in names)


def called_with(common, *arguments: str, **texts):
    """What `main` gets from a command line."""
    calls = []

    def main(
        data: str,
        n: int = 8,
        new_tokens: int | None = None,
        chat: bool = False,
        seeds: tuple[int, ...] = (0, 1),
        order: Literal["random", "global"] = "random",
        out: Path | None = None,
    ) -> None:
        calls.append(locals() | {"calls": None})
        if n < 0:
            raise common.UsageError(f"--n {n}: give 0 or more")

    with patch.object(sys, "argv", ["recipe.py", *arguments]):
        common.command_line(main, **texts)
    return calls[0]


def test_the_signature_is_the_command_line(common, tmp_path):
    said = called_with(common, "--data", "d")
    assert said["n"] == 8 and said["new_tokens"] is None and said["chat"] is False and said["seeds"] == (0, 1)
    more = ("--new-tokens", "3", "--chat", "--seeds", "4,5", "--order", "global", "--out", str(tmp_path))
    said = called_with(common, "--data", "d", "--n", "2", *more)
    assert said["data"] == "d" and said["n"] == 2 and said["new_tokens"] == 3 and said["chat"] is True
    assert said["seeds"] == (4, 5) and said["order"] == "global" and said["out"] == tmp_path


def test_options_of_a_parameter_can_be_given_as_argparse_takes_them(common):
    said = called_with(common, "--data", "a", "--seeds", "6", "7", seeds={"nargs": "+", "type": int, "help": ""})
    assert said["seeds"] == [6, 7]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "the following arguments are required: --data"),
        (("--data", "d", "--n", "many"), "argument --n: invalid int value: 'many'"),
        (("--data", "d", "--seeds", "1,x"), "argument --seeds: invalid"),
        (("--data", "d", "--order", "local"), "argument --order: invalid choice: 'local'"),
        (("--data", "d", "--n", "-1"), "--n -1: give 0 or more"),
    ],
    ids=str,
)
def test_a_wrong_command_line_ends_with_usage_and_code_2(common, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        called_with(common, *arguments)
    shown = capsys.readouterr().err
    assert end.value.code == 2 and "usage: recipe.py" in shown and message in shown


def test_help_says_what_there_is_and_what_is_taken_if_nothing_is_said(common, capsys):
    with pytest.raises(SystemExit) as end:
        called_with(common, "--help", n="how many continuations", new_tokens="default: as many as it takes")
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "how many continuations (default: 8)" in shown and "(default: 0,1)" in shown
    assert "default: as many as it takes" in shown and "default: None" not in shown


def test_results_are_written_without_paths_of_this_machine(common, tmp_path):
    common.write_json(tmp_path / "new" / "r.json", {"lr": 0.1, "seeds": (0, 1), "out": tmp_path})
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == {"lr": 0.1, "seeds": [0, 1]}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.json"]


def test_the_topics_of_the_embedded_model_are_there(common):
    topics = common.read_topics()
    assert len(topics) == 417 and all(topic["topic"] and topic["emoji"] and topic["fact"] for topic in topics)


def test_mean_and_deviation(common):
    assert common.mean_and_deviation([2.0]) == (2.0, 0.0)
    assert common.mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
