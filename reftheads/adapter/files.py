"""The files of a saved adapter: which there are, whether they may be read, are whole, and belong together."""

import hashlib
import json
import os
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, uint8

from reftheads._utils.atomic import replacing
from reftheads._utils.showing import shown
from reftheads.graph.node import check_key
from reftheads.graph.serialisation import check_depth

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"  # which is never read
CARD = "README.md"

_LARGEST = 2**26  # bytes of a configuration
_CHECKSUM, _GRAPH = "reftheads checksum", "reftheads graph"  # in the metadata of weights
_NO_FOLDERS = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}


def check_adapter_name(name: str) -> None:
    """Raise `ValueError` for what cannot name an adapter: its parameters, its folder, and its rows in a batch."""
    check_key(name, "adapter name")
    if set(name) & set('/\\:*?"<>|') or name != name.strip() or name.lower() in _NO_FOLDERS or name == "__base__":
        raise ValueError(
            f"adapter name {shown(name)} cannot be used: it names a folder too, so take letters, digits, '-' and '_'; "
            "'__base__' means no adapter"
        )


def has_file(model_id: str, name: str, subfolder: str | None = None, revision: str | None = None, **hub: Any) -> bool:
    """Return whether a directory, or a repository of the Hub (offline: what is cached of it), holds a file."""
    path = os.path.join(subfolder, name) if subfolder else name
    if os.path.isdir(model_id):
        return os.path.exists(os.path.join(model_id, path))
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        cached = huggingface_hub.try_to_load_from_cache(model_id, path, hub.get("cache_dir"), revision)
        return isinstance(cached, str)
    return huggingface_hub.file_exists(model_id, path, revision=revision, token=hub.get("token"))


def refuse_pickle(model_id: str, **hub: Any) -> None:
    """Raise `ValueError` where PEFT would fall back to a pickle, since there is nothing else."""
    if has_file(model_id, PICKLE, **hub) and not has_file(model_id, WEIGHTS, **hub):
        raise ValueError(
            f"{model_id} holds {PICKLE}, a pickle, which could run any code: convert it to {WEIGHTS} where you trust "
            "it (safetensors.torch.save_file)"
        )


def find_file(model_id: str, name: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """Return the path of a file of a directory, or of a repository of the Hub, from where it is fetched.

    Args:
        hub: such as `revision`; what the Hub does not know is left out.
    """
    if not has_file(model_id, name, subfolder, **hub):
        return None
    if os.path.isdir(model_id):
        return os.path.join(model_id, subfolder or "", name)
    known = signature(huggingface_hub.hf_hub_download).parameters
    hub = {option: value for option, value in hub.items() if option in known}
    return huggingface_hub.hf_hub_download(model_id, name, subfolder=subfolder, **hub)


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        ValueError: a file that is damaged, holds something else, or more than a configuration can be.
    """
    path = Path(path)
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: a configuration has at most {_LARGEST:,}")
    try:
        fields = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the {path.name} of {path.parent} is damaged ({error}): save or copy it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds {shown(fields)}, which is no object: save or copy it again")
    check_depth(fields, str(path))
    return fields


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name twice in one object")
    return fields


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, which stay on the disk until they are used, and its metadata.

    Raises:
        ValueError: a file that is truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, ValueError, RuntimeError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): save or copy it again") from error


def seal(weights: Path, graph: Mapping[str, Any]) -> None:
    """Write into the metadata of weights a checksum, and the hash of the graph that they belong to, if they lack both.

    Those that have them were saved before, with the graph of that time.
    """
    if _GRAPH in read_weights(weights)[1]:
        return
    content = weights.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    metadata = {"format": "pt", _CHECKSUM: _checksum(load(content)), _GRAPH: _digest(graph)}
    # not by safetensors, which writes metadata in another order each time
    header = json.dumps(json.loads(content[8:begin]) | {"__metadata__": metadata}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with replacing(weights) as temporary:
        temporary.write_bytes(len(header).to_bytes(8, "little") + header + content[begin:])


def check_seal(path: str | os.PathLike, graph: Mapping[str, Any] | None = None) -> None:
    """Check weights against what `seal` has written; without that, as before there was any, they pass.

    Args:
        path: of the weights.
        graph: which the configuration beside them holds; `None` if another one is meant.

    Raises:
        ValueError: weights that have changed since they were saved, or that were saved with another graph.
    """
    tensors, metadata = read_weights(path)
    if _CHECKSUM in metadata and metadata[_CHECKSUM] != _checksum(tensors):
        raise ValueError(f"{path} is damaged: its checksum is not that of its tensors. Save or copy it again")
    if graph is not None and _GRAPH in metadata and metadata[_GRAPH] != _digest(graph):
        raise ValueError(
            f"{path} is a mixture with the {CONFIG} beside it: these weights were saved with another graph, as when a "
            "save is broken off, or the file was edited. Save or copy both again"
        )


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of the bytes of all tensors, and of what says how to read them."""
    checksum = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        checksum.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        checksum.update(tensor.contiguous().reshape(-1).view(uint8).numpy().data)
    return checksum.hexdigest()


def _digest(graph: Mapping[str, Any]) -> str:
    """Return a hash of a graph as a configuration holds it."""
    return hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()
