"""Files of saved adapters, and how they are changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def change_weights(folder: Path, change: Callable[[dict[str, Any]], object] = lambda tensors: None) -> None:
    """Write the weights of an adapter again, without their checksum and the hash of their graph."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the configuration of an adapter again."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
