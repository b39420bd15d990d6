"""A model with strong edits, batches of ragged rows for it, and comparisons of what comes out."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reftheads as rh
from support import oracle
from support.models import WIDTH, tiny_gemma3, tiny_gpt2, tiny_llama

MODELS: dict[str, tuple[Callable[..., Any], str, dict[str, float]]] = {
    "llama": (tiny_llama, "model.layers.{}", {"initializer_range": 0.3}),
    "gpt2": (
        tiny_gpt2,
        "transformer.h.{}",
        {"initializer_range": 0.3, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0},
    ),
    "gemma3": (tiny_gemma3, "model.layers.{}", {"initializer_range": 0.3}),
}
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16], [17, 18], [19, 20, 21, 22, 23]]
PROMPT = [5, 2, 1, 4]  # tokens of the prompt in each row; the others are the answer
RULES = ["f1", "l1", "f2+l2", "f9", "l3", "all", "prompt", "generated"]


def close(got: Tensor, expected: Tensor) -> None:
    """Assert that two tensors are equal up to the rounding of float64."""
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def base_of(name: str = "llama") -> Any:
    """Return a tiny base model in float64 whose answers differ."""
    make, _, options = MODELS[name]
    return make(**options).double()


def intervened(base: Any, rule: str) -> rh.InterventionModel:
    """A copy of `base` with a strong LoReFT after block 0 and a strong steering vector after block 1."""
    torch.manual_seed(3)
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=4), 0, positions=rule, name="reft"),
        rh.Node(rh.Steering(vector=torch.randn(WIDTH) * 2, trainable=True), 1, positions=rule, name="steer"),
    )
    model = rh.InterventionModel(copy.deepcopy(base), graph).double().eval()
    with torch.no_grad():
        model.node("reft").b.copy_(torch.randn(4) * 3)
    return model


def changes(model: rh.InterventionModel, rule: str, block: str) -> list[tuple[str, oracle.Change]]:
    """Return the edits of an `intervened` model as the oracle takes them; `block` is a block's path."""
    return [
        (block.format(0), oracle.at(rule, oracle.loreft(model.node("reft")))),
        (block.format(1), oracle.at(rule, oracle.adding(model.node("steer").v.detach()))),
    ]


def labelled(side: str, rows: list[list[int]] = ROWS, prompt: list[int] = PROMPT) -> dict[str, Tensor]:
    """A padded batch with the answers as labels."""
    batch = oracle.pad(rows, side)
    answers = [[-100] * n + row[n:] for row, n in zip(rows, prompt, strict=True)]
    labels = oracle.pad(answers, side)["input_ids"]
    return {**batch, "labels": torch.where(batch["attention_mask"] == 1, labels, -100)}


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over answer tokens."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the gradients that a backward pass has left, and clear them."""
    copies = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return copies


def alike(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that gradients are equal, and none is zero."""
    assert got.keys() == expected.keys() and expected
    assert all(g.abs().max() > 0 for g in expected.values())
    for name in expected:
        close(got[name], expected[name])
