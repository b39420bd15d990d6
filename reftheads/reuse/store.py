"""ActivationStore: what a frozen base model computes again and again, kept by the hash of what it was computed from."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reftheads._utils.atomic import remove_abandoned, replacing
from reftheads._utils.deprecation import renamed
from reftheads._utils.memory import free_bytes

FORMAT = "reftheads activations 1"


@dataclass(frozen=True)
class _File:
    size: int
    keys: set[str]  # those whose newest value lies here


class ActivationStore:
    """Keep named tensors by key, in memory and, where there is a folder, on disk; the least recently used go first.

    A key stands for everything that its tensors were computed from: the same key means the same tensors, in all
    processes and runs. Tensors are handed out as they are kept, so whoever gets them must not write into them.

    With a folder, every `put` writes one safetensors file. An entry that memory has no room for is read from there:
    on the CPU its tensors are views of the mapped file, which take nothing of the budget; on another device they are
    kept in memory again. A store finds the files that are in its folder when it is made. Several processes may share
    a folder: each counts, and removes, the files that it knows of.

    Args:
        budget: bytes kept in memory; None for half of the main memory that is free now.
        directory: where files are written, made if there is none; None to keep entries in memory only.
        disk_budget: bytes of the files in the directory; None for half of what they could take now.
        device: where entries are kept in memory; None for where they were computed, or for the CPU if they were
            read from disk.

    Attributes:
        hits, misses: how often `get` found something, and how often it did not.
        evictions: how many entries were dropped to make room, from memory or with their file from disk.
        recomputed: how many damaged files were dropped, whose entries have to be computed again.
        bytes: taken in memory.
        disk_bytes: taken by the files that this store knows of.

    Raises:
        ValueError: a negative budget, or a directory that is a file.

    Example:
        ```python
        >>> import torch
        >>> import reftheads as rh
        >>> store = rh.ActivationStore(budget=10**6)
        >>> store.put({"c0ffee": {"hidden": torch.ones(2, 3)}})
        >>> store.get("c0ffee")["hidden"].shape, store.get("decaf")
        (torch.Size([2, 3]), None)
        >>> store.hits, store.misses, store.bytes
        (1, 1, 24)
        ```
    """

    @renamed(folder="directory")
    def __init__(
        self,
        budget: int | None = None,
        directory: str | os.PathLike | None = None,
        disk_budget: int | None = None,
        device: torch.device | str | None = None,
    ):
        for name, limit in (("budget", budget), ("disk_budget", disk_budget)):
            if limit is not None and limit < 0:
                raise ValueError(f"{name}={limit}: give a number of bytes >= 0, or None for half of what is free")
        self.hits = self.misses = self.evictions = self.recomputed = self.bytes = self.disk_bytes = 0
        self.budget = free_bytes() // 2 if budget is None else budget
        self.directory = None if directory is None else Path(directory)
        self.disk_budget = disk_budget or 0
        self.device = None if device is None else torch.device(device)
        self._memory: OrderedDict[str, dict[str, Tensor]] = OrderedDict()  # these two: least recently used first
        self._files: OrderedDict[Path, _File] = OrderedDict()
        self._path: dict[str, Path] = {}
        self._verified: set[str] = set()
        if self.directory is not None:
            self._open(self.directory)
            if disk_budget is None:  # files of an earlier run count as free: else every run would halve the budget
                self.disk_budget = (shutil.disk_usage(self.directory).free + self.disk_bytes) // 2
            self._make_room_on_disk(0)

    @torch.inference_mode(False)
    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of an entry, which is then the most recently used one; None if it is not there.

        An entry whose file has vanished, is truncated or damaged is not there; a damaged file is removed.
        """
        entry = self._memory.get(key)
        if entry is not None:
            self._memory.move_to_end(key)
        elif key in self._path:
            entry = self._read(key, self._path[key])
        if key in self._path:
            self._files.move_to_end(self._path[key])
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        return dict(entry)

    @torch.inference_mode(False)  # what is kept may be needed for a backward pass
    def put(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keep entries, in place of those with the same keys; with a folder, all of them in one file.

        What is larger than a whole budget is not kept there. Tensors are detached, and copied if they are views of
        something larger.

        Args:
            entries: tensors by name, by key; a key is the hex digest of all that its tensors were computed from.

        Raises:
            ValueError: a key that is not a hex string, or what is no dense, real tensor with a name.
            OSError: the file cannot be written, because the disk is full, for example.
        """
        for key, entry in entries.items():
            _check(key, entry)
        for key in entries:
            self._forget(key)
        if self.directory is not None and entries:
            self._write(self.directory, entries)
        for key, entry in entries.items():
            self._keep(key, self._detached(entry))

    def __contains__(self, key: object) -> bool:
        return key in self._memory or key in self._path

    def __len__(self) -> int:
        return len(self._memory.keys() | self._path.keys())

    def clear(self) -> None:
        """Forget all entries, and remove the files that this store knows of; the other counters stay."""
        self._memory.clear()
        self.bytes = 0
        for path in list(self._files):
            self._remove(path)

    def counters(self) -> dict[str, int]:
        """Return what a trainer logs: `hits`, `misses` and `evictions`, and `bytes` and `disk_bytes` that are taken."""
        return {name: getattr(self, name) for name in ("hits", "misses", "bytes", "disk_bytes", "evictions")}

    # --- in memory ----------------------------------------------------------------------------------------

    def _detached(self, entry: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors where they are kept, without gradient and each with a storage of its own size."""
        detached = {}
        for name, tensor in entry.items():
            tensor = tensor.detach().to(self.device or tensor.device)
            view = tensor.untyped_storage().nbytes() != tensor.nbytes  # it would keep all of its storage alive
            if view or tensor.is_inference():
                tensor = tensor.clone(memory_format=torch.contiguous_format)
            detached[name] = tensor
        return detached

    def _keep(self, key: str, entry: dict[str, Tensor]) -> None:
        size = _size(entry)
        if size > self.budget:
            return
        while self.bytes + size > self.budget:
            self.bytes -= _size(self._memory.popitem(last=False)[1])
            self.evictions += 1
        self._memory[key] = entry
        self.bytes += size

    def _forget(self, key: str) -> None:
        self.bytes -= _size(self._memory.pop(key, {}))
        path = self._path.pop(key, None)
        if path is not None:
            self._verified.discard(key)
            self._files[path].keys.discard(key)
            if not self._files[path].keys:
                self._remove(path)

    # --- on disk ------------------------------------------------------------------------------------------

    def _open(self, folder: Path) -> None:
        """Find the files of earlier runs, by their headers alone."""
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: give a folder, or None to keep entries in memory only")
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder, ".activations-")
        for path in sorted(folder.glob("*.safetensors")):  # names begin with the time of writing: the newest last
            if not _is_ours(path):
                continue
            with self._dropping_damaged(path), safe_open(path, framework="pt") as file:
                self._index(path, path.stat().st_size, set(json.loads(file.metadata()[FORMAT])))

    def _index(self, path: Path, size: int, keys: set[str]) -> None:
        for key in keys:
            self._forget(key)
        self._files[path] = _File(size, keys)
        self._path.update(dict.fromkeys(keys, path))
        self.disk_bytes += size

    def _write(self, folder: Path, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        tensors, checksums = {}, {}
        for key, entry in entries.items():
            copies = {  # since safetensors refuses tensors that share memory or are not contiguous
                f"{key}/{name}": tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                for name, tensor in entry.items()
            }
            tensors |= copies
            checksums[key] = _checksum(copies)
        path = folder / f"activations-{time.time_ns():020d}-{uuid.uuid4().hex}.safetensors"
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary, metadata={FORMAT: json.dumps(checksums)})
            except SafetensorError as error:
                raise OSError(f"cannot write to {folder} ({error}): free some space there, or give another") from error
            size = temporary.stat().st_size
            if size > self.disk_budget:
                temporary.unlink()
                return
            self._make_room_on_disk(size)
        self._index(path, size, set(entries))

    def _read(self, key: str, path: Path) -> dict[str, Tensor] | None:
        entry = None
        # opened every time: with a handle that is kept, reading a file that was truncated meanwhile would crash
        with self._dropping_damaged(path), safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(f"{key}/")}
            if key not in self._verified and json.loads(file.metadata()[FORMAT])[key] != _checksum(tensors):
                raise ValueError("wrong checksum")
            self._verified.add(key)
            entry = {name.partition("/")[2]: tensor for name, tensor in tensors.items()}
        if entry is not None and self.device is not None and self.device.type != "cpu":
            entry = self._detached(entry)
            self._keep(key, entry)
        return entry

    @contextlib.contextmanager
    def _dropping_damaged(self, path: Path) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:  # another process has removed it
            self._remove(path)
        except Exception:  # what safetensors and json make of a damaged header is anybody's guess
            self.recomputed += 1
            self._remove(path)

    def _make_room_on_disk(self, size: int) -> None:
        while self._files and self.disk_bytes + size > self.disk_budget:
            path = next(iter(self._files))
            self.evictions += len(self._files[path].keys)
            self._remove(path)

    def _remove(self, path: Path) -> None:
        file = self._files.pop(path, _File(0, set()))
        self.disk_bytes -= file.size
        for key in file.keys:
            del self._path[key]
            self._verified.discard(key)
        if _is_ours(path):  # somebody may have put another file in its place
            with contextlib.suppress(OSError):  # another process may have removed it
                path.unlink()


def _is_ours(path: Path) -> bool:
    """Return whether a file begins as ours do: the metadata comes first in a header."""
    begin = f'{{"__metadata__":{{"{FORMAT}":'.encode()
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(8 + len(begin))[8:] == begin
    return False


def _check(key: str, entry: Mapping[str, Tensor]) -> None:
    if not isinstance(key, str) or not re.fullmatch("[0-9a-f]+", key):
        raise ValueError(f"key {key!r} is not a hex string: give the hexdigest of what the tensors were computed from")
    for name, tensor in entry.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"entry {key} has {name!r}: {type(tensor).__name__}; give tensors by name")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise ValueError(f"{name!r} of entry {key} is {tensor.dtype}, {tensor.layout}: give dense, real tensors")


def _size(entry: Mapping[str, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in entry.values())


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """Return a checksum of the bytes of all tensors, and of what says how to read them."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc
