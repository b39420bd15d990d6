"""Files of saved adapters, and how they are changed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
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


# --- random damage --------------------------------------------------------------------------------------------------

_VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 17, 10**10, 10**30, -(10**19), 0.5, -1.0, 1e308, float("nan"), float("inf"), "",
    "0", "4", "l1", "0 1", "f١", "+1", "1_0", "f7+l7", "all", "../..", "a/b", "\0", "\ud800", "é" * 300, "LoReFT",
    "Gated", "Steering", "float16", "int64", "cuda", "lm_head.weight", "model..layers", ".", "model.layers.0", [], [1],
    [[]], {}, {"type": "LoReFT"}, {"constant": [16]}, {"constant": [10**10]}, {"constant": [-1]}, {"token_ids": [1, 2]},
    {"token_ids": ["7"]}, "+".join("0" for _ in range(5000)), "9" * 5000,
)  # fmt: skip
_KEYS = (
    "type",
    "options",
    "nodes",
    "rank",
    "layer",
    "inner",
    "self",
    "cls",
    "peft_type",
    "graph",
    "x",
    "source",
    "head",
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container within a JSON value, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def damage_config(path: Path, random: Random) -> None:
    """Replace, remove, add, move or copy values in a JSON file, or nest one very deep, or cut its text."""
    config = json.loads(path.read_text())
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        container, key = random.choice(places(config))
        other, at = random.choice(places(config))
        act = random.randrange(6)
        if act == 0 or act == 1:
            container[key] = copy.deepcopy(random.choice(_VALUES))
        elif act == 2:
            container.pop(key)
        elif act == 3 and isinstance(container, dict):
            container[random.choice(_KEYS)] = copy.deepcopy(random.choice(_VALUES))
        elif act == 4:
            container[key] = copy.deepcopy(other[at])
        elif isinstance(container, dict):
            container[random.choice(_KEYS)] = container.pop(key)
        if not places(config):
            break
    text = json.dumps(config)
    shape = random.randrange(30)
    if shape == 0:
        text = text.replace('"l1"', "[" * 100_000 + "]" * 100_000)
    elif shape == 1:
        text = text.replace('"l1"', '{"type":"Gated","options":{"inner":' * 300 + "1" + "}}" * 300)
    elif shape == 2:
        text = text[: random.randrange(len(text))]
    elif shape == 3:
        text = json.dumps(random.choice(_VALUES))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def damage_weights(path: Path, random: Random) -> None:
    """Flip bits, overwrite, insert or remove bytes, anywhere in a file or in its header, or change words of it."""
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(random.choice((1, 1, 2, 5))):
        end = random.choice((8, header, len(content), len(content)))
        at, act = random.randrange(end), random.randrange(6)
        if act <= 1:
            content[at] ^= 1 << random.randrange(8)
        elif act == 2:
            content[at] = random.randrange(256)
        elif act == 3:
            del content[at : at + random.choice((1, 1, 8, 100))]
        elif act == 4:
            content[at:at] = random.randbytes(random.choice((1, 8)))
        else:
            words = (
                (b"F32", b"F64"),
                (b"F32", b"I32"),
                (b"F32", b"BOOL"),
                (b"F32", b"F8_E4M3"),
                (b"16]", b"99]"),
                (b"[2", b"[9"),
            )
            content = content.replace(*random.choice(words), random.choice((1, -1)))
        if len(content) < 9:
            break
    path.write_bytes(content)


def damaged_copy(good: Path, bad: Path, random: Random) -> None:
    """Copy the files of an adapter to a folder, and damage the configuration or the weights there."""
    for path in good.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    if random.random() < 0.6:
        damage_config(bad / "adapter_config.json", random)
    else:
        damage_weights(bad / "adapter_model.safetensors", random)
