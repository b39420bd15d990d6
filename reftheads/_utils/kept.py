"""What modules keep from one pass to the next."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def nothing_kept(model: nn.Module) -> Iterator[list[str]]:
    """Take from modules the tensors that they keep as plain attributes when they have run in the block.

    Models for images and text keep `rope_deltas` so, for the steps of `generate` that go on from a pass.

    Yields:
        A list that holds, after the block, the names of such attributes.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    kept: list[str] = []
    try:
        yield kept
    finally:
        for module, attributes in before:
            new = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
            for name in [name for name, value in new.items() if attributes.get(name) is not value]:
                kept.append(name)
                if name in attributes:
                    vars(module)[name] = attributes[name]
                else:
                    del vars(module)[name]
