"""The package as a whole: what importing it costs, who may import whom, what it never does."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import reftheads as rh

PACKAGE = Path(rh.__file__).parent

# A module imports only from rows above its own.
ROWS = [
    {"sites", "positions", "losses", "store", "cache", "modes", "files"},
    {"nodes", "hooks", "blocks", "layout"},
    {"architectures"},
    {"fingerprint", "interventions", "steering", "lora", "heads"},
    {"graph"},
    {"output", "plan"},
    {"run", "cone"},
    {"checkpointing"},
    {"runtime"},
    {"generate", "record"},
    {"limits"},
    {"division"},
    {"tuner", "replay"},
    {"forecast", "reuse"},
    {"model"},
    {"data", "presets", "loading", "export"},
    {"chat", "trainer", "predicting"},
    {"sweeps", "probing"},
    {"interop", "fewshot"},
]
ROW = {name: i for i, names in enumerate(ROWS) for name in names}

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"torch.load", "eval", "exec", "compile", "__import__", "torch.hub.load", "np.load", "numpy.load"}


def sources():
    return sorted(path for path in PACKAGE.rglob("*.py"))


def owner(path: Path) -> str:
    """The module that a file belongs to: `interop` for all files in it."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """Full names of the modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rows_above_it(path):
    name = owner(path)
    if name == "__init__":
        return
    assert name in ROW, f"{name} stands in no row: add it to the table"
    for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
        if module == "reftheads" or not module.startswith("reftheads."):
            assert module != "reftheads", f"{name} imports the whole package"
            continue
        other = module.split(".")[1]
        if other != name:
            assert ROW[other] < ROW[name], f"{name} (row {ROW[name]}) imports {other} (row {ROW[other]})"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_unpickled_and_no_remote_code_is_trusted(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {module.split(".")[0] for module in imported(tree)} & FORBIDDEN_MODULES
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"line {node.lineno}: {ast.unparse(node)}"
            for keyword in node.keywords:
                given = ast.unparse(keyword.value)
                assert keyword.arg != "trust_remote_code" or given == "False", f"line {node.lineno}"
                assert keyword.arg != "weights_only" or given == "True", f"line {node.lineno}"


def test_every_public_name_exists_and_is_documented():
    assert sorted(rh.__all__) == sorted(set(rh.__all__))
    for name in rh.__all__:
        value = getattr(rh, name)
        if not inspect.isclass(value) and not callable(value):
            continue  # a table, documented where it is defined
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"
        if inspect.isclass(value):
            public = {k: v for k, v in vars(value).items() if inspect.isfunction(v) and not k.startswith("_")}
            for method, function in public.items():
                overridden = any(hasattr(base, method) for base in value.__mro__[1:])
                assert function.__doc__ or overridden, f"{name}.{method} has no docstring"


def test_every_module_says_what_it_is():
    for path in sources():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


_IMPORTS = """
import sys, time
import torch, transformers, peft
before = set(sys.modules)
start = time.perf_counter()
import reftheads
print(time.perf_counter() - start)
print(*sorted(set(sys.modules) - before))
"""


@pytest.mark.slow
def test_importing_the_package_loads_no_heavy_one():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", _IMPORTS], capture_output=True, text=True, check=True)
    seconds, modules = run.stdout.strip().split("\n")[-2:]
    new = set(modules.split())
    print(f"import reftheads: {float(seconds):.2f} s over torch, transformers and peft; {len(new)} modules")
    assert "reftheads.model" in new
    heavy = {
        "jaxtyping",
        "pyvene",
        "pyreft",
        "datasets",
        "bitsandbytes",
        "pandas",
        "matplotlib",
        "sklearn",
        "trl",
        "transformer_heads",
    }
    assert not {name.split(".")[0] for name in new} & heavy
