"""Conversions of GGUF files, kept in a cache so that a file is converted once."""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError

from reftheads._utils.atomic import filling, replacing
from reftheads.loading.gguf_files import GGUF, convert_gguf, open_gguf

_FORMAT = 1  # of what is kept: raise it when a conversion gives something else
_CHECKSUMS = "checksums.json"  # of all other files of an entry; written last, so that what lacks it is not used


@contextmanager
def converted(file: Path) -> Iterator[str]:
    """Yield a folder that holds the model and tokenizer of a GGUF file as `from_pretrained` takes them.

    It lies in `$REFTHEADS_CACHE`, or in the folder `reftheads` beside the Hub's cache, under the hash of the file's
    content. Where that cannot be written, a folder is made that is gone after the block.

    Raises:
        ImportError, ValueError: as by `open_gguf`, before anything is written, and `convert_gguf`.
    """
    entry = _root() / "gguf" / f"{_digest(file)}-{transformers.__version__}-{_FORMAT}"
    if not _whole(entry):
        opened = open_gguf(file)
        try:
            _keep(opened, entry)
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"{file.name} is converted anew each time it is loaded, since its conversion cannot be kept in "
                f"{_root()} ({error}): let REFTHEADS_CACHE name a folder with room for it",
                stacklevel=5,
            )
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                convert_gguf(opened, Path(folder))
                yield folder
            return
    yield str(entry)


def _root() -> Path:
    return Path(os.environ.get("REFTHEADS_CACHE") or Path(HF_HOME, "reftheads")).expanduser()


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(file):
        digest.update(piece)
    return digest.hexdigest()[:32]


def _keep(opened: GGUF, entry: Path) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{entry}.lock"):
        if _whole(entry):  # another process was faster
            return
        if entry.exists():
            shutil.rmtree(entry)
        with filling(entry) as folder:
            convert_gguf(opened, folder)
            checksums = _checksums(folder)
        with replacing(entry / _CHECKSUMS) as path:
            path.write_text(json.dumps(checksums))


def _whole(entry: Path) -> bool:
    """Return whether the files of an entry are those that were written, to the last byte."""
    try:
        return json.loads((entry / _CHECKSUMS).read_text()) == _checksums(entry)
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> dict[str, int]:
    files = sorted(file for file in folder.iterdir() if file.name != _CHECKSUMS)
    return {file.name: _checksum(file) for file in files}


def _checksum(file: Path) -> int:
    checksum = 0
    for piece in _pieces(file):
        checksum = zlib.crc32(piece, checksum)
    return checksum


def _pieces(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as opened:
        while piece := opened.read(1 << 24):
            yield piece
