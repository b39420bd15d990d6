"""What makes two computations of a frozen model the same: its weights, its settings, and what it is fed."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from reftheads.architectures.paths import own_modules


def digest(*parts: str | int | bytes) -> str:
    """Return a hexadecimal hash of the parts and of where each ends."""
    hashed = hashlib.blake2b(digest_size=20)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        hashed.update(b"%d:" % len(data))
        hashed.update(data)
    return hashed.hexdigest()


def content_of_ids(ids: Tensor) -> bytes:
    """Return the bytes of token ids, eight a token, whatever type of integer they come in."""
    return content(ids.long())


def content(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor of any type, on any device."""
    flat = tensor.detach().contiguous().flatten().cpu()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


class Fingerprint:
    """A hash of a base model's weights and settings.

    It is made anew when a weight was changed in place, or a weight or a module replaced. What is written past
    autograd, through `.data`, is not noticed, nor is a change of the settings.
    """

    def __init__(self, base: nn.Module):
        self.base = base
        self._places: list[tuple[dict[str, Any], str]] = []  # walking through the modules takes milliseconds
        self._state: list[tuple[Tensor, int]] = []
        self._children: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._value = ""

    def __str__(self) -> str:
        if not self._value or self._changed():
            own = {module: None for _, module in own_modules(self.base)}
            self._places = [
                (tensors, name)
                for module in own
                for tensors in (module._parameters, module._buffers)
                for name, tensor in tensors.items()
                if tensor is not None
            ]
            self._children = [
                (module._modules, name, child)
                for module in own
                for name, child in module._modules.items()
                if child in own
            ]
            self._state = [(tensors[name], tensors[name]._version) for tensors, name in self._places]
            parts: list[str | int | bytes] = [type(self.base).__name__, _settings(self.base)]
            for (_, name), (tensor, _) in zip(self._places, self._state, strict=True):
                parts += [name, str(tensor.dtype), str(tuple(tensor.shape)), content(tensor)]
                absmax = getattr(getattr(tensor, "quant_state", None), "absmax", None)  # 4-bit weights lack their scale
                parts += [] if absmax is None else [content(absmax)]
            self._value = digest(*parts)
        return self._value

    def _changed(self) -> bool:
        return any(modules.get(name) is not child for modules, name, child in self._children) or any(
            tensors.get(name) is not tensor or tensor._version != version
            for (tensors, name), (tensor, version) in zip(self._places, self._state, strict=True)
        )


def _settings(base: nn.Module) -> str:
    config: Any = getattr(base, "config", None)
    if config is None:
        return repr(base)
    # what only says where a model comes from; saving adds the last two, which the weights show
    ignored = {"_name_or_path", "transformers_version", "use_cache", "name_or_path", "architectures", "dtype"}
    known = {key: value for key, value in config.to_dict().items() if key not in ignored}
    return json.dumps([known, getattr(config, "_attn_implementation", None)], sort_keys=True, default=str)
