"""The package as a whole: what importing it costs, who may import whom, what it never does."""

import ast
import inspect
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.paths import ROOT, TESTS

import reftheads as rh

PACKAGE = Path(rh.__file__).parent
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings the latter

# A package imports only from floors below its own. docs/architecture.md shows the same table.
FLOORS = [
    {
        "_utils": "small things that know nothing of models: atomic files, free memory, evaluation for a while",
    },
    {
        "graph": "what a user writes, plain data that knows no model: site, positions, node, graph",
        "loading": "a base model and its tokenizer, from the Hub, a folder or a GGUF file",
    },
    {
        "interventions": "the node types, each with its equation: ReFT, steering, LoRA, heads, losses",
        "architectures": "reading any base model's structure: addresses, blocks",
        "data": "from text to rows and batches",
    },
    {
        "runtime": "one forward pass: plan, hooks, what a call knows, nodes acting, output, generation",
        "presets": "graphs by a short name",
    },
    {"reuse": "computing only what a graph can change: the cone, what can be reused, the store, replaying"},
    {"adapter": "the PEFT method: tuner, model, saving and loading"},
    {
        "interop": "formats of other libraries, and plain torch modules",
        "training": "the trainer, and many adapters side by side",
        "inference": "answers, conversations, predictions of heads",
    },
    {
        "probing": "all heads of a graph trained at once on recorded activations",
        "fewshot": "few-shot learning: fine-tuning modes, prompts, tasks, studies",
        "webpage": "a chat page in the browser: a session for each visitor, its looks, how it is served",
        "tuning": "where to edit: a search whose candidates are trained side by side",
    },
]
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor}

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"torch.load", "eval", "exec", "compile", "__import__", "torch.hub.load", "np.load", "numpy.load"}


def sources():
    return sorted(path for path in PACKAGE.rglob("*.py"))


def owner(path: Path) -> str:
    """The package that a file belongs to, or the module at the top."""
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
def test_a_package_imports_only_from_floors_below_its_own(path):
    name = owner(path)
    if name == "__init__":
        return
    assert name in FLOOR, f"{name} stands on no floor: add it to the table"
    for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
        assert module != "reftheads", f"{path} imports the whole package"
        if module.startswith("reftheads.") and (other := module.split(".")[1]) != name:
            assert FLOOR[other] < FLOOR[name], f"{name} (floor {FLOOR[name]}) imports {other} (floor {FLOOR[other]})"


@pytest.mark.parametrize("package", sorted({path.parent for path in sources()} - {PACKAGE}), ids=lambda path: path.name)
def test_the_modules_of_a_package_import_one_way(package):
    prefix = f"reftheads.{package.name}."
    arrows = {
        path.stem: {
            module.removeprefix(prefix).split(".")[0]
            for module in imported(ast.parse(path.read_text(encoding="utf-8")))
            if module.startswith(prefix)
        }
        for path in package.glob("*.py")
        if path.stem != "__init__"
    }
    while arrows:
        done = [name for name, others in arrows.items() if not others & (arrows.keys() - {name})]
        assert done, f"{package.name}: {sorted(arrows)} import each other in a circle"
        for name in done:
            del arrows[name]


def test_the_documentation_shows_the_floors_as_they_are():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [(i, name, idea) for i, floor in enumerate(FLOORS) for name, idea in floor.items()]
    table = [f"| {i} | `{name}` | {idea} |" for i, name, idea in rows]
    assert re.findall(r"^\| \d+ \| `.*$", text, re.M) == table, "\n".join(["the table should be", *table])


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_or_class_bears_the_name_of_its_module(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert path.stem not in defined


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


# required, and imported by nothing here
REQUIRED_BY_OTHERS = {
    "bitsandbytes": "transformers imports it where weights are loaded in 4 or 8 bits, as by load_base(bits=…)",
    "pyvene": "the format of its interventions is to be read and written by reftheads.interop",
}


places = cache(packages_distributions)  # it reads all that is installed


def distributions(names: set[str]) -> set[str]:
    """The distributions that modules from outside come from."""
    outside = {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "reftheads"}
    return {canonicalize_name(place) for name in outside for place in places().get(name, [f"{name}, not installed"])}


def imports_by_kind() -> dict[str, set[str]]:
    """What the package imports "always", "late" (within functions), and for "types" alone, as distributions."""
    found: dict[str, set[str]] = {"always": set(), "late": set(), "types": set()}
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for statement in tree.body:
            typing = isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
            late = isinstance(statement, ast.FunctionDef | ast.ClassDef)
            found["types" if typing else "late" if late else "always"] |= distributions(imported(statement))
    return found


def test_what_is_imported_is_declared_and_the_other_way_round():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}

    required = names(project["dependencies"])
    optional = {name for requirements in project["optional-dependencies"].values() for name in names(requirements)}
    used = imports_by_kind()
    assert used["always"] <= required, "imported, and no dependency"
    assert used["late"] <= required | optional, "imported within functions, and in no extra"
    assert used["types"] <= required | optional, "imported for types, and in no extra"
    assert required - used["always"] - used["late"] == REQUIRED_BY_OTHERS.keys(), "a dependency, and never imported"


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
    assert "reftheads.adapter.model" in new
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
        "gradio",
    }
    assert not {name.split(".")[0] for name in new} & heavy


# --- the tests --------------------------------------------------------------------------------------------


def test_no_test_file_imports_another():
    names = {path.stem for path in TESTS.rglob("test_*.py")} | {"conftest"}
    for path in TESTS.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        lines = re.findall(r"^\s*(?:import|from) .*$", text, re.M)  # also of programs in strings
        for line in lines:
            assert not names & set(re.findall(r"\w+", line)), f"{path}: {line}: what is shared lies in tests/support"


def test_what_tests_share_says_what_it_is():
    for path in (TESTS / "support").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_tests_lie_in_folders_that_are_named_as_the_packages_are():
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and any(path.rglob("test_*.py"))}
    folders -= {"census"}  # it is of the whole library
    assert folders <= {path.parent.name for path in PACKAGE.rglob("__init__.py")} - {PACKAGE.name}
