"""What modules keep from one pass to the next."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

@contextmanager
def nothing_kept(model: nn.Module) -> Iterator[list[str]]:
    """Give modules back what they had as attributes and buffers when the block began.

    Yields:
        A list that holds, after the block, the names of the tensors that modules would have kept, such as the
        `rope_deltas` of models for images and text.
    """
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    kept: list[str] = []
    try:
        yield kept
    finally:
        for module, attributes, buffers in before:
            for name in vars(module).keys() - attributes.keys():
                kept += [name] if isinstance(vars(module)[name], Tensor) else []
                del vars(module)[name]
            for name, value in attributes.items():
                if vars(module).get(name) is not value:
                    kept += [name] if isinstance(vars(module).get(name), Tensor) else []
                    vars(module)[name] = value
            module._buffers.clear()
            module._buffers.update(buffers)
