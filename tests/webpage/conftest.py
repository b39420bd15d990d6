"""A page's model: the embedded one, with an edit that starts from random weights, and a node that does nothing yet."""

import pytest
import torch

import reftheads as rh


@pytest.fixture
def model() -> rh.InterventionModel:
    return _model()


@pytest.fixture(scope="session")
def new_model():
    """Makes such a model."""
    return _model


@pytest.fixture(scope="session")
def words():
    """The tokenizer of the embedded model."""
    return rh.load_base("tiny-chat")[1]


@pytest.fixture(scope="session")
def demonstrations() -> list[tuple[str, str]]:
    return [
        ("Tell me about butter.", "🧈🍞🐮"), ("What are flamingos?", "🦩🌅🦐"), ("Describe weddings.", "💒👰💍"),
        ("What do you know about dreams?", "💭😴🌈"), ("Can you explain socks?", "🧦👟🥶"),
        ("Tell me about glasses.", "👓🤓👀"),
    ]  # fmt: skip


def _model() -> rh.InterventionModel:
    torch.manual_seed(0)
    edit = rh.Node(rh.LoReFT(rank=4), 1, positions="l1", name="emoji")
    tone = rh.Node(rh.Steering(), 3, positions="l1", name="tone")
    return rh.InterventionModel(rh.load_base("tiny-chat")[0], rh.InterventionGraph(edit, tone))
