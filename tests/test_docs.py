"""What the docstrings, the API pages and the links promise."""

import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
import warnings
from functools import cached_property
from pathlib import Path

import griffe
import matplotlib.image
import numpy as np
import pytest
from support.paths import ROOT

import reftheads

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LIBRARY = griffe.load("reftheads", search_paths=[ROOT], allow_inspection=False)
PACKAGES = sorted(name for name, module in LIBRARY.modules.items() if module.is_init_module and name[0] != "_")

VERBS = frozenset(
    """
    Ablate Accept Add Adjust Allow Answer Append Apply Ask Assemble Assert Assign Attach Average Begin Bind Bring Build
    Call Carry Cast Change Chat Check Choose Clear Clip Clone Close Collate Collect Combine Compare Compile Compute
    Concatenate Configure Connect Continue Convert Copy Correct Count Create Cut Decide Declare Decode Define Delete
    Derive Describe Detach Detect Determine Disable Divide Draw Drop Edit Embed Emit Enable Encode End Ensure Enter
    Erase Estimate Evaluate Evict Exclude Expand Export Extend Extract Feed Fetch Fill Filter Find Finetune Finish Fit
    Flatten Fold Follow Forget Format Freeze Gate Gather Generate Get Give Group Hand Handle Hash Hold Identify Ignore
    Import Include Inherit Initialise Inject Insert Install Intervene Invert Iterate Join Judge Keep Learn Leave Let
    Limit List Load Locate Log Look Make Map Mark Match Measure Merge Mix Move Multiply Name Normalise Offer Omit Open
    Order Orthonormalise Overwrite Pack Pad Parse Pass Patch Pick Place Plot Point Pool Predict Prepare Print Produce
    Project Provide Pull Push Put Raise Rank Read Record Reduce Refuse Register Remember Remove Rename Render Repeat
    Replace Replay Reply Report Represent Reserve Reset Resolve Restore Resume Return Reuse Revert Rotate Run Sample
    Save Say Scale Scatter Score Search Select Send Separate Serve Set Share Shift Show Shuffle Sort Specify Split Stack
    Start Steer Stop Store Strip Subtract Sum Swap Switch Take Talk Tell Tie Tokenise Track Train Transform Translate
    Truncate Turn Undo Unfreeze Unload Unwrap Update Use Validate Visit Wait Walk Warn Weigh Wrap Write Yield Zero
    """.split()
)
EXAMPLE = re.compile(r"\n\nExample:\n    ```python\n(?:    .*\n|\n)+    ```$")


def public_names() -> dict[str, griffe.Object]:
    """By its path, what `reftheads` and its packages export; a name that two of them export comes once."""
    exported = [module[name] for module in (LIBRARY, *map(LIBRARY.__getitem__, PACKAGES)) for name in names_of(module)]
    targets = [member.final_target if member.is_alias else member for member in exported]
    return {target.path: target for target in sorted(targets, key=lambda target: target.path)}


def names_of(module: griffe.Object) -> list[str]:
    return [str(name) for name in module.exports or ()]


def documented(thing: griffe.Object) -> list[tuple[str, str]]:
    """Path and docstring of an object and of all that is defined within it."""
    own = [(thing.path, thing.docstring.value)] if thing.docstring else []
    return own + [pair for member in thing.members.values() if not member.is_alias for pair in documented(member)]


def examples() -> dict[str, str]:
    """By the path of what shows it, what stands in a fenced block with prompts."""
    blocks = {}
    for path, text in documented(LIBRARY):
        shown = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if ">>>" in block]
        blocks |= {f"{path}{f' ({i})' if i else ''}": inspect.cleandoc(block) for i, block in enumerate(shown)}
    return blocks


def begins_with_a_verb(text: str) -> bool:
    """Whether a docstring says what is done; `Score of a probe` names a thing."""
    first, second = [*text.split(maxsplit=2), "", ""][:2]
    return first in VERBS and second != "of"


PUBLIC, EXAMPLES = public_names(), examples()


@pytest.mark.parametrize("path", PUBLIC)
def test_a_public_name_says_what_it_does_and_ends_in_an_example(path):
    docstring = PUBLIC[path].docstring
    assert docstring, f"{path} has no docstring"
    text = docstring.value
    assert begins_with_a_verb(text), f"{path} begins with no verb in the imperative: {text.splitlines()[0]!r}"
    assert EXAMPLE.search(text), f"{path} does not end in an `Example:` section with one fenced python block"


@pytest.mark.parametrize("path", EXAMPLES)
def test_an_example_prints_what_it_shows(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* is deprecated: use ", category=DeprecationWarning)
        runner.run(doctest.DocTestParser().get_doctest(EXAMPLES[path], {}, path, path, 0), out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("path", [path for path, target in PUBLIC.items() if target.is_class])
def test_methods_and_properties_of_a_public_class_say_what_they_do(path):
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    kinds = (property, cached_property, classmethod, staticmethod)
    for method, value in vars(cls).items():
        if method.startswith("_") or not (inspect.isfunction(value) or isinstance(value, kinds)):
            continue
        text = value.__doc__ or ""
        inherited = not text and any(hasattr(base, method) for base in cls.__mro__[1:])
        assert inherited or begins_with_a_verb(text), f"{path}.{method} begins with no verb in the imperative: {text!r}"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built strictly: a link between pages that leads nowhere fails it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_an_api_page_with_all_its_public_names(package, site):
    page = (site / "api" / package / "index.html").read_text(encoding="utf-8")
    missing = [name for name in names_of(LIBRARY[package]) if f'id="reftheads.{package}.{name}"' not in page]
    assert not missing


def test_the_api_index_links_to_every_name_that_the_library_exports(site):
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    linked = dict(re.findall(r'<td><a [^>]*href="([^"]+)"[^>]*><code>rh\.(\w+)</code></a>', page))
    assert sorted(linked.values()) == sorted(reftheads.__all__)
    for target in linked:
        place, anchor = target.split("#")
        assert f'id="{anchor}"' in (site / "api" / place / "index.html").read_text(encoding="utf-8")


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=.(?:https?:)?//[^>]*>", page.read_text())
        assert not loaded, page


def anchors(page: Path) -> set[str]:
    """What links may name behind a `#`: the page's headings, as repositories and the site make anchors of them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_readme_has_a_line_for_every_folder():
    tree = re.findall(r"^ *(\w+)/  +\S", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    folders = [ROOT / "recipes", ROOT / "tests", ROOT / "docs", *(ROOT / "reftheads").iterdir()]
    assert sorted(tree) == sorted(folder.name for folder in folders if folder.is_dir() and folder.name != "__pycache__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}: {file.name} has no such heading"


def test_the_picture_of_the_cone_is_what_its_script_draws(tmp_path):
    script, drawn = ROOT / "docs" / "images" / "draw_cone.py", tmp_path / "cone.png"
    subprocess.run([sys.executable, "-W", "ignore", str(script), str(drawn)], cwd=tmp_path, check=True)
    new, old = (matplotlib.image.imread(file) for file in (drawn, script.with_name("cone.png")))
    assert new.shape == old.shape and np.abs(new - old).mean() < 0.01  # fonts may differ by a little
