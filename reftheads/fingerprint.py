"""What makes two computations of a frozen model the same: its weights, its settings, and what it is fed."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn


def digest(*parts: str | int | bytes) -> str:
    """A hexadecimal hash of the parts and of where each ends."""
    hashed = hashlib.blake2b(digest_size=20)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        hashed.update(b"%d:" % len(data))
        hashed.update(data)
    return hashed.hexdigest()


def content(tensor: Tensor) -> bytes:
    """The bytes of a tensor of any type, on any device."""
    flat = tensor.detach().contiguous().flatten().cpu()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


class Fingerprint:
    """A hash of a base model's weights and settings, made anew when a weight has changed in place."""

    def __init__(self, base: nn.Module):
        self.base = base
        self._version: tuple[Any, ...] | None = None
        self._value = ""

    @property
    def tensors(self) -> list[tuple[str, Tensor]]:
        """The base model's own parameters and buffers, those of a compiled graph left out."""
        every = [*self.base.named_parameters(), *self.base.named_buffers()]
        return [(name, tensor) for name, tensor in every if not name.startswith("interventions.")]

    def __str__(self) -> str:
        tensors = self.tensors
        version = tuple((id(tensor), tensor._version, tensor.data_ptr()) for _, tensor in tensors)
        if version != self._version:
            parts: list[str | int | bytes] = [type(self.base).__name__, _settings(self.base)]
            for name, tensor in tensors:
                parts += [name, str(tensor.dtype), str(tuple(tensor.shape)), content(tensor)]
                absmax = getattr(getattr(tensor, "quant_state", None), "absmax", None)  # 4-bit weights lack their scale
                parts += [] if absmax is None else [content(absmax)]
            self._value, self._version = digest(*parts), version
        return self._value


def _settings(base: nn.Module) -> str:
    config: Any = getattr(base, "config", None)
    if config is None:
        return repr(base)
    ignored = {"_name_or_path", "transformers_version", "use_cache", "name_or_path"}
    known = {key: value for key, value in config.to_dict().items() if key not in ignored}
    return json.dumps([known, getattr(config, "_attn_implementation", None)], sort_keys=True, default=str)
