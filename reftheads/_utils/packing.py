"""bitsandbytes packs 4-bit weights for inference on a CPU, and no gradient gets through these any more."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

PACKS = "support_avx512bf16_for_cpu"  # the setting of a 4-bit module that lets it pack its weights


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Within, no module packs its weights."""
    settings = [(module, getattr(module, PACKS)) for module in model.modules() if hasattr(module, PACKS)]
    for module, _ in settings:
        setattr(module, PACKS, False)
    try:
        yield
    finally:
        for module, setting in settings:
            setattr(module, PACKS, setting)
