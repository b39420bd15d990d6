"""The parameters of a node, and one intervention on one tensor with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reftheads.graph.intervention import Context, Edit, Intervention, Params, Reader, Shape


def apply(intervention: Intervention, p: Params, h: Tensor, context: Context) -> Tensor:
    """Edit or read `h` with parameters and what was derived from them."""
    if isinstance(intervention, Edit):
        return intervention.edit(p, h, context)
    assert isinstance(intervention, Reader)
    return intervention.read(p, h.detach() if intervention.detach else h, context)


class NodeModule(nn.Module):
    """Hold the parameters of one node, or of all nodes that share them.

    An attribute is a stored parameter, or one of the paper's letters, such as `node.R` of a LoReFT:
    the derived value, without gradient.

    Example:
        ```python
        >>> import torch
        >>> import reftheads as rh
        >>> base, _ = rh.load_base("tiny-chat")
        >>> model = rh.InterventionModel(base, rh.InterventionGraph(rh.Node(rh.LoReFT(rank=4), layer=2, name="edit")))
        >>> R = model.node("edit").R
        >>> torch.allclose(R @ R.T, torch.eye(4), atol=1e-5)
        True
        ```
    """

    def __init__(self, intervention: Intervention, shape: Shape):
        super().__init__()
        self.intervention = intervention
        self.shape = shape
        for name, value in intervention.parameters(shape).items():
            copy = value.detach().clone()  # what comes from a constant of the graph must not change with the weights
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, nn.Parameter(copy, requires_grad=value.requires_grad))
            else:
                self.register_buffer(name, copy)

    def stored(self) -> dict[str, Tensor]:
        """Return parameters and buffers by name."""
        return {name: t for name, t in (*self._parameters.items(), *self._buffers.items()) if t is not None}

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the type of the parameters, and hence of the computation; `None` without parameters."""
        for tensor in (*self._parameters.values(), *self._buffers.values()):
            if tensor is not None:
                return tensor.dtype
        return None

    def forward(self, p: Params | None, tensors: Tensor, context: Context) -> Tensor:
        """Edit or read `tensors` with the derived parameters `p` (`None`: derive them here)."""
        if p is None:
            stored = self.stored()
            p = {**stored, **self.intervention.derive(stored)}
        return apply(self.intervention, p, tensors, context)

    def assign(self, **letters: Any) -> None:
        """Set parameters by the names or letters of the paper: `node.assign(R=…, W=…, b=…)`.

        Raises:
            ValueError: a name that this node does not have, or a value that does not fit; nothing is changed then.
        """
        stored = self.stored()
        device = next((tensor.device for tensor in stored.values()), None)
        values = {letter: torch.as_tensor(value, device=device) for letter, value in letters.items()}
        names = {letter: self.intervention.letters.get(letter, letter) for letter in values}
        for letter, value in values.items():
            if names[letter] not in stored:
                raise ValueError(
                    f"{type(self.intervention).__name__} has no parameter {letter!r}: it has {', '.join(stored)}"
                )
            shape = stored[names[letter]].shape
            if value.shape != shape:
                raise ValueError(f"{letter} must have shape {tuple(shape)}, got {tuple(value.shape)}")
        before = {name: tensor.clone() for name, tensor in stored.items()}
        with torch.no_grad():
            for letter, value in values.items():
                stored[names[letter]].copy_(value)
            try:
                self._check({letter: value for letter, value in values.items() if names[letter] != letter})
            except ValueError:
                for name, tensor in before.items():
                    stored[name].copy_(tensor)
                raise

    def _check(self, derived: dict[str, Tensor]) -> None:
        """Raise `ValueError` for stored parameters that cannot be computed with, or do not give what is derived."""
        for letter, value in derived.items():
            if not torch.allclose(getattr(self, letter).float(), value.float(), atol=1e-4):
                raise ValueError(f"{letter} of a {type(self.intervention).__name__} needs orthonormal rows")
        self.intervention.check_parameters(self.stored())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in self.__dict__.get("intervention", Intervention).letters:
                raise
            with torch.no_grad():
                return self.intervention.derive(self.stored())[name]

    def extra_repr(self) -> str:
        return f"{self.intervention}, width={self.shape.width}"
