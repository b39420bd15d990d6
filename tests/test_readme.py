"""The README and the docs are promises: every program in them runs as printed."""

import re
from pathlib import Path

import pytest
from support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def programs(page: Path) -> str:
    """All Python blocks of a page, in order: later ones may use what earlier ones have made."""
    return "\n\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))


def promised(page: Path) -> list[str]:
    """The lines that the page says are printed, but for those that say how long it took."""
    blocks = re.findall(r"^```text\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if "train_runtime" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if programs(p)], ids=lambda p: p.name)
def test_every_program_of_the_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(programs(page), str(page), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out.splitlines()
    for line in promised(page):
        assert line in printed


def test_the_readme_links_to_files_that_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
