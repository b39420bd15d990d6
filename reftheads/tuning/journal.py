"""What a search has done so far, kept in a directory, so that one that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reftheads._utils.atomic import replacing
from reftheads._utils.showing import shown
from reftheads.adapter.files import read_object

FILE, BEST = "search.json", "best"
_FORMAT = "reftheads search 1"


@dataclass(frozen=True)
class Pass:
    """Some candidates trained side by side.

    Attributes:
        steps: for how many.
        scores: by number of the candidate; `None` if it was no number.
        seconds: of the pass and of all since the one before.
        step_seconds: of a step.
    """

    steps: int
    scores: dict[int, float | None]
    seconds: float
    step_seconds: float


class Journal:
    """All passes of a search in their order, on the disk as soon as each has ended.

    A search that goes on runs through the same steps again; what the journal knows is not trained a second time.

    Args:
        directory: of the search, made if there is none.
        settings: what makes the search what it is, as JSON values.

    Raises:
        ValueError: the directory holds a search with other settings, or a damaged one.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]):
        self.directory = directory
        self.settings = settings
        self.passes: list[Pass] = []
        file = directory / FILE
        if file.exists():
            self.passes = _read(file, settings)
        elif directory.exists() and any(directory.iterdir()):
            raise ValueError(f"{directory} holds other files, and no search: give an empty directory, or a new one")

    def add(self, done: Pass) -> None:
        """Write one more pass."""
        self.passes.append(done)
        passes = [
            [p.steps, [[n, score] for n, score in p.scores.items()], p.seconds, p.step_seconds] for p in self.passes
        ]
        content = {"format": _FORMAT, "settings": self.settings, "passes": passes}
        with replacing(self.directory / FILE) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def place(self, adapter_name: str) -> Path:
        """Return where the weights of an adapter are kept."""
        return self.directory / BEST / adapter_name

    def keep_only(self, adapter_name: str) -> None:
        """Remove the weights of all other adapters."""
        for folder in (self.directory / BEST).iterdir():
            if folder.name != adapter_name:
                shutil.rmtree(folder, ignore_errors=True)


def _read(file: Path, settings: Mapping[str, Any]) -> list[Pass]:
    content = read_object(file)
    if content.get("format") != _FORMAT or not isinstance(content.get("settings"), dict):
        raise ValueError(f"{file} holds no search of this version: give another directory")
    was, now = content["settings"], json.loads(json.dumps(settings))
    changed = [name for name in now if was.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{file.parent} holds a search with another {name}: {shown(was.get(name))} there, {shown(now[name])} here. "
            "Give another directory to begin a new search"
        )
    passes = []
    entries: list[Any] = content.get("passes") or []
    for number, entry in enumerate(entries):
        try:
            steps, scores, seconds, step_seconds = entry
            by_number = {int(n): None if score is None else float(score) for n, score in scores}
            passes.append(Pass(int(steps), by_number, float(seconds), float(step_seconds)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged: pass {number} is {shown(entry)}. Give another directory") from error
    return passes


def finite(score: Any) -> float | None:
    """Return a score as a number, `None` for NaN and infinity."""
    return float(score) if math.isfinite(score) else None


def digest_of_rows(rows: Iterable[Any]) -> str:
    """Return a hash of the content of rows."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(json.dumps(row, sort_keys=True, default=_plain).encode() + b"\n")
    return hashed.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        return value.tolist()
    return dict(value) if isinstance(value, Mapping) else repr(value)
