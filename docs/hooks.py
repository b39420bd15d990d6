"""What the site shows beyond the pages in docs/.

READMEs, CONTRIBUTING, CHANGELOG, recipes and notebooks become pages, the names that `reftheads` exports a table. Links
in all pages are written for the repository, and turned here into links between pages of the site.
"""

import json
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md")
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/."""
    for name in TOP:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    for path in sorted((ROOT / "recipes").rglob("*.py")):
        name, source = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        files.append(File.generated(config, f"{name}.md", content=f"# {name}\n\n````python\n{source}````\n"))
    for path in sorted((ROOT / "recipes" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"{path.relative_to(ROOT).as_posix()}.md", content=cells_of(path)))
    return files


def cells_of(notebook: Path) -> str:
    """Return the cells of a notebook as a page: texts, programs, and what these print."""
    parts = [f"# {notebook.name}"]
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"````python\n{source}\n````")
        parts += [f"````text\n{''.join(output['text'])}````" for output in cell.get("outputs", ())]
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    uri = page.file.src_uri
    if uri.startswith("recipes/") and uri not in TOP:
        return markdown
    folder = posixpath.dirname(uri if uri in TOP else f"docs/{uri}")

    def to_page(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        place = target.removeprefix("docs/") + (".md" if target.endswith((".py", ".ipynb")) else "")
        return link[1] + posixpath.relpath(place, posixpath.dirname(uri) or ".")

    markdown = LINK.sub(to_page, markdown)
    return f"{markdown}\n{exported()}" if uri == "api/index.md" else markdown


def exported() -> str:
    """Return what `reftheads` exports as a table: every name, its package and the first sentence about it."""
    package = griffe.load("reftheads", search_paths=[ROOT])
    lines = ["## What `reftheads` exports", "", "| name | package | |", "|---|---|---|"]
    for name in sorted(map(str, package.exports or ()), key=str.casefold):
        member = package[name]
        summary = member.docstring.value.partition("\n\n")[0] if member.docstring else ""
        home = member.target_path.split(".")[1]
        lines.append(f"| [`rh.{name}`][reftheads.{name}] | {home} | {' '.join(summary.split())} |")
    return "\n".join(lines)
