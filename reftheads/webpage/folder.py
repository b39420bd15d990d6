"""Saved adapters of a page: all in one folder, and known by their names within it."""

import tempfile
import threading
from pathlib import Path
from typing import Any

from reftheads._utils.atomic import filling
from reftheads._utils.showing import shown
from reftheads.adapter.files import CONFIG, WEIGHTS, check_adapter_name
from reftheads.adapter.model import InterventionModel

MOST = 100  # adapters, so that visitors cannot fill the disk
_LONGEST = 64  # letters of a name


class Folder:
    """Hold adapters by name. A name is one word, never a path, so that nothing outside of the folder is reached.

    Args:
        path: of the folder, which is made when the first adapter is saved.
    """

    def __init__(self, path: Any):
        self.path = Path(path).resolve()
        self._saving = threading.Lock()

    def names(self) -> list[str]:
        """Return the names of what can be loaded."""
        if not self.path.is_dir():
            return []
        folders = sorted(place.name for place in self.path.iterdir())
        return [name for name in folders if _is_name(name) and self._holds(self.path / name)]

    def place(self, name: Any) -> Path:
        """Return where the adapter of a name lies, or would lie.

        Raises:
            ValueError: what is no name, but a path, say; or a link that leads out of the folder.
        """
        _check_name(name)
        if (self.path / name).resolve() != self.path / name:
            raise ValueError(f"the adapter {name!r} is a link that leads out of the page's folder: copy it there")
        return self.path / name

    def load(self, model: InterventionModel, name: Any) -> None:
        """Add the adapter of a name to a model.

        Raises:
            ValueError: no adapter of that name, or one that does not fit the model.
        """
        place = self.place(name)
        if not self._holds(place):
            raise ValueError(f"no adapter {shown(name)}: there are {', '.join(self.names()) or 'none yet'}")
        model.load_adapter(place, name, is_trainable=True)

    def save(self, model: InterventionModel, adapter_name: str, name: Any) -> None:
        """Write an adapter of a model under a name that none has yet.

        Raises:
            ValueError: a name that is taken or cannot be used, or more adapters than the folder takes.
        """
        place = self.place(name)
        with self._saving, tempfile.TemporaryDirectory() as temporary:
            if place.exists():
                raise ValueError(f"there is an adapter {name!r} already: take another name")
            if len(self.names()) >= MOST:
                raise ValueError(f"there are {MOST} adapters already: whoever runs this page can remove some")
            model.save_pretrained(temporary, selected_adapters=[adapter_name])
            # PEFT writes every adapter but "default" into a folder of its name
            written = Path(temporary, *([] if adapter_name == "default" else [adapter_name]))
            with filling(place, first=(WEIGHTS,)) as folder:
                for file in (WEIGHTS, CONFIG):
                    (folder / file).write_bytes((written / file).read_bytes())

    def _holds(self, place: Path) -> bool:
        return place.resolve() == place and all((place / file).is_file() for file in (CONFIG, WEIGHTS))


def _check_name(name: Any) -> None:
    check_adapter_name(name)
    if len(name) > _LONGEST:
        raise ValueError(f"the name {shown(name)} has {len(name)} letters: take at most {_LONGEST}")


def _is_name(name: str) -> bool:
    try:
        _check_name(name)
    except ValueError:
        return False
    return True
