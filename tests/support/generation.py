"""A model with strong edits for what `generate` does, and the same logits by calls that recompute a whole text."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import reftheads as rh
from support import oracle
from support.models import HEADS, WIDTH, tiny_gpt2, tiny_llama

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15], [16, 17, 18, 19, 20]]
MODELS: dict[str, Callable[..., Any]] = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def edited(name: str = "llama", rule: str = "l1", gated: bool = False) -> rh.InterventionModel:
    """A model with strong edits after two blocks, the second behind a gate that the first block's output sets."""
    base = MODELS[name](initializer_range=0.3).double()
    base.generation_config.eos_token_id = None
    torch.manual_seed(3)
    nodes = [
        rh.Node(rh.LoReFT(rank=HEADS), 0, positions=rule, name="reft"),
        rh.Node(rh.Steering(vector=torch.randn(WIDTH) * 2), 1, positions=rule, name="steer"),
    ]
    if gated:
        nodes.append(rh.Node(rh.LinearHead(1), 0, positions="l1", name="probe"))
        edit = rh.Gated(rh.Steering(vector=torch.randn(WIDTH) * 4))
        nodes.append(rh.Node(edit, 1, positions="generated", source="probe", name="gated"))
    model = rh.InterventionModel(base, rh.InterventionGraph(*nodes)).double().eval()
    with torch.no_grad():
        model.node("reft").b.copy_(torch.randn(HEADS) * 3)
        if gated:
            model.node("probe").W.copy_(torch.randn(1, WIDTH) * 3)
    return model


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Return rows padded at the left, with their mask."""
    batch = oracle.pad(rows, "left")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def told(model: Any, ids: Tensor, mask: Tensor, prompt: int) -> Tensor:
    """The last logits of a text whose first columns are its prompt, by a call of its own without a cache."""
    prompt_mask = mask.bool() & (torch.arange(ids.shape[1]) < prompt)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions, prompt_mask=prompt_mask, use_cache=False)
    return out.logits[:, -1].float()


def close(got: Tensor, expected: Tensor) -> None:
    """Assert that scores are equal up to the float32 in which `generate` keeps them."""
    torch.testing.assert_close(got.double(), expected.double(), atol=2e-5, rtol=1e-5)
