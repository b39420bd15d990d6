"""Files that are there as a whole or not at all, whenever the process that writes them is killed."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_ABANDONED = 3600  # seconds after which nobody is taken to be writing into a temporary folder any more


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path to write to, whose file takes the place of `path` once the block ends.

    If the block raises, or leaves no file there, `path` stays as it is. Its folder is made if there is none.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(target.parent, target.name) as folder:
        temporary = folder / target.name
        yield temporary
        if temporary.exists():
            _move([temporary], folder, target.parent)


@contextmanager
def filling(folder: str | os.PathLike, first: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty folder, whose files move into `folder` once the block ends, over files of the same names.

    If the block raises, `folder` stays as it is. A process that is killed while files move leaves some of the new
    ones, each of them whole. Other files in `folder` are left alone; it is made if there is none.

    Args:
        folder: where the files belong, or a link to there.
        first: names of the files that move before the others, in this order.

    Raises:
        ValueError: `folder` is a file.
    """
    target = Path(os.path.realpath(folder))
    if target.is_file():
        raise ValueError(f"{target} is a file: give a directory to save into")
    target.parent.mkdir(parents=True, exist_ok=True)
    place = target if target.is_dir() else target.parent  # on one file system with the target in any case
    with _temporary_folder(place, target.name) as temporary:
        yield temporary
        rank = {name: i for i, name in enumerate(first)}
        files = [file for file in temporary.rglob("*") if file.is_file()]
        _move(sorted(files, key=lambda file: rank.get(file.name, len(rank))), temporary, target)


def remove_abandoned(place: Path, prefix: str) -> None:
    """Remove the folders in `place`, of names with this prefix, into which nobody writes any more.

    Those are the ones whose process has ended, or, where that cannot be told, that are an hour old.
    """
    folders = [name for name in os.listdir(place) if name.startswith(prefix)]
    for folder in (place / name for name in folders):
        with suppress(OSError), _locked(folder, wait=False) as alone:  # another process may be removing it as well
            if alone or time.time() - folder.stat().st_mtime > _ABANDONED:
                shutil.rmtree(folder)


@contextmanager
def _temporary_folder(place: Path, name: str) -> Iterator[Path]:
    """Yield a folder in `place` that is gone afterwards, as are those that killed processes left for the same name."""
    prefix = f".{name[:50]}.saving-"  # so that what is added to a long name is no name too long
    remove_abandoned(place, prefix)
    while True:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True) as folder:
            with _locked(Path(folder), wait=True):
                if os.path.exists(folder):  # else another process took it for abandoned before it was locked
                    yield Path(folder)
                    return


@contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Say whether this process holds the lock of a folder within the block, which ends with the process at the latest.

    Some file systems, and Windows, have no such locks: then nobody holds one.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield _lock(handle, wait)
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _move(files: Sequence[Path], source: Path, target: Path) -> None:
    """Move files from below `source` to the same places below `target`, once all of them are on the disk."""
    for file in files:
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    for file in files:
        destination = target / file.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, destination)
