"""What the tests of reuse share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def loss_in_float64() -> Iterator[None]:
    """transformers rounds logits to float32 before the cross-entropy; within, they stay in float64."""
    from support.oracle import causal_loss, exact_loss

    with causal_loss(exact_loss):
        yield
