"""Random numbers that are drawn on the side."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Let the block draw random numbers (of Python, numpy, torch on the CPU) that change none of those drawn later."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
